"""The double with events that count: whose they are, how often they were recorded, and what was waited for.

An event of `DoubleDevice` is nothing. Here it is what CUDA's is between processes: memory that others can open,
in which its owner says how often it has been recorded. With ``trace`` a rank writes down what it does to shared
memory, so that `races` can tell afterwards whether the events really order what several ranks do there: on a GPU
nothing else would. And what fails on one rank can be chosen.
"""

from __future__ import annotations

import itertools
import mmap
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from minidp.comm import nccl
from tests import device_double
from tests.device_double import DeviceArray, DoubleDevice


class Event:
    """``records[0]``: how often its owner has recorded it."""

    def __init__(self, owner: int, records: np.ndarray, mine: bool) -> None:
        self.owner, self.records, self.mine = owner, records, mine


class Access(NamedTuple):
    """What a rank's stream does: read or write bytes of shared memory, record an event, or wait for one."""

    kind: str
    where: Any  # a piece of memory; of "record" and "wait" the rank whose event it is
    start: int = 0  # first byte; of "record" and "wait" the number of the record
    stop: int = 0


class StrictDevice(DoubleDevice):
    """``fails``: by ``"share"``, ``"open"``, ``"new_event"`` or ``"open_event"`` the rank on which it fails, and
    the error."""

    def __init__(
        self,
        shareable: bool = True,
        places: int = 1,
        fails: Mapping[str, tuple[int, Exception]] | None = None,
        trace: bool = False,
    ) -> None:
        super().__init__(shareable, places)
        self.fails = dict(fails or {})
        self.trace = trace
        self.log: list[Access] = []
        self._pieces: list[tuple[np.ndarray, bytes]] = []  # all that was ever mapped: no address comes twice

    def start(self, local_rank: int = 0) -> None:
        super().start(local_rank)
        nccl.library = self.library
        if self.trace:
            _trace(self)

    def library(self) -> Any:
        raise ImportError("NCCL knows no doubles")

    def _may_fail(self, what: str) -> None:
        rank, error = self.fails.get(what, (None, None))
        if error is not None and rank == self.started_by:
            raise error

    # -- memory ------------------------------------------------------------------------------------------

    def share(self, nbytes: int) -> tuple[DeviceArray, bytes]:
        self._may_fail("share")
        array, handle = super().share(nbytes)
        if not self.shareable:  # not the same for all: who can't open others' can open their own
            self._mine[handle := b"none %d %d" % (os.getpid(), len(self._mine))] = array
        self._know(array, handle)
        self.note("write", array._host)  # that it is zero
        return array, handle

    def open(self, handle: bytes, nbytes: int) -> DeviceArray:
        if handle not in self._mine:
            self._may_fail("open")
            if handle.startswith(b"none"):
                raise OSError("this double's memory is its own")
        array = super().open(handle, nbytes)
        self._know(array, handle)
        return array

    def _know(self, array: DeviceArray, handle: bytes) -> None:
        self._pieces.append((array._host, handle))

    def note(self, kind: str, host: np.ndarray) -> None:
        """Write down that these bytes were read or written, if others see them."""
        if self.trace and host.size:
            low, high = np.lib.array_utils.byte_bounds(host)
            for piece, handle in self._pieces:
                start = low - piece.ctypes.data
                if 0 <= start < piece.nbytes:
                    self.log.append(Access(kind, handle, start, start + high - low))
                    return

    # -- events ------------------------------------------------------------------------------------------

    def new_event(self) -> tuple[Event, bytes]:
        self._may_fail("new_event")
        file = os.memfd_create("event")
        os.ftruncate(file, 8)
        handle = f"{self.started_by} /proc/{os.getpid()}/fd/{file}".encode()
        return Event(self.started_by, np.frombuffer(mmap.mmap(file, 8), np.int64), mine=True), handle

    def open_event(self, handle: bytes) -> Event:
        self._may_fail("open_event")
        owner, path = handle.decode().split(" ")
        with open(path, "r+b") as file:
            return Event(int(owner), np.frombuffer(mmap.mmap(file.fileno(), 8), np.int64), mine=False)

    def record(self, event: Event) -> None:
        assert event.mine, "only its owner records an event"
        super().record(event)
        event.records[0] += 1
        if self.trace:
            self.log.append(Access("record", event.owner, self.recorded))

    def wait(self, event: Event) -> None:
        assert not event.mine, "what a stream was asked before comes before anyway"
        super().wait(event)
        assert event.records[0], "waited for what has not been recorded yet"
        if self.trace:  # where all ranks record equally often: of this many we are sure, of more only by chance
            assert event.records[0] >= self.recorded
            self.log.append(Access("wait", event.owner, self.recorded))


def _trace(device: StrictDevice) -> None:
    """Let the operations of collectives tell the device of this process what they read and write."""
    set_item, as_type, call = DeviceArray.__setitem__, DeviceArray.astype, device_double.Ufunc.__call__

    def setitem(self: DeviceArray, index: Any, value: Any) -> None:
        if isinstance(value, DeviceArray):
            device.note("read", value._host)
        device.note("write", self._host[index])
        set_item(self, index, value)

    def astype(self: DeviceArray, *args: Any, **options: Any) -> DeviceArray:
        device.note("read", self._host)
        return as_type(self, *args, **options)

    def ufunc(self: Any, *args: Any, out: Any = None, **options: Any) -> Any:
        for argument in args:
            if isinstance(argument, DeviceArray):
                device.note("read", argument._host)
        if out is not None:
            device.note("write", out._host)
        return call(self, *args, out=out, **options)

    DeviceArray.__setitem__, DeviceArray.astype, device_double.Ufunc.__call__ = setitem, astype, ufunc


def races(logs: list[list[Access]]) -> list[str]:
    """Pairs of accesses of two ranks to the same bytes, one of them a write, that no event orders."""
    accesses: dict[Any, list[tuple[int, int, tuple[int, ...], Access]]] = {}
    for rank, index, clock, access in _clocks(logs):
        if access.kind in ("read", "write"):
            accesses.setdefault(access.where, []).append((rank, index, clock, access))
    found = []
    for piece in accesses.values():
        for (rank, index, clock, a), (other, at, theirs, b) in itertools.combinations(piece, 2):
            clash = rank != other and "write" in (a.kind, b.kind) and a.start < b.stop and b.start < a.stop
            if clash and clock[other] <= at and theirs[rank] <= index:
                found.append(f"rank {rank} #{index} {a.kind} and rank {other} #{at} {b.kind} bytes {a.start} …")
    return found


def _clocks(logs: list[list[Access]]) -> Iterator[tuple[int, int, tuple[int, ...], Access]]:
    """Every entry with its vector clock: how many entries of each rank surely come before it."""
    at, clocks = [0] * len(logs), [[0] * len(logs) for _ in logs]
    recorded: dict[tuple[int, int], list[int]] = {}
    going = True
    while going:
        going = False
        for rank, log in enumerate(logs):
            while at[rank] < len(log):
                entry = log[at[rank]]
                if entry.kind == "wait":
                    if (entry.where, entry.start) not in recorded:
                        break  # that rank comes first
                    clocks[rank] = [max(pair) for pair in zip(clocks[rank], recorded[entry.where, entry.start])]
                yield rank, at[rank], tuple(clocks[rank]), entry
                at[rank] += 1
                clocks[rank][rank] = at[rank]
                if entry.kind == "record":
                    recorded[rank, entry.start] = list(clocks[rank])
                going = True
    assert at == [len(log) for log in logs], "a rank waits for a record that never comes"
