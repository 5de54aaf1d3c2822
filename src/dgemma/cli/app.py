"""The command group: it imports a command's module when the command is used, and turns every end into an exit code."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from . import failures
from .terminal import ReaderGone

# name: (module and attribute, one line for `dgemma --help`, so that listing them imports none of them)
COMMANDS = {
    "generate": (".generate:generate", "One answer to one prompt, from the argument or stdin."),
    "chat": (".chat:chat", "A conversation in the terminal."),
    "batch": (".batch:batch", "Answers to all lines of a file, resumably."),
    "serve": (".serve:serve", "The HTTP server, OpenAI-compatible, with a web page."),
    "info": (".info:info", "A model's sizes, its memory at each format, what fits on this machine."),
    "quantize": (".quantize:quantize", "A copy of a model in few bits, made in bounded memory, resumably."),
    "train": (".train:train", "Train a model by a recipe, resumably."),
    "eval": (".eval:evaluate", "Exact match and speed on held-out prompts."),
}


class App(click.Group):
    """A lazy group with this project's exit codes: 0 done, 1 failed, 2 bad input (one line), 130 interrupted."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Imports the module of `name` and returns its command."""
        if name not in COMMANDS:
            return None
        module, attribute = COMMANDS[name][0].split(":")
        return getattr(importlib.import_module(module, __package__), attribute)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's, with the known commands in the message when there is no such one."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            raise click.UsageError(f"{args[0]}: no such command (known: {', '.join(COMMANDS)})", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table's own short lines; click would import every module for them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; what interrupts it becomes an exit code before click rewords it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            if sys.stderr.isatty():
                click.echo(err=True)  # the terminal has written ^C
            return failures.INTERRUPTED
        except ReaderGone:
            failures.abandon_stdout()
            return failures.DONE

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line and exits with its code; errors come out as one line on stderr."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        with warnings.catch_warnings():
            warnings.showwarning = failures.show_warning
            try:
                code = super().main(args, prog_name or "dgemma", complete_var, False, **extra)
            except (KeyboardInterrupt, click.Abort):
                code = failures.INTERRUPTED
            except Exception as error:
                code = failures.report(error)
        sys.exit(code if isinstance(code, int) else failures.DONE)


def _print_version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"dgemma {_version()}")
        ctx.exit()


def _version() -> str:
    import dgemma

    own = getattr(dgemma, "__version__", None)
    if own:
        return str(own)
    from importlib import metadata

    try:
        return metadata.version("dgemma")
    except metadata.PackageNotFoundError:
        return "(not installed)"


@click.group(cls=App, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="The version."
)
@click.pass_context
def app(ctx: click.Context) -> None:
    """Text generation by block diffusion (DiffusionGemma), on any hardware.

    \b
    dgemma generate "Tell me a story about a fox."
    dgemma chat
    dgemma info google/diffusiongemma-26B-A4B-it

    Answers go to stdout, everything else to stderr. Exit codes: 0 done, 1 the run failed, 2 bad arguments or bad
    input, 130 interrupted.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """The entry point of the `dgemma` script."""
    for stream in (sys.stdout, sys.stderr):
        # A pipe gets UTF-8 on every system; a terminal of another encoding shows `?` instead of failing.
        with contextlib.suppress(AttributeError, ValueError):
            if stream.isatty():
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
            else:
                stream.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    with contextlib.suppress(AttributeError, ValueError):
        if os.name == "posix" and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            # Leave through the `finally` blocks, so that the cursor comes back and half-written files go.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app.main()
    raise AssertionError("app.main exits")
