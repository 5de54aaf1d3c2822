"""Runs a recipe: in this process, or in several that average their gradients."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as distributed

from ..checkpoint import load_network
from ..errors import CheckpointError, ConfigError
from . import recipes
from .compiled import compile_network
from .loop import STATE, Progress, Trainer


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a training run is asked for.

    Fields:
        minutes: stops it early, to be resumed later.
        start: a model directory whose weights a new run begins with.
    """

    recipe: str
    directory: Path
    updates: int
    seed: int
    resume: bool = False
    minutes: float | None = None
    start: Path | None = None
    processes: int = 1
    compiled: bool = True

    def check(self) -> None:
        """Refuses what cannot work, before anything is built.

        Raises:
            ConfigError: there is no such recipe.
            CheckpointError: the directory holds a run and `resume` is not set, or the other way round.
        """
        if self.recipe not in recipes.RECIPES:
            raise ConfigError(f"recipe: {self.recipe!r} is unknown (known: {', '.join(recipes.RECIPES)})")
        if self.start is not None and self.resume:
            raise ConfigError("start: goes with a new run, not with resume")
        exists = (self.directory / STATE).is_file()
        if exists and not self.resume:
            raise CheckpointError(f"{self.directory}: holds a run already; go on with --resume or name another folder")
        if self.resume and not exists:
            raise CheckpointError(f"{self.directory / STATE}: no such file; there is nothing to resume")
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory}: is a file; name a directory")


def train(run: Run, report: Callable[[Progress], None]) -> bool:
    """Trains, then writes the model to `directory/model`; True when the schedule's end was reached.

    With several processes each has one thread and batches of its own: small layers keep one core busier than two.
    """
    run.check()
    run.directory.mkdir(parents=True, exist_ok=True)
    until = None if run.minutes is None else time.monotonic() + 60 * run.minutes
    if run.processes == 1:
        return _work(run, until, report)
    with tempfile.TemporaryDirectory() as meeting:
        context = multiprocessing.get_context("spawn")
        helpers = [
            context.Process(target=_help, args=(run, rank, f"file://{meeting}/join"), daemon=True)
            for rank in range(1, run.processes)
        ]
        for helper in helpers:
            helper.start()
        try:
            _join(run, 0, f"file://{meeting}/join")
            return _work(run, until, report)
        finally:
            for helper in helpers:
                helper.terminate()
            if distributed.is_initialized():
                distributed.destroy_process_group()


def _join(run: Run, rank: int, meeting: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=run.processes)


def _help(run: Run, rank: int, meeting: str) -> None:
    """What the other processes do: the same updates on other batches, until the first one ends them."""
    _join(run, rank, meeting)
    _work(run, None, lambda progress: None)


def _work(run: Run, until: float | None, report: Callable[[Progress], None]) -> bool:
    trainer: Trainer = recipes.RECIPES[run.recipe](run.directory, updates=run.updates, seed=run.seed)
    if run.resume:
        trainer.resume()
    elif run.start is not None:
        trainer.start_from(load_network(run.start, trainer.network.config, dtype=torch.float32).state_dict())
    if run.compiled:
        compile_network(trainer.network)
    ended = trainer.run(report, until=until)
    if trainer.rank == 0:
        recipes.export(trainer, run.directory / "model")
    return ended
