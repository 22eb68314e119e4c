"""What a collective makes of all ranks' arrays, computed at one place: the values of the virtual world.

Where ranks share one process nobody needs to copy chunks about to know the result; messages are only timed. The
sums have the terms and the order of the schedule, read off its entries, so the bits are those of ranks that
exchange messages. Tests hold both equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from minidp.comm.execute import Pieces
from minidp.comm.reduction import ReduceOp, finish, fold
from minidp.comm.schedules import ALL_REDUCE
from minidp.comm.transfers import chunk_bounds
from minidp.comm.waves import waves

Array = npt.NDArray[Any]
Flat = Array | Pieces
Sum = tuple[int, tuple[int, ...]]  # the rank that gets it, the ranks whose values are its terms, in order
_SMALL = 4096  # bytes of a chunk below which one vector operation over all chunks beats one for each


def combine(name: str, root: int, arrays: Sequence[Flat], op: ReduceOp | None) -> None:
    """Do to the ranks' flat arrays, in place, what the schedule ``name`` does (see `schedules`).

    Args:
        arrays: one a rank, in order of rank, all of one length and dtype.
        root: of a broadcast, reduce, gather or scatter.
        op: of a reduction.
    """
    if name in ALL_REDUCE:
        assert op is not None
        _all_reduce(name, cast("Sequence[Array]", arrays), op)
    else:
        _OTHERS[name](arrays, root, op)


# --- all-reduce -------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
def order_of_sum(name: str, world_size: int) -> tuple[int, tuple[Sum, ...]]:
    """How chunk 0 comes about: (the rank that ends with it, the sums before, in order).

    It is read off the entries, from the end backwards.
    A sum's terms are the values that those ranks hold at that moment. All ranks end with equal bits, so one
    rank's way to them is enough; no value that it needs is used twice.
    """
    if name == "direct":  # p² entries, of which one rank's p − 1 say it all
        return 0, ((0, tuple(range(world_size))),)
    wanted = {0}  # ranks whose value is needed
    sums: list[Sum] = []
    for step in reversed(list(waves(name, world_size))):
        arriving: dict[int, list[int]] = {}
        copied: dict[int, int] = {}
        for wave in step:
            carries = (wave.start <= 0) & (wave.stop > 0)
            for src, dst in zip(wave.pattern.src[carries].tolist(), wave.pattern.dst[carries].tolist()):
                if wave.reduce:
                    arriving.setdefault(dst, []).append(src)
                else:
                    copied[dst] = src
        for dst in sorted(wanted):
            if dst in copied:
                wanted.remove(dst)
                wanted.add(copied[dst])
            elif dst in arriving:
                terms = tuple(sorted([dst, *arriving[dst]]))
                sums.append((dst, terms))
                wanted.update(terms)
    sums.reverse()
    return (sums[-1][0] if sums else 0), tuple(sums)


def _all_reduce(name: str, arrays: Sequence[Array], op: ReduceOp) -> None:
    p, n = len(arrays), len(arrays[0])
    if n == 0:
        return
    if name != "ring":
        total = _evaluate(name, list(arrays), op)
        if name != "direct":
            finish(total, op, p)
        _give(total, arrays)
    elif n * arrays[0].itemsize < _SMALL * p:
        # Chunk c comes about as chunk 0 does, all ranks moved on by c.
        matrix, columns = np.stack(arrays), np.arange(n)
        chunk = np.repeat(np.arange(p), [hi - lo for lo, hi in chunk_bounds(n, p)])
        total = _evaluate(name, [matrix[(k + chunk) % p, columns] for k in range(p)], op)
        finish(total, op, p)
        _give(total, arrays)
    else:
        for c, (lo, hi) in enumerate(chunk_bounds(n, p)):
            parts = [x[lo:hi] for x in arrays]
            total = _evaluate(name, parts[c:] + parts[:c], op)
            finish(total, op, p)
            _give(total, parts)


def _evaluate(name: str, values: list[Array], op: ReduceOp) -> Array:
    """The sum, in the memory of one of ``values``; all of them may be overwritten."""
    last, sums = order_of_sum(name, len(values))
    for rank, terms in sums:
        # What has arrived is still in the cache, the rank's own value is not: the sum replaces the former.
        arrived = next(term for term in terms if term != rank) if len(terms) == 2 else terms[0]
        out = values[arrived]
        # Halves that arrive all at once are averaged before they are rounded, as in the process world.
        fold([values[term] for term in terms], op, out, divide=name == "direct")
        values[rank] = out
    return values[last]


def _give(total: Array, arrays: Sequence[Array]) -> None:
    for x in arrays:
        if x is not total:
            np.copyto(x, total)


# --- the others -------------------------------------------------------------------------------------------


def _broadcast(arrays: Sequence[Array], root: int, op: ReduceOp | None) -> None:
    _give(arrays[root], arrays)


def _parts(x: Flat, count: int) -> list[slice]:
    """The chunks of an array that has that many, of equal size."""
    each = len(x) // count
    return [slice(i * each, (i + 1) * each) for i in range(count)]


def _rows(x: Array, p: int) -> Array:
    """Chunks of equal size, as these collectives have."""
    return x.reshape(p, -1)


def _all_gather(arrays: Sequence[Array], root: int, op: ReduceOp | None) -> None:
    p = len(arrays)
    if len(arrays[0]):
        everybody = np.concatenate([_rows(x, p)[rank] for rank, x in enumerate(arrays)])
        _give(everybody, arrays)


def _gather(arrays: Sequence[Flat], root: int, op: ReduceOp | None) -> None:
    for rank, part in enumerate(_parts(arrays[0], len(arrays))):
        if rank != root:
            arrays[root][part] = arrays[rank][part]


def _scatter(arrays: Sequence[Flat], root: int, op: ReduceOp | None) -> None:
    for rank, part in enumerate(_parts(arrays[0], len(arrays))):
        if rank != root:
            arrays[rank][part] = arrays[root][part]


def _all_to_all(arrays: Sequence[Flat], root: int, op: ReduceOp | None) -> None:
    p = len(arrays)
    for i, part in enumerate(_parts(arrays[0], p * p)):
        src, dst = divmod(i, p)
        if src != dst:
            arrays[dst][part] = arrays[src][part]


def _direct_reduce(arrays: Sequence[Array], root: int, op: ReduceOp | None) -> None:
    assert op is not None
    total = np.empty_like(arrays[root])
    fold(arrays, op, total, divide=True)
    np.copyto(arrays[root], total)


def _direct_reduce_scatter(arrays: Sequence[Array], root: int, op: ReduceOp | None) -> None:
    assert op is not None
    p = len(arrays)
    if len(arrays[0]):
        total = np.empty_like(arrays[0])
        fold(arrays, op, total, divide=True)
        for rank, x in enumerate(arrays):
            _rows(x, p)[rank] = _rows(total, p)[rank]


_OTHERS: dict[str, Callable[[Any, int, ReduceOp | None], None]] = {
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "gather": _gather,
    "scatter": _scatter,
    "all_to_all": _all_to_all,
    "direct_reduce": _direct_reduce,
    "direct_reduce_scatter": _direct_reduce_scatter,
}
