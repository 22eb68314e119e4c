"""What a rank does in a step, written down without its peers: the script that timing-only runs replay.

A rehearsal is a communicator of one rank whose peers all do just what it does, and have the same data. A strategy
that is built on it and makes a step leaves a script: what was computed, what was begun, what was waited for. Any
strategy can be rehearsed whose ranks do the same work; nothing of it needs to be told twice.

What can't be rehearsed: messages from rank to rank (NotImplementedError). What goes unnoticed, because one rank
can't see it: ranks that do different work, groups that are not the whole world (every ``split`` is taken for a
duplicate), and shares that shrink as ranks are added (an array keeps the length that it has here).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp import backend
from minidp.comm.communicator import Communicator
from minidp.comm.execute import Pieces
from minidp.comm.reduction import SUM, ReduceOp
from minidp.comm.traffic import Traffic
from minidp.comm.work import Work

Array = npt.NDArray[Any]


class Compute(NamedTuple):
    """Work, as `backend.meter` counts it: operations, floating-point operations, bytes read and written."""

    operations: float
    flops: float
    nbytes: float = 0.0


class Collective(NamedTuple):
    """A meeting of all ranks.

    ``schedule`` "" carries no bytes, "all_reduce" is the fastest for these ranks, others are names of
    ``schedules``. It moves an array of ``length · p^scale`` elements of ``itemsize`` bytes. With a ``stream`` it
    goes on by itself, after what that stream was given before, and a `Wait` ends it.
    """

    schedule: str
    length: int = 0
    itemsize: int = 1
    scale: int = 0
    root: int = 0
    stream: int | None = None


class Wait(NamedTuple):
    """Wait for what has been begun on a stream, up to its ``nth`` collective of the script (from 1).

    0 is the last one of the step before, −1 the one before that: a step may end while its messages still travel.
    """

    stream: int
    nth: int


Entry = Compute | Collective | Wait
Script = list[Entry]

# By which power of the number of ranks the array of a schedule grows; others: not at all.
_SCALES = {"all_gather": 1, "gather": 1, "scatter": 1, "all_to_all": 2}


class Tape:
    """What is written down: one for a rehearsal and all communicators made from it."""

    def __init__(self) -> None:
        self._script: Script = []
        self._begun: list[int] = []  # collectives that each stream has been given
        self._begun_before: list[int] = []  # those of them that are in scripts before this one
        self._meter = backend.Meter()
        self._charged = Compute(0, 0.0, 0.0)

    @contextmanager
    def metered(self) -> Iterator[None]:
        """Inside this block what is computed is written down, too."""
        with backend.meter() as self._meter:
            self._charged = Compute(0, 0.0, 0.0)
            yield
            self.charge()

    def cut(self) -> Script:
        """What was written since the last time."""
        self.charge()
        script, self._script = self._script, []
        self._begun_before = list(self._begun)
        return script

    def charge(self) -> None:
        """Write down what was computed until now."""
        m, charged = self._meter, self._charged
        if m.operations > charged.operations:
            self._charged = Compute(m.operations, m.flops, m.nbytes)
            self._script.append(Compute(*(now - before for now, before in zip(self._charged, charged))))

    def add(self, entry: Entry) -> None:
        self.charge()
        self._script.append(entry)

    def stream(self) -> int:
        """A new one."""
        self._begun.append(0)
        self._begun_before.append(0)
        return len(self._begun) - 1

    def begin(self, stream: int) -> int:
        """How many collectives the stream has been given since it was made, this one included."""
        self._begun[stream] += 1
        return self._begun[stream]

    def wait(self, stream: int, count: int) -> None:
        """Wait for the first ``count`` collectives that the stream has been given."""
        self.add(Wait(stream, count - self._begun_before[stream]))


class Rehearsal(Communicator):
    """See the module.

    Args:
        tape: what it is written to.
        world_size: how many ranks the rank believes in. A reduction leaves its array as it is: what is done
            afterwards must not depend on values.
    """

    def __init__(self, tape: Tape, world_size: int = 2, traffic: Traffic | None = None) -> None:
        super().__init__()
        self.rank = self.local_rank = 0
        self.world_size = world_size
        self.traffic = Traffic(parent=traffic)
        self._tape, self._stream = tape, tape.stream()
        self._on_stream = False
        self._last: _Begun | None = None  # what the stream was given last

    def _note(self, schedule: str, length: int = 0, itemsize: int = 1, root: int = 0) -> None:
        scale = _SCALES.get(schedule, 0)
        stream = self._stream if self._on_stream else None
        self._tape.add(Collective(schedule, length // self.world_size**scale, itemsize, scale, root, stream))

    def _defer(self, run: Callable[[], Any]) -> Work:
        self._on_stream = True
        try:
            value = run()
        finally:
            self._on_stream = False
        self._last = _Begun(self._tape, self._stream, value)
        return self._last

    def run_all(self) -> None:
        """What has been begun earlier comes first: the order of collectives is that of the program."""
        if self._last is not None and not self._on_stream:
            self._last.settle()

    # -- primitives ------------------------------------------------------------------------------------

    def post_send(self, x: Array, dst: int, tag: int) -> Work:
        raise NotImplementedError(
            "a rehearsal has no peers, so messages from rank to rank can't be rehearsed: run the strategy itself, "
            'minidp.spawn(train, ranks, world="virtual")'
        )

    def post_recv(self, x: Array, src: int, tag: int) -> Work:
        return self.post_send(x, src, tag)

    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Communicator | None:
        self.barrier()
        return None if color is None else Rehearsal(self._tape, self.world_size, self.traffic)

    def allocate(self, nbytes: int) -> list[npt.NDArray[np.uint8]]:
        self.barrier()
        return [np.zeros(nbytes, np.uint8) for _ in range(self.world_size)]

    def now(self) -> float:
        """0: a rehearsal takes no time. What was computed before is written down apart from what comes after."""
        self._tape.charge()
        return 0.0

    def close(self) -> None: ...

    # -- collectives -----------------------------------------------------------------------------------

    def begin(self, operation: str, detail: str = "") -> int:
        return -1

    def run_schedule(self, name: str, flat: Array | Pieces, op: ReduceOp | None, tag: int, root: int = 0) -> None:
        self._note(name, len(flat), flat.itemsize, root)

    def all_reduce(
        self, x: Array, op: ReduceOp = SUM, algorithm: str | None = None, *, async_op: bool = False
    ) -> Work | None:
        if async_op or algorithm is not None:
            return super().all_reduce(x, op, algorithm, async_op=async_op)
        self.run_all()
        self._note("all_reduce", x.size, x.itemsize)
        return None

    def all_gather_int(self, value: int, what: str = "all_gather_int", *, async_op: bool = False) -> Any:
        if async_op:
            return self._defer(lambda: self.all_gather_int(value, what))
        self.barrier()
        return [value] * self.world_size

    def barrier(self) -> None:
        self.run_all()
        self._note("")

    def broadcast_object(self, obj: Any, src: int = 0, what: str = "broadcast_object") -> Any:
        """``obj``, from every ``src``: all have the same."""
        self._check_peer(src, "src")
        data = pickle.dumps(obj)
        self.barrier()  # its length comes first
        self._note("broadcast", len(data), root=src)
        return pickle.loads(data)

    def all_gather_object(self, obj: Any, what: str = "all_gather_object") -> list[Any]:
        data = pickle.dumps(obj)
        self.barrier()
        self._note("all_gather", len(data) * self.world_size)
        return [pickle.loads(data) for _ in range(self.world_size)]


class _Begun(Work):
    """What has been begun on a stream."""

    def __init__(self, tape: Tape, stream: int, value: Any) -> None:
        self._tape, self._stream, self._value = tape, stream, value
        self._count = tape.begin(stream)
        self._settled = False

    def wait(self) -> Any:
        self._settled = True
        self._tape.wait(self._stream, self._count)
        return self._value

    def settle(self) -> None:
        """Wait, unless somebody has done so before."""
        if not self._settled:
            self.wait()
