"""The process world: ranks are processes of one machine that share memory.

Collectives go through payload slots: each rank copies a chunk into its own, all meet once, and everybody reads
everybody's, summing in order of rank. One barrier a chunk of 512 KB, so copying, summing and the next chunk
stay in L2. Point-to-point messages, and any other ``algorithm=``, go over queues (``mailbox.py``).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.comm import execute
from minidp.comm.arena import Bytes, available_bytes, not_enough
from minidp.comm.arguments import check_color, check_dtype
from minidp.comm.communicator import Communicator
from minidp.comm.errors import CommError
from minidp.comm.mailbox import Mailbox
from minidp.comm.reduction import SUM, Array, ReduceOp, check_array, check_op, fold
from minidp.comm.rendezvous import CHUNK, Header, Rendezvous
from minidp.comm.traffic import Traffic
from minidp.comm.work import Work

_MAX_PLANS = 256


class _Plan(NamedTuple):
    """What a collective on arrays of one shape and dtype needs each time: made once."""

    header: Header
    slots: tuple[list[Array], list[Array]]  # typed views of all payload slots, for either parity
    per_chunk: int  # elements of a slot; the array's size if that is less


class ProcessCommunicator(Communicator):
    """A group of processes of one machine, seen from member ``rank``; see ``Communicator``."""

    shares_memory = True

    def __init__(self, rendezvous: Rendezvous, traffic: Traffic) -> None:
        super().__init__()
        self.rank = self.local_rank = rendezvous.rank
        self.world_size = rendezvous.size
        self.traffic = traffic
        self._rendezvous = rendezvous
        self._world_rank = rendezvous.ranks[rendezvous.rank]
        self._mailbox = Mailbox(rendezvous, self._world_rank, traffic)
        self._plans: dict[Any, _Plan] = {}
        self._closed = False
        self._children: weakref.WeakSet[Communicator] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"ProcessCommunicator(rank={self.rank}, world_size={self.world_size}, {self._rendezvous.name!r})"

    # -- primitives ------------------------------------------------------------------------------------

    def post_send(self, x: Array, dst: int, tag: int) -> Work:
        self._check_usable(x)
        return self._mailbox.send(x, dst, tag)

    def post_recv(self, x: Array, src: int, tag: int) -> Work:
        self._check_usable(x, writes=True)
        return self._mailbox.recv(x, src, tag)

    def begin(self, operation: str, detail: str = "") -> int:
        self._check_open()
        self._rendezvous.enter(self._plan((operation, detail), f"{operation} {detail}").header)
        return -1 - self._rendezvous.sequence

    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Communicator | None:
        check_color(color, key)
        rendezvous = self._rendezvous
        colors = self.all_gather_object((color, key, self._world_rank), name or "split")
        members = sorted((key, i) for i, (c, key, _) in enumerate(colors) if c == color)
        offset = Rendezvous.reserve(rendezvous.arena, self._world_rank, len(members)) if color is not None else 0
        offsets = self.all_gather_object(offset, name or "split")
        if color is None:
            return None
        order = [i for _, i in members]
        group = Rendezvous(
            rendezvous.watch,
            rendezvous.arena,
            [offsets[i] for i in order],
            [colors[i][2] for i in order],
            order.index(self.rank),
            name or f"{rendezvous.name}/split {color}",
        )
        child = ProcessCommunicator(group, Traffic(parent=self.traffic))
        child.endpoint = self.endpoint
        self._children.add(child)
        return child

    def allocate(self, nbytes: int) -> list[npt.NDArray[np.uint8]]:
        if nbytes < 0:
            raise ValueError(f"allocate: nbytes={nbytes} must be 0 or more")
        arena = self._rendezvous.arena
        asked = self.all_gather_object((nbytes, available_bytes()), "allocate")
        total, free = sum(size for size, _ in asked), min(room for _, room in asked)
        if total > free:
            raise MemoryError(not_enough(total, free))
        place: int | str  # where, or why not: the others must know, or they would wait
        try:
            place = arena.take(self._world_rank, nbytes)
            arena.reserve(place, nbytes)
        except MemoryError as error:
            place = str(error)
        places = self.all_gather_object(place, "allocate")
        for problem in places:
            if isinstance(problem, str):
                raise MemoryError(problem)
        return [arena.map(place, size, populate=True) for place, (size, _) in zip(places, asked)]

    def now(self) -> float:
        return time.perf_counter()

    def close(self) -> None:
        self._closed = True
        self._plans.clear()
        for child in list(self._children):
            child.close()

    def leave(self) -> None:
        """Tell the peers that this rank will not come to any collective again."""
        self._rendezvous.watch.board.returned(self._world_rank)

    def expendable(self, yes: bool) -> None:
        self._rendezvous.watch.board.expendable(self._world_rank, yes)

    def progress(self, done: int, total: int = 0, note: str | None = None) -> None:
        self._rendezvous.watch.board.progress(self._world_rank, done, total, note)

    # -- collectives through payload slots --------------------------------------------------------------

    def all_reduce(
        self, x: Array, op: ReduceOp = SUM, algorithm: str | None = None, *, async_op: bool = False
    ) -> Work | None:
        if async_op or algorithm is not None:
            return super().all_reduce(x, op, algorithm, async_op=async_op)
        if self._later:
            self.run_all()
        plan = self._plans.get((x.dtype, x.shape, op)) or self._all_reduce_plan(x, op)
        if x.flags.carray:  # contiguous and writeable
            self._sum_slots(x if x.ndim == 1 else x.reshape(-1), op, plan)
        else:
            check_array(x, writes=True)
            with execute.contiguous(x) as flat:
                self._sum_slots(flat, op, plan)
        self._count(x.nbytes)
        return None

    def _sum_slots(self, flat: Array, op: ReduceOp, plan: _Plan) -> None:
        """The whole of an all-reduce: copy in, meet, sum everybody's in order of rank; chunk by chunk."""
        rendezvous, rank, per_chunk = self._rendezvous, self.rank, plan.per_chunk
        arrive: Callable[[Header], object] = rendezvous.enter
        for lo in range(0, len(flat) or 1, per_chunk or 1):
            mine = flat if len(flat) == per_chunk else flat[lo : lo + per_chunk]
            slots = plan.slots[rendezvous.parity()]
            if len(mine) < per_chunk:
                slots = [slot[: len(mine)] for slot in slots]
            slots[rank][:] = mine
            arrive(plan.header)
            if rank < 2:  # read my own values where they still are, not what has just left for my slot
                slots = slots.copy()
                slots[rank] = mine
            fold(slots, op, mine, divide=True)
            arrive = rendezvous.arrive

    def _all_reduce_plan(self, x: Array, op: ReduceOp) -> _Plan:
        check_op(op, check_array(x, writes=False).dtype)
        return self._plan((x.dtype, x.shape, op), f"all_reduce {x.dtype} {x.shape}, {op.value}", x)

    def all_gather(self, out: Array, x: Array, *, async_op: bool = False) -> Work | None:
        if async_op:
            return self._defer(lambda: self.all_gather(out, x))
        if self._later:
            self.run_all()
        plan = self._plans.get(("all_gather", x.dtype, x.shape)) or self._plan(
            ("all_gather", x.dtype, x.shape), f"all_gather {x.dtype} {x.shape}", x
        )
        self._check_parts(x, out, "all_gather(out, x)")
        if not out.flags.carray:
            check_array(out, writes=True)
        rendezvous, per_chunk = self._rendezvous, plan.per_chunk
        with execute.contiguous(out) as flat:
            rows = flat.reshape(self.world_size, x.size)
            mine = x.reshape(-1)
            arrive: Callable[[Header], object] = rendezvous.enter
            for lo in range(0, len(mine) or 1, per_chunk or 1):
                slots = plan.slots[rendezvous.parity()]
                hi = min(lo + per_chunk, len(mine))
                slots[self.rank][: hi - lo] = mine[lo:hi]
                arrive(plan.header)
                for row, slot in zip(rows, slots):
                    row[lo:hi] = slot[: hi - lo]
                arrive = rendezvous.arrive
        self._count(x.nbytes)
        return None

    def reduce_scatter(self, out: Array, x: Array, op: ReduceOp = SUM, *, async_op: bool = False) -> Work | None:
        check_array(out, writes=True)
        check_op(op, out.dtype)
        if async_op:
            return self._defer(lambda: self.reduce_scatter(out, x, op))
        self._check_parts(out, x, "reduce_scatter(out, x)")
        p, rank = self.world_size, self.rank
        parts = np.ascontiguousarray(x).reshape(p, out.size)
        with execute.contiguous(out) as flat:

            def put(slot: Bytes, lo: int, hi: int) -> None:
                _typed(slot, p, hi - lo, x.dtype)[...] = parts[:, lo:hi]

            def take(slots: list[Bytes], lo: int, hi: int) -> None:
                pieces = [_typed(slot, p, hi - lo, x.dtype)[rank] for slot in slots]
                fold(pieces, op, flat[lo:hi], divide=True)

            self._rounds("reduce_scatter", x, op.value, out.size, p * x.itemsize, put, take)
        self._count(out.nbytes)
        return None

    def broadcast(self, x: Array, src: int = 0, *, async_op: bool = False) -> Work | None:
        if async_op:
            return self._defer(lambda: self.broadcast(x, src))
        self._check_peer(src, "src")
        self._check_usable(x, writes=self.rank != src)
        with execute.contiguous(x, writes=self.rank != src) as flat:
            data = flat.view(np.uint8)

            def put(slot: Bytes, lo: int, hi: int) -> None:
                if self.rank == src:
                    slot[: hi - lo] = data[lo:hi]

            def take(slots: list[Bytes], lo: int, hi: int) -> None:
                if self.rank != src:
                    data[lo:hi] = slots[src][: hi - lo]

            self._rounds("broadcast", x, f"src={src}", len(data), 1, put, take)
        readers, read = (self.world_size - 1, 0) if self.rank == src else (0, x.nbytes)
        self.traffic.add(x.nbytes * readers, read, readers)
        return None

    def barrier(self) -> None:
        self.all_gather_int(0, "barrier")

    def all_gather_int(self, value: int, what: str = "all_gather_int", *, async_op: bool = False) -> Any:
        if async_op:
            return self._defer(lambda: self.all_gather_int(value, what))
        if self._later:
            self.run_all()
        plan = self._plans.get(what) or self._plan(what, what)
        return self._rendezvous.enter(plan.header, value)

    # -- how they are made ------------------------------------------------------------------------------

    def _rounds(
        self,
        operation: str,
        x: Array,
        detail: str,
        count: int,
        width: int,
        put: Callable[[Bytes, int, int], None],
        take: Callable[[list[Bytes], int, int], None],
    ) -> None:
        """A collective over ``count`` items of ``width`` bytes: put a chunk into the own slot, meet, take."""
        if self._later:
            self.run_all()
        self._check_usable(x)
        text = f"{operation} {x.dtype} {x.shape}, {detail}"
        header = self._plan((operation, x.dtype, x.shape, detail), text).header
        rendezvous, step = self._rendezvous, max(1, CHUNK // width)
        arrive: Callable[[Header], object] = rendezvous.enter
        for lo in range(0, max(count, 1), step):
            hi = min(lo + step, count)
            slots = rendezvous.slots(rendezvous.parity())
            put(slots[self.rank], lo, hi)
            arrive(header)
            take(slots, lo, hi)
            arrive = rendezvous.arrive

    def _plan(self, key: Any, text: str, x: Array | None = None) -> _Plan:
        plan = self._plans.get(key)
        if plan is None:
            self._check_open()  # here is enough: closing clears the plans
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            if x is None:
                plan = _Plan(Header(text), ([], []), 0)
            else:
                check_dtype(x.dtype)
                per_chunk = min(x.size, CHUNK // x.itemsize)
                slots = [
                    [slot[: per_chunk * x.itemsize].view(x.dtype) for slot in self._rendezvous.slots(parity)]
                    for parity in (0, 1)
                ]
                plan = _Plan(Header(text), (slots[0], slots[1]), per_chunk)
            self._plans[key] = plan
        return plan

    def _count(self, each: int) -> None:
        self.traffic.add(each * (self.world_size - 1), each * (self.world_size - 1), self.world_size - 1)

    def _check_usable(self, x: Array, writes: bool = False) -> None:
        self._check_open()
        check_array(x, writes)
        check_dtype(x.dtype)

    def _check_open(self) -> None:
        if self._closed:
            raise CommError(
                "this communicator is closed: it lives as long as the function that spawn called with it"
            )


def _typed(slot: Bytes, rows: int, columns: int, dtype: np.dtype[Any]) -> Array:
    return slot[: rows * columns * dtype.itemsize].view(dtype).reshape(rows, columns)
