"""What a collective costs: the textbook's formulas, and the same numbers read off a schedule's entries.

Model (Hockney's, as in Thakur, Rabenseifner and Gropp 2005): a message of n bytes takes α + nβ; a node has
one full-duplex port, so that what it sends (or receives) in one step goes one after another, the latencies
overlapping; adding n bytes takes nγ; a step starts when the one before has ended everywhere.

Arguments everywhere: p ranks, n bytes, `alpha` seconds a message, `beta` seconds a byte on the wire, `gamma`
seconds a byte reduced. Results are seconds. A test holds each formula equal to `cost` of its schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from minidp.comm.transfers import Schedule, chunk_bounds, log2_ceil, log2_floor

Formula = Callable[[int, float, float, float, float], float]


def ring(p: int, n: float, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """2(p−1)α + 2((p−1)/p)nβ + ((p−1)/p)nγ, where p divides n."""
    return 2 * (p - 1) * alpha + 2 * (p - 1) / p * n * beta + (p - 1) / p * n * gamma


def binomial_tree(p: int, n: float, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """2⌈log₂ p⌉(α + nβ) + ⌈log₂ p⌉nγ."""
    return 2 * log2_ceil(p) * (alpha + n * beta) + log2_ceil(p) * n * gamma


def fold(p: int, n: float, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """2α + 2nβ + nγ to fold p ranks into p' = 2^⌊log₂ p⌋ and back; nothing if p is a power of two."""
    return 0.0 if p == 1 << log2_floor(p) else 2 * alpha + 2 * n * beta + n * gamma


def recursive_doubling(p: int, n: float, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """log₂ p' (α + nβ + nγ), plus the fold."""
    return log2_floor(p) * (alpha + n * beta + n * gamma) + fold(p, n, alpha, beta, gamma)


def halving_doubling(p: int, n: float, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """2 log₂ p' α + 2((p'−1)/p')nβ + ((p'−1)/p')nγ, plus the fold, where p' divides n."""
    share = 1 - 1 / (1 << log2_floor(p))
    inside = 2 * log2_floor(p) * alpha + 2 * share * n * beta + share * n * gamma
    return inside + fold(p, n, alpha, beta, gamma)


def direct(p: int, n: float, alpha: float, beta: float, gamma: float = 0.0) -> float:
    """α + (p−1)nβ + (p−1)nγ; nothing for p = 1."""
    return 0.0 if p == 1 else alpha + (p - 1) * n * (beta + gamma)


ALL_REDUCE: dict[str, Formula] = {
    "ring": ring,
    "binomial_tree": binomial_tree,
    "recursive_doubling": recursive_doubling,
    "halving_doubling": halving_doubling,
    "direct": direct,
}


@lru_cache(maxsize=4096)
def fastest(p: int, n: float, alpha: float, beta: float, gamma: float = 0.0) -> str:
    """Name of the all-reduce with the least cost; of several, the first in `ALL_REDUCE`."""
    return min(ALL_REDUCE, key=lambda name: ALL_REDUCE[name](p, n, alpha, beta, gamma))


def cost(
    schedule: Schedule,
    nbytes: int,
    latency_s: float,
    seconds_per_byte: float,
    reduce_seconds_per_byte: float = 0.0,
    itemsize: int = 1,
) -> float:
    """Seconds that the schedule takes for `nbytes`, cut at whole elements of `itemsize` bytes.

    A step takes α, the busiest port's bytes · β, and the bytes that the busiest rank adds · γ.
    """
    sizes = [(hi - lo) * itemsize for lo, hi in chunk_bounds(nbytes // itemsize, schedule.chunks)]
    total = 0.0
    for transfers in schedule.rounds:
        out, in_, added = ([0] * schedule.world_size for _ in range(3))
        for t in transfers:
            out[t.src] += sizes[t.chunk]
            in_[t.dst] += sizes[t.chunk]
            added[t.dst] += sizes[t.chunk] if t.op == "reduce" else 0
        total += latency_s + max(*out, *in_) * seconds_per_byte + max(added) * reduce_seconds_per_byte
    return total
