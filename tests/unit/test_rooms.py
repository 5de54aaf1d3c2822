"""The layering: a room calls only rooms below it, nothing heavy loads at import, files stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src"
PACKAGE = SOURCE / "dgemma"

# Top to bottom. Rooms in one line do not call each other.
ORDER = """
cli
eval server bench
batch
protocol
api
engine
train
diffusion
checkpoint
model
kernels
quant
constrain
text tasks params events config memory devices demo
errors
"""
LEVEL = {room: level for level, line in enumerate(ORDER.split("\n")) for room in line.split()}
MAX_LINES = 400
# `dgemma/__init__.py` and `__main__.py` are doors to other rooms: anything may be behind them. Through the first one
# comes the public face, so for whoever goes through it counts as `api`.
DOORS = {"", "__main__"}
LEVEL[""] = LEVEL["api"]


def files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of a module's dotted name below `dgemma`: "model.view" is in "model"; "" is the package itself."""
    return module.split(".")[0]


def module_of(path: Path) -> str:
    """Dotted name below `dgemma`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Absolute dotted names that a file imports, wherever in the file, with line numbers; for `from a import b`
    it is "a.b", since b may be a module."""
    package = ["dgemma", *(module.split(".") if module else [])]
    if not is_package:
        package = package[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}", node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str) and not first.value.startswith("."):
                yield first.value, node.lineno


def breaches(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a file's imports break of the order."""
    room, found = room_of(module), []
    for name, line in imports(ast.parse(source), module, is_package):
        if name.split(".")[0] != "dgemma":
            continue
        target = room_of(name.removeprefix("dgemma").removeprefix("."))
        if target == room or room in DOORS:
            continue
        if target not in LEVEL:
            target = ""  # `from dgemma import SamplingParams`: a name behind the door, no room
        if LEVEL[target] <= LEVEL[room]:
            found.append(f"{module}:{line} imports {name}: {target or 'the door'} is not below {room}")
    return found


def test_every_room_has_a_level() -> None:
    """A new folder or top-level module gets its place in the order above, on purpose."""
    rooms = {room_of(module_of(path)) for path in files()} - DOORS
    assert "model" in rooms
    assert rooms <= LEVEL.keys(), f"without a place in the order: {rooms - LEVEL.keys()}"


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_rooms_call_only_below(path: Path) -> None:
    """No import goes up or sideways, not even one inside a function."""
    assert not breaches(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py")


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("model.view", "from ..config import ModelConfig", False),
        ("model.view", "from .rope import rotation", False),
        ("model.view", "from ..checkpoint import load_network", True),
        ("model.view", "def f():\n    from dgemma.diffusion import generate", True),
        ("model.view", "from .. import api", True),
        ("model.view", "import dgemma", True),
        ("text.chat", "from ..tasks import sums", True),
        ("text.chat", "import importlib\nimportlib.import_module('dgemma.api')", True),
        ("errors", "from .config import ModelConfig", True),
        ("config", "from .errors import ConfigError", False),
        ("train.loop", "from ..diffusion import noise", False),
        ("cli.main", "from ..api import load", False),
        ("cli.main", "import dgemma", False),
        ("server.app", "from dgemma import SamplingParams", False),
        ("engine.engine", "from .. import SamplingParams", True),
    ],
)
def test_the_check_itself(module: str, source: str, broken: bool) -> None:
    """The parser above sees relative, absolute, late and dynamic imports."""
    assert bool(breaches(source, module)) == broken


@pytest.mark.parametrize("path", files(), ids=module_of)
def test_no_transformers_and_no_long_files(path: Path) -> None:
    """transformers is for tests only; a file over the limit wants splitting."""
    text = path.read_text(encoding="utf-8")
    names = {name.split(".")[0] for name, _ in imports(ast.parse(text), module_of(path), path.name == "__init__.py")}
    assert "transformers" not in names
    assert len(text.splitlines()) <= MAX_LINES


HEAVY = {"torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub", "jinja2", "fastapi"}


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after a statement in a fresh interpreter."""
    code = f"{statement}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize("statement", ["import dgemma", "import dgemma.cli", "from dgemma import SamplingParams"])
def test_imports_are_light(statement: str) -> None:
    """Neither the package nor the command line loads torch, the network stack or anything else that is slow."""
    loaded = loaded_by(statement)
    assert "dgemma" in loaded
    assert not loaded & HEAVY
    if statement == "import dgemma":
        assert not loaded & {"rich", "click"}


def test_help_is_light() -> None:
    """`dgemma --help` answers without torch."""
    code = (
        "import sys\nsys.argv = ['dgemma', '--help']\n"
        "from dgemma.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert not loaded_by(code) & {"torch", "transformers"}
