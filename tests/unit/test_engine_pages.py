"""Page tables against a model that keeps whole prefixes instead of hashes and searches instead of counting."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from dgemma.engine.pages import Pages, Pool, Table, page_keys

Prefix = tuple[int, ...]
EXAMPLES = settings(max_examples=40, stateful_step_count=30, deadline=None)
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)


class PoolMachine(RuleBasedStateMachine):
    """One pool; the model has each page's users, its content, and the time it was last let go."""

    @initialize(pages=st.integers(1, 6))
    def begin(self, pages: int) -> None:
        self.pool = Pool(pages)
        self.users = [0] * pages
        self.content: list[bytes | None] = [None] * pages
        self.left = [0] * pages
        self.clock = 0

    def page_of(self, key: bytes) -> int | None:
        return next((page for page, content in enumerate(self.content) if content == key), None)

    def used(self) -> list[int]:
        return [page for page, users in enumerate(self.users) if users]

    @precondition(lambda self: 0 in self.users)
    @rule()
    def take(self) -> None:
        free = [page for page, users in enumerate(self.users) if not users]
        empty = [page for page in free if self.content[page] is None]
        oldest = min(free, key=lambda page: self.left[page])
        page = self.pool.take()
        assert page in (empty or [oldest])
        self.users[page], self.content[page] = 1, None

    @rule(key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def share(self, key: bytes) -> None:
        page = self.page_of(key)
        assert self.pool.knows(key) == (page is not None)
        if page is not None:
            assert self.pool.share(key) == page
            self.users[page] += 1

    @precondition(lambda self: any(self.users))
    @rule(data=st.data(), key=st.sampled_from([b"a", b"b", b"c", b"d"]))
    def name(self, data: st.DataObject, key: bytes) -> None:
        page = data.draw(st.sampled_from(self.used()))
        self.pool.name(page, key)
        if self.page_of(key) is None and self.content[page] is None:
            self.content[page] = key

    @precondition(lambda self: any(self.users))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.used()))
        self.pool.release(page)
        self.users[page] -= 1
        self.clock += 1
        self.left[page] = self.clock

    @invariant()
    def counts(self) -> None:
        assert self.pool.available == self.users.count(0)

    def teardown(self) -> None:
        """Everything given back: each page can be had exactly once."""
        if hasattr(self, "pool"):
            for page, users in enumerate(self.users):
                for _ in range(users):
                    self.pool.release(page)
            assert sorted(self.pool.take() for _ in self.users) == list(range(len(self.users)))


class TableMachine(RuleBasedStateMachine):
    """Several sequences on one pair of pools; the model writes each token's whole prefix into its place of its page."""

    @initialize(size=st.integers(1, 4), window=st.integers(1, 9), full=st.integers(6, 30), sliding=st.integers(4, 20))
    def begin(self, size: int, window: int, full: int, sliding: int) -> None:
        self.pages = Pages(size=size, window=window, full=full, sliding=sliding)
        self.pools = self.pages.full, self.pages.sliding
        self.held: list[list[Prefix | None]] = [[None] * (size * full), [None] * (size * sliding)]
        self.names: tuple[dict[Prefix, int], dict[Prefix, int]] = ({}, {})
        self.live: list[tuple[Table, list[int]]] = []

    def parts(self, table: Table) -> list[list[int | None]]:
        return [[*table.full], [*table.sliding]]

    def seen(self, length: int) -> int:
        """The first page that sliding layers look at after `length` tokens."""
        return max(0, length - self.pages.window + 1) // self.pages.size

    @rule(tokens=TOKENS, reuse=st.booleans())
    def enter(self, tokens: list[int], reuse: bool) -> None:
        size, table = self.pages.size, Table(self.pages)
        self.live.append((table, tokens))
        if not reuse:
            return
        cuts = [tuple(tokens[: size * (n + 1)]) for n in range((len(tokens) - 1) // size)]
        most = 0
        for count in range(1, len(cuts) + 1):
            behind = min(count, self.seen(count * size))
            if all(cut in self.names[0] for cut in cuts[:count]) and all(
                cut in self.names[1] for cut in cuts[behind:count]
            ):
                most = count
        assert table.reuse(tokens) == most * size == table.length < len(tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), more=st.integers(0, 9), fresh=st.lists(st.integers(0, 1), max_size=4))
    def encode(self, data: st.DataObject, more: int, fresh: list[int]) -> None:
        """Some more of a sequence is encoded, which may itself have grown; or not, where pages are missing."""
        table, tokens = data.draw(st.sampled_from(self.live))
        tokens += fresh
        more = min(more, len(tokens) - table.length)
        size, end = self.pages.size, -(-(table.length + more) // self.pages.size)
        wanted = [end - len(part) for part in self.parts(table)]
        assert table.missing(more) == tuple(wanted)
        fits = all(count <= pool.available for count, pool in zip(wanted, self.pools, strict=True))
        assert table.fits(more) == fits
        if not fits:
            return
        before = self.parts(table)
        table.reserve(more)
        for kind, (old, new) in enumerate(zip(before, self.parts(table), strict=True)):
            for page in new[len(old) :]:
                assert page is not None
                self.held[kind][page * size : (page + 1) * size] = [None] * size
                self.forget(kind, page)
            for place in range(table.length, table.length + more):
                page = new[place // size]
                assert page is not None
                self.held[kind][page * size + place % size] = tuple(tokens[: place + 1])
        in_use = sum(page is not None for page in table.sliding)
        assert in_use <= self.pages.sliding_needed(more)
        for kind, part in enumerate(self.parts(table)):
            for number in range(table.length // size, (table.length + more) // size):
                cut, page = tuple(tokens[: (number + 1) * size]), part[number]
                if page is not None and page not in self.names[kind].values():
                    self.names[kind].setdefault(cut, page)
        table.advance(tokens, more)

    def forget(self, kind: int, page: int) -> None:
        for cut in [cut for cut, named in self.names[kind].items() if named == page]:
            del self.names[kind][cut]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        place = data.draw(st.integers(0, len(self.live) - 1))
        table, _ = self.live.pop(place)
        table.release()
        assert table.full == table.sliding == [] and table.length == 0

    @invariant()
    def nobody_sees_anothers_tokens(self) -> None:
        size = self.pages.size
        for table, tokens in self.live:
            first = self.seen(table.length)
            assert [page is None for page in table.sliding] == [n < first for n in range(len(table.sliding))]
            assert [*table.lines[False]] == table.full
            assert [*table.lines[True]] == [page or 0 for page in table.sliding]
            for kind, part in enumerate(self.parts(table)):
                for place in range(first * size if kind else 0, table.length):
                    page = part[place // size]
                    assert page is not None
                    assert self.held[kind][page * size + place % size] == tuple(tokens[: place + 1])

    @invariant()
    def none_is_lost_and_none_is_kept(self) -> None:
        for kind, pool in enumerate(self.pools):
            used = Counter(page for table, _ in self.live for page in self.parts(table)[kind] if page is not None)
            assert pool.available == pool.size - len(used)
            assert [pool._users[page] for page in range(pool.size)] == [used[page] for page in range(pool.size)]

    def teardown(self) -> None:
        if hasattr(self, "pages"):
            for table, _ in self.live:
                table.release()
            for pool in self.pools:
                assert sorted(pool.take() for _ in range(pool.size)) == list(range(pool.size))


PoolMachine.TestCase.settings = TableMachine.TestCase.settings = EXAMPLES
TestPool = PoolMachine.TestCase
TestTable = TableMachine.TestCase


@settings(max_examples=200, deadline=None)
@given(one=TOKENS, other=TOKENS, size=st.integers(1, 4), common=st.integers(0, 24))
def test_keys_are_equal_exactly_where_prefixes_are(one: list[int], other: list[int], size: int, common: int) -> None:
    other = one[:common] + other
    mine, yours = page_keys(one, size), page_keys(other, size)
    assert len(mine) == len(one) // size and len(yours) == len(other) // size
    for number, (a, b) in enumerate(zip(mine, yours, strict=False), start=1):
        assert (a == b) == (one[: number * size] == other[: number * size])
    # Nor is a page ever taken for one at another place.
    assert len({*mine}) == len(mine)


@given(tokens=TOKENS, page=st.integers(0, 23), value=st.integers(2, 300_000))
def test_every_token_before_a_page_counts(tokens: list[int], page: int, value: int) -> None:
    assume(page < len(tokens))
    other = [*tokens]
    other[page] = value
    same = [a == b for a, b in zip(page_keys(tokens, 1), page_keys(other, 1), strict=True)]
    assert same == [place < page for place in range(len(tokens))]


def test_the_page_unused_for_longest_is_forgotten_first() -> None:
    pool = Pool(3)
    pages = [pool.take() for _ in range(3)]
    for page, key in zip(pages, (b"a", b"b", b"c"), strict=True):
        pool.name(page, key)
    for page in (pages[1], pages[0], pages[2]):
        pool.release(page)
    pool.release(pool.share(b"b"))  # used again: now the latest
    order = [pool.take() for _ in range(3)]
    assert order == [pages[0], pages[2], pages[1]]
    assert not any(map(pool.knows, (b"a", b"b", b"c")))


def test_a_sequences_end_is_forgotten_before_its_beginning() -> None:
    pages = Pages(size=2, window=100, full=4, sliding=4)
    tokens = list(range(9))
    table = Table(pages)
    table.reserve(8)
    table.advance(tokens, 8)
    table.release()
    known = []
    for taken in range(4):
        again = Table(pages)
        known.append(again.reuse(tokens))
        again.release()
        other = Table(pages)
        other.reserve(2 * (taken + 1))
        other.release()
    assert known == [8, 6, 4, 2]
    assert all(a > b for a, b in pairwise(known))


def test_a_page_with_no_users_cannot_be_released() -> None:
    pool = Pool(2)
    page = pool.take()
    pool.release(page)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(page)


@pytest.mark.parametrize("known", [True, False])
def test_pages_that_nobody_may_find_are_used_again(known: bool) -> None:
    """One sequence after another touches as many pages as one of them needs; otherwise all are touched in the end."""
    pages = Pages(size=2, window=100, full=40, sliding=40)
    touched: set[int] = set()
    for turn in range(10):
        table = Table(pages, known=known)
        table.reserve(8)
        touched.update(table.full)
        table.advance([turn] * 9, 8)
        table.release()
    assert len(touched) == (40 if known else 4)
    assert pages.full.available == 40
