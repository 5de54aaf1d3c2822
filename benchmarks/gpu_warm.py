"""Triton compiles what the GPU check needs beforehand, in processes beside each other."""

from __future__ import annotations

import multiprocessing
import sys
import time

import torch
from gpu_case import Maker
from gpu_kernels import cases
from gpu_rows import ask, config_rows, finish, rows_of
from gpu_weights import config_of, network_of

from dgemma.engine import Engine, EngineSettings
from dgemma.engine.card import CardForward
from dgemma.engine.forward import Work


def warm(forms: list[str], batches: tuple[int, ...], prefixes: tuple[int, ...]) -> None:
    """Has Triton compile what the formats need, each in a process of its own, on networks of two layers."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=_warm_one, args=(form, batches, prefixes)) for form in forms]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.stderr.write(f"compiled in {time.monotonic() - started:.0f} s\n")


def _warm_one(form: str, batches: tuple[int, ...], prefixes: tuple[int, ...]) -> None:
    config, device = config_of(2, tiny=False), torch.device("cuda")
    network = network_of(config, form, device)
    limit = max(prefixes) + 2 * config.canvas_length
    for batch in batches:
        pages, canvases = config_rows(config, batch, limit)
        forward = CardForward(network, pages, canvases=canvases, limit=limit)
        for prefix in prefixes:
            rows = rows_of(forward, pages, batch, prefix)
            forward.run([Work(row=row, encode=0, denoise=True) for row in rows])
            for row in rows:
                row.leave()
        del forward
    own = Engine(network, None, EngineSettings(kernels="triton", max_batch=8, cache_tokens=1 << 15))
    for mode in ("diffusion", "autoregressive"):
        for ticket in [own.submit(ask(config, [5] * 1024, seed=n, new=8, steps=2, mode=mode)) for n in range(8)]:
            finish(ticket)


def warm_kernels() -> None:
    """The same for the kernels one by one, a process for some of them each."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    count = len(cases(config_of(2, tiny=False), Maker(torch.device("cuda"), torch.bfloat16), 1))
    running = [context.Process(target=_warm_kernel, args=(number,)) for number in range(count)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    sys.stderr.write(f"compiled in {time.monotonic() - started:.0f} s\n")


def _warm_kernel(number: int) -> None:
    for canvases in (1, 8):
        for case in cases(config_of(2, tiny=False), Maker(torch.device("cuda"), torch.bfloat16), canvases)[number]():
            case.ours()
            torch.cuda.synchronize()
