"""`--ray HOST:PORT` against a cluster that `ray start --head` has begun, and that wants a token."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lines import assert_all_answered, request, write

pytest.importorskip("ray")
pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="ends processes by /proc")

HERE = Path(__file__).parent
TOKEN = "0123456789abcdef" * 4
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("DGEMMA_", "RAY_", "FAKE_"))},
    "PYTHONPATH": os.pathsep.join([str(HERE.parents[1] / "src"), str(HERE)]),
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of one with a CPU."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = int(one.getsockname()[1])
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets are short
    options = ["--num-cpus=1", "--include-dashboard=false", "--object-store-memory=100000000", "--block"]
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", f"--temp-dir={folder}"]
    more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_worker_niceness": "0"}
    with (Path(folder) / "said").open("wb") as said:
        process = subprocess.Popen(
            [*command, *options], env={**ENVIRONMENT, **more}, stdout=said, stderr=said, start_new_session=True
        )
    try:
        for _ in range(600):
            if process.poll() is not None or b"runtime started" in (Path(folder) / "said").read_bytes():
                break
            time.sleep(0.1)
        assert process.poll() is None, (Path(folder) / "said").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
        for path in Path("/proc").glob("[0-9]*/cmdline"):  # what it has begun names its folder or its port
            with contextlib.suppress(OSError):
                said_so = path.read_bytes()
                if folder.encode() in said_so or f":{port}".encode() in said_so:
                    os.kill(int(path.parent.name), signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def batch(folder: Path, address: str, **more: str) -> subprocess.CompletedProcess[bytes]:
    """The command."""
    command = [sys.executable, str(HERE / "fakes.py"), "batch", "in.jsonl", "out.jsonl", "--ray", address]
    return subprocess.run(
        command, cwd=folder, env={**ENVIRONMENT, **more}, capture_output=True, timeout=120, check=False
    )


def test_a_cluster_that_wants_a_token(tmp_path: Path, head: str) -> None:
    asked = [request(n) for n in range(50)]
    write(tmp_path / "in.jsonl", asked)
    done = batch(tmp_path, head, RAY_AUTH_TOKEN="f" * 64)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and last.startswith(f"error: --ray: the cluster at '{head}' wants its own token; copy")
    done = batch(tmp_path, head, RAY_AUTH_TOKEN=TOKEN, RAY_AUTH_MODE="disabled")
    assert done.returncode == 2 and done.stderr.decode().endswith("set RAY_AUTH_MODE=token, not disabled\n")
    done = batch(tmp_path, head, RAY_AUTH_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr.decode()
    assert_all_answered(tmp_path / "out.jsonl", asked)
    assert len(done.stderr.splitlines()) == 3 and not done.stdout
