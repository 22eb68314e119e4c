"""How ranks talk: one small class, torch.distributed's words, MPI's groups. Arrays in, arrays out, in place.

A world must provide the primitives (``post_send``, ``post_recv``, ``split``, ``allocate``, ``now``); every
collective then works by running its schedule (``schedules.py``) over them. A world may override a collective by
a faster one of its own: it must be bit-equal on integer-valued inputs and sum in order of rank by default.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NoReturn, overload

import numpy as np
import numpy.typing as npt

from minidp.backend import HOST, Device
from minidp.comm import execute, schedules
from minidp.comm.arguments import check_parts, user_tag
from minidp.comm.endpoint import Endpoint
from minidp.comm.reduction import SUM, ReduceOp, check_array, check_op
from minidp.comm.traffic import Traffic
from minidp.comm.work import Later, Work

Array = npt.NDArray[Any]
ANY = -1
"""As ``src`` of ``recv``: a message from whichever rank."""


class Communicator(ABC):
    """A group of ranks, seen from one of them.

    All collectives are called by every rank of the group, in the same order, with equal shapes and dtypes;
    otherwise ``CollectiveMismatch`` on all. They return when this rank's part is done. A dead rank is
    ``RankFailed``, an absent one ``CollectiveTimeout``. Results are the same bits on all ranks, on every run.
    Costs below are for p ranks and n bytes; "sent" is what ``traffic`` counts on each rank.
    """

    rank: int
    world_size: int
    local_rank: int
    traffic: Traffic
    shares_memory: bool = False
    """Whether ``allocate`` gives memory that the ranks really share."""
    device: Device = HOST
    """Where the ranks' models lie, and arrays of collectives may lie besides the host."""
    endpoint: Endpoint | None = None
    """How to reach the servers, where a run has any; groups that are split off have it too."""

    def __init__(self) -> None:
        self._later: list[Later] = []

    def __reduce__(self) -> NoReturn:
        raise TypeError("a communicator can't be pickled: it belongs to its rank, and lives as long as the run")

    # -- primitives ------------------------------------------------------------------------------------

    @abstractmethod
    def post_send(self, x: Array, dst: int, tag: int) -> Work:
        """Begin to send; ``x`` must not change until ``wait``."""

    @abstractmethod
    def post_recv(self, x: Array, src: int, tag: int) -> Work:
        """Begin to receive into ``x``."""

    @abstractmethod
    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Communicator | None:
        """A communicator of all ranks that gave the same ``color``, ordered by ``key``, then rank. Collective.

        Both are whole numbers; None for ``color=None``. ``split(0, rank)`` is a duplicate: the same ranks, its
        own sequence numbers. ``name`` is for messages.
        """

    @abstractmethod
    def allocate(self, nbytes: int) -> list[npt.NDArray[np.uint8]]:
        """Shared memory: one view a rank, in rank order, each of the size that its rank asked for. Collective.

        The views are zeroed, 64-byte aligned uint8 arrays, and the same memory on every rank. They are
        released when the run ends. MemoryError on all ranks, in bytes, if there is too little.
        """

    @abstractmethod
    def now(self) -> float:
        """Seconds on this world's clock; differences count."""

    def settle(self) -> None:  # noqa: B027
        """Wait until all that the others did before this rank's ``now`` has happened. Real worlds do nothing.

        For ranks that touch the same memory without a message. In the virtual world a rank that computes is ahead
        of its clock's time: what it reads there without this, others have yet to write.
        """

    @abstractmethod
    def close(self) -> None:
        """No operation works afterwards. Not collective."""

    def expendable(self, yes: bool) -> None:  # noqa: B027
        """Say whether the run goes on, should this rank die. Who waits for it then gets RankLost, and who receives
        from any rank gets it once; the group's other members can go on. A rank that raises still ends the run.
        """

    def progress(self, done: int, total: int = 0, note: str | None = None) -> None:  # noqa: B027
        """Tell whoever launched the run how far this rank is: ``done`` of ``total`` steps (0: as said before)."""

    def begin(self, operation: str, detail: str = "") -> int:
        """Start a collective: check that all ranks mean the same one. Its tag: a negative number of its own."""
        raise NotImplementedError

    def run_schedule(
        self, name: str, flat: Array | execute.Pieces, op: ReduceOp | None, tag: int, root: int = 0
    ) -> None:
        """This rank's part of the schedule of that name (``schedules.get``) on the flat array, in place.

        All collectives below come here, after ``begin`` has given them their ``tag``. ``op`` None: it only copies.
        """
        execute.by_messages(self, schedules.get(name, self.world_size, root), flat, op, tag)

    # -- point to point --------------------------------------------------------------------------------

    @overload
    def send(self, x: Array, dst: int, tag: int = 0, *, async_op: Literal[False] = False) -> None: ...
    @overload
    def send(self, x: Array, dst: int, tag: int = 0, *, async_op: Literal[True]) -> Work: ...
    def send(self, x: Array, dst: int, tag: int = 0, *, async_op: bool = False) -> Work | None:
        """Send array ``x`` to rank ``dst``. Waits while the queue is full. Sent: n bytes."""
        self._check_peer(dst, "dst")
        work = self.post_send(x, dst, user_tag(tag))
        if async_op:
            return work
        work.wait()
        return None

    @overload
    def recv(self, x: Array, src: int = ANY, tag: int = 0, *, async_op: Literal[False] = False) -> int: ...
    @overload
    def recv(self, x: Array, src: int = ANY, tag: int = 0, *, async_op: Literal[True]) -> Work: ...
    def recv(self, x: Array, src: int = ANY, tag: int = 0, *, async_op: bool = False) -> Work | int | None:
        """Receive into ``x`` a message with this tag from rank ``src``; returns the rank that sent it.

        Messages of one pair and tag arrive in order. The message must have the dtype and the number of
        elements of ``x``, else CollectiveMismatch.
        """
        if src != ANY:
            self._check_peer(src, "src")
        work = self.post_recv(x, src, user_tag(tag))
        return work if async_op else work.wait()

    # -- collectives on arrays -------------------------------------------------------------------------

    def all_reduce(
        self, x: Array, op: ReduceOp = SUM, algorithm: str | None = None, *, async_op: bool = False
    ) -> Work | None:
        """Every rank's ``x`` becomes the reduction of all ranks' ``x``, in place.

        By default summed in order of rank; ``algorithm`` names another schedule of ``schedules.ALL_REDUCE``,
        equal to rounding. Half precision is summed in float32. Cost: see the schedule; direct sends (p-1)n.
        """
        check_array(x, writes=True)
        check_op(op, x.dtype)
        if async_op:
            return self._defer(lambda: self.all_reduce(x, op, algorithm))
        name = schedules.checked(algorithm or "direct")
        tag = self._begin("all_reduce", x, op.value, name)
        with execute.contiguous(x) as flat:
            self.run_schedule(name, flat, op, tag)
        return None

    def reduce_scatter(self, out: Array, x: Array, op: ReduceOp = SUM, *, async_op: bool = False) -> Work | None:
        """``out`` becomes this rank's p-th part of the reduction of all ``x``; x.size = p × out.size."""
        check_array(out, writes=True)
        check_op(op, out.dtype)
        if async_op:
            return self._defer(lambda: self.reduce_scatter(out, x, op))
        self._check_parts(out, x, "reduce_scatter(out, x)")
        tag = self._begin("reduce_scatter", x, op.value)
        execute.reduce_scatter(self, out, x, op, tag)
        return None

    def all_gather(self, out: Array, x: Array, *, async_op: bool = False) -> Work | None:
        """``out`` becomes all ranks' ``x``, one after the other; out.size = p × x.size. Sent: (p-1)n."""
        if async_op:
            return self._defer(lambda: self.all_gather(out, x))
        self._check_parts(x, out, "all_gather(out, x)")
        check_array(out, writes=True)
        tag = self._begin("all_gather", x)
        execute.all_gather(self, out, x, tag)
        return None

    def broadcast(self, x: Array, src: int = 0, *, async_op: bool = False) -> Work | None:
        """Every rank's ``x`` becomes that of ``src``."""
        if async_op:
            return self._defer(lambda: self.broadcast(x, src))
        self._check_peer(src, "src")
        check_array(x, writes=self.rank != src)
        tag = self._begin("broadcast", x, f"src={src}")
        with execute.contiguous(x, writes=self.rank != src) as flat:
            self.run_schedule("broadcast", flat, None, tag, src)
        return None

    def reduce(self, x: Array, dst: int = 0, op: ReduceOp = SUM, *, async_op: bool = False) -> Work | None:
        """The reduction of all ``x`` in ``x`` of rank ``dst``; the others' ``x`` stays as it is."""
        self._check_peer(dst, "dst")
        check_array(x, writes=self.rank == dst)
        check_op(op, x.dtype)
        if async_op:
            return self._defer(lambda: self.reduce(x, dst, op))
        tag = self._begin("reduce", x, f"dst={dst}, {op.value}")
        execute.reduce(self, x, dst, op, tag)
        return None

    def gather(self, x: Array, dst: int = 0) -> Array | None:
        """At ``dst`` an array of shape (p, *x.shape) with all ranks' ``x``; None elsewhere."""
        self._check_peer(dst, "dst")
        tag = self._begin("gather", x, f"dst={dst}")
        return execute.gather(self, x, dst, tag)

    def scatter(self, x: Array | None, src: int = 0) -> Array:
        """This rank's ``x[rank]`` of the array of shape (p, …) that ``src`` gives (None elsewhere)."""
        self._check_peer(src, "src")
        if self.rank == src and (x is None or x.ndim == 0 or len(x) != self.world_size):
            found = "None" if x is None else f"shape {x.shape}"
            raise ValueError(f"scatter: rank {src} must give an array of shape (p={self.world_size}, …): {found}")
        shape, dtype = self.broadcast_object(None if x is None else (x.shape[1:], x.dtype), src)
        tag = self.begin("scatter", f"{dtype} {shape}, src={src}")
        return execute.scatter(self, x, np.empty(shape, dtype), src, tag)

    def all_to_all(self, out: Array, x: Array, *, async_op: bool = False) -> Work | None:
        """``out[j]`` becomes ``x[rank]`` of rank j; both have shape (p, …). Sent: (p-1)/p n."""
        if async_op:
            return self._defer(lambda: self.all_to_all(out, x))
        for name, array in (("out", out), ("x", x)):
            if array.ndim == 0 or len(array) != self.world_size:
                raise ValueError(f"all_to_all: {name} must have shape (p={self.world_size}, …): {array.shape}")
        if out.shape != x.shape or out.dtype != x.dtype:
            raise ValueError(f"all_to_all: out {out.dtype} {out.shape} and x {x.dtype} {x.shape} must be alike")
        check_array(out, writes=True)
        tag = self._begin("all_to_all", x)
        execute.all_to_all(self, out, x, tag)
        return None

    def barrier(self) -> None:
        """Return when all ranks have called it."""
        tag = self._begin("barrier", np.zeros(0, np.int8))
        token = np.zeros(1, np.int64)
        self.run_schedule("direct", token, SUM, tag)

    # -- collectives on objects ------------------------------------------------------------------------

    def broadcast_object(self, obj: Any, src: int = 0, what: str = "broadcast_object") -> Any:
        """The object that rank ``src`` gives, pickled once; the others' ``obj`` is not looked at."""
        self._check_peer(src, "src")
        data = np.frombuffer(pickle.dumps(obj) if self.rank == src else b"", np.uint8)
        sizes = self.all_gather_int(len(data), f"{what} src={src}")
        buffer = data.copy() if self.rank == src else np.empty(sizes[src], np.uint8)
        self.broadcast(buffer, src)
        return pickle.loads(buffer.tobytes())

    def all_gather_object(self, obj: Any, what: str = "all_gather_object") -> list[Any]:
        """The objects of all ranks, in rank order. ``what`` names the operation in messages."""
        data = np.frombuffer(pickle.dumps(obj), np.uint8)
        sizes = self.all_gather_int(len(data), what)
        mine = np.zeros(max(sizes), np.uint8)
        mine[: len(data)] = data
        everybody = np.empty((self.world_size, len(mine)), np.uint8)
        self.all_gather(everybody, mine)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(everybody, sizes)]

    @overload
    def all_gather_int(self, value: int, what: str = ..., *, async_op: Literal[False] = False) -> list[int]: ...
    @overload
    def all_gather_int(self, value: int, what: str = ..., *, async_op: Literal[True]) -> Work: ...
    def all_gather_int(self, value: int, what: str = "all_gather_int", *, async_op: bool = False) -> Any:
        """Every rank's ``value``, an int64, in rank order; ``what`` names the operation in messages.

        The cheapest meeting of all ranks that says something: a barrier whose header carries the number.
        """
        if async_op:
            return self._defer(lambda: self.all_gather_int(value, what))
        everybody = np.zeros(self.world_size, np.int64)
        self.all_gather(everybody, np.array([value], np.int64))
        return [int(x) for x in everybody]

    def duplicate(self, name: str) -> Communicator:
        """The same ranks with sequence numbers of their own: what a strategy talks over. Collective."""
        duplicate = self.split(0, self.rank, name)
        assert duplicate is not None
        return duplicate

    # -- order and checks ------------------------------------------------------------------------------

    def _begin(self, operation: str, x: Array, *details: str) -> int:
        self.run_all()
        return self.begin(operation, ", ".join((f"{x.dtype} {x.shape}", *details)))

    def _defer(self, run: Callable[[], Any]) -> Work:
        work = Later(self, run)
        self._later.append(work)
        return work

    def run_oldest(self) -> None:
        self._later.pop(0).run()

    def run_all(self) -> None:
        """Run what has been deferred, so that the order of collectives is that of the program."""
        while self._later:
            self.run_oldest()

    def _check_peer(self, rank: int, what: str) -> None:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"{what}={rank}: this communicator has ranks 0 to {self.world_size - 1}")

    def _check_parts(self, part: Array, whole: Array, call: str) -> None:
        check_parts(part, whole, self.world_size, call)
