"""Workers on a real Ray cluster of this machine: every line exactly once, whoever is killed."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeModel
from lines import assert_all_answered, read, request, write

from dgemma.batch import BatchSettings, Cluster, Summary, run
from dgemma.batch.cluster import share
from dgemma.errors import CheckpointError, ConfigError
from dgemma.params import SamplingParams

HERE = Path(__file__).parent
PATH = os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)])


def refusing() -> int:
    """A port where nobody listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def load(folder: Path, *, device: str, threads: int, fails: bool = False) -> FakeModel:
    """A slow model that leaves its process's number behind."""
    if fails:
        raise CheckpointError("somewhere: no such directory")
    assert device == "cpu" and threads == 1
    (folder / str(os.getpid())).touch()
    return FakeModel(delay=0.05)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of two CPUs, with this process in it."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATH)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        patience = {"health_check_failure_threshold": 100}
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 << 20,
            _system_config=patience,
        )
        yield ray
        ray.shutdown()


def start(folder: Path, report: Any = lambda progress: None, *, fails: bool = False, **more: Any) -> Summary:
    marks = folder / "marks"
    marks.mkdir(exist_ok=True)
    cluster = Cluster(address="auto", load=partial(load, marks, fails=fails), workers=2, batch=16)
    return run(BatchSettings(source=folder / "in.jsonl", target=folder / "out.jsonl", **more), lambda: cluster, report)


def test_one_of_two_is_killed_in_the_middle(tmp_path: Path, ray: Any) -> None:
    asked = [request(n, "CRASH" if n == 60 else None) for n in range(700)]
    write(tmp_path / "in.jsonl", [*asked, "{"])
    killed: list[int] = []

    def report(progress: Any) -> None:
        if not killed and progress.done > 100:
            killed.append(int(min(path.name for path in (tmp_path / "marks").iterdir())))
            os.kill(killed[0], signal.SIGKILL)

    summary = start(tmp_path, report)
    assert (summary.done, summary.failed, len(killed)) == (699, 2, 1)
    assert_all_answered(tmp_path / "out.jsonl", asked[:60] + asked[61:])
    assert sorted(line["line"] for line in read(tmp_path / "out.errors.jsonl")) == [61, 701]
    assert len(list((tmp_path / "marks").iterdir())) == 3  # another one has begun in its place
    assert ray.is_initialized()  # it was there before


def test_a_request_that_kills_every_worker_fails_alone(tmp_path: Path, ray: Any) -> None:
    asked = [request(n, "KILL" if n == 60 else None) for n in range(100)]
    write(tmp_path / "in.jsonl", asked)
    summary = start(tmp_path)
    assert (summary.done, summary.failed) == (99, 1)
    assert_all_answered(tmp_path / "out.jsonl", asked[:60] + asked[61:])
    (line,) = read(tmp_path / "out.errors.jsonl")
    error = line["response"]["body"]["error"]
    assert (line["line"], line["custom_id"], error["code"]) == (61, "r60", "internal_error")
    assert error["message"] == "the worker died each of the 3 times that it had this request"
    assert 3 <= len(list((tmp_path / "marks").iterdir())) <= 5  # two at first, and three have died


def test_stopped_and_resumed(tmp_path: Path, ray: Any) -> None:
    asked = [request(n) for n in range(300)]
    write(tmp_path / "in.jsonl", asked)
    stop = threading.Event()
    cluster = Cluster(address="auto", load=partial(load, tmp_path), workers=1, threads=1)
    settings = BatchSettings(source=tmp_path / "in.jsonl", target=tmp_path / "out.jsonl")
    summary = run(settings, lambda: cluster, lambda progress: stop.set() if progress.done else None, stop=stop)
    assert summary.stopped and 0 < summary.done < 300
    assert run(settings, FakeModel()).resumed == summary.done
    assert_all_answered(tmp_path / "out.jsonl", asked)


def test_what_a_worker_raises_is_raised_here(tmp_path: Path, ray: Any) -> None:
    write(tmp_path / "in.jsonl", [request(n) for n in range(40)])
    with pytest.raises(CheckpointError, match=r"somewhere: no such directory \(on node [\d.]+\)"):
        start(tmp_path, fails=True)
    with pytest.raises(ConfigError, match=r"canvas_length: 512 is above .* \(on node"):
        start(tmp_path, params=SamplingParams(canvas_length=512), restart=True)
    assert not read(tmp_path / "out.jsonl") and not (tmp_path / "out.errors.jsonl").exists()


def test_the_command_with_a_cluster_of_its_own(tmp_path: Path) -> None:
    """Alone on its machine; the answers on stdout are nothing but answers; nothing of Ray outlives it."""
    asked = [request(n) for n in range(64)]
    write(tmp_path / "in.jsonl", asked)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("DGEMMA_", "RAY_", "FAKE_"))}
    command = [sys.executable, str(HERE / "fakes.py"), "batch", "in.jsonl", "-", "--ray", "local", "--workers", "1"]
    process = subprocess.run(
        command, cwd=tmp_path, env={**kept, "PYTHONPATH": PATH}, capture_output=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr.decode()
    (tmp_path / "out.jsonl").write_bytes(process.stdout)
    assert_all_answered(tmp_path / "out.jsonl", asked)
    assert [line.split(":")[0].split(" ")[0] for line in process.stderr.decode().splitlines()] == [
        "loading", "running", "64"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("somewhere", "error: --ray: 'somewhere' is not local, auto or host:port"),
        ("ray://127.0.0.1:10001", "error: --ray: 'ray://127.0.0.1:10001' is not local, auto or host:port"),
        ("127.0.0.1:{port}", "error: --ray: no cluster at '127.0.0.1:{port}' (Connection refused)"),
    ],
)
def test_an_address_where_nobody_is(tmp_path: Path, address: str, said: str) -> None:
    port = refusing()
    write(tmp_path / "in.jsonl", [request(0)])
    command = [sys.executable, "-m", "dgemma", "batch", "in.jsonl", "out.jsonl", "--ray", address.format(port=port)]
    started = time.monotonic()
    process = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, timeout=60, check=False
    )
    assert (process.returncode, process.stderr.decode()) == (2, said.format(port=port) + "\n")
    assert time.monotonic() - started < 30
    assert not (tmp_path / "out.jsonl").exists()


def test_what_a_cluster_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"workers": 0, "threads": 0, "device": "cuda:1"}.items():
        with pytest.raises(ConfigError, match=f"^{name}: "):
            Cluster(address="local", load=FakeModel, **{name: value})  # type: ignore[arg-type]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else found(name))
    with pytest.raises(ConfigError, match=r"^ray: is not installed; pip install 'dgemma\[ray\]'$"):
        Cluster(address="local", load=FakeModel)


def test_shares_of_a_cluster() -> None:
    """(workers, CPUs, GPUs of each): no more than the nodes have, and no larger share would do."""

    def given(*nodes: dict[str, float], **more: Any) -> tuple[int, int, int]:
        return share([*nodes], Cluster(address="local", load=FakeModel, **more))

    head, eight, four = {"memory": 1e9}, {"CPU": 8.0}, {"CPU": 4.0}
    gpus = {"CPU": 32.0, "GPU": 4.0}
    assert given(head, eight, four) == (2, 4, 0)
    assert given(head, eight, four, workers=1) == (1, 8, 0)
    assert given(eight, four, workers=4) == (4, 2, 0)
    assert given(eight, four, workers=12) == (12, 1, 0)
    assert given(eight, four, threads=3) == (2, 3, 0)
    assert given(gpus, gpus, eight) == (8, 1, 1)
    assert given(gpus, gpus, workers=3, threads=6) == (3, 6, 1)
    assert given(gpus, device="cpu") == (1, 32, 0)
    assert given(head, device="cuda") == (1, 1, 1)  # one that grows
    for workers in range(1, 13):
        _, each, _ = given(eight, four, workers=workers)
        assert 8 // each + 4 // each >= workers > 8 // (each + 1) + 4 // (each + 1)
