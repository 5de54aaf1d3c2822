"""From what people call a model to the directory that holds it, and on to its packed copy."""

from __future__ import annotations

import hashlib
import importlib.resources
import os
import re
import sys
from pathlib import Path

from ..errors import CheckpointError

DEMO = "demo"
CACHE = "DGEMMA_CACHE"
# Weights in safetensors and text files only: a pickle is not even downloaded.
PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]
_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve(name: str | os.PathLike[str]) -> Path:
    """The directory of a model.

    Args:
        name: `demo` (the embedded model; a directory of that name is `./demo`), a directory, or a Hugging Face id
            `owner/name`, with `@revision` if need be. An existing directory comes before an id.

    A download shows its progress on stderr, goes on where it was interrupted, and is kept in the Hugging Face cache;
    with `HF_HUB_OFFLINE=1` only what is there already is used.

    Raises:
        CheckpointError: there's no such model, or it could not be fetched; one line that says what was tried.
    """
    text = os.fspath(name)
    if not text:
        raise CheckpointError("the model's name is empty; give demo, a directory or a Hugging Face id")
    if text == DEMO:
        return _demo()
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{text}: is a file; {_about_file(path)}")
    match = _HUB_ID.fullmatch(text) if isinstance(name, str) else None
    if match is None:
        raise CheckpointError(f"{text}: no such directory, and it is neither demo nor a Hugging Face id (owner/name)")
    return _download(text, match["id"], match["revision"])


def copy_path(directory: Path) -> Path:
    """Where the packed copy of a model directory is, if there is one (`kept.py`).

    In the folder that the environment variable DGEMMA_CACHE names, else in one of the user's own.
    """
    whole = directory.resolve()
    digest = hashlib.blake2b(os.fsencode(whole), digest_size=6).hexdigest()
    return _cache() / f"{whole.name[:40]}-{digest}.safetensors"


def _cache() -> Path:
    """Where programs keep on this system what they can make again."""
    if given := os.environ.get(CACHE):
        return Path(given).absolute()
    home = Path(os.path.expanduser("~"))  # stays "~" where there is none, which is then nobody's folder
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return base / "dgemma"


def _demo() -> Path:
    path = Path(str(importlib.resources.files("dgemma"))) / DEMO
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: the embedded demo model is not installed; reinstall dgemma")
    return path


def _download(text: str, repository: str, revision: str | None) -> Path:
    import huggingface_hub
    from huggingface_hub import errors

    where = f"{text}: no such directory, and not fetched from Hugging Face"
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=PATTERNS))
    except errors.GatedRepoError:
        reason = f"access must be asked for at https://huggingface.co/{repository} and HF_TOKEN be set"
    except errors.RevisionNotFoundError:
        reason = f"{repository} has no revision {revision!r}"
    except errors.RepositoryNotFoundError:
        reason = f"no repository {repository} there, or it is private and HF_TOKEN is not set"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        reason = "it is not in the cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
    except Exception as error:  # whichever HTTP library the hub's client uses has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
    raise CheckpointError(f"{where} ({reason})") from None


def _about_file(path: Path) -> str:
    """What to do about a file that was given in a directory's place."""
    match path.suffix.lower():
        case ".gguf":
            return "GGUF is not read yet; give a directory with config.json and safetensors files"
        case ".bin" | ".pt" | ".pth" | ".ckpt" | ".pkl":
            return "a pickle can run code when it is opened, so dgemma reads safetensors only; give their directory"
        case _:
            return f"give the directory that holds it: {path.parent}"
