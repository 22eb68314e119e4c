"""The virtual world's communicator: ranks are tasks of one thread, messages take virtual time.

Point to point: `post`. Collectives: `meeting`. Where the ranks are, and what becomes of them: `venue`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt
from greenlet import getcurrent

from minidp import trace
from minidp.comm import execute
from minidp.comm.arguments import check_color
from minidp.comm.communicator import ANY, Communicator
from minidp.comm.errors import CommError
from minidp.comm.meeting import Meeting, Payload
from minidp.comm.movement import Group, Movement
from minidp.comm.post import PostOffice
from minidp.comm.reduction import SUM, ReduceOp, check_array, check_op
from minidp.comm.stream import Stream
from minidp.comm.traffic import Traffic
from minidp.comm.wording import describe
from minidp.comm.work import Work

Array = npt.NDArray[Any]
_ASKS = 1_000_000  # for the time, with nothing in between, after which a rank has been waiting for it to pass
_Members = tuple[Group, PostOffice, dict[int, int]]  # a new group, and the place in it by rank in the old one


class VirtualCommunicator(Communicator):
    """A group of virtual ranks, seen from one of them.

    Every collective begins when the last rank has come and ends for all at once. It takes what `costs.cost` says
    of its schedule, on an idle network. ``barrier`` and ``all_gather_int`` carry no bytes: they take one latency.
    ``all_reduce`` without ``algorithm`` sums in order of rank, and takes the time (and counts the bytes) of the
    schedule that is fastest for these ranks (`movement.Group.fastest`). ``async_op`` works go on while the caller
    computes: the k-th of a communicator ends at ``max(end of the one before, the last rank's call) + its own
    time``.

    Arrays may hold Python objects, such as Fractions; a reference counts 8 bytes then.
    """

    def __init__(self, group: Group, post: PostOffice, member: int, traffic: Traffic) -> None:
        super().__init__()
        self._group, self._post, self._venue = group, post, group.venue
        self._world_rank = group.ranks[member]
        self.rank, self.world_size = member, group.size
        self.local_rank = self._venue.cluster.local_rank(self._world_rank)
        self.traffic = traffic
        self._sequence = 0
        self._header = ""
        self._headers: dict[Any, str] = {}  # made once: to format one takes longer than to compare it
        self._stream: Stream | None = None
        self._children: WeakSet[VirtualCommunicator] = WeakSet()
        self._closed = False
        self._moment = (0.0, 0, 0)  # when the time was last asked for
        self._asked = 0  # how often at that moment

    # -- primitives ------------------------------------------------------------------------------------

    def post_send(self, x: Array, dst: int, tag: int) -> Work:
        self._check(x)
        if dst != self.rank:  # what one tells oneself goes nowhere
            self.traffic.add(x.nbytes)
        return self._post.begin_send(self.rank, x, dst, tag)

    def post_recv(self, x: Array, src: int, tag: int) -> Work:
        self._check(x, writes=True)
        return self._post.begin_recv(self.rank, x, src, tag, self.traffic)

    def send(self, x: Array, dst: int, tag: int = 0, *, async_op: bool = False) -> Any:
        if async_op or type(x) is not np.ndarray or not 0 <= dst < self.world_size or tag < 0 or self._closed:
            return super().send(x, dst, tag, async_op=async_op)  # type: ignore[call-overload]
        self._post.send(self.rank, x, dst, tag)  # the short way
        if dst != self.rank:
            self.traffic.add(x.nbytes)
        return None

    def recv(self, x: Array, src: int = ANY, tag: int = 0, *, async_op: bool = False) -> Any:
        if async_op or type(x) is not np.ndarray or tag < 0 or not ANY <= src < self.world_size or self._closed:
            return super().recv(x, src, tag, async_op=async_op)  # type: ignore[call-overload]
        if not x.flags.writeable:
            check_array(x, writes=True)
        src = self._post.recv(self.rank, x, src, tag)
        if src != self.rank:
            self.traffic.add(0, x.nbytes, 0)
        return src

    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Communicator | None:
        check_color(color, key)
        self.run_all()
        meeting = self._meet(name or "split", note=(color, key))
        found: dict[Any, _Members] = meeting.make(lambda: self._groups(meeting, name))
        if color is None:
            return None
        group, post, member = found[color]
        child = VirtualCommunicator(group, post, member[self.rank], Traffic(parent=self.traffic))
        child.endpoint = self.endpoint
        self._children.add(child)
        return child

    def _groups(self, meeting: Meeting, name: str | None) -> dict[Any, _Members]:
        members: dict[Any, list[tuple[int, int]]] = {}
        for rank, (color, key) in enumerate(meeting.everybody()):
            members.setdefault(color, []).append((key, rank))
        groups = {}
        for color, pairs in members.items():
            order = [rank for _, rank in sorted(pairs)]
            ranks = [self._group.ranks[rank] for rank in order]
            group = Group(self._venue, ranks, name or f"{self._group.name}/split {color}")
            groups[color] = group, PostOffice(self._venue, ranks), {rank: i for i, rank in enumerate(order)}
        return groups

    def allocate(self, nbytes: int) -> list[npt.NDArray[np.uint8]]:
        if nbytes < 0:
            raise ValueError(f"allocate: nbytes={nbytes} must be 0 or more")
        self.run_all()
        meeting = self._meet("allocate", note=nbytes)
        views: list[npt.NDArray[np.uint8]] = meeting.make(lambda: [_aligned(n) for n in meeting.everybody()])
        return list(views)

    def now(self) -> float:
        """Virtual seconds since the start of the run.

        To ask takes no time. CommError for a rank that does nothing else: it waits for a time that never comes.
        """
        clock = self._venue.here(self._world_rank).clock
        moment = clock, self._venue.loop.events, self.traffic.messages_sent
        self._asked = self._asked + 1 if moment == self._moment else 0
        self._moment = moment
        if self._asked >= _ASKS:
            raise CommError(
                f"rank {self._world_rank} has asked for the time {_ASKS} times, and it is always {clock:g} s: in "
                "the virtual world time passes while a rank computes or communicates, not while it asks. Wait by "
                "receiving a message"
            )
        return clock

    def settle(self) -> None:
        self._check_open()
        task = self._venue.here(self._world_rank)
        task.sleep()
        task.waited()
        self._venue.check(self._world_rank)

    def close(self) -> None:
        self._closed = True
        for child in list(self._children):
            child.close()

    # -- collectives -----------------------------------------------------------------------------------

    def begin(self, operation: str, detail: str = "") -> int:
        self._check_open()
        self._header = f"{operation} {detail}".rstrip()
        return -1

    def _begin(self, operation: str, x: Array, *details: str) -> int:
        self._check(x)
        return super()._begin(operation, x, *details)

    def run_schedule(
        self, name: str, flat: Array | execute.Pieces, op: ReduceOp | None, tag: int, root: int = 0
    ) -> None:
        self._collective(name, name, flat, op, root)

    def all_reduce(
        self, x: Array, op: ReduceOp = SUM, algorithm: str | None = None, *, async_op: bool = False
    ) -> Work | None:
        if async_op or algorithm is not None:
            return super().all_reduce(x, op, algorithm, async_op=async_op)
        check_array(x, writes=True)
        check_op(op, x.dtype)
        self.run_all()
        self._check_open()
        key = x.dtype, x.shape, op
        header = self._headers.get(key)
        if header is None:
            header = self._headers[key] = f"all_reduce {x.dtype} {x.shape}, {op.value}"
        self._header = header
        fastest = self._group.fastest(x.nbytes)
        if x.ndim == 1 and x.flags.c_contiguous:
            self._collective("direct", fastest, x, op)
        else:
            with execute.contiguous(x) as flat:
                self._collective("direct", fastest, flat, op)
        return None

    def barrier(self) -> None:
        self.all_gather_int(0, "barrier")

    def all_gather_int(self, value: int, what: str = "all_gather_int", *, async_op: bool = False) -> Any:
        if async_op:
            return self._defer(lambda: self.all_gather_int(value, what))
        self.run_all()
        return list(self._meet(what, note=int(value)).everybody())

    def all_gather_object(self, obj: Any, what: str = "all_gather_object") -> list[Any]:
        data = pickle.dumps(obj)
        size = max(self.all_gather_int(len(data), what))
        movement = Movement("all_gather", 0, size * self.world_size, 1)
        meeting = self._meet(f"{what} of {size} bytes", note=data, movement=movement)
        # One pickle of the whole list: each rank needs objects of its own, but not p² small ones.
        everybody: bytes = meeting.make(lambda: pickle.dumps([pickle.loads(each) for each in meeting.everybody()]))
        return list(pickle.loads(everybody))

    def _collective(
        self, schedule: str, timed: str, flat: Array | execute.Pieces, op: ReduceOp | None, root: int = 0
    ) -> None:
        movement = Movement(timed, root, len(flat), flat.itemsize)
        self._meet(self._header, payload=Payload(schedule, flat, op), movement=movement)

    def _meet(
        self, header: str, note: Any = 0, payload: Payload | None = None, movement: Movement | None = None
    ) -> Meeting:
        """Come to the next meeting of the group, and go on when it has ended."""
        self._check_open()
        group, task = self._group, self._venue.here(self._world_rank)
        self._sequence = sequence = self._sequence + 1
        meeting = group.meetings.get(sequence)
        if meeting is None:
            meeting = group.meetings[sequence] = Meeting(group, sequence)
        meeting.movement = movement
        came = task.clock
        meeting.arrive(self.rank, task, header, note, payload)
        task.block(lambda: describe(header, sequence, group.name))
        task.waited()
        if movement is not None:
            traffic = group.traffic(movement)
            sent, received = traffic.sent[self.rank], traffic.received[self.rank]
            self.traffic.add(sent, received, traffic.messages[self.rank])
        recorder = trace.current()
        if recorder is not None:
            name = header.partition(" ")[0]
            args = {"stream": task.name} if task.name else {}
            if meeting.start > came:
                recorder.add(f"wait for {name}", "wait", came, meeting.start, **args)
            if meeting.end > meeting.start:
                recorder.add(name, "communication", meeting.start, meeting.end, **args)
        return meeting

    # -- works that go on by themselves ------------------------------------------------------------------

    def _defer(self, run: Callable[[], Any]) -> Work:
        task = self._venue.here(self._world_rank)
        if self._stream is None:
            self._stream = Stream(self._venue, self._world_rank, self._group.name)
        return self._stream.add(run, task)

    def run_all(self) -> None:
        """What has been begun earlier comes first: the order of collectives is that of the program."""
        stream = self._stream
        if stream is not None and stream.last is not None and getcurrent() is not stream.task:
            stream.last.settle()
            if stream.failed:  # what nobody has waited for may not fail in silence
                stream.failed[0].wait()

    def _check(self, x: Array, writes: bool = False) -> None:
        self._check_open()
        check_array(x, writes)

    def _check_open(self) -> None:
        if self._closed:
            raise CommError(
                "this communicator is closed: it lives as long as the function that spawn called with it"
            )


def _aligned(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeros, at a multiple of 64 bytes."""
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes]
