"""`dgemma generate`: one answer to one prompt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from . import answer, figures, options
from .failures import FAILED, INTERRUPTED, BadInput
from .terminal import is_terminal, say, write_answer
from .views import choose


@click.command(short_help="One answer to one prompt.")
@click.argument("prompt", required=False)
@options.flags(
    *options.MODEL_FLAGS,
    *options.SAMPLING_FLAGS,
    options.SYSTEM_FLAG,
    options.THINK_FLAG,
    click.option("--raw", is_flag=True, help="Give the model the prompt as it is, without the chat template."),
    options.WATCH_FLAG,
    click.option(
        "--record",
        type=click.Path(path_type=Path),
        metavar="FILE.svg",
        help="Write the canvas settling as an animated SVG.",
    ),
    options.STATS_FLAG,
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the text."),
)
def generate(prompt: str | None, **values: Any) -> int | None:
    """One answer to PROMPT, or to what is on stdin (PROMPT `-`, or none given).

    \b
    dgemma generate "Tell me a story about a fox."
    dgemma generate --preset quality --seed 7 --stats < question.txt
    dgemma generate "Sort 5 3 9" --json | jq .text
    dgemma generate "Tell me a story." --record story.svg
    """
    params = options.sampling_params(values)
    diffusion = params.mode == "diffusion"
    _check_company(values, diffusion)
    if values["record"]:
        from .files import check_writable

        check_writable(values["record"], "--record")
    text = read_prompt(prompt)
    system = values["system"]
    messages = [{"role": "system", "content": options.check_text(system, "--system")}] if system is not None else []
    messages.append({"role": "user", "content": text})

    model = options.open_model(values)
    pieces = answer.pieces_of(model)
    view = choose(values["watch"], pieces, quiet=values["as_json"], diffusion=diffusion)
    done = answer.run(
        model,
        text if values["raw"] else messages,
        params,
        view,
        think=values["think"],
        raw=values["raw"],
        keep_drafts=values["record"] is not None,
    )
    if done.result is None:
        return INTERRUPTED
    if values["as_json"]:
        write_answer(json.dumps(figures.as_json(done.result), ensure_ascii=False) + "\n")
    watched = is_terminal(sys.stderr) and sys.stdout.isatty() and values["watch"] is not False
    answer.report(
        done.result,
        stats=values["stats"],
        brief=watched and not values["as_json"],
        think=values["think"] and not values["as_json"],
    )
    if values["record"]:
        return _record(values["record"], text, done, pieces)
    return None


def read_prompt(argument: str | None) -> str:
    """The prompt from the command line, or all of stdin.

    Raises:
        BadInput: there is none, or it isn't text.
    """
    if argument is not None and argument != "-":
        return options.check_text(argument, "PROMPT")
    if argument is None and sys.stdin is not None and sys.stdin.isatty():
        raise BadInput("PROMPT: missing; give it in quotes or on stdin (or talk with `dgemma chat`)")
    if sys.stdin is None:
        raise BadInput("PROMPT: missing, and there is no stdin to read it from")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"stdin: is not valid UTF-8 (byte {error.start + 1}); convert it first (for example with iconv)"
        ) from None
    except OSError as error:
        raise BadInput(f"stdin: cannot be read ({error.strerror or error})") from None
    return options.check_text(text.replace("\r\n", "\n").removesuffix("\n"), "stdin")


def _check_company(values: dict[str, Any], diffusion: bool) -> None:
    """Refuses flags that say nothing beside each other."""
    if values["raw"]:
        for name in ("system", "think"):
            if values[name]:
                raise BadInput(f"--{name}: goes through the chat template, which --raw leaves out; drop one of them")
    if not diffusion:
        for name in ("watch", "record"):
            if values[name]:
                raise BadInput(f"--{name}: shows a canvas, which --mode autoregressive does not have; drop one of them")
    if values["record"] is not None and values["record"].suffix.lower() != ".svg":
        raise BadInput(f"--record: {values['record']} does not end in .svg; an animated SVG is what it writes")


def _record(path: Path, prompt: str, done: answer.Answer, pieces: Any) -> int | None:
    from .files import write_atomically
    from .record import render

    if not done.drafts:
        say(f"error: --record: the run had no steps to show; {path} was not written")
        return FAILED
    assert done.result is not None
    write_atomically(path, render(prompt, done.drafts, done.deltas, done.result, pieces))
    return None
