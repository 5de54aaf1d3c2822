"""The training loop: updates, learning rate, averaged weights, a log, and checkpoints that resume exactly."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as distributed
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError
from ..model import Network
from .data import Batch, Batching, Sample, pools
from .objective import Objective, compute
from .optimizer import make_optimizers

STATE = "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast.

    Fields:
        updates: optimizer steps in all.
        warmup: updates over which the rate rises from zero.
        cooldown: share of the updates, at the end, over which the rate falls to zero.
        matrix_lr, vector_lr: peak rates of Muon and AdamW.
        weight_decay: of matrices.
        average: decay of the averaged weights, which are what is kept in the end.
        save_every: seconds between checkpoints.
    """

    updates: int
    warmup: int = 100
    cooldown: float = 0.3
    matrix_lr: float = 0.02
    vector_lr: float = 3e-3
    weight_decay: float = 0.01
    average: float = 0.99
    save_every: float = 120.0

    def rate(self, update: int) -> float:
        """Share of the peak rate at an update (from 0): a trapezoid."""
        rising = (update + 1) / self.warmup
        falling = (self.updates - update) / max(1.0, self.cooldown * self.updates)
        return max(0.0, min(1.0, rising, falling))


@dataclass(frozen=True)
class Progress:
    """What one update reports."""

    update: int
    updates: int
    loss: float
    denoise: float
    autoregressive: float
    accuracy: float
    canvases: int
    seconds: float


class Trainer:
    """A network under training and all that is needed to go on with it."""

    def __init__(
        self,
        network: Network,
        *,
        draw: Callable[[random.Random, int], Sample],
        batching: Callable[[int], Batching],
        objective: Objective,
        schedule: Schedule,
        end: int,
        pad: int,
        seed: int,
        directory: Path,
    ):
        self.network, self.objective, self.schedule = network, objective, schedule
        self.draw, self.batching, self.end, self.pad, self.seed = draw, batching, end, pad, seed
        self.directory = directory
        self.optimizers = make_optimizers(
            network,
            matrix_lr=schedule.matrix_lr,
            vector_lr=schedule.vector_lr,
            weight_decay=schedule.weight_decay,
        )
        self.average = {name: weight.detach().clone() for name, weight in network.named_parameters()}
        self.update, self.pool, self.number, self.seconds = 0, 0, -1, 0.0
        parallel = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if parallel else 0
        self.processes = distributed.get_world_size() if parallel else 1

    def run(self, report: Callable[[Progress], None], *, until: float | None = None) -> bool:
        """Trains to the end of the schedule, or until `until` (a `time.monotonic` time); True when at the end.

        Every update is appended to `log.jsonl`; a checkpoint is written every `save_every` seconds and at the end.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        batches = pools(
            self.draw,
            self.batching,
            end=self.end,
            pad=self.pad,
            seed=self.seed,
            pool=self.pool,
            skip=self.number + 1,
            share=(self.rank, self.processes),
        )
        saved = time.monotonic()
        with (self.directory / "log.jsonl").open("a", encoding="utf-8") as log:
            while self.update < self.schedule.updates and (until is None or time.monotonic() < until):
                started = time.monotonic()
                self.pool, self.number, batch = next(batches)
                progress = self._step(batch.to(self.network.device))
                self.seconds += time.monotonic() - started
                if self.rank:
                    continue
                report(progress)
                log.write(json.dumps({**vars(progress), "seconds": round(self.seconds, 2)}) + "\n")
                log.flush()
                if time.monotonic() - saved > self.schedule.save_every:
                    self.save()
                    saved = time.monotonic()
        if self.rank == 0:
            self.save()
        return self.update >= self.schedule.updates

    def _step(self, batch: Batch) -> Progress:
        started = time.monotonic()
        noise_seed = random.Random(f"{self.seed} noise {self.update} {self.rank}").getrandbits(63)
        generator = torch.Generator().manual_seed(noise_seed)
        losses = compute(self.network, batch, self.objective, generator)
        if not torch.isfinite(losses.total):
            raise CheckpointError(f"{self.directory}: the loss is not a number at update {self.update}; training stops")
        losses.total.backward()
        if self.processes > 1:
            self._average_gradients()
        rate = self.schedule.rate(self.update)
        for optimizer, peak in zip(self.optimizers, (self.schedule.matrix_lr, self.schedule.vector_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.update += 1
        decay = min(self.schedule.average, (1 + self.update) / (10 + self.update))
        with torch.no_grad():
            weights = [weight.detach() for weight in self.network.parameters()]
            torch._foreach_lerp_(list(self.average.values()), weights, 1 - decay)
        return Progress(
            update=self.update,
            updates=self.schedule.updates,
            loss=losses.total.item(),
            denoise=losses.denoise.item(),
            autoregressive=losses.autoregressive.item(),
            accuracy=losses.accuracy.item(),
            canvases=len(batch.canvas),
            seconds=time.monotonic() - started,
        )

    def _average_gradients(self) -> None:
        """Gives every process the mean of all processes' gradients (one message for all of them)."""
        weights = list(self.network.parameters())
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
        together = torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None])
        distributed.all_reduce(together)
        together /= self.processes
        for weight, part in zip(weights, together.split([weight.numel() for weight in weights]), strict=True):
            weight.grad = part.view_as(weight)

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Takes a trained network's weights as the beginning of a new run; the optimizers start afresh."""
        self.network.load_state_dict(weights)
        self.average = {name: weight.detach().clone() for name, weight in self.network.named_parameters()}

    def save(self) -> None:
        """Writes the whole state to one file, atomically."""
        tensors = {f"weight.{name}": weight.detach() for name, weight in self.network.named_parameters()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.items()}
        for index, optimizer in enumerate(self.optimizers):
            for key, state in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer.{index}.{key}.{name}": torch.as_tensor(v) for name, v in state.items()}
        counters = {"update": self.update, "pool": self.pool, "number": self.number, "seconds": self.seconds}
        path = self.directory / STATE
        partial = path.with_suffix(".partial")
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            partial,
            metadata={"counters": json.dumps(counters), "seed": str(self.seed)},
        )
        os.replace(partial, path)

    def resume(self) -> None:
        """Goes back to the last checkpoint in the directory.

        Raises:
            CheckpointError: there is none, or it belongs to another network or seed.
        """
        path = self.directory / STATE
        if not path.is_file():
            raise CheckpointError(f"{path}: no such file; there is nothing to resume in this directory")
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        weights = dict(self.network.named_parameters())
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            if metadata.get("seed") != str(self.seed):
                raise CheckpointError(f"{path}: was written with seed {metadata.get('seed')}, not {self.seed}")
            counters = json.loads(metadata["counters"])
            for name in file.keys():  # noqa: SIM118 - not a dict
                kind, _, rest = name.partition(".")
                if kind == "optimizer":
                    index, key, field = rest.split(".")
                    states[int(index)].setdefault(int(key), {})[field] = file.get_tensor(name)
                    continue
                target = weights.get(rest) if kind == "weight" else self.average.get(rest)
                tensor = file.get_tensor(name)
                if target is None or target.shape != tensor.shape:
                    raise CheckpointError(f"{path}: {rest} does not belong to the network of this recipe")
                with torch.no_grad():
                    target.copy_(tensor)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        self.update, self.pool, self.number = counters["update"], counters["pool"], counters["number"]
        self.seconds = counters["seconds"]
