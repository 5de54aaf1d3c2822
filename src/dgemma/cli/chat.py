"""`dgemma chat`: a conversation in the terminal, or a script of one on stdin."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..errors import DGemmaError
from ..events import Result
from ..params import SamplingParams
from . import answer, figures, options
from .failures import DONE, FAILED, INTERRUPTED, BadInput, describe, one_line
from .files import check_writable, write_atomically
from .terminal import say
from .views import choose

HELP = """\
/reset          forget the conversation (the system message stays)
/system [TEXT]  set the system message; without TEXT remove it
/seed [N]       use this seed from now on; without N a new one is drawn for each answer
/stats          the figures of the last answer
/save FILE      write the conversation as JSON messages
/help           these lines
/quit           leave (Ctrl-D does too)
A backslash at the end of a line continues it. A message that begins with a slash is written with two: //
Ctrl-C stops an answer: what is on the screen by then stays in the conversation."""


@click.command(short_help="A conversation in the terminal.")
@options.flags(
    *options.MODEL_FLAGS,
    *options.SAMPLING_FLAGS,
    options.SYSTEM_FLAG,
    options.THINK_FLAG,
    options.WATCH_FLAG,
    options.STATS_FLAG,
)
def chat(**values: Any) -> int:
    """A conversation; /help lists what can be done in it.

    Ctrl-C stops an answer and keeps the session. With a pipe for stdin each line is a turn, and the exit code is 1
    when one of them failed.
    """
    params = options.sampling_params(values)
    if values["watch"] and params.mode != "diffusion":
        raise BadInput("--watch: shows a canvas, which --mode autoregressive does not have; drop one of them")
    system = values["system"]
    if system is not None:
        options.check_text(system, "--system")
    lines = Lines()
    session = Session(options.open_model(values), params, values, system)
    if lines.interactive:
        say(f"{one_line(values['model'])} · /help lists the commands, Ctrl-D leaves", dim=True)
    return session.talk(lines)


class Lines:
    """What the person types, a turn at a time: with editing and history at a terminal, plain lines from a pipe."""

    def __init__(self) -> None:
        self.interactive = sys.stdin is not None and sys.stdin.isatty()
        # `input` writes its prompt to stdout, where only answers belong unless both are the terminal.
        self._editable = self.interactive and sys.stdout.isatty()
        if self._editable:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives `input` its history)

    def next(self) -> str | None:
        """The next turn, continued lines joined; None at the end.

        Raises:
            BadInput: a line isn't UTF-8 text.
            KeyboardInterrupt: Ctrl-C.
        """
        turn: list[str] = []
        while True:
            line = self._line("... " if turn else "> ")
            if line is None:
                return "\n".join(turn) if turn else None
            if not line.endswith("\\"):
                return "\n".join([*turn, line])
            turn.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        try:
            if self._editable:
                return input(prompt)
            if self.interactive:
                click.echo(prompt, err=True, nl=False)
            if sys.stdin is None:
                return None
            data = sys.stdin.buffer.readline()
            return data.decode("utf-8").rstrip("\r\n") if data else None
        except EOFError:
            return None
        except UnicodeError:
            raise BadInput("stdin: the line is not valid UTF-8; it was left out") from None


class Session:
    """A conversation with a model: its messages, its settings, and the commands that begin with a slash."""

    def __init__(self, model: answer.Model, params: SamplingParams, values: dict[str, Any], system: str | None = None):
        self.model, self.params, self.values = model, params, values
        self.system = system
        self.turns: list[dict[str, str]] = []
        self.last: Result | None = None
        self.failed = False
        self._pieces = answer.pieces_of(model)
        self._commands: dict[str, Callable[[str], str | None]] = {
            "/reset": self._reset,
            "/system": self._system,
            "/seed": self._seed,
            "/stats": self._stats,
            "/save": self._save,
            "/help": lambda _rest: HELP,
        }

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation as the model gets it."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return system + self.turns

    def talk(self, lines: Lines) -> int:
        """Turn after turn until the end of input; returns the exit code."""
        warned = False  # Ctrl-C at the prompt leaves only the second time
        while True:
            try:
                turn = lines.next()
                warned = False
                if turn is None or turn.split(maxsplit=1)[:1] == ["/quit"]:
                    break
                if turn.strip():
                    self._take(turn)
            except KeyboardInterrupt:
                say("")
                if warned or not lines.interactive:
                    return INTERRUPTED
                say("Ctrl-C once more leaves, and so does Ctrl-D", dim=True)
                warned = True
            except BadInput as error:
                self._refuse(error)
        if turn is None and lines.interactive:
            say("")
        return FAILED if self.failed and not lines.interactive else DONE

    def _take(self, turn: str) -> None:
        """A command or a message."""
        try:
            if turn.startswith("/") and not turn.startswith("//"):
                name, _, rest = turn.partition(" ")
                command = self._commands.get(name)
                if command is None:
                    say(f"{one_line(name)}: no such command; /help lists them")
                elif said := command(rest.strip()):
                    say(said, dim=True)
            else:
                self._ask(options.check_text(turn.removeprefix("/") if turn.startswith("//") else turn, "message"))
        except (DGemmaError, click.ClickException, OSError) as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        self.failed = True
        say(f"error: {one_line(describe(error))}")

    def _ask(self, message: str) -> None:
        """Sends a message and shows the answer; both enter the conversation once there is an answer."""
        question = {"role": "user", "content": message}
        view = choose(self.values["watch"], self._pieces, quiet=False, diffusion=self.params.mode == "diffusion")
        think = self.values["think"]
        done = answer.run(self.model, [*self.messages, question], self.params, view, think=think)
        if done.result is not None:
            self.last = done.result
            answer.report(done.result, stats=self.values["stats"], brief=False, think=think)
        if done.result is not None or done.text:
            self.turns += [question, {"role": "assistant", "content": done.text}]
        if done.result is None:
            kept = (
                "what is above stays in the conversation" if done.text else "nothing was said, the question is dropped"
            )
            say(f"(stopped: {kept})", dim=True)

    def _reset(self, _rest: str) -> str:
        self.turns.clear()
        self.last = None
        return "(a new conversation)"

    def _system(self, rest: str) -> str:
        if not rest:
            self.system = None
            return "(no system message)"
        self.system = options.check_text(rest, "/system")
        return "(system message set)"

    def _seed(self, rest: str) -> str:
        if not rest:
            self.params = replace(self.params, seed=None)
            return "(a new seed for each answer)"
        try:
            seed = int(rest)
        except ValueError:
            raise BadInput(f"/seed: {rest!r} is not a whole number") from None
        self.params = replace(self.params, seed=seed)
        return f"(seed {seed})"

    def _stats(self, _rest: str) -> str:
        return "\n".join(figures.table(self.last)) if self.last else "(no answer yet)"

    def _save(self, rest: str) -> str:
        if not rest:
            raise BadInput("/save: needs the name of a file")
        path = Path(rest).expanduser()
        check_writable(path, "/save")
        write_atomically(path, json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n")
        return f"(saved {len(self.messages)} messages to {one_line(str(path))})"
