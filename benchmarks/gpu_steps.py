"""A whole step of the 26B on a GPU: seconds by format, requests at once and prefix; where they go; the memory peak."""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import torch
from gpu_rows import config_rows, floor_bytes, rows_of
from gpu_run import Check
from gpu_weights import config_of, nbytes

from dgemma.engine.card import CardForward
from dgemma.engine.forward import Work
from dgemma.engine.pages import Pages

PROFILED, PROFILE_STEPS = (1, 8), 3
TARGETS = {"fp8": ("S3", 10.0), "int4": ("S4", 7.0)}  # ms a step, one request, 1,024 tokens before it


def steps(check: Check) -> None:
    """Seconds of a step, with all that belongs to it, by format, requests at once and prefix."""
    found = check.figures.setdefault("step_ms", {})
    for form in check.forms:
        config = config_of(check.layers, tiny=check.tiny)
        if not check.time_for(f"steps {form}", 40) or (network := check.network(config, form)) is None:
            continue
        limit = max(check.prefixes) + 2 * config.canvas_length
        for batch in check.batches:
            pages, canvases = config_rows(config, batch, limit)
            forward = None
            try:
                forward = CardForward(network, pages, canvases=canvases, limit=limit)
                for prefix in check.prefixes:
                    name = f"{form} x{batch} after {prefix}"
                    if check.time_for(name, 20):
                        found[name] = _measured(check, forward, pages, name, form, batch, prefix)
            except torch.OutOfMemoryError:
                check.left_out.append(
                    f"steps {form} x{batch}: no room for prefixes of up to {max(check.prefixes)} tokens"
                )
            del forward
        del network
        try:
            _memory(check, form)
        except torch.OutOfMemoryError:
            check.left_out.append(f"memory {form}: no room for 8k tokens")
    for form, (name, target) in TARGETS.items():
        own = found.get(f"{form} x1 after 1024")
        check.figures[name] = {"ms": own, "target_ms": target}
    near, far = found.get("fp8 x1 after 256"), found.get("fp8 x1 after 8192")
    check.figures["S6"] = {"ratio": round(far / near, 3) if near and far else None, "target": 1.25}


def _measured(check: Check, forward: CardForward, pages: Pages, name: str, form: str, batch: int, prefix: int) -> float:
    """Milliseconds of a step."""
    rows = rows_of(forward, pages, batch, prefix)
    seconds = _step_seconds(check, forward, rows)
    floor = floor_bytes(forward.network, batch, prefix) / check.bandwidth
    check.say(
        f"{name}: {seconds * 1e3:.2f} ms a step, floor {floor * 1e3:.2f} ms ({floor / seconds:.0%})",
        section="steps", form=form, batch=batch, prefix=prefix, seconds=seconds, floor_seconds=floor,
        weights_bytes=nbytes(forward.network), peak_gb=check.peak(),
    )  # fmt: skip
    if batch in PROFILED and prefix == 1024:
        _profile(check, name, forward, rows)
    for row in rows:
        row.leave()
    return round(seconds * 1e3, 2)


def _profile(check: Check, name: str, forward: CardForward, rows: list[Any]) -> None:
    """Where a step's time goes on the card, kernel by kernel."""
    from torch.profiler import ProfilerActivity, profile

    works = [Work(row=row, encode=0, denoise=True) for row in rows]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(PROFILE_STEPS):
            forward.run(works)
    found = [(e.key, e.count // PROFILE_STEPS, e.device_time_total / PROFILE_STEPS) for e in seen.key_averages()]
    found.sort(key=lambda one: -one[2])
    check.results.add(section="profile", name=name, kernels=found)
    told = "\n".join(f"  {spent:8.0f} us {count:5} x {kernel[:90]}" for kernel, count, spent in found[:24])
    sys.stderr.write(f"{name}: {sum(spent for _, _, spent in found) / 1e3:.2f} ms in kernels\n{told}\n")


def _step_seconds(check: Check, forward: CardForward, rows: list[Any]) -> float:
    """A step by the wall, the median of several: what the host does is in it."""
    works = [Work(row=row, encode=0, denoise=True) for row in rows]
    seconds = []
    for number in range(1 if check.tiny else 15):
        started = time.perf_counter()
        failed = forward.run(works)
        assert not failed, failed
        if number >= (0 if check.tiny else 3):  # the first ones compile, record and replay for the first time
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _memory(check: Check, form: str) -> None:
    """The allocator's peak of one request with 8k tokens before it: weights, cache and all transients."""
    config = config_of(check.layers, tiny=check.tiny)
    prefix = 24 if check.tiny else 8192
    network = check.network(config, form)
    if network is None:
        return
    check.free()  # what drawing the weights took is none of it
    pages, canvases = config_rows(config, 1, prefix + config.canvas_length)
    forward = CardForward(network, pages, canvases=canvases, limit=prefix + config.canvas_length)
    _step_seconds(check, forward, rows_of(forward, pages, 1, prefix))
    check.figures.setdefault("memory_gb", {})[form] = round(check.peak(), 2)
    check.say(f"{form}: {check.peak():.2f} GB at most, 8k tokens", section="memory", form=form, gb=check.peak())
