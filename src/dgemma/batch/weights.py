"""Which model it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..checkpoint.files import read_samples


def weights(directory: Path) -> str:
    """A digest of a model's directory that tells it from another: its settings, and samples of its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*directory.glob("*.json"), *directory.glob("*.jinja"), *directory.glob("*.safetensors")]):
        for sample in read_samples(path):
            digest.update(sample)
    return digest.hexdigest()
