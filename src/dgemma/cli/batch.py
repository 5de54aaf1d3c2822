"""`dgemma batch`: answers to all lines of a file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from . import options
from .failures import BadInput, one_line
from .terminal import ReaderGone, say, write_answer

if TYPE_CHECKING:
    from ..api import Model
    from ..batch import BatchSettings, Cluster, Merged, Summary

STREAM = "-"
SMALL = 50e6  # weights of a model that threads do not share well
BESIDE_MERGE = ("files", "merge", "restart", "as_json", "quiet")
SEED_FLAG = click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N",
    help="The run's: each line's own follows from it and from its custom_id.",
)  # fmt: skip


class _Shard(click.ParamType):
    """I/N."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """(i, n); the ranges are the settings' own business."""
        number, slash, count = str(value).partition("/")
        if not (slash and all(part.isascii() and part.isdecimal() and len(part) < 9 for part in (number, count))):
            self.fail(f"{value!r} is not I/N, as in 2/8", param, ctx)
        return int(number), int(count)


@click.command(short_help="Answers to all lines of a file, resumably.")
@click.argument("files", nargs=-1, metavar="IN OUT")
@options.flags(
    *options.MODEL_FLAGS,
    *(SEED_FLAG if flag is options.SEED_FLAG else flag for flag in options.SAMPLING_FLAGS),
    click.option("--max-batch", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
                 help="Requests that run at once, in each worker."),
    click.option("--workers", type=click.IntRange(1, options.MAX_THREADS), envvar="DGEMMA_WORKERS", metavar="N",
                 help="Processes that answer, each with the model.  [default: one a GPU; one a CPU thread where the "
                 "model is small; with --ray, without GPUs, one a node]"),
    click.option("--ray", metavar="ADDRESS",
                 help="Answer on a Ray cluster: auto (the one this machine is in), HOST:PORT, or local (one on this "
                 "machine)."),
    click.option("--max-model-len", type=click.IntRange(min=1), metavar="N",
                 help="Tokens of a prompt and its answer at most.  [default: the model's context]"),
    click.option("--format", type=click.Choice(("auto", "openai", "rows")), default="auto", show_default=True,
                 help="What lines are: OpenAI's batch requests, or rows with a prompt."),
    click.option("--prompt-column", metavar="NAME",
                 help="Where rows have their prompt.  [default: prompt, question, text or messages]"),
    click.option("--template", metavar="TEXT",
                 help="The prompt of a row, as in \"Translate: {text}\"; @FILE reads it from a file."),
    options.SYSTEM_FLAG,
    options.THINK_FLAG,
    click.option("--raw", is_flag=True, help="Give the model the prompts of rows as they are, without chat template."),
    click.option("--column-prefix", default="", metavar="TEXT",
                 help="In front of the columns that answers add to rows."),
    click.option("--any-model", is_flag=True, help="Answer requests whatever model they name."),
    click.option("--errors", metavar="FILE", help="Lines that get no answer.  [default: OUT.errors.jsonl]"),
    click.option("--shard", type=_Shard(), help="Only each N-th line, from line I on: one of N jobs."),
    click.option("--merge", is_flag=True, help="Make one file of all shards' outputs."),
    click.option("--restart", is_flag=True, help="Throw away what OUT and the files beside it hold, and begin anew."),
    click.option("--price-per-hour", type=click.FloatRange(min=0), metavar="X",
                 help="What this machine costs, to show the cost of the run."),
    click.option("--quiet", is_flag=True, help="No progress."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object of figures at the end."),
)  # fmt: skip
@click.pass_context
def batch(ctx: click.Context, files: tuple[str, ...], **values: Any) -> None:
    """Answers every line of IN exactly once and writes the answers to OUT as they are done.

    \b
    dgemma batch requests.jsonl answers.jsonl
    dgemma batch questions.parquet answers.parquet --template "Q: {question}" --max-new-tokens 64
    zcat big.jsonl.gz | dgemma batch - answers.jsonl.zst
    dgemma batch in.jsonl out.jsonl --ray auto
    dgemma batch in.jsonl out.2.jsonl --shard 2/8
    dgemma batch --merge out.jsonl out.[1-8].jsonl

    IN holds requests of OpenAI's batch API, or rows (JSON lines, Parquet) with a prompt column. Names that end in .gz
    or .zst are compressed files; `-` is stdin or stdout. Lines that cannot be answered go to OUT.errors.jsonl with
    their number and the reason. The same command goes on where it was stopped, killed or ran out of disk.
    """
    if values["merge"]:
        _check_merge(ctx, files)
        merged = _merge(files, restart=values["restart"])
        if not values["quiet"]:
            say(_merged_in_words(merged))
        if values["as_json"]:
            write_answer(json.dumps(_plain(merged)) + "\n")
        return
    if len(files) < 2:
        raise BadInput(f"{'OUT' if files else 'IN'}: missing; `dgemma batch IN OUT`")
    if len(files) > 2:
        raise BadInput(f"unexpected argument {files[2]!r}; `dgemma batch IN OUT` takes two files, --merge takes more")
    if values["price_per_hour"] is not None and not math.isfinite(values["price_per_hour"]):
        raise BadInput(f"--price-per-hour: {values['price_per_hour']} is no price")
    if values["as_json"] and files[1] == STREAM:
        raise BadInput("--json: stdout is where the answers go; name a file for OUT")
    summary = _run(_settings(files, values), values)
    if values["as_json"]:
        write_answer(json.dumps(_plain(summary) | _rates(summary, values["price_per_hour"])) + "\n")


def _settings(files: tuple[str, ...], values: dict[str, Any]) -> BatchSettings:
    params = options.sampling_params(values)
    if not values["model"].strip() or "\0" in values["model"]:
        raise BadInput("--model: names no model; give `demo`, a directory or a Hugging Face id")
    from ..batch import BatchSettings

    return BatchSettings(
        source=files[0],
        target=files[1],
        errors=values["errors"],
        format=values["format"],
        prompt_column=values["prompt_column"],
        template=None if values["template"] is None else _template(values["template"]),
        system=None if values["system"] is None else options.check_text(values["system"], "--system"),
        think=values["think"],
        raw=values["raw"],
        column_prefix=values["column_prefix"],
        params=params,
        model=values["model"],
        any_model=values["any_model"],
        shard=values["shard"],
        restart=values["restart"],
    )


def _template(text: str) -> str:
    """The flag's text, or the text of the file that it names."""
    if not text.startswith("@"):
        return options.check_text(text, "--template")
    try:
        return options.check_text(Path(text[1:]).read_text(encoding="utf-8").removesuffix("\n"), "--template")
    except UnicodeDecodeError:
        raise BadInput(
            f"--template: {text[1:]} is not valid UTF-8; convert it first (for example with iconv)"
        ) from None
    except OSError as error:
        raise BadInput(f"--template: {text[1:]} cannot be read ({error.strerror or error})") from None


def _run(settings: BatchSettings, values: dict[str, Any]) -> Summary:
    from ..batch import run
    from .batch_view import View

    if values["tensor_parallel"] > 1 and (values["ray"] is not None or (values["workers"] or 1) > 1):
        raise BadInput("--tensor-parallel: one network is all that answers then; drop --ray and --workers")
    cluster = None if values["ray"] is None else _cluster(values)
    if (values["offload"] or values["keep_packed"]) and (cluster is None or values["device"] == "cpu"):
        from ..devices import check_keep_packed, check_offload, device_of  # else the workers find out

        device = device_of(values["device"])
        check_offload(values["offload"], device, values["tensor_parallel"])
        check_keep_packed(values["keep_packed"], device, values["tensor_parallel"])

    def load() -> Model | list[Callable[[], Model]] | Cluster:
        import dgemma

        if cluster is not None:
            return cluster
        engine = dgemma.EngineSettings(max_batch=values["max_batch"], max_model_len=values["max_model_len"])
        settings = options.load_settings(values) | {"engine": engine}
        each = [{}] if "tensor_parallel" in settings else _workers(values)
        if len(each) == 1:
            return dgemma.load(values["model"], **settings)
        return [partial(dgemma.load, values["model"], **{**settings, **own}) for own in each]

    with View(values["price_per_hour"], quiet=values["quiet"]) as view:
        try:
            summary = run(settings, load, view)
        except BrokenPipeError:
            raise ReaderGone from None
        except OSError as error:
            if error.errno is None or settings.target == STREAM:
                raise
            more = "what is written is whole, and the same command goes on from there"
            raise OSError(error.errno, f"{error.strerror}; {more}", error.filename) from None
        except (KeyboardInterrupt, SystemExit):
            view.stopped(resumable=settings.target != STREAM)
            raise
    if not values["quiet"]:
        view.ended(summary)
    return summary


def _cluster(values: dict[str, Any]) -> Cluster:
    """Looked at before lines are checked, which may take long."""
    import dgemma

    from ..batch import Cluster

    engine = dgemma.EngineSettings(max_batch=values["max_batch"], max_model_len=values["max_model_len"])
    # Workers have a working directory of their own.
    model = values["model"]
    if model != "demo" and Path(model).is_dir():
        model = os.path.abspath(model)
    return Cluster(
        address=values["ray"],
        load=partial(dgemma.load, model, engine=engine, **{n: values[n] for n in ("dtype", "offload", "keep_packed")}),
        workers=values["workers"],
        device=values["device"],
        threads=values["threads"],
        batch=values["max_batch"],
    )


def _workers(values: dict[str, Any]) -> list[dict[str, Any]]:
    """What each process is given of this machine: a GPU, or some of the threads.

    A small model's products are too small to be shared by threads; several of them fill the machine better. A large
    one is in memory once, and its products are large.
    """
    import torch

    from .. import checkpoint
    from ..config import ModelConfig

    wanted, device = values["workers"], values["device"]
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    if gpus or device.startswith("cuda"):
        return [{"device": f"cuda:{n % gpus}" if gpus else device} for n in range(wanted or max(1, gpus))]
    threads = values["threads"] or torch.get_num_threads()
    if wanted is None:
        config = ModelConfig.read(checkpoint.resolve(values["model"]) / "config.json")
        wanted = threads if config.total_parameters() < SMALL else 1
    return [{"threads": max(1, threads // wanted)} for _ in range(wanted)]


def _check_merge(ctx: click.Context, files: tuple[str, ...]) -> None:
    if len(files) < 2:
        raise BadInput("--merge: takes OUT and the outputs of all shards; `dgemma batch --merge OUT PART...`")
    for param in ctx.command.params:
        name = param.name or ""
        if name not in BESIDE_MERGE and ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            raise BadInput(f"{max(param.opts, key=len)}: says nothing beside --merge; drop it")


def _merge(files: tuple[str, ...], *, restart: bool) -> Merged:
    from ..batch import merge

    return merge(files[0], files[1:], restart=restart)


def _merged_in_words(merged: Merged) -> str:
    words = [f"{merged.target}: {merged.done:,} answers of {merged.parts} shards"]
    if merged.failed:
        words.append(f"{merged.failed:,} failed ({merged.errors})")
    if merged.duplicates:
        words.append(f"{merged.duplicates:,} of them answered twice under one custom_id")
    return one_line(" · ".join(words))


def _plain(figures: Summary | Merged) -> dict[str, Any]:
    values = dataclasses.asdict(figures)
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _rates(summary: Summary, price: float | None) -> dict[str, Any]:
    return {
        "tokens_per_second": summary.tokens_per_second,
        "tokens_per_forward": summary.tokens_per_forward,
        "cost": None if price is None else price * summary.seconds / 3600,
    }
