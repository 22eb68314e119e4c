"""NVIDIA's collectives, for ranks that have a GPU each: NCCL through CuPy, found over our own queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakSet

import numpy as np

from minidp.backend import Array, Device
from minidp.comm.communicator import Communicator
from minidp.comm.execute import contiguous
from minidp.comm.reduction import ReduceOp, is_half
from minidp.comm.staged import Staged
from minidp.comm.work import Work

TYPES = {
    "int8": "INT8", "uint8": "UINT8", "int32": "INT32", "uint32": "UINT32", "int64": "INT64", "uint64": "UINT64",
    "float16": "FLOAT16", "float32": "FLOAT32", "float64": "FLOAT64",
}  # fmt: skip


def library() -> Any:
    """CuPy's binding; ImportError, with what to install, where NCCL is not to be had."""
    from cupy.cuda import nccl

    if not nccl.available:
        raise ImportError("NCCL is not installed: pip install nvidia-nccl-cu13 (or -cu12, as CuPy is)")
    return nccl


class Lane:
    """The stream beside the computation in which all of a rank's calls of NCCL run, of whatever group.

    In one stream they run in the order of the program. In streams of their own, two groups' could wait for each
    other: each kernel holds a part of the GPU until all ranks' have begun.
    """

    def __init__(self, device: Device) -> None:
        self._beside = device.beside()
        self._held: list[Any] = []

    def run(self, ask: Callable[[], None], *arrays: Array) -> None:
        """Ask for it there; the arrays it works on stay until `join`: the memory of one that is dropped before
        would be given out again at once, though it is still read or written."""
        self._held.extend(arrays)
        with self._beside:
            ask()

    def join(self) -> None:
        """What is asked for from now on comes after all that was asked for there."""
        self._beside.join()
        self._held.clear()


_living: list[Any] = []
"""NCCL's communicators of this process. What drops one waits for its peers: so none is, before it is closed."""


class Nccl(Staged):
    """All-reduce, reduce-scatter, all-gather and broadcast by NCCL, on a stream beside the computation.

    Every call says on the host first what it is, as everywhere: whoever disagrees, or is dead, is found there, and
    nobody enters NCCL in vain. With ``async_op`` the device goes on computing until the work is waited for; no
    host waits for a device. Sums are in NCCL's order: equal to sums in order of rank to rounding, the same bits
    on all ranks, and on every run with the same ranks and sizes. Half precision is summed in float32. The rest
    (``reduce``, ``all_to_all``, other dtypes, whatever names an ``algorithm``) goes through the host's memory.

    Traffic is counted as if each piece went to each rank once: a ring's 2(p−1)/p n for an all-reduce.
    """

    name = "NCCL"
    shares_memory = False

    def __init__(self, host: Communicator, device: Device, lane: Lane | None = None) -> None:
        super().__init__(host, device)
        self._nccl = library()
        self._comm: Any = None
        self._lane = lane or Lane(device)
        self._groups: WeakSet[Nccl] = WeakSet()

    def in_turn(self) -> None:
        self.host.run_all()
        self._lane.join()

    def split(self, host: Communicator, ranks: Sequence[int]) -> Nccl:
        group = Nccl(host, self.device, self._lane)
        self._groups.add(group)
        return group

    def close(self) -> None:
        for group in list(self._groups):
            group.close()
        if self._comm is not None:
            _living.remove(self._comm)
            self._comm.abort()  # which, unlike destroy, waits for nobody: a peer may be dead
            self._comm = None

    def all_reduce(self, x: Array, op: ReduceOp, algorithm: str | None, async_op: bool) -> Work | None:
        if algorithm is not None or not self._takes(x):
            return super().all_reduce(x, op, algorithm, async_op)
        self.host.run_all()
        wide = x.astype(np.float32) if is_half(x.dtype) else x

        def ask(comm: Any, flat: Array, stream: int) -> None:
            comm.allReduce(*_both(flat), flat.size, self._type(wide), self._op(op), stream)

        p = self.host.world_size
        each = 2 * (p - 1) * wide.nbytes // p
        work = self._ask("all_reduce", x, op.value, wide, ask, each, each)
        return _maybe(work if wide is x else _Put(work, x, wide), async_op)

    def reduce_scatter(self, out: Array, x: Array, op: ReduceOp, async_op: bool) -> Work | None:
        if not self._takes(x) or is_half(x.dtype):
            return super().reduce_scatter(out, x, op, async_op)
        self.host.run_all()
        whole = self.device.xp.ascontiguousarray(x)

        def ask(comm: Any, part: Array, stream: int) -> None:
            comm.reduceScatter(whole.data.ptr, part.data.ptr, part.size, self._type(x), self._op(op), stream)

        each = (self.host.world_size - 1) * out.nbytes
        return _maybe(self._ask("reduce_scatter", x, op.value, out, ask, each, each, whole), async_op)

    def all_gather(self, out: Array, x: Array, async_op: bool) -> Work | None:
        if not self._takes(x):
            return super().all_gather(out, x, async_op)
        self.host.run_all()
        mine = self.device.xp.ascontiguousarray(x)

        def ask(comm: Any, flat: Array, stream: int) -> None:
            comm.allGather(mine.data.ptr, flat.data.ptr, mine.size, self._type(x), stream)

        each = (self.host.world_size - 1) * x.nbytes
        return _maybe(self._ask("all_gather", x, "", out, ask, each, each, mine), async_op)

    def broadcast(self, x: Array, src: int, async_op: bool) -> Work | None:
        if not self._takes(x):
            return super().broadcast(x, src, async_op)
        self.host.run_all()

        def ask(comm: Any, flat: Array, stream: int) -> None:
            comm.broadcast(*_both(flat), flat.size, self._type(x), src, stream)

        readers = (self.host.world_size - 1) * x.nbytes
        sent, received = (readers, 0) if self.host.rank == src else (0, x.nbytes)
        return _maybe(self._ask("broadcast", x, f"src={src}", x, ask, sent, received), async_op)

    # -- how they are asked for ---------------------------------------------------------------------------

    def _ask(
        self,
        operation: str,
        x: Array,
        detail: str,
        target: Array,
        ask: Callable[[Any, Array, int], None],
        sent: int,
        received: int,
        *held: Array,
    ) -> Work:
        self.host.begin(operation, f"{x.dtype} {x.shape}, {detail}, by NCCL")
        comm = self._communicator()
        with contiguous(target) as flat:
            if flat.size:
                stream = self.device.xp.cuda.get_current_stream
                self._lane.run(lambda: ask(comm, flat, stream().ptr), flat, *held)
                if not target.flags.c_contiguous:
                    self._lane.join()  # the copy back comes after it
        self.host.traffic.add(sent, received, 1)
        return _Joined(self._lane)

    def _communicator(self) -> Any:
        """Made when it is first needed. All ranks are alive and here: they have just met."""
        if self._comm is None:
            mine = self._nccl.get_unique_id() if self.host.rank == 0 else None
            secret = self.host.broadcast_object(mine, 0, "NCCL's meeting place")
            self._comm = self._nccl.NcclCommunicator(self.host.world_size, secret, self.host.rank)
            _living.append(self._comm)
        return self._comm

    def _takes(self, x: Array) -> bool:
        return x.dtype.name in TYPES

    def _type(self, x: Array) -> int:
        code: int = getattr(self._nccl, f"NCCL_{TYPES[x.dtype.name]}")
        return code

    def _op(self, op: ReduceOp) -> int:
        code: int = getattr(self._nccl, f"NCCL_{op.name}")
        return code


class _Joined(Work):
    """What runs beside; after ``wait`` this rank's own stream comes after it."""

    def __init__(self, lane: Lane) -> None:
        self._lane: Lane | None = lane

    def wait(self) -> None:
        if self._lane is not None:
            self._lane.join()
            self._lane = None


class _Put(Work):
    """A sum in float32 that goes back to half precision."""

    def __init__(self, work: Work, x: Array, wide: Array) -> None:
        self._work, self._x, self._wide = work, x, wide

    def wait(self) -> None:
        if self._wide is not None:
            self._work.wait()
            self._x[...] = self._wide
            self._wide = None


def _maybe(work: Work, async_op: bool) -> Work | None:
    if async_op:
        return work
    work.wait()
    return None


def _both(flat: Array) -> tuple[int, int]:
    """In place: it is read where it is written."""
    return flat.data.ptr, flat.data.ptr
