"""Running a schedule: the generic form of every collective, over nothing but send and receive.

The same lists of transfers are timed by the virtual world and drawn in the notebooks. Contributions that reach
a rank in one step are added in order of rank, its own value taking its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

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
        flat = x.flatten()
        yield flat
        if writes:
            x[...] = flat.reshape(x.shape)


def by_messages(comm: Communicator, schedule: Schedule, flat: Array, op: ReduceOp | None, tag: int) -> None:
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
    everybody = np.empty((comm.world_size, *x.shape), x.dtype)
    everybody[comm.rank] = x
    comm.run_schedule("gather", everybody.reshape(-1), None, tag, dst)
    return everybody if comm.rank == dst else None


def scatter(comm: Communicator, x: Array | None, out: Array, src: int, tag: int) -> Array:
    everybody = np.empty((comm.world_size, *out.shape), out.dtype)
    if x is not None and comm.rank == src:
        everybody[...] = x
    comm.run_schedule("scatter", everybody.reshape(-1), None, tag, src)
    out[...] = everybody[comm.rank]
    return out


def all_to_all(comm: Communicator, out: Array, x: Array, tag: int) -> None:
    """Works on the whole p × p matrix of pieces, as the schedule is written: row r is rank r's."""
    p = comm.world_size
    matrix = np.empty((p, *x.shape), x.dtype)
    matrix[comm.rank] = x
    comm.run_schedule("all_to_all", matrix.reshape(-1), None, tag)
    out[...] = matrix[:, comm.rank]


def _slice(flat: Array, message: Message, bounds: list[tuple[int, int]]) -> Array:
    return flat[bounds[message.start][0] : bounds[message.stop - 1][1]]


def _store(
    flat: Array,
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
