"""The flags that several commands share, and what they mean to the library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..params import EARLY_TEXT, MODES, PRESETS, SamplingParams
from .failures import BadInput

if TYPE_CHECKING:
    from ..api import Model

Command = TypeVar("Command", bound=Callable[..., Any])
DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLOADS = ("experts",)
MAX_THREADS = 1024

# flag's parameter name -> SamplingParams field
FIELDS = {
    "max_new_tokens": "max_new_tokens",
    "min_tokens": "min_tokens",
    "seed": "seed",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "max_steps": "max_denoising_steps",
    "entropy_bound": "entropy_bound",
    "canvas_length": "canvas_length",
    "stop_at_end": "stop_at_end",
    "early_text": "early_text",
    "stop": "stop",
    "mode": "mode",
}

MODEL_FLAGS = (
    click.option("--model", default="demo", show_default=True, metavar="NAME",
                 help="`demo`, a directory, or a Hugging Face id."),
    click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1."),
    click.option("--dtype", type=click.Choice(DTYPES), default="auto", show_default=True,
                 help="What the weights are held in."),
    click.option("--threads", type=click.IntRange(1, MAX_THREADS), metavar="N", help="CPU threads to compute with."),
    click.option("--tensor-parallel", type=click.IntRange(1, 8), default=1, metavar="N",
                 help="Processes that hold the model together, one a GPU.  [default: 1]"),
    click.option("--offload", type=click.Choice(OFFLOADS),
                 help="Keep in host memory what a GPU has no room for, and stream it there in each step."),
    click.option("--keep-packed", is_flag=True,
                 help="Keep a copy in few bits on the disk in the CPU's own form, which later starts map at once."),
)  # fmt: skip

SEED_FLAG = click.option("--seed", type=int, metavar="N", help="Same seed, same answer; left out, one is drawn.")
SAMPLING_FLAGS = (
    click.option("--max-new-tokens", type=int, metavar="N", help="Tokens of the answer at most."),
    click.option("--min-tokens", type=int, metavar="N", help="No end before this many tokens."),
    SEED_FLAG,
    click.option("--temperature", type=float, metavar="X",
                 help="Multiplies the model's temperature schedule; 0 is greedy."),
    click.option("--top-p", type=float, metavar="X", help="Sample from the likeliest words of this probability."),
    click.option("--top-k", type=int, metavar="N", help="Sample from this many of the likeliest words."),
    click.option("--min-p", type=float, metavar="X", help="Sample from words this likely beside the likeliest."),
    click.option("--max-steps", type=int, metavar="N", help="Denoising steps a canvas at most."),
    click.option("--entropy-bound", type=float, metavar="X",
                 help="Nats of doubt that one step may settle: more is faster, less is more careful."),
    click.option("--canvas-length", type=int, metavar="N", help="Tokens settled together; at most the model's own."),
    click.option("--stop-at-end", is_flag=True, default=None,
                 help="A canvas is done when the part up to its first end token is: faster for short answers."),
    click.option("--early-text", type=click.Choice(EARLY_TEXT),
                 help="Give out, and keep, a canvas's first words before all of it is done.  [default: off]"),
    click.option("--preset", type=click.Choice(list(PRESETS)),
                 help="A set of the step settings; flags given besides it win."),
    click.option("--stop", multiple=True, metavar="TEXT", help="Ends the answer where this appears; may be repeated."),
    click.option("--mode", type=click.Choice(MODES), help="How the tokens are made.  [default: diffusion]"),
)  # fmt: skip

STATS_FLAG = click.option("--stats", is_flag=True, help="Figures of the run on stderr.")
THINK_FLAG = click.option("--think", is_flag=True, help="Let the model think before it answers.")
SYSTEM_FLAG = click.option("--system", metavar="TEXT", help="A system message.")
WATCH_FLAG = click.option(
    "--watch/--no-watch",
    default=None,
    help="Show the canvas settle.  [default: when stdout and stderr are a terminal]",
)


def flags(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator for many options, which the help page lists in the order given."""

    def apply(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


def sampling_params(values: Mapping[str, Any]) -> SamplingParams:
    """The request's settings: a preset's, then what was given explicitly.

    Raises:
        RequestError: a value is out of range; `failures.describe` words it with the flag's name.
    """
    settings = dict(PRESETS[values["preset"]]) if values.get("preset") else {}
    settings.update(
        {name: values[flag] for flag, name in FIELDS.items() if values.get(flag) is not None and values[flag] != ()}
    )
    return SamplingParams(**settings)


def check_text(text: str, name: str) -> str:
    """`text`, when a model can be given it; `name` is the flag or argument that it came from."""
    if not text.strip():
        raise BadInput(f"{name}: is empty; give it some text")
    if "\0" in text:
        raise BadInput(f"{name}: holds a NUL character; it must be text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise BadInput(f"{name}: is not valid UTF-8; convert it first (for example with iconv)")
    return text


def open_model(values: Mapping[str, Any]) -> Model:
    """Loads the model that the flags name, with a line on the terminal while that takes its time."""
    from .live import loading

    name = values["model"]
    if not name.strip():
        raise BadInput("--model: is empty; give `demo`, a directory or a Hugging Face id")
    if "\0" in name:
        raise BadInput("--model: holds a NUL character")
    with loading(name) if values.get("watch") is not False else contextlib.nullcontext():
        import dgemma

        return dgemma.load(name, **load_settings(values))


def load_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the flags say of how a model is loaded, as `dgemma.load` takes it."""
    settings = {name: values[name] for name in ("device", "dtype", "threads")}
    if values["tensor_parallel"] > 1:
        settings["tensor_parallel"] = values["tensor_parallel"]
    return settings | {name: values[name] for name in ("offload", "keep_packed") if values[name]}
