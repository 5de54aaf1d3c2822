"""`dgemma quantize`: a copy of a model in few bits."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..quant.policy import FORMATS, GROUPS, KEEP, KINDS, ROW, Policy
from .failures import BadInput, one_line
from .figures import bytes_in_words
from .terminal import is_terminal, say, write_answer

if TYPE_CHECKING:
    from ..checkpoint.quantize import Done
    from ..checkpoint.resumable import Progress


@click.command(short_help="A copy of a model in few bits.")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(FORMATS), required=True, help="Of experts, attention, dense MLP.")
@click.option(
    "--group",
    type=click.Choice([*map(str, GROUPS), ROW]),
    help="Inputs that share a scale in int4.  [default: 64, or 32 where 64 does not fit]",
)
@click.option(
    "--kind",
    "kinds",
    multiple=True,
    metavar="KIND=FORMAT",
    help=f"Another choice for one kind: {', '.join(KINDS)} = {', '.join(FORMATS)} or {KEEP}. May be repeated.",
)
@click.option("--search/--no-search", default=True, show_default=True, help="Try many scales and keep the best.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize(
    source: str,
    destination: Path,
    form: str,
    group: str | None,
    kinds: tuple[str, ...],
    search: bool,
    as_json: bool,
) -> None:
    """Writes a copy of SRC (`demo`, a directory, or a Hugging Face id) in few bits to the new directory DST.

    \b
    dgemma quantize google/diffusiongemma-26B-A4B-it model-int4 --format int4
    dgemma generate --model model-int4 "Why is the sky blue?"

    Works shard by shard, in about 1 GB of memory. DST appears when all of it is there; until then the work is in
    DST.partial, and the same command goes on where it was stopped. Others read the copy too: it is in the layouts of
    compressed-tensors.
    """
    if not source.strip() or "\0" in source:
        raise BadInput("SRC: is empty; give `demo`, a directory or a Hugging Face id")
    if not str(destination).strip() or "\0" in str(destination):
        raise BadInput("DST: is empty; name a directory")
    size = None if group is None else ROW if group == ROW else int(group)
    policy = Policy(format=form, group=size, kinds=_kinds(kinds), search=search)
    from ..checkpoint import resolve
    from ..checkpoint.quantize import quantize_checkpoint

    directory = resolve(source)
    with _bar() as report:
        done = quantize_checkpoint(directory, destination, policy, report=report)
    if as_json:
        write_answer(json.dumps(_as_json(source, done), ensure_ascii=False) + "\n")
        return
    say(f"{'kind':<14}{'stored as':<36}{'weights':>16}{'bits':>7}{'error':>8}")
    for kind, sums in done.errors.items():
        layout = done.layouts[kind]
        name = f"{layout.name} {layout.stored_bits} {f'groups of {layout.group}' if layout.group else 'by rows'}"
        say(f"{kind:<14}{name:<36}{sums.weights:>16,}{sums.bits:>7.2f}{sums.relative:>8.2%}")
    say(f"{one_line(os.fspath(destination))}: {bytes_in_words(done.nbytes)}; all other tensors are kept as they were")


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    """A progress bar on a terminal; nothing in a file."""
    if not is_terminal(sys.stderr):
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading headers", total=None)

        def report(progress: Progress) -> None:
            where = f"shard {progress.shard} of {progress.shards}"
            bar.update(task, completed=progress.done, total=progress.total, description=where)

        yield report


def _kinds(given: tuple[str, ...]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for text in given:
        kind, equals, choice = text.partition("=")
        if not equals or kind in kinds:
            reason = "is given twice" if equals else "needs KIND=FORMAT"
            raise BadInput(f"--kind: {text!r} {reason}")
        kinds[kind] = choice
    return kinds


def _as_json(source: str, done: Done) -> dict[str, Any]:
    return {
        "source": source,
        "directory": str(done.destination),
        "bytes": done.nbytes,
        "group": done.group,
        "kinds": {
            kind: {
                "layout": done.layouts[kind].name,
                "bits": done.layouts[kind].stored_bits,
                "weights": sums.weights,
                "bits_a_weight": sums.bits,
                "relative_error": sums.relative,
            }
            for kind, sums in done.errors.items()
        },
    }
