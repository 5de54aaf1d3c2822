"""The official npm client against the server: `npm/openai_client.mjs`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake import FakeModel
from servers import SECONDS, Running

FOLDER = Path(__file__).with_name("npm")


@pytest.fixture(scope="session")
def installed() -> None:
    """The client as `package-lock.json` pins it; installed once, into a folder that git ignores."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("needs node and npm")
    mark, lock = FOLDER / "node_modules" / ".package-lock.json", FOLDER / "package-lock.json"
    if mark.exists() and mark.stat().st_mtime >= lock.stat().st_mtime:
        return
    command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("installed")
def test_the_npm_client(start: Callable[..., Running]) -> None:
    server = start(FakeModel(delay=0.005))
    done = subprocess.run(
        ["node", "--test", "--test-reporter=tap", "openai_client.mjs"],
        cwd=FOLDER,
        env={**os.environ, "SERVER_URL": server.url},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "# fail 0" in done.stdout and "# skipped 0" in done.stdout
    source = (FOLDER / "openai_client.mjs").read_text(encoding="utf-8")
    assert f"# pass {source.count(chr(10) + 'test(')}" in done.stdout
    assert all(ticket.over.wait(SECONDS) for ticket in server.model.tickets)
