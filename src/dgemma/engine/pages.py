"""Which pages hold whose tokens: allocation, sharing between requests, reuse of what is already encoded.

A page holds the keys and values of P neighbouring tokens. Full layers and sliding layers have a pool of pages each,
since sliding layers forget what is behind their window.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

Key = bytes


class Pool:
    """Pages of one kind of layer: in use, idle (nobody's, but findable by what they hold), or empty."""

    def __init__(self, pages: int):
        self.size = pages
        self._empty = list(range(pages))[::-1]
        self._users = [0] * pages
        self._key: list[Key | None] = [None] * pages
        self._known: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return len(self._empty) + len(self._idle)

    def take(self) -> int:
        """A page for one user; what the idle page used longest ago holds is forgotten when no page is empty."""
        if self._empty:
            page = self._empty.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            key = self._key[page]
            assert key is not None
            del self._known[key]
            self._key[page] = None
        self._users[page] = 1
        return page

    def knows(self, key: Key) -> bool:
        """Whether a page with this content is here."""
        return key in self._known

    def share(self, key: Key) -> int:
        """The page with this content, for one more user."""
        page = self._known[key]
        self._idle.pop(page, None)
        self._users[page] += 1
        return page

    def name(self, page: int, key: Key) -> None:
        """Makes a full page findable; of two pages with the same content the first stays known."""
        if key not in self._known and self._key[page] is None:
            self._known[key], self._key[page] = page, key

    def release(self, page: int) -> None:
        """One user less. The last one's page becomes idle if it is findable, else empty."""
        self._users[page] -= 1
        assert self._users[page] >= 0, f"page {page} is released twice"
        if self._users[page] == 0:
            if self._key[page] is None:
                self._empty.append(page)
            else:
                self._idle[page] = None


def page_keys(tokens: Sequence[int], size: int, before: Key = b"") -> list[Key]:
    """A name for each whole page of a sequence, of that page's tokens and all before them (SHA-256).

    Args:
        before: the name of the page before the first.
    """
    keys = []
    for end in range(size, len(tokens) + 1, size):
        before = hashlib.sha256(before + array("q", tokens[end - size : end]).tobytes()).digest()
        keys.append(before)
    return keys


class Pages:
    """The two pools of an engine.

    Args:
        size: tokens a page.
        window: of the sliding layers.
        full, sliding: pages in each pool.
    """

    def __init__(self, *, size: int, window: int, full: int, sliding: int):
        self.size, self.window = size, window
        self.full, self.sliding = Pool(full), Pool(sliding)

    def first_seen(self, position: int) -> int:
        """The first page that the sliding layers of a token at `position` look at."""
        return max(0, position - self.window + 1) // self.size

    def sliding_needed(self, tokens: int) -> int:
        """Sliding pages in use at most while `tokens` are added at once."""
        return -(-(self.window + tokens) // self.size) + 1


class Table:
    """One sequence's pages, in order; `length` tokens of it are encoded.

    `sliding` holds None where the window has moved on. `lines` has the same as a card is told it, by kind of layer
    (True: sliding), with zeros there.

    Args:
        known: whether others may find its pages by what they hold; if not, they are empty again once it is done.
    """

    def __init__(self, pages: Pages, *, known: bool = True):
        self.pages, self.known = pages, known
        self.length = 0
        self.full: list[int] = []
        self.sliding: list[int | None] = []
        self.lines = {False: array("i"), True: array("i")}
        self._key: Key = b""  # of the last page that is encoded whole

    def reuse(self, tokens: Sequence[int]) -> int:
        """Takes over pages that hold the beginning of `tokens`, for an empty table; returns how many tokens that is.

        At least one token is left to encode.
        """
        assert self.length == 0 and not self.full
        keys = page_keys(tokens[: len(tokens) - 1], self.pages.size)
        count = next((n for n, key in enumerate(keys) if not self.pages.full.knows(key)), len(keys))
        while count and not all(map(self.pages.sliding.knows, keys[self._behind(count) : count])):
            count -= 1
        first = self._behind(count)
        sliding = [self.pages.sliding.share(key) for key in keys[first:count]]
        self._add([self.pages.full.share(key) for key in keys[:count]], [*[None] * first, *sliding])
        self.length = count * self.pages.size
        self._key = keys[count - 1] if count else b""
        return self.length

    def missing(self, tokens: int) -> tuple[int, int]:
        """New pages that `tokens` more tokens take, in the full and in the sliding pool."""
        count = -(-(self.length + tokens) // self.pages.size)
        return count - len(self.full), count - len(self.sliding)

    def fits(self, tokens: int) -> bool:
        """Whether the pools have those pages."""
        full, sliding = self.missing(tokens)
        return full <= self.pages.full.available and sliding <= self.pages.sliding.available

    def reserve(self, tokens: int) -> None:
        """Takes the pages for `tokens` more tokens; `fits` was asked before."""
        full, sliding = self.missing(tokens)
        self._add([self.pages.full.take() for _ in range(full)], [self.pages.sliding.take() for _ in range(sliding)])

    def advance(self, tokens: Sequence[int], count: int) -> None:
        """`count` more of a sequence that begins with `tokens` are encoded: names full pages, frees what the sliding
        layers will not look at again.
        """
        size, before = self.pages.size, self.length // self.pages.size
        self.length += count
        if self.known and self.length // size > before:
            keys = page_keys(tokens[before * size : self.length], size, self._key)
            self._key = keys[-1]
            for index, key in enumerate(keys, start=before):
                self.pages.full.name(self.full[index], key)
                sliding = self.sliding[index]
                if sliding is not None:
                    self.pages.sliding.name(sliding, key)
        self._free_sliding(self.pages.first_seen(self.length))

    def release(self) -> None:
        """Gives all pages back. The last ones go first, so that the beginning of a sequence stays known longest."""
        self._free_sliding(len(self.sliding))
        for page in reversed(self.full):
            self.pages.full.release(page)
        self.full, self.sliding, self.length = [], [], 0
        self.lines, self._key = {False: array("i"), True: array("i")}, b""

    def _add(self, full: Sequence[int], sliding: Sequence[int | None]) -> None:
        """Puts pages behind those that it has."""
        self.full += full
        self.sliding += sliding
        self.lines[False].extend(full)
        self.lines[True].extend(page or 0 for page in sliding)

    def _behind(self, count: int) -> int:
        """The first page that what follows `count` whole pages looks at in sliding layers."""
        return min(count, self.pages.first_seen(count * self.pages.size))

    def _free_sliding(self, end: int) -> None:
        for index in reversed(range(end)):
            page = self.sliding[index]
            if page is not None:
                self.pages.sliding.release(page)
                self.sliding[index], self.lines[True][index] = None, 0
