"""`dgemma eval`: exact match and speed on held-out prompts of the demo's tasks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from . import options
from .files import check_writable, write_atomically
from .terminal import write_answer


@click.command("eval", short_help="Exact match and speed on held-out prompts.")
@click.argument("tasks", nargs=-1)
@options.flags(
    *options.MODEL_FLAGS,
    *options.SAMPLING_FLAGS,
    click.option("--limit", type=click.IntRange(min=1), default=500, show_default=True, help="Prompts a family."),
    click.option("--data-seed", type=int, default=0, show_default=True, help="Which held-out prompts are drawn."),
    click.option(
        "--records", type=click.Path(path_type=Path), metavar="FILE.jsonl", help="Write one line a prompt to this file."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table."),
)
def evaluate(tasks: tuple[str, ...], **values: Any) -> None:
    """Scores a model on TASKS: sums, sorting, sudoku, records, calendar, stories (all of them if none is named).

    \b
    dgemma eval
    dgemma eval sums sudoku --limit 100 --preset fast
    """
    params = options.sampling_params(values)
    if values["records"]:
        check_writable(values["records"], "--records")
    from rich.console import Console
    from rich.progress import Progress

    from ..eval import exact

    names = exact.families(tasks)
    model = options.open_model(values)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bars = {name: progress.add_task(name, total=values["limit"]) for name in names}
        records, scores = exact.run(
            model,
            names,
            params,
            limit=values["limit"],
            seed=values["data_seed"],
            report=lambda record: progress.advance(bars[record.family]),
        )
    if values["records"]:
        lines = (json.dumps(asdict(record), ensure_ascii=False) for record in records)
        write_atomically(values["records"], "\n".join(lines) + "\n")
    summary = exact.as_dict(scores)
    if values["as_json"]:
        write_answer(json.dumps({"model": model.name, **summary}) + "\n")
        return
    row = "{:<10} {:>8} {:>12} {:>16} {:>14} {:>12} {:>7}\n"
    write_answer(row.format("family", "prompts", "exact match", "tokens/forward", "steps/canvas", "tokens/s", "empty"))
    for s in scores:
        figures = (f"{s.exact_match:.1%}", f"{s.tokens_per_forward:.2f}", f"{s.steps_per_canvas:.2f}")
        write_answer(row.format(s.family, s.prompts, *figures, f"{s.tokens_per_second:.0f}", s.empty))
    mean = (f"{summary['exact_match']:.1%}", f"{summary['tokens_per_forward']:.2f}")
    write_answer(row.format("average", "", *mean, "", "", ""))
