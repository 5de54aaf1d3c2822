"""Which model it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

SAMPLES, SAMPLE = 32, 1 << 16  # pieces of a weights file, and their bytes, that tell it from another


def weights(directory: Path) -> str:
    """A digest of a model's directory that tells it from another: its settings, and samples of its weights."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*directory.glob("*.json"), *directory.glob("*.jinja"), *directory.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in sorted({number * max(0, size - SAMPLE) // (SAMPLES - 1) for number in range(SAMPLES)}):
                file.seek(place)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()
