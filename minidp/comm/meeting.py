"""Collectives of a virtual group: they begin when all have come, and end for all at once.

    arrive      headers are compared; the last one's clock is the start
    values      computed for all ranks at one place (`values`)
    time        the schedule's messages pass through the network, a step when the one before has ended everywhere

So a collective takes what `costs.cost` says, exactly, where its messages meet nobody else's; and it begins when
the slowest rank has come. In groups of up to 64 ranks every message passes by itself. Larger groups take the path
of `waves`: the same arithmetic, a wave of messages at a time, with all links taken at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.comm import schedules
from minidp.comm.board import name_ranks
from minidp.comm.errors import CollectiveMismatch
from minidp.comm.reduction import ReduceOp
from minidp.comm.transfers import Message, chunk_bounds
from minidp.comm.values import combine
from minidp.comm.venue import Venue
from minidp.comm.waves import Pattern, chunks, waves
from minidp.sim.loop import Task
from minidp.sim.network import Floats, Path, Stage

Array = npt.NDArray[Any]
EVENTS_UP_TO = 64  # ranks of a group whose messages are events of their own


class Movement(NamedTuple):
    """What moves in a collective: the schedule ``timed``, ``length`` elements of ``itemsize`` bytes."""

    timed: str
    root: int
    length: int
    itemsize: int


class Payload(NamedTuple):
    """What a rank brings: its flat array, and the schedule that says what becomes of all of them."""

    schedule: str
    flat: Array
    op: ReduceOp | None


class Traffics(NamedTuple):
    """Bytes sent and received and messages sent, by member."""

    sent: list[int]
    received: list[int]
    messages: list[int]


class Group:
    """Ranks that meet.

    Args:
        venue: where they are.
        ranks: the world rank of each member.
        name: for messages.
    """

    def __init__(self, venue: Venue, ranks: Sequence[int], name: str) -> None:
        self.venue, self.ranks, self.name = venue, list(ranks), name
        self.size = len(self.ranks)
        self.meetings: dict[int, Meeting] = {}
        self._rounds: dict[Movement, list[Round]] = {}
        self._traffic: dict[Movement, Traffics] = {}
        self._routes: dict[Pattern, list[Stage]] = {}

    def describe(self, sequence: int, header: str) -> str:
        """``all_reduce #412 (float32 (784, 512), sum)``."""
        operation, _, rest = header.partition(" ")
        where = "" if self.name == "world" else f" of {self.name}"
        return f"{operation} #{sequence}{where}" + (f" ({rest})" if rest else "")

    # -- what a movement consists of ---------------------------------------------------------------------

    def rounds(self, movement: Movement) -> list[Round]:
        """Step by step, the messages of a schedule in the order in which they are posted."""
        found = self._rounds.get(movement)
        if found is None:
            if len(self._rounds) > 64:
                self._rounds.clear()
            found = self._rounds[movement] = _rounds(self, movement)
        return found

    def traffic(self, movement: Movement) -> Traffics:
        found = self._traffic.get(movement)
        if found is None:
            found = self._traffic[movement] = traffic(movement, self.size)
        return found

    def route(self, pattern: Pattern) -> list[Stage]:
        found = self._routes.get(pattern)
        if found is None:
            ranks = np.array(self.ranks)
            found = self.venue.network.route(ranks[pattern.src], ranks[pattern.dst])
            self._routes[pattern] = found
        return found


class Meeting:
    """One collective of a group."""

    def __init__(self, group: Group, sequence: int) -> None:
        self.group, self.sequence = group, sequence
        self.tasks: dict[int, Task] = {}
        self.headers: dict[int, str] = {}
        self.notes: dict[int, Any] | list[Any] = {}
        self.payloads: dict[int, Payload] = {}
        self.movement: Movement | None = None
        self.start = self.end = 0.0
        self._made: Any = None

    def everybody(self) -> list[Any]:
        """The members' notes, in their order: one list for all, not to be changed."""
        if not isinstance(self.notes, list):
            self.notes = [self.notes[i] for i in range(self.group.size)]
        return self.notes

    def make(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns, called once for all members."""
        if self._made is None:
            self._made = function()
        return self._made

    def arrive(self, member: int, task: Task, header: str, note: Any, payload: Payload | None) -> None:
        """A member has come; the last one begins the collective. CollectiveMismatch on all if headers differ."""
        self.tasks[member], self.headers[member], self.notes[member] = task, header, note
        if payload is not None:
            self.payloads[member] = payload
        if len(self.tasks) < self.group.size:
            return
        del self.group.meetings[self.sequence]
        if any(other != header for other in self.headers.values()):
            text = self._disagreement()
            for other in self.tasks.values():
                if other is not task:
                    other.fail(CollectiveMismatch(text))
            raise CollectiveMismatch(text)
        self.start = max(other.clock for other in self.tasks.values())
        self.group.venue.loop.at(self.start, self._begin)

    def _disagreement(self) -> str:
        said: dict[str, list[int]] = {}
        for member in sorted(self.headers):
            said.setdefault(self.headers[member], []).append(self.group.ranks[member])
        what = "; ".join(name_ranks(ranks, f"called {text}") for text, ranks in said.items())
        where = "" if self.group.name == "world" else f" of {self.group.name}"
        return (
            f"the ranks disagree at collective #{self.sequence}{where}: {what}. All ranks must call the same "
            "operations in the same order, with equal shapes and dtypes"
        )

    # -- when all are here -------------------------------------------------------------------------------

    def _begin(self) -> None:
        group = self.group
        if self.payloads:
            schedule, _, op = self.payloads[0]
            root = self.movement.root if self.movement else 0
            with np.errstate(all="ignore"):  # as on the ranks: NaN and infinity are looked for, not stumbled over
                try:
                    combine(schedule, root, [self.payloads[i].flat for i in range(group.size)], op)
                except Exception as error:  # such as a sum of what can't be added: theirs, not the loop's
                    for task in self.tasks.values():
                        task.fail(copy(error))
                    return
        if self.movement is None:  # headers alone
            self._finish(self.start + (group.venue.cluster.latency_s if group.size > 1 else 0.0))
        elif group.size <= EVENTS_UP_TO:
            Transport(self, group.rounds(self.movement)).go_on()
        else:
            network = group.venue.network
            free = np.array(network.free)
            gamma = group.venue.cluster.reduce_seconds_per_byte
            end = by_waves(group, free, self.movement, self.start, gamma)
            network.free[:] = free.tolist()
            self._finish(end)

    def _finish(self, time_s: float) -> None:
        """All go on at the same moment."""
        self.end = time_s
        for task in self.tasks.values():
            task.wake(time_s)


# --- message by message -----------------------------------------------------------------------------------


class Round(NamedTuple):
    """A step: its messages, and the most bytes that a rank adds at its end."""

    messages: list[tuple[Path, int]]
    added: int


class Transport:
    """A collective's messages under way."""

    def __init__(self, meeting: Meeting, rounds: list[Round]) -> None:
        venue = meeting.group.venue
        self.meeting, self.loop, self.network = meeting, venue.loop, venue.network
        self.gamma = venue.cluster.reduce_seconds_per_byte
        self.rounds = iter(rounds)
        self.end = 0.0  # of the step: the latest arrival so far
        self.added = 0
        self.waiting = 0  # messages that wait for their sender's port

    def go_on(self) -> None:
        """Post the messages of the next step, now."""
        now = self.end = self.loop.now
        step = next(self.rounds, None)
        if step is None:
            self.meeting._finish(now)
            return
        messages, self.added = step
        network = self.network
        leave, arrive = network.leave, network.arrive
        end = now
        for path, nbytes in messages:
            start, last = leave(path, nbytes, now)
            if start > now:
                self.waiting += 1
                self.loop.at(start, partial(self._left, path, nbytes, start, last))
            else:
                arrival = arrive(path, nbytes, start, last)
                if arrival > end:
                    end = arrival
        self.end = end
        if not self.waiting:
            self._ended()

    def _left(self, path: Path, nbytes: int, start: float, last: float) -> None:
        self.end = max(self.end, self.network.arrive(path, nbytes, start, last))
        self.waiting -= 1
        if not self.waiting:
            self._ended()

    def _ended(self) -> None:
        self.loop.at(self.end + self.added * self.gamma, self.go_on)


def _rounds(group: Group, movement: Movement) -> list[Round]:
    name, root, length, itemsize = movement
    schedule = schedules.get(name, group.size, root)
    bounds = chunk_bounds(length, schedule.chunks)
    path = group.venue.network.path
    rounds: list[Round] = []
    added: list[dict[int, int]] = [{} for _ in range(schedule.steps)]
    messages: list[list[tuple[Path, int]]] = [[] for _ in range(schedule.steps)]
    for m in sorted(schedule.messages, key=lambda m: port_order(m, group.size)):
        nbytes = (bounds[m.stop - 1][1] - bounds[m.start][0]) * itemsize
        messages[m.step].append((path(group.ranks[m.src], group.ranks[m.dst]), nbytes))
        if m.op == "reduce":
            added[m.step][m.dst] = added[m.step].get(m.dst, 0) + nbytes
    for step, sums in zip(messages, added):
        rounds.append(Round(step, max(sums.values(), default=0)))
    return rounds


def port_order(m: Message, world_size: int) -> tuple[int, int, int]:
    """The order in which messages are posted: to the next rank first, so that no two senders meet at a port."""
    return m.step, (m.dst - m.src) % world_size, m.src


# --- as vectors -------------------------------------------------------------------------------------------


def by_waves(group: Group, free: Floats, movement: Movement, start: float, gamma: float) -> float:
    """When the movement ends that begins at ``start``; ``free``, when each link becomes free, is changed in place.

    Equal to the messages as events, to the bit, if no others are under way, and, where ranks share links before
    the last one, if no rank sends several messages in one step. Not on a `Ring` where messages hop: there one may
    start from a link in which another, as an event, has taken its place ahead of time.
    """
    name, root, length, itemsize = movement
    p = group.size
    edges = np.array([0, *(hi for _, hi in chunk_bounds(length, chunks(name, p)))]) * itemsize
    travel = group.venue.network.travel
    for step in waves(name, p, root):
        end, added = start, np.zeros(p, np.int64)
        for pattern, first, stop, reduce in step:
            nbytes = edges[stop] - edges[first]
            end = max(end, float(travel(free, group.route(pattern), nbytes, start).max()))
            if reduce:
                np.add.at(added, pattern.dst, nbytes)
        start = end + int(added.max()) * gamma
    return start


def traffic(movement: Movement, world_size: int) -> Traffics:
    """What each member sends and receives."""
    name, root, length, itemsize = movement
    sent, received, messages = (np.zeros(world_size, np.int64) for _ in range(3))
    edges = np.array([0, *(hi for _, hi in chunk_bounds(length, chunks(name, world_size)))]) * itemsize
    for step in waves(name, world_size, root):
        for pattern, first, stop, _ in step:
            nbytes = edges[stop] - edges[first]
            np.add.at(sent, pattern.src, nbytes)
            np.add.at(received, pattern.dst, nbytes)
            np.add.at(messages, pattern.src, 1)
    return Traffics(sent.tolist(), received.tolist(), messages.tolist())
