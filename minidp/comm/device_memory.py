"""Ranks that share a device: collectives in memory that all of them see, ordered by events.

What ``process.py`` does with shared memory of the host: each rank copies into a slot of its own, all meet, and
everybody reads everybody's, in order of rank. Only that "all meet" says nothing about the device, which may not
have begun what the host has asked for. So each rank records an event before it meets the others, and afterwards
lets its stream wait for theirs: what follows reads what has been written, and no host waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np

from minidp.backend import Array, Device
from minidp.comm.communicator import Communicator
from minidp.comm.execute import contiguous
from minidp.comm.reduction import ReduceOp, fold
from minidp.comm.staged import Staged
from minidp.comm.work import Work

T = TypeVar("T")
LARGEST_SLOT = 256 * 2**20
SMALLEST_SLOT = 2**20
DTYPES = "fiub"  # kinds that devices add up; of others (complex) the host does


class Peers(NamedTuple):
    """The events of a group's ranks, in rank order, by which their streams are ordered: one a rank and run."""

    device: Device
    rank: int
    events: tuple[Any, ...]

    def meeting(self) -> None:
        if len(self.events) > 1:  # a lone rank has none
            self.device.record(self.events[self.rank])

    def met(self) -> None:
        # Each event stands for the last record before this moment: all that its rank asked for before it came.
        # Should that rank be ahead already, and have recorded again, we wait for more than we need, never less.
        for rank, event in enumerate(self.events):
            if rank != self.rank:
                self.device.wait(event)

    def of(self, ranks: Sequence[int]) -> Peers:
        return Peers(self.device, list(ranks).index(self.rank), tuple(self.events[rank] for rank in ranks))


def make_peers(host: Communicator, device: Device) -> Peers:
    """Exchange the events of all ranks. Collective. OSError, on all ranks alike, if it can't be done."""
    event, handle = all_or_none(host, device.new_event)
    handles = host.all_gather_object(handle, "events of devices")
    theirs = all_or_none(
        host, lambda: [event if rank == host.rank else device.open_event(h) for rank, h in enumerate(handles)]
    )
    return Peers(device, host.rank, tuple(theirs))


def share(host: Communicator, device: Device, nbytes: int) -> list[Array]:
    """As ``Communicator.allocate``, memory of the device: one zeroed view a rank. Collective.

    MemoryError on all ranks if there is too little, OSError if it can't be shared.
    """
    nothing = device.xp.zeros(0, np.uint8)
    if host.world_size == 1:
        return [device.xp.zeros(nbytes, np.uint8)]
    mine, handle = all_or_none(host, lambda: device.share(nbytes) if nbytes else (nothing, b""))
    offers = host.all_gather_object((handle, nbytes), "allocate")

    def opened() -> list[Array]:
        views = [device.open(handle, size) if size else nothing for handle, size in offers]
        views[host.rank] = mine
        return views

    return all_or_none(host, opened)


def all_or_none(host: Communicator, attempt: Callable[[], T]) -> T:
    """What ``attempt`` gives, if no rank fails in it; else the first one's error on all of them. Collective."""
    value, problem = None, None
    try:
        value = attempt()
    except (MemoryError, OSError, RuntimeError, ImportError) as error:
        problem = isinstance(error, MemoryError), f"rank {host.rank}: {error}"
    found = next(filter(None, host.all_gather_object(problem, "devices")), None)
    if found is not None:
        raise (MemoryError if found[0] else OSError)(found[1])
    return cast(T, value)


class SharedMemory(Staged):
    """Collectives of ranks that share one device.

    Cost of an all-reduce of n bytes: a rank copies n into its slot and reads all p of them, (p + 3)n read and
    written; one meeting on the host for each 256 MiB. Slots grow to the largest array, twice (so that a rank can
    fill one while others still read its last). Not summed here, but on the host: complex numbers, and whatever
    names an ``algorithm``. With ``async_op`` it runs in ``wait``, as on the host (``Later``).
    """

    name = "memory of the device that all ranks see"
    shares_memory = True

    def __init__(self, host: Communicator, device: Device, peers: Peers) -> None:
        super().__init__(host, device)
        self.peers = peers
        self._slots: tuple[list[Array], list[Array]] = ([], [])
        self._size = self._parity = 0

    def meeting(self) -> None:
        self.peers.meeting()

    def met(self) -> None:
        self.peers.met()

    def split(self, host: Communicator, ranks: Sequence[int]) -> SharedMemory:
        return SharedMemory(host, self.device, self.peers.of(ranks))

    def all_reduce(self, x: Array, op: ReduceOp, algorithm: str | None, async_op: bool) -> Work | None:
        if algorithm is not None or x.dtype.kind not in DTYPES:
            return super().all_reduce(x, op, algorithm, async_op)
        if async_op:
            return self.host._defer(lambda: self.all_reduce(x, op, None, False))

        def take(slots: list[Array], lo: int, hi: int) -> None:
            fold(slots, op, flat[lo:hi], divide=True)  # out is none of the slots: any order of ranks will do

        with contiguous(x) as flat:
            self._rounds("all_reduce", x, op.value, flat, take)
        self._count(x.nbytes)
        return None

    def reduce_scatter(self, out: Array, x: Array, op: ReduceOp, async_op: bool) -> Work | None:
        if x.dtype.kind not in DTYPES:
            return super().reduce_scatter(out, x, op, async_op)
        if async_op:
            return self.host._defer(lambda: self.reduce_scatter(out, x, op, False))
        start = self.host.rank * out.size

        def take(slots: list[Array], lo: int, hi: int) -> None:
            first, last = max(lo, start), min(hi, start + out.size)
            if first < last:  # of my part, what is in this round
                pieces = [slot[first - lo : last - lo] for slot in slots]
                fold(pieces, op, part[first - start : last - start], divide=True)

        with contiguous(out) as part:
            self._rounds("reduce_scatter", x, op.value, self.device.xp.ascontiguousarray(x).reshape(-1), take)
        self._count(out.nbytes)
        return None

    def all_gather(self, out: Array, x: Array, async_op: bool) -> Work | None:
        if async_op:
            return self.host._defer(lambda: self.all_gather(out, x, False))

        def take(slots: list[Array], lo: int, hi: int) -> None:
            for row, slot in zip(rows, slots):
                row[lo:hi] = slot

        with contiguous(out) as flat:
            rows = flat.reshape(self.host.world_size, x.size)
            self._rounds("all_gather", x, "", self.device.xp.ascontiguousarray(x).reshape(-1), take)
        self._count(x.nbytes)
        return None

    def broadcast(self, x: Array, src: int, async_op: bool) -> Work | None:
        if async_op:
            return self.host._defer(lambda: self.broadcast(x, src, False))
        mine = self.host.rank == src

        def take(slots: list[Array], lo: int, hi: int) -> None:
            if not mine:
                flat[lo:hi] = slots[src]

        with contiguous(x, writes=not mine) as flat:
            self._rounds("broadcast", x, f"src={src}", flat, take, puts=mine)
        readers = self.host.world_size - 1
        self.host.traffic.add(*((x.nbytes * readers, 0, readers) if mine else (0, x.nbytes, 0)))
        return None

    def _rounds(
        self,
        operation: str,
        x: Array,
        detail: str,
        flat: Array,
        take: Callable[[list[Array], int, int], None],
        puts: bool = True,
    ) -> None:
        """Slot by slot: put a piece into my own, meet, take from all. Here all ranks say what they mean first."""
        host, total = self.host, flat.nbytes
        host.begin(operation, f"{x.dtype} {x.shape}, {detail}, on the device")
        self._grow(total)
        per_slot = max(1, self._size // flat.itemsize)
        for lo in range(0, flat.size, per_slot):
            hi = min(lo + per_slot, flat.size)
            slots = [slot[: (hi - lo) * flat.itemsize].view(flat.dtype) for slot in self._slots[self._parity]]
            self._parity = 1 - self._parity
            if puts:
                slots[host.rank][...] = flat[lo:hi]
            self.meeting()
            host.barrier()
            self.met()
            take(slots, lo, hi)

    def _grow(self, nbytes: int) -> None:
        """Slots for pieces of that many bytes. All ranks come here with the same number: they do it together."""
        if nbytes > self._size and self._size < LARGEST_SLOT:
            size = min(LARGEST_SLOT, max(SMALLEST_SLOT, 1 << (nbytes - 1).bit_length()))
            views = share(self.host, self.device, 2 * size)
            self._slots = [v[:size] for v in views], [v[size:] for v in views]
            self._size = size  # last: if there was no room, the slots are still the small ones

    def _count(self, each: int) -> None:
        peers = self.host.world_size - 1
        self.host.traffic.add(each * peers, each * peers, peers)
