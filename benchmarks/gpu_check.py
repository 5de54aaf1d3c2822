"""One command for a GPU: every kernel against its twin, the engine against the CPU's, then the 26B's figures.

    make gpu-check                                       all, in under 10 minutes on one H100
    python benchmarks/gpu_check.py [SECTION ...]         kernels, engine, steps, protocol, transformers
    python benchmarks/gpu_check.py --tiny                a dry run at tiny sizes, on a CPU in Triton's interpreter

    kernels       each kernel's result against plain torch, and its time beside a library's and the memory's floor
    engine        the demo model: the CPU's texts, in float32, also with experts in host memory
    steps         a whole step of the 26B by format, requests at once and prefix; share of its floor; the memory peak
    protocol      16 fixed steps a canvas, 1,024 tokens in and out, 1 and 8 at once; the same weights autoregressively
    transformers  its compiled `generate` with a static cache, bfloat16, the same protocol, one at a time

Needs python, torch, triton, numpy, safetensors, tokenizers, and transformers for the last section; no network. Random
weights measure time and memory and say nothing of text; routing is near uniform and no word unlikely, the worst case.
The floor of a step is its weights and cached keys and values, read once (the table twice), at the rate of a copy or a
sum measured in the same run. What there was no time for is named, not left out in silence. Raw records go under
benchmarks/results/; the last line of output is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from gpu_kernels import Maker, cases, gap, timed
from gpu_rows import ask, config_rows, floor_bytes, rows_of
from gpu_weights import FORMS, config_of, nbytes, network_of
from record import Results

from dgemma.engine import Engine, EngineSettings
from dgemma.engine.card import CardForward
from dgemma.engine.forward import Work
from dgemma.model import Network
from dgemma.model.moe import Experts
from dgemma.model.offload import ExpertStream

SECTIONS = ("kernels", "engine", "steps", "protocol", "transformers")
LAYERS = 30
PROFILED, PROFILE_STEPS = (1, 8), 3
BATCHES, PREFIXES = (1, 2, 4, 8, 16), (256, 1024, 8192, 32_768)
TARGETS = {"fp8": ("S3", 10.0), "int4": ("S4", 7.0)}  # ms a step, one request, 1,024 tokens before it


class Check:
    """One run: options, time left, records."""

    def __init__(self, options: argparse.Namespace):
        self.tiny, self.forms = options.tiny, options.forms
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.end = time.monotonic() + options.seconds
        self.results = Results("gpu-check" + ("-tiny" if self.tiny else ""), vars(options) | {"out": None}, options.out)
        self.figures: dict[str, Any] = {}
        self.left_out: list[str] = []
        self.layers = 2 if self.tiny else LAYERS
        self.batches, self.prefixes = ((2,), (8, 24)) if self.tiny else (options.batches, options.prefixes)
        self.bandwidth = self._memory_rate()

    def say(self, text: str, **record: Any) -> None:
        """A record, and a line for who watches."""
        self.results.add(**record)
        sys.stderr.write(text + "\n")

    def time_for(self, what: str, seconds: float) -> bool:
        """Whether there is time; what there is none for is named in the end."""
        if self.end - time.monotonic() > seconds or self.tiny:
            return True
        self.left_out.append(what)
        return False

    def free(self) -> None:
        """Gives memory back before the next network."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        """GB that the allocator had given out at most since `free`."""
        return torch.cuda.max_memory_allocated() / 1e9 if self.device.type == "cuda" else 0.0

    def _memory_rate(self) -> float:
        """Bytes a second: of a copy, read and written, or of a sum, which only reads; the better."""
        source = torch.empty(1 << (20 if self.tiny else 31), dtype=torch.uint8, device=self.device)
        target, numbers = torch.empty_like(source), source.zero_().view(torch.float32)
        copied = 2 * source.nbytes / timed(lambda: target.copy_(source), self.device)
        read = source.nbytes / timed(lambda: numbers.sum(), self.device)
        self.say(
            f"memory: {copied / 1e9:.0f} GB/s copied, {read / 1e9:.0f} GB/s read",
            section="bandwidth", copied=copied, read=read,
        )  # fmt: skip
        return max(copied, read)


def kernels(check: Check) -> None:
    """Each kernel's result and time."""
    config = config_of(2, tiny=check.tiny)
    wrong, ratios = [], {}
    for canvases in (1,) if check.tiny else (1, 8):
        make = Maker(check.device, torch.float32 if check.tiny else torch.bfloat16)
        for case in (case for own in cases(config, make, canvases) for case in own()):
            if not check.time_for(f"kernel {case.name}", 60):
                continue
            off = gap(case.ours(), case.twin())
            ours = timed(case.ours, check.device, 1 if check.tiny else 15)
            theirs = None if case.library is None else timed(case.library, check.device, 1 if check.tiny else 15)
            share = case.moved / check.bandwidth / ours
            if not off <= case.tolerance:
                wrong.append(f"{case.name} x{canvases}")
            if theirs:
                ratios[f"{case.name} x{canvases}"] = round(theirs / ours, 2)
            beside = "" if theirs is None else f", torch {theirs * 1e6:.0f}"
            check.say(
                f"{case.name} x{canvases}: off by {off:.1e} of {case.tolerance:.1e}; {ours * 1e6:.0f} us{beside}, "
                f"{share:.0%} of the memory's rate",
                section="kernels", name=case.name, canvases=canvases, gap=off, tolerance=case.tolerance,
                seconds=ours, library_seconds=theirs, floor_share=share,
            )  # fmt: skip
    check.figures["kernels_wrong"], check.figures["kernels_to_library"] = wrong, ratios


def engine(check: Check) -> None:
    """Tokens of the demo model with the kernels, and without on a CPU."""
    import dgemma
    from dgemma.tasks import held_out

    if check.tiny:
        config = config_of(check.layers, tiny=True)
        own = network_of(config, "bfloat16", check.device)
        prompts: list[Any] = [[3, 5, 7], [11] * 9]
        pair = [
            Engine(own, None, EngineSettings(kernels=way, cache_tokens=512, page_size=16))
            for way in ("triton", "torch")
        ]
        pair.insert(1, Engine(_streamed(own), None, pair[0].settings))
        found, offloaded, wanted = (
            [_finish(e.submit(ask(config, p, seed=n, new=8, steps=2)))[0] for n, p in enumerate(prompts)] for e in pair
        )
    else:
        card = dgemma.load("demo", device="cuda", dtype="float32", engine=EngineSettings(kernels="triton"))
        host = dgemma.load("demo", device="cpu", dtype="float32")
        away = dgemma.load("demo", device="cuda", dtype="float32", engine=EngineSettings(kernels="triton"),
                           offload="experts")  # fmt: skip
        assert away.network.expert_stream is not None
        away.network.expert_stream.begin()  # from here on nothing moves to a card that has room
        prompts = [e.prompt for family in ("sums", "sorting", "records", "calendar") for e in held_out(family, 8, 0)]
        params = [dgemma.SamplingParams(seed=n, max_new_tokens=128) for n in range(len(prompts))]
        found, offloaded, wanted = (
            [result.tokens for result in model.map(zip(prompts, params, strict=True))] for model in (card, away, host)
        )
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    check.say(f"engine: {same} of {len(wanted)} answers are the CPU's", section="engine", same=same, of=len(wanted))
    check.figures["engine_same"] = f"{same}/{len(wanted)}"
    alike = sum(a == b for a, b in zip(offloaded, found, strict=True))
    check.say(
        f"engine: {alike} of {len(found)} answers with experts in host memory are those without",
        section="engine", offload_same=alike, of=len(found),
    )  # fmt: skip
    check.figures["offload_same"] = f"{alike}/{len(found)}"


def _streamed(network: Network) -> Network:
    """A copy whose experts are streamed, on a CPU."""
    own = copy.deepcopy(network)
    experts = [module for module in own.modules() if isinstance(module, Experts)]
    own.expert_stream = ExpertStream(experts, own.device)
    return own


def steps(check: Check) -> None:
    """Seconds of a step, with all that belongs to it, by format, requests at once and prefix."""
    found = check.figures.setdefault("step_ms", {})
    for form in check.forms:
        check.free()
        config = config_of(check.layers, tiny=check.tiny)
        if not check.time_for(f"steps {form}", 40):
            continue
        network = network_of(config, form, check.device)
        limit = max(check.prefixes) + 2 * config.canvas_length
        for batch in check.batches:
            pages, canvases = config_rows(config, batch, limit)
            try:
                forward = CardForward(network, pages, canvases=canvases, limit=limit)
            except torch.OutOfMemoryError:
                check.left_out.append(f"steps {form} x{batch}: the cache does not fit")
                continue
            for prefix in check.prefixes:
                name = f"{form} x{batch} after {prefix}"
                if check.time_for(name, 20):
                    rows = rows_of(forward, pages, batch, prefix)
                    seconds = _step_seconds(check, forward, rows)
                    floor = floor_bytes(network, batch, prefix) / check.bandwidth
                    found[name] = round(seconds * 1e3, 2)
                    check.say(
                        f"{name}: {seconds * 1e3:.2f} ms a step, floor {floor * 1e3:.2f} ms ({floor / seconds:.0%})",
                        section="steps", form=form, batch=batch, prefix=prefix, seconds=seconds, floor_seconds=floor,
                        weights_bytes=nbytes(network), peak_gb=check.peak(),
                    )  # fmt: skip
                    if batch in PROFILED and prefix == 1024:
                        _profile(check, name, forward, rows)
                    for row in rows:
                        row.leave()
            del forward
        del network
        _memory(check, form)
    for form, (name, target) in TARGETS.items():
        own = found.get(f"{form} x1 after 1024")
        check.figures[name] = {"ms": own, "target_ms": target}
    near, far = found.get("fp8 x1 after 256"), found.get("fp8 x1 after 8192")
    check.figures["S6"] = {"ratio": round(far / near, 3) if near and far else None, "target": 1.25}


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
    check.free()
    config = config_of(check.layers, tiny=check.tiny)
    prefix = 24 if check.tiny else 8192
    network = network_of(config, form, check.device)
    check.free()  # what drawing the weights took is none of it
    pages, canvases = config_rows(config, 1, prefix + config.canvas_length)
    forward = CardForward(network, pages, canvases=canvases, limit=prefix + config.canvas_length)
    _step_seconds(check, forward, rows_of(forward, pages, 1, prefix))
    check.figures.setdefault("memory_gb", {})[form] = round(check.peak(), 2)
    check.say(f"{form}: {check.peak():.2f} GB at most, 8k tokens", section="memory", form=form, gb=check.peak())


def protocol(check: Check) -> None:
    """Tokens a second of the engine at 16 fixed steps a canvas, and of the same weights one token at a time."""
    found = check.figures.setdefault("tokens_per_second", {})
    given, new, steps = (9, 8, 2) if check.tiny else (1024, 1024, 16)
    for form in check.forms:
        check.free()
        if not check.time_for(f"protocol {form}", 45):
            continue
        config = config_of(check.layers, tiny=check.tiny)
        network = network_of(config, form, check.device)
        for batch in (2,) if check.tiny else (1, 8):
            settings = EngineSettings(
                kernels="triton",
                max_batch=batch,
                cache_tokens=batch * (given + new) * 2,
                page_size=config.canvas_length,
            )
            own = Engine(network, None, settings)
            for mode, length in (("diffusion", new), ("autoregressive", new // 4)):
                name = f"{form} x{batch} {mode}"
                if not check.time_for(name, 30):
                    continue
                rates = []
                for number in range(1 if check.tiny else 4):
                    started = time.perf_counter()
                    tickets = [
                        own.submit(ask(config, [17 + n] * given, seed=n, new=length, steps=steps, mode=mode))
                        for n in range(batch)
                    ]
                    count = sum(_finish(ticket)[1] for ticket in tickets)
                    if number or check.tiny:
                        rates.append(count / (time.perf_counter() - started))
                found[name] = round(statistics.median(rates), 1)
                check.say(f"{name}: {found[name]} tokens/s", section="protocol", name=name, rates=rates, tokens=length)
            own.close()
        del network
    check.figures["S5"] = {"tokens_per_second": found.get("fp8 x8 diffusion"), "target": 2500}


def transformers(check: Check) -> None:
    """The peer: transformers' own loop, compiled, with a static cache, on the same card."""
    if not check.time_for("transformers", 90):
        return
    check.free()
    from gpu_peer import peer_rate

    given, new = (24, 16) if check.tiny else (1024, 1024)
    layers = check.layers
    rates = peer_rate(layers, check.tiny, check.device, given, new, rounds=1 if check.tiny else 3)
    rate = statistics.median(rates)
    check.say(f"transformers bfloat16: {rate:.1f} tokens/s", section="transformers", rates=rates)
    ours = check.figures.get("tokens_per_second", {}).get("bfloat16 x1 diffusion")
    check.figures["transformers"] = {"tokens_per_second": round(rate, 1), "ours_bfloat16": ours}


def _finish(ticket: Any) -> tuple[list[int], int]:
    """Tokens of a request, and how many."""
    result = list(ticket)[-1].result
    return result.tokens, len(result.tokens)


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
            _finish(ticket)


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


def main() -> int:
    """Runs the sections; 1 if a kernel is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["fp8", "int4", "bfloat16", "int8"])
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="requests at once, for steps")
    parser.add_argument("--prefixes", type=int, nargs="+", default=list(PREFIXES), help="tokens before, for steps")
    parser.add_argument("--seconds", type=float, default=560, help="after which nothing new is begun")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    options = parser.parse_args()
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"{section}: no such section ({', '.join(SECTIONS)})")
    check = Check(options)
    chosen = options.sections or list(SECTIONS)
    if not check.tiny and {"steps", "protocol"} & set(chosen):
        warm(check.forms, check.batches, check.prefixes)
    if not check.tiny and "kernels" in chosen:
        warm_kernels()
    run: dict[str, Callable[[Check], None]] = {
        "kernels": kernels, "engine": engine, "steps": steps, "protocol": protocol, "transformers": transformers,
    }  # fmt: skip
    for section in (s for s in SECTIONS if s in chosen):
        started = time.monotonic()
        try:
            run[section](check)
        except Exception as error:  # one section that fails must not lose what the others found
            traceback.print_exc()
            check.figures.setdefault("failed", {})[section] = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"{section}: {type(error).__name__}: {error}\n")
        check.figures.setdefault("seconds", {})[section] = round(time.monotonic() - started, 1)
    check.figures["left_out"] = check.left_out
    rows = "\n".join(f"- {name}: {value}" for name, value in check.figures.items())
    where = "at tiny sizes: a dry run, no figure" if check.tiny else "random weights at the 26B's sizes"
    sys.stdout.write(check.results.close(f"# GPU check\n\n{where}\n\n{rows}\n", check.figures) + "\n")
    return 1 if check.figures.get("kernels_wrong") or "failed" in check.figures else 0


if __name__ == "__main__":
    sys.exit(main())
