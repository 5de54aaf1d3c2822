"""One command for a GPU: every kernel against its twin, the engine against the CPU's, then the 26B's figures.

    make gpu-check                                       all, in under 10 minutes on one H100
    python benchmarks/gpu_check.py [SECTION ...]         kernels, engine, steps, protocol, transformers
    python benchmarks/gpu_check.py --tiny                a dry run at tiny sizes, on a CPU in Triton's interpreter

    kernels       each kernel's result against plain torch, and its time beside a library's and the memory's floor
    engine        the demo model: the CPU's texts, in float32, also with experts in host memory, and as one of one rank
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
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from gpu_case import Maker, gap, timed
from gpu_kernels import cases
from gpu_rows import ask, finish
from gpu_run import Check
from gpu_steps import steps
from gpu_warm import warm, warm_kernels
from gpu_weights import FORMS, config_of, network_of

from dgemma.engine import Engine, EngineSettings
from dgemma.model import Network
from dgemma.model.moe import Experts
from dgemma.model.offload import ExpertStream
from dgemma.model.ranks import Ranks

SECTIONS = ("kernels", "engine", "steps", "protocol", "transformers")
BATCHES, PREFIXES = (1, 2, 4, 8, 16), (256, 1024, 8192, 32_768)


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
        pair[1:1] = [Engine(other, None, pair[0].settings) for other in (_streamed(own), _as_ranks(copy.deepcopy(own)))]
        found, offloaded, ranked, wanted = (
            [finish(e.submit(ask(config, p, seed=n, new=8, steps=2)))[0] for n, p in enumerate(prompts)] for e in pair
        )
    else:
        card, ranks = (
            dgemma.load("demo", device="cuda", dtype="float32", engine=EngineSettings(kernels="triton"))
            for _ in range(2)
        )
        _as_ranks(ranks.network)
        host = dgemma.load("demo", device="cpu", dtype="float32")
        away = dgemma.load("demo", device="cuda", dtype="float32", engine=EngineSettings(kernels="triton"),
                           offload="experts")  # fmt: skip
        assert away.network.expert_stream is not None
        away.network.expert_stream.begin()  # from here on nothing moves to a card that has room
        prompts = [e.prompt for family in ("sums", "sorting", "records", "calendar") for e in held_out(family, 8, 0)]
        params = [dgemma.SamplingParams(seed=n, max_new_tokens=128) for n in range(len(prompts))]
        found, offloaded, ranked, wanted = (
            [result.tokens for result in model.map(zip(prompts, params, strict=True))]
            for model in (card, away, ranks, host)
        )
    same = sum(a == b for a, b in zip(found, wanted, strict=True))
    check.say(f"engine: {same} of {len(wanted)} answers are the CPU's", section="engine", same=same, of=len(wanted))
    check.figures["engine_same"] = f"{same}/{len(wanted)}"
    others = {"offload": (offloaded, "experts in host memory"), "ranks": (ranked, "what several GPUs would add up")}
    for name, (answers, what) in others.items():
        alike = sum(a == b for a, b in zip(answers, found, strict=True))
        check.say(
            f"engine: {alike} of {len(found)} answers with {what} are those without",
            section="engine", of=len(found), **{f"{name}_same": alike},
        )  # fmt: skip
        check.figures[f"{name}_same"] = f"{alike}/{len(found)}"


def _as_ranks(network: Network) -> Network:
    """The network in parts, this process having all of them: sums and joins go over NCCL, and through the graphs."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if network.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    network.ranks = Ranks(rank=0, size=1, config=network.config)
    return network


def _streamed(network: Network) -> Network:
    """A copy whose experts are streamed, on a CPU."""
    own = copy.deepcopy(network)
    experts = [module for module in own.modules() if isinstance(module, Experts)]
    own.expert_stream = ExpertStream(experts, own.device)
    return own


def protocol(check: Check) -> None:
    """Tokens a second of the engine at 16 fixed steps a canvas, and of the same weights one token at a time."""
    found = check.figures.setdefault("tokens_per_second", {})
    given, new, steps = (9, 8, 2) if check.tiny else (1024, 1024, 16)
    for form in check.forms:
        config = config_of(check.layers, tiny=check.tiny)
        if not check.time_for(f"protocol {form}", 45) or (network := check.network(config, form)) is None:
            continue
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
                    count = sum(finish(ticket)[1] for ticket in tickets)
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
    try:
        rates = peer_rate(check.layers, check.tiny, check.device, given, new, rounds=1 if check.tiny else 3)
    except torch.OutOfMemoryError:
        check.left_out.append("transformers: does not fit")
        return
    rate = statistics.median(rates)
    check.say(f"transformers bfloat16: {rate:.1f} tokens/s", section="transformers", rates=rates)
    check.figures["transformers"] = {"tokens_per_second": round(rate, 1)}


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
    parser.add_argument("--folder", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"{section}: no such section ({', '.join(SECTIONS)})")
    check = Check(options)
    chosen = [section for section in SECTIONS if section in (options.sections or SECTIONS)]
    if len(chosen) > 1:
        for section in chosen:
            _apart(check, section)
    else:
        _run(check, chosen[0])
    check.figures["left_out"] = check.left_out
    rows = "\n".join(f"- {name}: {value}" for name, value in check.figures.items())
    where = "at tiny sizes: a dry run, no figure" if check.tiny else "random weights at the 26B's sizes"
    sys.stdout.write(check.results.close(f"# GPU check\n\n{where}\n\n{rows}\n", check.figures) + "\n")
    return 1 if check.figures.get("kernels_wrong") or "failed" in check.figures else 0


def _run(check: Check, section: str) -> None:
    """One section here."""
    started = time.monotonic()
    try:
        if not check.tiny and section in ("steps", "protocol"):
            warm(check.forms, check.batches, check.prefixes)
        if not check.tiny and section == "kernels":
            warm_kernels()
        {"kernels": kernels, "engine": engine, "steps": steps, "protocol": protocol, "transformers": transformers}[
            section
        ](check)
    except Exception as error:  # what has been found so far is kept
        traceback.print_exc()
        check.figures["failed"] = {section: f"{type(error).__name__}: {error}"}
    check.figures["seconds"] = {section: round(time.monotonic() - started, 1)}


def _apart(check: Check, section: str) -> None:
    """One section in a process of its own: what breaks a card's context loses no other section."""
    left = check.end - time.monotonic()
    command = [sys.executable, __file__, section, "--folder", str(check.results.folder), "--seconds", str(left)]
    command += ["--forms", *check.forms, *(["--tiny"] if check.tiny else [])]
    command += ["--batches", *map(str, check.batches), "--prefixes", *map(str, check.prefixes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        found = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        found = {"failed": {section: f"ended with {done.returncode}"}}
    check.left_out += found.pop("left_out", [])
    for name, value in found.items():
        own = check.figures.get(name)
        check.figures[name] = own | value if isinstance(own, dict) else value


if __name__ == "__main__":
    sys.exit(main())
