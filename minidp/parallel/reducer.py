"""How payloads move between ranks: the `Reducer` of ``minidp.compress`` over a communicator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from minidp import trace
from minidp.backend import Array, array_module, asarray, to_numpy
from minidp.comm import Communicator
from minidp.compress import Payload

Sizes = np.ndarray[Any, np.dtype[np.int64]]


class CommReducer:
    """Payloads are sent as they are packed, each in one message; those of a device from the host's memory, unless
    all ranks' have one size: then they are gathered by a collective on the device's arrays, which may do without.

    Args:
        comm: the ranks.
        steady: whether all payloads of a key have the same sizes: then these are told once. Otherwise in front of
            each exchange, 8 bytes for each array of a payload and 8 more.
    """

    def __init__(self, comm: Communicator, steady: bool) -> None:
        self._comm, self._steady = comm, steady
        self.rank, self.world_size = comm.rank, comm.world_size
        self._told: dict[tuple[str, str], Sizes] = {}

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
        xp = array_module(wire)
        if xp is not np and (sizes == sizes[0]).all():
            self._comm.all_gather(arrived := xp.empty((self.world_size, wire.size), wire.dtype), wire)
        else:
            arrived = self._exchange([wire] * self.world_size, sizes)
        return [_unwired(data, payload, row) for data, row in zip(arrived, sizes)]

    def scatter(self, payloads: Sequence[Payload]) -> list[Payload]:
        mine = payloads[self.rank]
        sizes = self._told.get(("scatter", mine.key))
        if sizes is None:
            ours = np.stack([_sizes_of(payload) for payload in payloads])
            self._comm.all_to_all(sizes := np.empty_like(ours), ours)
            self._tell("scatter", mine.key, sizes)
        wires = [_wire(payload) for payload in payloads]
        arrived = self._exchange(wires, sizes)
        return [_unwired(data, mine, row) for data, row in zip(arrived, sizes)]

    def _tell(self, what: str, key: str, sizes: Sizes) -> None:
        if self._steady:
            self._told[what, key] = sizes

    def _exchange(self, wires: Sequence[Array], sizes: Sizes) -> list[Array]:
        """``wires[j]`` goes to rank j; what has come from each rank, in rank order."""
        comm, ranks, own = self._comm, range(self.world_size), wires[self.rank]
        xp = array_module(own)
        if xp is not np:
            on_host = {id(wire): to_numpy(wire) for wire in wires}  # each is moved once, however many it goes to
            wires = [on_host[id(wire)] for wire in wires]
        arrived: list[Array] = [np.empty(int(row[1:].sum()), own.dtype) for row in sizes]
        others = [(self.rank + step) % self.world_size for step in ranks[1:]]
        with trace.span("exchange payloads", "communication"):
            works = [comm.recv(arrived[src], src, async_op=True) for src in others if arrived[src].size]
            # To the next rank first, so that no two send to the same one at once.
            works += [comm.send(wires[dst], dst, async_op=True) for dst in others if wires[dst].size]
            for work in works:
                work.wait()
        if xp is not np:
            arrived = [data if src == self.rank else asarray(data, xp) for src, data in enumerate(arrived)]
        arrived[self.rank] = own
        return arrived


def _sizes_of(payload: Payload) -> Sizes:
    """Elements that it stands for, then bytes of each of its arrays (elements, where they are objects)."""
    of_arrays = [array.size if array.dtype.hasobject else array.nbytes for array in payload.arrays]
    return np.array([payload.size, *of_arrays], np.int64)


def _wire(payload: Payload) -> Array:
    """All arrays in one, of bytes; or of objects, if there are any."""
    arrays = payload.arrays
    if any(array.dtype.hasobject for array in arrays):
        return np.concatenate([array.astype(object) for array in arrays])
    return array_module(arrays[0]).concatenate([array.view(np.uint8) for array in arrays])


def _unwired(data: Array, like: Payload, sizes: Sizes) -> Payload:
    """The payload that another rank has made as this one made ``like``; its sizes may differ."""
    elements, *lengths = (int(size) for size in sizes)
    edges = [0, *np.cumsum(lengths).tolist()]
    pieces = [data[lo:hi] for lo, hi in pairwise(edges)]
    if not isinstance(data, np.ndarray):
        pieces = [piece.copy() for piece in pieces]  # a GPU reads numbers only where multiples of their size lie
    arrays = tuple(
        piece.astype(array.dtype) if data.dtype.hasobject else piece.view(array.dtype)
        for piece, array in zip(pieces, like.arrays)
    )
    return replace(like, arrays=arrays, shape=like.shape if elements == like.size else (elements,))
