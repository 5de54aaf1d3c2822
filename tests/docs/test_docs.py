"""README and docs tell the truth: their commands parse, their Python runs, their links lead somewhere."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dgemma.cli.app import COMMANDS, app

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *ROOT.glob("src/**/README.md"),
]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language ("" is plain)."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands() -> list[tuple[str, str]]:
    """Every line that calls `dgemma`, with its page."""
    return [
        (page.name, line.split("#")[0].strip())
        for page in PAGES
        for block in blocks(page, "")
        for line in block.splitlines()
        if line.startswith("dgemma ")
    ]


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_in_the_docs_parse(page: str, line: str) -> None:
    """The command exists and knows every flag used (click parses; nothing is run)."""
    name, *arguments = shlex.split(line)[1:]
    command = app.get_command(None, name)  # type: ignore[arg-type]
    assert command is not None, f"{page}: {line}"
    command.make_context(name, arguments, resilient_parsing=True)
    known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for argument in arguments:
        assert not argument.startswith("--") or argument in known, f"{page}: {argument}"


def test_every_command_helps_and_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        result = CliRunner().invoke(app, [name, "--help"])
        assert result.exit_code == 0 and "Usage" in result.output
        assert f"dgemma {name}" in readme, name


def test_the_readmes_python_runs() -> None:
    for block in blocks(ROOT / "README.md", "python"):
        subprocess.run([sys.executable, "-c", block], check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_module_is_in_the_architecture_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for path in (ROOT / "src" / "dgemma").rglob("*.py"):
        room = path.relative_to(ROOT / "src" / "dgemma").parts[0]
        assert room.removesuffix(".py") in page or room.startswith("__"), path
    for name in re.findall(r"^\| `(.+?)`", page, re.M):
        first = name.split("`")[0]
        assert (ROOT / "src" / "dgemma" / first).exists(), first
