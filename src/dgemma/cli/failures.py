"""How a command ends when it does not end well: exit codes and one line on stderr."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from typing import Any, TextIO

import click

from ..errors import DGemmaError, WorkerLost
from .terminal import say, visible

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130

# How the settings of `SamplingParams` and `dgemma.load` are spelled here; their errors begin with the setting's name.
FLAGS = {
    "max_new_tokens": "--max-new-tokens",
    "min_tokens": "--min-tokens",
    "seed": "--seed",
    "temperature": "--temperature",
    "stop": "--stop",
    "max_denoising_steps": "--max-steps",
    "entropy_bound": "--entropy-bound",
    "canvas_length": "--canvas-length",
    "mode": "--mode",
    "device": "--device",
    "dtype": "--dtype",
    "threads": "--threads",
    "tensor_parallel": "--tensor-parallel",
    "offload": "--offload",
    "keep_packed": "--keep-packed",
    "model": "--model",
    "think": "--think",
    "raw": "--raw",
    "host": "--host",
    "port": "--port",
    "api_key": "--api-key",
    "data_dir": "--data-dir",
    "max_batch": "--max-batch",
    "max_queue": "--max-queue",
    "max_model_len": "--max-model-len",
    "group": "--group",
    "kind": "--kind",
    "prompt": "PROMPT",
    "source": "IN",
    "target": "OUT",
    "errors": "--errors",
    "format": "--format",
    "prompt_column": "--prompt-column",
    "template": "--template",
    "system": "--system",
    "column_prefix": "--column-prefix",
    "any_model": "--any-model",
    "shard": "--shard",
    "ray": "--ray",
    "workers": "--workers",
}


class BadInput(click.UsageError):
    """A flag, an argument or a file that cannot be used; the message names it and the mend."""


def abandon_stdout() -> None:
    """Points stdout at nothing, so that the interpreter's last flush does not complain about a closed pipe."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def report(error: Exception) -> int:
    """Says in one line what went wrong and returns the exit code for it."""
    if os.environ.get("DGEMMA_DEBUG") == "1":
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)
    say(f"error: {one_line(describe(error))}")
    return BAD_INPUT if isinstance(error, DGemmaError | click.ClickException) else FAILED


def describe(error: Exception) -> str:
    """What went wrong, named by the flag or file that mends it."""
    if isinstance(error, click.NoSuchOption):
        return _no_such_option(error)
    if isinstance(error, click.BadOptionUsage):
        return f"{error.option_name}: {error.message}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{_spelling(error.param)}: missing"
    if isinstance(error, click.BadParameter) and error.param is not None:
        return f"{_spelling(error.param)}: {error.message}"
    if isinstance(error, click.UsageError) and error.message.startswith("Got unexpected extra argument"):
        extra = error.message.partition("(")[2].rstrip(").")
        return f"unexpected argument {extra!r}; a prompt of several words goes in quotes"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, DGemmaError):
        name, colon, rest = str(error).partition(":")
        return f"{FLAGS[name]}:{rest}" if colon and name in FLAGS else str(error)
    if isinstance(error, WorkerLost):
        return str(error)
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of memory; a smaller --canvas-length or --max-new-tokens, or a quantised model, needs less ({error})"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    detail = f": {error}" if str(error).strip() else ""
    return f"unexpected {type(error).__name__}{detail} (DGEMMA_DEBUG=1 shows the traceback)"


def _spelling(param: click.Parameter) -> str:
    """`--flag` or `ARGUMENT`, as the help page spells it."""
    return max(param.opts, key=len) if isinstance(param, click.Option) else param.human_readable_name


def _no_such_option(error: click.NoSuchOption) -> str:
    if error.possibilities:
        return f"{error.option_name}: no such flag; did you mean {' or '.join(sorted(error.possibilities))}?"
    path = error.ctx.command_path if error.ctx else "dgemma"
    return f"{error.option_name}: no such flag (`{path} --help` lists them; text that begins with a dash goes after --)"


def one_line(text: str, limit: int = 600) -> str:
    """`text` without line breaks and control characters, cut in the middle when it is very long."""
    flat = visible(re.sub(r"\s+", " ", text).strip())
    return flat if len(flat) <= limit else f"{flat[: limit // 2]} … {flat[-limit // 2 :]}"


def warn(text: str) -> None:
    """One `warning: …` line on stderr."""
    say(f"warning: {one_line(text)}")


def show_warning(
    message: Warning | str,
    category: Any,
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """What `warnings.showwarning` does while a command runs."""
    warn(str(message))
