"""Running a schedule: the generic form of every collective, over nothing but send and receive.

The same lists of transfers are timed by the virtual world and drawn in the notebooks. Contributions that reach
a rank in one step are added in order of rank, its own value taking its place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from minidp.backend import array_module
from minidp.comm import schedules
from minidp.comm.reduction import ReduceOp, finish, fold
from minidp.comm.transfers import Message, Schedule, chunk_bounds

if TYPE_CHECKING:
    from minidp.comm.communicator import Communicator

Array = npt.NDArray[Any]


@contextmanager
def contiguous(x: Array, writes: bool = True) -> Iterator[Array]:
    """``x`` as a flat C-contiguous array; if the caller ``writes`` there, that is in ``x`` afterwards."""
    if x.flags.c_contiguous:
        yield x.reshape(-1)
    else:
        flat = array_module(x).ascontiguousarray(x).reshape(-1)
        yield flat
        if writes:
            x[...] = flat.reshape(x.shape)


def by_messages(
    comm: Communicator, schedule: Schedule, flat: Array | Pieces, op: ReduceOp | None, tag: int
) -> None:
    """Execute this rank's part of ``schedule`` on the flat array, in place; ``op`` None: it only copies."""
    at_once = schedule.name.startswith("direct")  # all arrive in one step: averaged before halves are rounded
    bounds = chunk_bounds(len(flat), schedule.chunks)
    for sends, receives in schedule.messages_of(comm.rank):
        leaving = [comm.post_send(_slice(flat, m, bounds), m.dst, tag) for m in sends]
        # A step reads the state from before the step: what arrives waits aside until all has left.
        arrived = [np.empty_like(_slice(flat, m, bounds)) for m in receives]
        arriving = [comm.post_recv(a, m.src, tag) for a, m in zip(arrived, receives)]
        for work in (*leaving, *arriving):
            work.wait()
        _store(flat, list(zip(receives, arrived)), bounds, comm.rank, op, at_once)
    if op is not None and not at_once and schedule.name in schedules.ALL_REDUCE:
        assert not isinstance(flat, Pieces)
        finish(flat, op, comm.world_size)


def reduce(comm: Communicator, x: Array, dst: int, op: ReduceOp, tag: int) -> None:
    """All send to ``dst``, which adds in order of rank."""
    with contiguous(x, writes=comm.rank == dst) as flat:
        comm.run_schedule("direct_reduce", flat, op, tag, dst)


def reduce_scatter(comm: Communicator, out: Array, x: Array, op: ReduceOp, tag: int) -> None:
    """Rank r gets everybody's r-th part and adds in order of rank."""
    flat = x.reshape(-1).copy()
    comm.run_schedule("direct_reduce_scatter", flat, op, tag)
    with contiguous(out) as part:
        part[:] = flat.reshape(comm.world_size, -1)[comm.rank]


def all_gather(comm: Communicator, out: Array, x: Array, tag: int) -> None:
    with contiguous(out) as flat:
        flat.reshape(comm.world_size, -1)[comm.rank] = x.reshape(-1)
        comm.run_schedule("all_gather", flat, None, tag)


def gather(comm: Communicator, x: Array, dst: int, tag: int) -> Array | None:
    p, rank = comm.world_size, comm.rank
    if rank != dst:
        comm.run_schedule("gather", Pieces({rank: x.reshape(-1)}, p), None, tag, dst)
        return None
    everybody = np.empty((p, *x.shape), x.dtype)
    everybody[rank] = x
    comm.run_schedule("gather", everybody.reshape(-1), None, tag, dst)
    return everybody


def scatter(comm: Communicator, x: Array | None, out: Array, src: int, tag: int) -> Array:
    p, rank = comm.world_size, comm.rank
    if rank != src:
        comm.run_schedule("scatter", Pieces({rank: out.reshape(-1)}, p), None, tag, src)
        return out
    assert x is not None
    comm.run_schedule("scatter", x.reshape(-1), None, tag, src)
    out[...] = x[rank]
    return out


def all_to_all(comm: Communicator, out: Array, x: Array, tag: int) -> None:
    """The schedule is that of the whole p × p matrix of pieces: rank r has row r, and ends with column r."""
    p, rank = comm.world_size, comm.rank
    with contiguous(out) as flat:
        column, row = flat.reshape(p, -1), x.reshape(p, -1)
        if np.may_share_memory(out, x):
            row = row.copy()  # what arrives must not change what has yet to leave
        column[rank] = row[rank]
        pieces = {i * p + rank: column[i] for i in range(p)} | {rank * p + j: row[j] for j in range(p)}
        comm.run_schedule("all_to_all", Pieces(pieces, p * p), None, tag)


class Pieces:
    """Of a flat array of ``count`` chunks, all of one size, those that this rank sends or receives.

    To hold all of it, most of which never comes near this rank, would take p times the memory.
    """

    def __init__(self, chunks: Mapping[int, Array], count: int) -> None:
        self._chunks = chunks
        some = next(iter(chunks.values()))
        self._each, self._length = some.size, some.size * count
        self.dtype, self.itemsize = some.dtype, some.itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> Array:
        """The chunk that begins there."""
        return self._chunks[part.start // self._each] if self._each else np.empty(0, self.dtype)

    def __setitem__(self, part: slice, data: Array) -> None:
        self[part][...] = data


def _slice(flat: Array | Pieces, message: Message, bounds: list[tuple[int, int]]) -> Array:
    return flat[bounds[message.start][0] : bounds[message.stop - 1][1]]


def _store(
    flat: Array | Pieces,
    received: list[tuple[Message, Array]],
    bounds: list[tuple[int, int]],
    rank: int,
    op: ReduceOp | None,
    divide: bool,
) -> None:
    contributions: dict[int, list[tuple[int, Array]]] = {}
    for message, data in received:
        first = bounds[message.start][0]
        for chunk in range(message.start, message.stop):
            lo, hi = bounds[chunk]
            part = data[lo - first : hi - first]
            if message.op == "copy":
                flat[lo:hi] = part
            else:
                contributions.setdefault(chunk, []).append((message.src, part))
    for chunk, parts in contributions.items():
        assert op is not None
        lo, hi = bounds[chunk]
        own = flat[lo:hi].copy() if len(parts) > 1 else flat[lo:hi]
        ordered = sorted([(rank, own), *parts], key=lambda part: part[0])
        fold([part for _, part in ordered], op, flat[lo:hi], divide)
