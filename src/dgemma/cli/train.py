"""`dgemma train`: runs a training recipe, with a progress bar, resumable."""

from __future__ import annotations

import os
from pathlib import Path

import click


@click.command(short_help="Train a model by a recipe.")
@click.argument("recipe")
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="DIR", help="Where the run is kept. [default: runs/RECIPE]"
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out.")
@click.option("--start-from", metavar="MODEL", help="Begin with this model's weights (`demo` or a directory).")
@click.option("--updates", type=click.IntRange(min=1), default=6550, show_default=True, help="Optimizer steps in all.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Stop (resumably) after so long.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    default=lambda: os.cpu_count() or 1,
    show_default="one a core",
    help="Processes that average their gradients.",
)
@click.option("--compile/--no-compile", "compiled", default=True, help="Fuse small operations with torch's compiler.")
def train(
    recipe: str,
    out: Path | None,
    resume: bool,
    start_from: str | None,
    updates: int,
    minutes: float | None,
    seed: int,
    processes: int,
    compiled: bool,
) -> None:
    """Trains by RECIPE (`demo`) and writes the model to DIR/model.

    \b
    dgemma train demo
    dgemma train demo --out runs/demo --resume
    dgemma generate --model runs/demo/model "What is 3 + 4?"

    Every update is a line of DIR/log.jsonl; a checkpoint is written every two minutes.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from ..checkpoint import resolve
    from ..train.loop import Progress as Update
    from ..train.run import Run
    from ..train.run import train as run_training

    run = Run(
        recipe=recipe,
        directory=out or Path("runs") / recipe,
        updates=updates,
        seed=seed,
        resume=resume,
        minutes=minutes,
        start=resolve(start_from) if start_from else None,
        processes=processes,
        compiled=compiled,
    )
    run.check()
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("starting", total=updates)

        def report(update: Update) -> None:
            figures = f"loss {update.denoise:.3f}  next token {update.autoregressive:.3f}  right {update.accuracy:.1%}"
            bar.update(task, completed=update.update, description=figures)

        ended = run_training(run, report)
    again = "" if ended else f"; go on with: dgemma train {recipe} --out {run.directory} --resume --updates {updates}"
    click.echo(f"model written to {run.directory / 'model'}{again}", err=True)
