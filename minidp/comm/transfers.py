"""What a schedule is: a list of transfers between ranks, and how it is read, executed and counted.

- The array of n elements is cut into ``chunks`` pieces by `chunk_bounds`.
- All transfers of one step read the state from *before* the step (a synchronous round).
- ``copy``: the receiver's chunk becomes what it received. ``reduce``: contributions of a step are added in
  order of rank, the receiver's own value taking its place. With one contribution that is own + received,
  or received + own, which are the same bits.
- Neighbouring chunks that go from one rank to another in one step travel as one message.

The algorithms themselves are in `minidp.comm.schedules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

Bounds = list[tuple[int, int]]
OPS = ("reduce", "copy")


class Transfer(NamedTuple):
    """In `step`, rank `src` sends its `chunk` to rank `dst`, which reduces it into its own or copies it."""

    step: int
    src: int
    dst: int
    chunk: int
    op: str  # "reduce" | "copy"


class Message(NamedTuple):
    """Neighbouring chunks ``start <= c < stop`` that travel together: one slice of the array, one latency."""

    step: int
    src: int
    dst: int
    start: int
    stop: int
    op: str


Part = tuple[tuple[tuple[Message, ...], tuple[Message, ...]], ...]  # step -> (what leaves, what arrives)


@dataclass(frozen=True)
class Schedule:
    """A collective written out: `transfers`, in order of step, between `world_size` ranks.

    Raises:
        ValueError: an entry names a rank, chunk or op that is not there, sends to itself, comes out of
            order, or meets a copy into the same chunk in the same step (the result would be ambiguous).
    """

    name: str
    world_size: int
    chunks: int
    transfers: tuple[Transfer, ...]

    def __post_init__(self) -> None:
        if self.world_size < 1:
            raise ValueError(f"{self.name}: world_size must be at least 1, not {self.world_size}")
        ranks, latest, arrived = range(self.world_size), -1, dict[tuple[int, int], Transfer]()
        for t in self.transfers:
            if t.src not in ranks or t.dst not in ranks or t.src == t.dst:
                raise ValueError(f"{self.name}: {t} is not between two different ranks of {self.world_size}")
            if not 0 <= t.chunk < self.chunks or t.op not in OPS:
                raise ValueError(f"{self.name}: {t} needs a chunk below {self.chunks} and an op of {OPS}")
            if not max(latest, 0) <= t.step <= latest + 1:
                raise ValueError(f"{self.name}: {t} follows step {latest}; steps count up from 0, without a gap")
            if t.step > latest:
                latest, arrived = t.step, {}
            other = arrived.get((t.dst, t.chunk))
            arrived[t.dst, t.chunk] = t
            if other is not None and (other.op, t.op) != ("reduce", "reduce"):
                raise ValueError(f"{self.name}: {t} and {other} write the same chunk in the same step")

    @cached_property
    def steps(self) -> int:
        """Number of synchronous rounds (0 if nothing is sent)."""
        return self.transfers[-1].step + 1 if self.transfers else 0

    @cached_property
    def rounds(self) -> tuple[tuple[Transfer, ...], ...]:
        """The transfers, step by step."""
        rounds: list[list[Transfer]] = [[] for _ in range(self.steps)]
        for t in self.transfers:
            rounds[t.step].append(t)
        return tuple(map(tuple, rounds))

    @cached_property
    def messages(self) -> tuple[Message, ...]:
        """The transfers with neighbouring chunks joined: what goes over the wire, in order of step."""
        joined: list[Message] = []
        for step, src, dst, chunk, op in sorted(self.transfers):
            last = joined[-1] if joined else None
            if last and (last.step, last.src, last.dst, last.stop, last.op) == (step, src, dst, chunk, op):
                joined[-1] = last._replace(stop=chunk + 1)
            else:
                joined.append(Message(step, src, dst, chunk, chunk + 1, op))
        return tuple(joined)

    @cached_property
    def _parts(self) -> dict[int, Part]:
        return {}

    def messages_of(self, rank: int) -> Part:
        """For each step, what `rank` sends and what it receives, in order of the peer. Made once a rank."""
        if rank not in self._parts:
            rounds: list[tuple[list[Message], list[Message]]] = [([], []) for _ in range(self.steps)]
            for m in self.messages:
                if rank in (m.src, m.dst):
                    rounds[m.step][m.dst == rank].append(m)
            self._parts[rank] = tuple((tuple(sends), tuple(receives)) for sends, receives in rounds)
        return self._parts[rank]


def log2_floor(p: int) -> int:
    return p.bit_length() - 1


def log2_ceil(p: int) -> int:
    return (p - 1).bit_length()


def chunk_bounds(n: int, chunks: int) -> Bounds:
    """Cut n elements into `chunks` slices (start, stop): sizes differ by at most 1, the longest come first."""
    if n < 0 or chunks < 1:
        raise ValueError(f"cannot cut {n} elements into {chunks} chunks")
    size, longer = divmod(n, chunks)
    starts = [i * size + min(i, longer) for i in range(chunks + 1)]
    return list(pairwise(starts))


def simulate(schedule: Schedule, arrays: Sequence[Any], reduce: Callable[..., Any] = np.add) -> list[Any]:
    """Execute the schedule literally, in one process. `arrays`: one 1-d array a rank, all of one length.

    Returns the ranks' arrays afterwards; the inputs stay as they are. For reading and for tests: it holds
    everybody's memory and copies what it sends.
    """
    if len(arrays) != schedule.world_size or len({len(a) for a in arrays}) != 1:
        lengths = [len(a) for a in arrays]
        raise ValueError(f"{schedule.name} needs {schedule.world_size} arrays of one length, not {lengths}")
    state = [a.copy() for a in arrays]
    bounds = chunk_bounds(len(state[0]), schedule.chunks)
    for transfers in schedule.rounds:
        before = [a.copy() for a in state]
        arriving: dict[tuple[int, int], list[Transfer]] = {}
        for t in transfers:
            arriving.setdefault((t.dst, t.chunk), []).append(t)
        for (dst, chunk), incoming in arriving.items():
            lo, hi = bounds[chunk]
            added = [dst] if incoming[0].op == "reduce" else []  # the receiver's own value, at its place
            sources = sorted([t.src for t in incoming] + added)
            total = before[sources[0]][lo:hi]
            for src in sources[1:]:
                total = reduce(total, before[src][lo:hi])
            state[dst][lo:hi] = total
    return state


def bytes_sent(schedule: Schedule, n: int, itemsize: int = 1) -> list[int]:
    """Bytes that each rank sends for an array of n elements of `itemsize` bytes."""
    bounds = chunk_bounds(n, schedule.chunks)
    sent = [0] * schedule.world_size
    for t in schedule.transfers:
        lo, hi = bounds[t.chunk]
        sent[t.src] += (hi - lo) * itemsize
    return sent
