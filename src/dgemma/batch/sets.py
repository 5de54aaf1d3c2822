"""Sets of millions of members in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

_LEAST = 64  # places of a table
_TABLES = 64


class Lines:
    """A set of line numbers: one bit each up to the greatest, 0.125 MB a million lines."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, line: int) -> bool:
        """Whether it was new."""
        place, bit = line >> 3, 1 << (line & 7)
        if place >= len(self._bits):
            self._bits.extend(bytes(max(4096, place + 1 - len(self._bits))))
        if self._bits[place] & bit:
            return False
        self._bits[place] |= bit
        self._count += 1
        return True

    def __contains__(self, line: int) -> bool:
        place = line >> 3
        return place < len(self._bits) and bool(self._bits[place] & 1 << (line & 7))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        for place, byte in enumerate(self._bits):
            if byte:
                yield from (place << 3 | bit for bit in range(8) if byte >> bit & 1)


class Keys:
    """A set of texts, kept as 64-bit hashes: 12 to 24 MB a million.

    Two of ten million different texts are taken for one with a probability of three in a million.
    """

    def __init__(self) -> None:
        self._tables = [array("Q", bytes(8 * _LEAST)) for _ in range(_TABLES)]
        self._counts = [0] * _TABLES

    def add(self, text: str) -> bool:
        """Whether it was new."""
        key = hash(text) & 0xFFFF_FFFF_FFFF_FFFF or 1  # 0 is an empty place
        index = key % _TABLES
        if not _put(self._tables[index], key):
            return False
        self._counts[index] += 1
        if 3 * self._counts[index] > 2 * len(self._tables[index]):
            self._tables[index] = _grown(self._tables[index])
        return True

    def __len__(self) -> int:
        return sum(self._counts)


def _put(table: array[int], key: int) -> bool:
    size = len(table)
    place = (key >> 6) % size
    while table[place]:
        if table[place] == key:
            return False
        place = (place + 1) % size
    table[place] = key
    return True


def _grown(table: array[int]) -> array[int]:
    larger = array("Q", bytes(8 * 2 * len(table)))
    for key in table:
        if key:
            _put(larger, key)
    return larger
