"""Schedules of large groups, as vectors over ranks: the entries of `schedules.py`, a wave of messages at a time.

A ring of 1000 ranks has two million messages; as lists of entries they would take seconds to make and a gigabyte
to hold. A wave is a set of messages of one step of which each rank sends at most one. Where a rank sends several
in a step, the waves are in the order in which they leave its port: to the next rank first. A test holds the waves
of each algorithm equal to its entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.comm.transfers import log2_ceil, log2_floor

Ints = npt.NDArray[np.int64]


class Pattern:
    """Who sends to whom: ``src`` and ``dst``, shape (messages,). Compared by identity: routes can be kept."""

    def __init__(self, src: Ints, dst: Ints) -> None:
        self.src, self.dst = src, dst


class Wave(NamedTuple):
    """Messages of one step: chunks ``start <= c < stop`` of the sender's array go to the receiver."""

    pattern: Pattern
    start: Ints
    stop: Ints
    reduce: bool


Step = list[Wave]
Steps = Iterator[Step]


# --- patterns ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def _shift(p: int, by: int) -> Pattern:
    """Everybody to the rank ``by`` places on."""
    ranks = np.arange(p)
    return Pattern(ranks, (ranks + by) % p)


@lru_cache(maxsize=256)
def _exchange(p: int, distance: int, world_size: int) -> Pattern:
    """The first ``p`` ranks in pairs, both ways."""
    src = np.arange(p)
    src = src[np.argsort(((src ^ distance) - src) % world_size, kind="stable")]
    return Pattern(src, src ^ distance)


@lru_cache(maxsize=256)
def _tree(p: int, root: int, step: int) -> Pattern:
    """From those who have it to as many who do not: step ``step`` of a broadcast from ``root``."""
    src = np.sort((root + np.arange(min(2**step, p - 2**step))) % p)
    return Pattern(src, (src + 2**step) % p)


@lru_cache(maxsize=256)
def _reversed(pattern: Pattern) -> Pattern:
    return Pattern(pattern.dst, pattern.src)


@lru_cache(maxsize=64)
def _extras(p: int) -> Pattern:
    """From the ranks beyond the largest power of two to their partners below it."""
    half = 2 ** log2_floor(p)
    return Pattern(np.arange(half, p), np.arange(p - half))


@lru_cache(maxsize=64)
def _to_root(p: int, root: int) -> Pattern:
    others = (root + np.arange(1, p)) % p
    others = others[np.argsort((root - others) % p, kind="stable")]
    return Pattern(others, np.full(p - 1, root))


def _whole(pattern: Pattern, reduce: bool, chunks: int = 1) -> Wave:
    n = len(pattern.src)
    return Wave(pattern, np.zeros(n, np.int64), np.full(n, chunks), reduce)


def _chunk(pattern: Pattern, chunk: Ints, reduce: bool) -> Wave:
    return Wave(pattern, chunk, chunk + 1, reduce)


# --- algorithms -------------------------------------------------------------------------------------------


def _ring_reduce_scatter(p: int, root: int = 0) -> Steps:
    ranks, on = np.arange(p), _shift(p, 1)
    for s in range(p - 1):
        yield [_chunk(on, (ranks - 1 - s) % p, True)]


def _all_gather(p: int, root: int = 0) -> Steps:
    ranks, on = np.arange(p), _shift(p, 1)
    for s in range(p - 1):
        yield [_chunk(on, (ranks - s) % p, False)]


def _ring(p: int, root: int = 0) -> Steps:
    yield from _ring_reduce_scatter(p)
    yield from _all_gather(p)


def _broadcast(p: int, root: int = 0) -> Steps:
    for step in range(log2_ceil(p)):
        yield [_whole(_tree(p, root, step), False)]


def _binomial_tree(p: int, root: int = 0) -> Steps:
    for step in reversed(range(log2_ceil(p))):
        yield [_whole(_reversed(_tree(p, 0, step)), True)]
    yield from _broadcast(p)


def _recursive_doubling(p: int, root: int = 0) -> Steps:
    half = 2 ** log2_floor(p)
    core = ([_whole(_exchange(half, 2**k, p), True)] for k in range(log2_floor(p)))
    yield from _folded(p, 1, core)


def _halving_doubling(p: int, root: int = 0) -> Steps:
    half = 2 ** log2_floor(p)
    yield from _folded(p, half, _halvings_and_doublings(half, p))


def _halvings_and_doublings(p: int, world_size: int) -> Steps:
    steps = log2_floor(p)
    for step in range(2 * steps):
        halving = step < steps
        d = p >> (step + 1) if halving else 1 << (step - steps)
        on = _exchange(p, d, world_size)
        block = (on.dst if halving else on.src) // d * d
        yield [Wave(on, block, block + d, halving)]


def _folded(p: int, chunks: int, core: Steps) -> Steps:
    if p == 2 ** log2_floor(p):
        yield from core
        return
    yield [_whole(_extras(p), True, chunks)]
    yield from core
    yield [_whole(_reversed(_extras(p)), False, chunks)]


def _direct(p: int, root: int = 0) -> Steps:
    if p > 1:
        yield [_whole(_shift(p, by), True) for by in range(1, p)]


def _direct_reduce_scatter(p: int, root: int = 0) -> Steps:
    if p > 1:
        yield [_chunk(on, on.dst, True) for on in (_shift(p, by) for by in range(1, p))]


def _direct_reduce(p: int, root: int = 0) -> Steps:
    if p > 1:
        yield [_whole(_to_root(p, root), True)]


def _gather(p: int, root: int = 0) -> Steps:
    if p > 1:
        pattern = _to_root(p, root)
        yield [_chunk(pattern, pattern.src, False)]


def _scatter(p: int, root: int = 0) -> Steps:
    if p > 1:
        ones = (Pattern(np.array([root]), np.array([(root + by) % p])) for by in range(1, p))
        yield [_chunk(one, one.dst, False) for one in ones]


def _all_to_all(p: int, root: int = 0) -> Steps:
    ranks = np.arange(p)
    for s in range(p - 1):
        on = _shift(p, s + 1)
        yield [_chunk(on, ranks * p + on.dst, False)]


_ALGORITHMS: dict[str, tuple[Callable[[int, int], Steps], Callable[[int], int]]] = {
    "ring": (_ring, lambda p: p),
    "binomial_tree": (_binomial_tree, lambda p: 1),
    "recursive_doubling": (_recursive_doubling, lambda p: 1),
    "halving_doubling": (_halving_doubling, lambda p: 2 ** log2_floor(p)),
    "direct": (_direct, lambda p: 1),
    "broadcast": (_broadcast, lambda p: 1),
    "all_gather": (_all_gather, lambda p: p),
    "gather": (_gather, lambda p: p),
    "scatter": (_scatter, lambda p: p),
    "all_to_all": (_all_to_all, lambda p: p * p),
    "direct_reduce": (_direct_reduce, lambda p: 1),
    "direct_reduce_scatter": (_direct_reduce_scatter, lambda p: p),
}


def waves(name: str, world_size: int, root: int = 0) -> Steps:
    """The steps of a schedule of that name (see `schedules`), made as they are asked for."""
    return _ALGORITHMS[name][0](world_size, root)


def chunks(name: str, world_size: int) -> int:
    """How many chunks the array is cut into."""
    return _ALGORITHMS[name][1](world_size)
