"""How payloads move between ranks: the `Reducer` of ``minidp.compress`` over a communicator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from minidp import trace
from minidp.comm import Communicator
from minidp.compress import Payload

Array = np.ndarray[Any, Any]


class CommReducer:
    """Payloads are sent as they are packed, each in one message.

    Args:
        comm: the ranks.
        steady: whether all payloads of a key have the same sizes: then these are told once. Otherwise in front of
            each exchange, 8 bytes for each array of a payload and 8 more.
    """

    def __init__(self, comm: Communicator, steady: bool) -> None:
        self._comm, self._steady = comm, steady
        self.rank, self.world_size = comm.rank, comm.world_size
        self._told: dict[tuple[str, str], Array] = {}

    def sum(self, array: Array) -> Array:
        self._comm.all_reduce(array)
        return array

    def gather(self, payload: Payload) -> list[Payload]:
        sizes = self._told.get(("gather", payload.key))
        if sizes is None:
            mine = _sizes_of(payload)
            self._comm.all_gather(sizes := np.empty((self.world_size, mine.size), np.int64), mine)
            self._tell("gather", payload.key, sizes)
        wire = _wire(payload)
        arrived = self._exchange([wire] * self.world_size, sizes, wire.dtype)
        return [_unwired(data, payload, row) for data, row in zip(arrived, sizes)]

    def scatter(self, payloads: Sequence[Payload]) -> list[Payload]:
        mine = payloads[self.rank]
        sizes = self._told.get(("scatter", mine.key))
        if sizes is None:
            ours = np.stack([_sizes_of(payload) for payload in payloads])
            self._comm.all_to_all(sizes := np.empty_like(ours), ours)
            self._tell("scatter", mine.key, sizes)
        wires = [_wire(payload) for payload in payloads]
        arrived = self._exchange(wires, sizes, wires[self.rank].dtype)
        return [_unwired(data, mine, row) for data, row in zip(arrived, sizes)]

    def _tell(self, what: str, key: str, sizes: Array) -> None:
        if self._steady:
            self._told[what, key] = sizes

    def _exchange(self, wires: Sequence[Array], sizes: Array, dtype: np.dtype[Any]) -> list[Array]:
        """``wires[j]`` goes to rank j; what has come from each rank, in rank order."""
        comm, ranks = self._comm, range(self.world_size)
        arrived = [np.empty(int(row[1:].sum()), dtype) for row in sizes]
        arrived[self.rank] = wires[self.rank]
        others = [(self.rank + step) % self.world_size for step in ranks[1:]]
        with trace.span("exchange payloads", "communication"):
            works = [comm.recv(arrived[src], src, async_op=True) for src in others if arrived[src].size]
            # To the next rank first, so that no two send to the same one at once.
            works += [comm.send(wires[dst], dst, async_op=True) for dst in others if wires[dst].size]
            for work in works:
                work.wait()
        return arrived


def _sizes_of(payload: Payload) -> Array:
    """Elements that it stands for, then bytes of each of its arrays (elements, where they are objects)."""
    of_arrays = [array.size if array.dtype.hasobject else array.nbytes for array in payload.arrays]
    return np.array([payload.size, *of_arrays], np.int64)


def _wire(payload: Payload) -> Array:
    """All arrays in one, of bytes; or of objects, if there are any."""
    arrays = payload.arrays
    if any(array.dtype.hasobject for array in arrays):
        return np.concatenate([array.astype(object) for array in arrays])
    return np.concatenate([array.view(np.uint8) for array in arrays])


def _unwired(data: Array, like: Payload, sizes: Array) -> Payload:
    """The payload that another rank has made as this one made ``like``; its sizes may differ."""
    elements, *lengths = (int(size) for size in sizes)
    edges = [0, *np.cumsum(lengths).tolist()]
    arrays = tuple(
        data[lo:hi].astype(array.dtype) if data.dtype.hasobject else data[lo:hi].view(array.dtype)
        for (lo, hi), array in zip(pairwise(edges), like.arrays)
    )
    return replace(like, arrays=arrays, shape=like.shape if elements == like.size else (elements,))
