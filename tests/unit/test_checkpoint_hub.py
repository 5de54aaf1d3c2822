"""Names of models: the demo, directories, Hugging Face ids; no test uses the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from checkpoint_fixtures import refused
from huggingface_hub import errors

from dgemma.checkpoint import hub, resolve


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Calls of `snapshot_download`, which gives a directory without a download."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(repository: str, **options: Any) -> str:
        calls.append((repository, options))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def test_directories_are_themselves(tmp_path: Path, downloads: list[Any], monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert resolve(tmp_path) == tmp_path
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve("owner/name") == Path("owner/name")  # a directory comes before a Hugging Face id
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert resolve("~/owner") == tmp_path / "owner"
    assert not downloads


def test_hugging_face_ids_are_downloaded_without_pickles(tmp_path: Path, downloads: list[Any]):
    assert resolve("google/diffusiongemma-26B-A4B-it") == tmp_path / "snapshot"
    resolve("some-one/m.odel_1@refs/pr/3")
    assert [(name, options["revision"]) for name, options in downloads] == [
        ("google/diffusiongemma-26B-A4B-it", None),
        ("some-one/m.odel_1", "refs/pr/3"),
    ]
    assert downloads[0][1]["allow_patterns"] == ["*.json", "*.safetensors", "*.jinja", "tokenizer*"]


@pytest.mark.parametrize(
    "name", ["nowhere", "./a/b", "/a/b", "a/b/c", "a\\b", "../a", "a b/c", "a/", "a/b@", "é/b", Path("owner/name")]
)
def test_what_is_neither(name: Any, downloads: list[Any]):
    refused(lambda: resolve(name), str(name), "no such directory", "neither demo nor a Hugging Face id")
    assert not downloads


def test_empty_name(downloads: list[Any]):
    refused(lambda: resolve(""), "name is empty")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.gguf", "GGUF"),
        ("pytorch_model.bin", "pickle"),
        ("m.pt", "pickle"),
        ("model.safetensors", "give the directory that holds it"),
    ],
)
def test_files(tmp_path: Path, downloads: list[Any], name: str, words: str):
    (tmp_path / name).write_bytes(b"")
    refused(lambda: resolve(tmp_path / name), str(tmp_path / name), "is a file", words)


def hub_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)  # the constructors differ between versions of the library
    error.args = ("first line\n  second line",)
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(errors.RepositoryNotFoundError), "no repository owner/name there"),
        (hub_error(errors.GatedRepoError), "https://huggingface.co/owner/name"),
        (hub_error(errors.RevisionNotFoundError), "no revision 'v9'"),
        (hub_error(errors.LocalEntryNotFoundError), "HF_HUB_OFFLINE"),
        (hub_error(errors.OfflineModeIsEnabled), "HF_HUB_OFFLINE"),
        (ConnectionError("name\nresolution failed"), "name resolution failed"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_every_error_of_the_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(lambda: resolve("owner/name@v9"), "owner/name@v9", "no such directory, and not fetched", words)


def test_interrupting_a_download_is_no_error_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("owner/name")


def test_offline_needs_no_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The real library with HF_HUB_OFFLINE: what is in no cache is said to be so."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(lambda: resolve("owner/name"), "owner/name", "HF_HUB_OFFLINE")


def test_demo_is_the_packaged_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    package = tmp_path / "package"
    (package / "demo").mkdir(parents=True)
    monkeypatch.setattr(hub.importlib.resources, "files", lambda name: package)
    refused(lambda: resolve("demo"), str(package / "demo"), "not installed")
    (package / "demo" / "config.json").write_text("{}")
    assert resolve("demo") == package / "demo"
    assert resolve("./demo") == Path("demo")
