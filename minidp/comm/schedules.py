"""Collective algorithms as data: who sends which chunk to whom, in which step.

An algorithm is a pure function ``world_size -> Schedule``. The same list of entries is executed by the
communicators, timed by the virtual world, drawn in notebooks, and checked entry by entry in the tests.
How a schedule is read is told in `minidp.comm.transfers`; one rule of it matters most here: contributions of
one step are added in order of rank, the receiver's own value taking its place. So `direct`, where all
arrive in one step, gives the same sum, to the bit, on every rank.

Costs are given for p ranks, n bytes, latency α, seconds per byte β, seconds per reduced byte γ, and
are functions in `minidp.comm.costs`. Sources: Thakur, Rabenseifner and Gropp, "Optimization of Collective
Communication Operations in MPICH", IJHPCA 19(1), 2005; for the ring's bandwidth optimality Patarasuk and
Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from minidp.comm.transfers import (
    Message,
    Schedule,
    Transfer,
    bytes_sent,
    chunk_bounds,
    log2_ceil,
    log2_floor,
    simulate,
)

__all__ = [
    "ALL_REDUCE",
    "Message",
    "Schedule",
    "Transfer",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "binomial_tree",
    "broadcast",
    "bytes_sent",
    "chunk_bounds",
    "direct",
    "direct_reduce",
    "direct_reduce_scatter",
    "gather",
    "halving_doubling",
    "recursive_doubling",
    "reduce",
    "reduce_scatter",
    "ring",
    "scatter",
    "simulate",
]


def _ranks(world_size: int, root: int = 0) -> range:
    """All ranks; ValueError if there are none, or if `root` is not one of them."""
    if world_size < 1:
        raise ValueError(f"world_size must be at least 1, not {world_size}")
    if not 0 <= root < world_size:
        raise ValueError(f"rank {root} is not one of the {world_size} ranks 0 to {world_size - 1}")
    return range(world_size)


def _in_a_row(name: str, first: Schedule, second: Schedule) -> Schedule:
    later = [t._replace(step=t.step + first.steps) for t in second.transfers]
    return Schedule(name, first.world_size, first.chunks, (*first.transfers, *later))


# --- one-way collectives, and the two halves of an all-reduce -----------------------------------------------


@lru_cache(maxsize=64)
def broadcast(world_size: int, src: int = 0) -> Schedule:
    """Binomial tree from `src`: those who have the array double each step. ⌈log₂ p⌉ steps.

    Bytes: n a message, p−1 messages in all, ⌈log₂ p⌉ of them from `src`. Cost ⌈log₂ p⌉(α + nβ).
    """
    p = len(_ranks(world_size, src))
    transfers = [
        Transfer(step, (src + i) % p, (src + i + 2**step) % p, 0, "copy")
        for step in range(log2_ceil(p))
        for i in range(min(2**step, p - 2**step))
    ]
    return Schedule("broadcast", p, 1, tuple(transfers))


@lru_cache(maxsize=64)
def reduce(world_size: int, dst: int = 0) -> Schedule:
    """Binomial tree to `dst`: the broadcast backwards. ⌈log₂ p⌉ steps.

    Bytes: every rank but `dst` sends n once. Cost ⌈log₂ p⌉(α + nβ + nγ). The other ranks' arrays hold
    partial sums afterwards.
    """
    tree = broadcast(world_size, dst)
    back = [Transfer(tree.steps - 1 - t.step, t.dst, t.src, 0, "reduce") for t in reversed(tree.transfers)]
    return Schedule("reduce", world_size, 1, tuple(back))


@lru_cache(maxsize=64)
def reduce_scatter(world_size: int) -> Schedule:
    """Ring: rank r ends with the sum of chunk r; its other chunks hold partial sums. p−1 steps.

    Bytes a rank: all chunks but its own, (p−1)/p·n. Cost (p−1)α + ((p−1)/p)nβ + ((p−1)/p)nγ.
    """
    p = len(ranks := _ranks(world_size))
    hops = [Transfer(s, r, (r + 1) % p, (r - 1 - s) % p, "reduce") for s in range(p - 1) for r in ranks]
    return Schedule("reduce_scatter", p, p, tuple(hops))


@lru_cache(maxsize=64)
def all_gather(world_size: int) -> Schedule:
    """Ring: rank r starts with chunk r, and ends with all of them. p−1 steps.

    Bytes a rank: (p−1)/p·n, for n bytes in all. Cost (p−1)α + ((p−1)/p)nβ.
    """
    p = len(ranks := _ranks(world_size))
    hops = [Transfer(s, r, (r + 1) % p, (r - s) % p, "copy") for s in range(p - 1) for r in ranks]
    return Schedule("all_gather", p, p, tuple(hops))


@lru_cache(maxsize=64)
def gather(world_size: int, dst: int = 0) -> Schedule:
    """Rank r's chunk r goes straight to `dst`. 1 step. Cost α + ((p−1)/p)nβ, at the receiving port."""
    transfers = tuple(Transfer(0, r, dst, r, "copy") for r in _ranks(world_size, dst) if r != dst)
    return Schedule("gather", world_size, world_size, transfers)


@lru_cache(maxsize=64)
def scatter(world_size: int, src: int = 0) -> Schedule:
    """Chunk r of `src` goes straight to rank r. 1 step. Cost α + ((p−1)/p)nβ, at the sending port."""
    transfers = tuple(Transfer(0, src, r, r, "copy") for r in _ranks(world_size, src) if r != src)
    return Schedule("scatter", world_size, world_size, transfers)


@lru_cache(maxsize=64)
def all_to_all(world_size: int) -> Schedule:
    """Pairwise exchange: in step s rank r sends to rank r+s+1. p−1 steps.

    The array is the whole p × p matrix of pieces: chunk i·p + j is what rank i has for rank j. Rank r
    starts with row r, and ends with column r too. Bytes a rank: (p−1)/p of its row.
    Cost for rows of n bytes: (p−1)α + ((p−1)/p)nβ.
    """
    p = len(ranks := _ranks(world_size))
    pairs = [(s, r, (r + s + 1) % p) for s in range(p - 1) for r in ranks]
    return Schedule("all_to_all", p, p * p, tuple(Transfer(s, i, j, i * p + j, "copy") for s, i, j in pairs))


# --- sums in order of rank ----------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def direct(world_size: int) -> Schedule:
    """All-reduce: everybody sends the whole array to everybody, who adds up in order of rank. 1 step.

    Bytes a rank: (p−1)n. Cost α + (p−1)nβ + (p−1)nγ. The order of the sum is 0, 1 … p−1 on every rank, the
    receiver's own value at its place: the same bits everywhere.
    """
    ranks = _ranks(world_size)
    pairs = [(src, dst) for src in ranks for dst in ranks if src != dst]
    return Schedule("direct", world_size, 1, tuple(Transfer(0, src, dst, 0, "reduce") for src, dst in pairs))


@lru_cache(maxsize=64)
def direct_reduce(world_size: int, dst: int = 0) -> Schedule:
    """Everybody sends the whole array to `dst`, which adds up in order of rank. 1 step.

    Bytes: every rank but `dst` sends n. Cost α + (p−1)nβ + (p−1)nγ. The other arrays stay as they were.
    """
    sources = [src for src in _ranks(world_size, dst) if src != dst]
    return Schedule("direct_reduce", world_size, 1, tuple(Transfer(0, src, dst, 0, "reduce") for src in sources))


@lru_cache(maxsize=64)
def direct_reduce_scatter(world_size: int) -> Schedule:
    """Everybody sends chunk r to rank r, which adds up in order of rank. 1 step.

    Bytes a rank: all chunks but its own, (p−1)/p·n. Cost α + ((p−1)/p)n(β + γ): with an all-gather behind it
    the ring's traffic and `direct`'s order of sums. Other chunks stay as they were.
    """
    ranks = _ranks(world_size)
    pairs = [(src, dst) for src in ranks for dst in ranks if src != dst]
    transfers = tuple(Transfer(0, src, dst, dst, "reduce") for src, dst in pairs)
    return Schedule("direct_reduce_scatter", world_size, world_size, transfers)


# --- all-reduce ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def ring(world_size: int) -> Schedule:
    """Reduce-scatter, then all-gather, round a ring: the least traffic, for large arrays. 2(p−1) steps.

    Bytes a rank: exactly 2(p−1)/p·n when p divides n, else the sum of its chunks' lengths.
    Cost 2(p−1)α + 2((p−1)/p)nβ + ((p−1)/p)nγ when p divides n, else with the longest chunk for n/p.
    """
    return _in_a_row("ring", reduce_scatter(world_size), all_gather(world_size))


@lru_cache(maxsize=64)
def binomial_tree(world_size: int) -> Schedule:
    """Reduce to rank 0, then broadcast: the simplest, but whole arrays cross rank 0's port. 2⌈log₂ p⌉ steps.

    Bytes: 2(p−1)n in all, ⌈log₂ p⌉n from rank 0. Cost 2⌈log₂ p⌉(α + nβ) + ⌈log₂ p⌉nγ.
    """
    return _in_a_row("binomial_tree", reduce(world_size), broadcast(world_size))


@lru_cache(maxsize=64)
def recursive_doubling(world_size: int) -> Schedule:
    """Whole arrays, exchanged at distance 1, 2, 4 …: few steps, for small arrays. log₂ p' steps, +2 if folded.

    Bytes a rank: n·log₂ p'. Cost log₂ p' (α + nβ + nγ). With p' = 2^⌊log₂ p⌋, and the fold where p' < p.
    Both of a pair add the same two numbers, so all ranks end with the same bits.
    """
    p = 2 ** log2_floor(len(_ranks(world_size)))
    core = [Transfer(k, r, r ^ 2**k, 0, "reduce") for k in range(log2_floor(p)) for r in range(p)]
    return _folded("recursive_doubling", world_size, 1, core)


@lru_cache(maxsize=64)
def halving_doubling(world_size: int) -> Schedule:
    """Reduce-scatter by halves, then all-gather by doubles: the ring's traffic in few steps (Rabenseifner).

    At distance d (p'/2 … 2, 1) a rank sends the d chunks of its partner's block, and keeps its own block's;
    then all the way back (1, 2 … p'/2) it sends its own block. 2 log₂ p' steps, +2 if folded.
    Bytes a rank: 2(p'−1)/p'·n. Cost 2 log₂ p' α + 2((p'−1)/p')nβ + ((p'−1)/p')nγ. With p' = 2^⌊log₂ p⌋,
    and the fold where p' < p.
    """
    p = 2 ** log2_floor(len(_ranks(world_size)))
    halvings = log2_floor(p)
    core: list[Transfer] = []
    for step in range(2 * halvings):
        halving = step < halvings
        d = p >> (step + 1) if halving else 1 << (step - halvings)
        for rank in range(p):
            block = (rank ^ d if halving else rank) // d * d
            op = "reduce" if halving else "copy"
            core += [Transfer(step, rank, rank ^ d, chunk, op) for chunk in range(block, block + d)]
    return _folded("halving_doubling", world_size, p, core)


def _folded(name: str, world_size: int, chunks: int, core: list[Transfer]) -> Schedule:
    """`core` for the first p' = 2^⌊log₂ p⌋ ranks; the others hand in their array before, and get the sum after.

    For p' < p this adds 2 steps, n bytes sent by each rank of such a pair, and 2α + 2nβ + nγ.
    """
    half = 2 ** log2_floor(world_size)
    if half == world_size:
        return Schedule(name, world_size, chunks, tuple(core))
    pairs = [(r - half, r, chunk) for r in range(half, world_size) for chunk in range(chunks)]
    fold = [Transfer(0, extra, r, chunk, "reduce") for r, extra, chunk in pairs]
    inner = [t._replace(step=t.step + 1) for t in core]
    end = inner[-1].step + 1 if inner else 1
    unfold = [Transfer(end, r, extra, chunk, "copy") for r, extra, chunk in pairs]
    return Schedule(name, world_size, chunks, (*fold, *inner, *unfold))


ALL_REDUCE: dict[str, Callable[[int], Schedule]] = {
    "ring": ring,
    "binomial_tree": binomial_tree,
    "recursive_doubling": recursive_doubling,
    "halving_doubling": halving_doubling,
    "direct": direct,
}


_ONE_WAY: dict[str, Callable[..., Schedule]] = {
    "broadcast": broadcast,
    "reduce": reduce,
    "gather": gather,
    "scatter": scatter,
    "direct_reduce": direct_reduce,
}
_OTHERS: dict[str, Callable[[int], Schedule]] = {
    "reduce_scatter": reduce_scatter,
    "direct_reduce_scatter": direct_reduce_scatter,
    "all_gather": all_gather,
    "all_to_all": all_to_all,
}


def get(name: str, world_size: int, root: int = 0) -> Schedule:
    """The schedule of that name; ``root`` is the source or destination of those that have one."""
    if name in _ONE_WAY:
        return _ONE_WAY[name](world_size, root)
    return {**ALL_REDUCE, **_OTHERS}[name](world_size)


def checked(algorithm: str) -> str:
    """``algorithm``, if it is an all-reduce. Raises ValueError, with the valid names, for an unknown one."""
    if algorithm not in ALL_REDUCE:
        raise ValueError(f"unknown all-reduce algorithm {algorithm!r}; valid: {', '.join(ALL_REDUCE)}")
    return algorithm


def all_reduce(algorithm: str, world_size: int) -> Schedule:
    """The all-reduce schedule of that name. Raises ValueError, with the valid names, for an unknown one."""
    return ALL_REDUCE[checked(algorithm)](world_size)
