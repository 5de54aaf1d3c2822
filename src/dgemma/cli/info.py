"""`dgemma info`: a model in figures, from its `config.json` and the headers of its files."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import click

from .failures import BadInput, one_line
from .figures import bytes_in_words
from .terminal import visible

if TYPE_CHECKING:
    from ..checkpoint.summary import Summary


@click.command(short_help="A model in figures.")
@click.argument("model", default="demo")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(model: str, as_json: bool) -> None:
    """Sizes of MODEL (`demo`, a directory, or a Hugging Face id), its memory at each format, and what fits here.

    A directory that holds only a config.json will do. The formats in few bits are what `dgemma quantize` makes.
    """
    if not model.strip() or "\0" in model:
        raise BadInput("MODEL: is empty; give `demo`, a directory or a Hugging Face id")
    from ..checkpoint import resolve, summarize

    summary = summarize(resolve(model))
    gpus = _gpus()
    if as_json:
        click.echo(json.dumps(_as_json(model, summary, gpus), ensure_ascii=False))
    else:
        click.echo("\n".join(_as_text(model, summary, gpus)))


def _gpus() -> list[tuple[str, int]]:
    """Name and bytes of each GPU. torch takes a second to load: it is asked only where there is a driver."""
    if shutil.which("nvidia-smi") is None and shutil.which("rocm-smi") is None:
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    devices = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [(device.name, device.total_memory) for device in devices]


def _as_json(model: str, summary: Summary, gpus: list[tuple[str, int]]) -> dict[str, Any]:
    config = summary.config
    return {
        "model": model,
        "directory": str(summary.directory),
        "parameters": summary.total,
        "active_parameters": summary.active,
        "parameters_by_part": summary.parameters,
        "layers": config.num_layers,
        "sliding_layers": sum(layer.sliding for layer in config.layers),
        "sliding_window": config.sliding_window,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "num_experts": config.num_experts,
        "top_k_experts": config.top_k_experts,
        "canvas_length": config.canvas_length,
        "max_position_embeddings": config.max_position_embeddings,
        "dtype": config.dtype,
        "files": summary.files,
        "tensors": summary.tensors,
        "bytes_on_disk": summary.stored_bytes,
        "bytes_on_disk_by_type": summary.stored,
        "quantized": None if summary.scheme is None else str(summary.scheme),
        "packed_copy": None
        if summary.packed is None
        else {
            "path": str(summary.packed.path),
            "bytes": summary.packed.nbytes,
            "problem": summary.packed.problem,
        },
        "cache_tokens": summary.context,
        "machine_memory_bytes": summary.machine_memory,
        "gpus": [{"name": name, "memory_bytes": count} for name, count in gpus],
        "memory": {
            form.name: {
                "weights_bytes": form.weights,
                "cache_bytes": form.cache,
                "total_bytes": form.total,
                "fits_in_machine_memory": form.fits,
                "fits_on_one_gpu": _fits(form.total, gpus),
            }
            for form in summary.memory
        },
    }


def _as_text(model: str, summary: Summary, gpus: list[tuple[str, int]]) -> list[str]:
    config = summary.config
    sliding = sum(layer.sliding for layer in config.layers)
    rows = [
        ("model", one_line(model)),
        ("directory", visible(str(summary.directory))),
        ("parameters", f"{_count(summary.total)}, of which {_count(summary.active)} are active for a token"),
        ("layers", f"{config.num_layers}: {sliding} with a window of {config.sliding_window:,}, "
                   f"{config.num_layers - sliding} with full attention"),
        ("experts", f"{config.num_experts:,} a layer, {config.top_k_experts:,} for each token"),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("canvas", f"{config.canvas_length:,} tokens"),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("on disk", _on_disk(summary)),
    ]  # fmt: skip
    if summary.scheme is not None:
        rows.append(("in few bits", f"{summary.scheme}"))
        rows.append(("packed copy", _packed_copy(summary)))
    lines = [f"{name:<12}{value}" for name, value in rows]
    lines += ["", "parameters by part"]
    lines += [f"  {name:<20}{_count(count):>9}{_share(count, summary)}" for name, count in summary.parameters.items()]
    lines += ["", f"memory with a context of {summary.context:,} tokens"]
    lines += [f"  {'format':<10}{'weights':>10}{'cache':>11}{'total':>11}   fits"]
    for form in summary.memory:
        sizes = (bytes_in_words(form.weights), bytes_in_words(form.cache), bytes_in_words(form.total))
        verdicts = [] if form.fits is None else ["memory" if form.fits else "no" if not gpus else "not memory"]
        if gpus:
            verdicts.append("one GPU" if _fits(form.total, gpus) else "not one GPU")
        lines.append(f"  {form.name:<10}{sizes[0]:>10}{sizes[1]:>11}{sizes[2]:>11}   {', '.join(verdicts)}")
    known = summary.machine_memory
    lines += ["", f"this machine: {'memory unknown' if known is None else bytes_in_words(known) + ' of memory'}"
              + "".join(f", {name} with {bytes_in_words(count)}" for name, count in gpus)]  # fmt: skip
    return lines


def _fits(total: int, gpus: list[tuple[str, int]]) -> bool | None:
    return any(total <= count for _, count in gpus) if gpus else None


def _on_disk(summary: Summary) -> str:
    if not summary.files:
        return "no weights here"
    types = ", ".join(f"{name} {bytes_in_words(count)}" for name, count in summary.stored.items())
    vision = f", {summary.vision_tensors:,} of them for images" if summary.vision_tensors else ""
    plural = "file" if summary.files == 1 else "files"
    whole = f"{bytes_in_words(summary.stored_bytes)} in {summary.files:,} {plural} ({types})"
    return f"{whole}; {summary.tensors:,} tensors{vision}"


def _packed_copy(summary: Summary) -> str:
    """For whoever loads it on a CPU, or wants the room back."""
    copy = summary.packed
    if copy is None:
        return "none; --keep-packed makes one, with which a CPU starts at once"
    known = "" if copy.problem is None else f"; not used: it {copy.problem}"
    return f"{bytes_in_words(copy.nbytes)}, {visible(str(copy.path))}{known}"


def _share(count: int, summary: Summary) -> str:
    return f"{100 * count / summary.total:>7.1f} %"


def _count(number: int) -> str:
    """`25.2 B`, `3.1 M`, `512`: cut and not rounded, as 25.25 billion are called 25.2 B everywhere."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number * 10 // size / 10:.1f} {letter}"
    return str(number)
