"""What a rank does in a step, written down without its peers: the script that timing-only runs replay.

A rehearsal is a communicator of one rank whose peers all do just what it does, and have the same data. A strategy
that is built on it and makes a step leaves a script: what was computed, what was begun, what was waited for. Any
strategy can be rehearsed whose ranks do the same work; nothing of it needs to be told twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp import backend
from minidp.comm.communicator import Communicator
from minidp.comm.reduction import SUM, ReduceOp
from minidp.comm.traffic import Traffic
from minidp.comm.work import Work

Array = npt.NDArray[Any]


class Compute(NamedTuple):
    """Work, as `backend.meter` counts it."""

    operations: float
    flops: float
    nbytes: float = 0.0


class Collective(NamedTuple):
    """A meeting of all ranks.

    ``schedule`` "" carries no bytes, "all_reduce" is the fastest by the cost model, others are names of
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
    """Wait for what has been begun on a stream, up to its ``nth`` collective of the script (from 1)."""

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
        self._begun: list[int] = []  # collectives of each stream, in this script
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
        self._begun = [0] * len(self._begun)
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
        return len(self._begun) - 1

    def begin(self, stream: int) -> int:
        """How many collectives the stream has been given, this one included."""
        self._begun[stream] += 1
        return self._begun[stream]


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
        return _Begun(self._tape, Wait(self._stream, self._tape.begin(self._stream)), value)

    # -- primitives ------------------------------------------------------------------------------------

    def post_send(self, x: Array, dst: int, tag: int) -> Work:
        raise NotImplementedError("a rehearsal has no peers: messages from rank to rank can't be rehearsed")

    def post_recv(self, x: Array, src: int, tag: int) -> Work:
        return self.post_send(x, src, tag)

    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Communicator | None:
        self._note("")
        return None if color is None else Rehearsal(self._tape, self.world_size, self.traffic)

    def allocate(self, nbytes: int) -> list[npt.NDArray[np.uint8]]:
        self._note("")
        return [np.zeros(nbytes, np.uint8) for _ in range(self.world_size)]

    def now(self) -> float:
        return 0.0

    def close(self) -> None: ...

    # -- collectives -----------------------------------------------------------------------------------

    def begin(self, operation: str, detail: str = "") -> int:
        return -1

    def run_schedule(self, name: str, flat: Array, op: ReduceOp | None, tag: int, root: int = 0) -> None:
        self._note(name, len(flat), flat.itemsize, root)

    def all_reduce(
        self, x: Array, op: ReduceOp = SUM, algorithm: str | None = None, *, async_op: bool = False
    ) -> Work | None:
        if async_op or algorithm is not None:
            return super().all_reduce(x, op, algorithm, async_op=async_op)
        self._note("all_reduce", x.size, x.itemsize)
        return None

    def all_gather_int(self, value: int, what: str = "all_gather_int", *, async_op: bool = False) -> Any:
        if async_op:
            return self._defer(lambda: self.all_gather_int(value, what))
        self._note("")
        return [value] * self.world_size

    def barrier(self) -> None:
        self._note("")

    def broadcast_object(self, obj: Any, src: int = 0, what: str = "broadcast_object") -> Any:
        self._note("")
        return obj

    def all_gather_object(self, obj: Any, what: str = "all_gather_object") -> list[Any]:
        self._note("")
        return [obj] * self.world_size


class _Begun(Work):
    """What has been begun on a stream."""

    def __init__(self, tape: Tape, end: Wait, value: Any) -> None:
        self._tape, self._end, self._value = tape, end, value

    def wait(self) -> Any:
        self._tape.add(self._end)
        return self._value
