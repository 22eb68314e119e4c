"""Collectives of a virtual group: they begin when all have come, and end for all at once.

    arrive      headers are compared; the last one's clock is the start
    values      computed for all ranks at one place (`values`)
    time        the schedule's messages pass through the network, a step when the one before has ended everywhere

So a collective takes what `costs.cost` says, exactly, where its messages meet nobody else's; and it begins when
the slowest rank has come. In groups of up to 64 ranks every message passes by itself. Larger groups take the path
of `waves`: the same arithmetic, a wave of messages at a time, with all links taken at the start.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.comm.errors import CollectiveMismatch
from minidp.comm.execute import Pieces
from minidp.comm.movement import Group, Movement, Round, by_waves
from minidp.comm.reduction import ReduceOp
from minidp.comm.values import combine
from minidp.comm.wording import disagreement
from minidp.sim.loop import Task
from minidp.sim.network import Path

Array = npt.NDArray[Any]
EVENTS_UP_TO = 64  # ranks of a group whose messages pass one by one


def passes_one_by_one(group: Group, movement: Movement) -> bool:
    """Whether its messages are timed one by one: in small groups, and where waves would tell another time."""
    several = movement.timed in ("direct", "direct_reduce", "direct_reduce_scatter", "gather", "scatter")
    return group.size <= EVENTS_UP_TO or (group.venue.network.hops and several)


class Payload(NamedTuple):
    """What a rank brings: its flat array, and the schedule that says what becomes of all of them."""

    schedule: str
    flat: Array | Pieces
    op: ReduceOp | None


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
        return disagreement(said, self.sequence, self.group.name)

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
                        task.fail(_another(error))
                    return
        if self.movement is None:  # headers alone
            self._finish(self.start + (group.alpha if group.size > 1 else 0.0))
        elif passes_one_by_one(group, self.movement):
            Transport(self, group.rounds(self.movement)).go_on()
        else:
            network = group.venue.network
            free = np.array(network.free)
            end = by_waves(group, free, self.movement, self.start)
            network.free[:] = free.tolist()
            self._finish(end)

    def _finish(self, time_s: float) -> None:
        """All go on at the same moment."""
        self.end = time_s
        for task in self.tasks.values():
            task.wake(time_s)


def _another(error: Exception) -> Exception:
    """A copy for each rank, as tracebacks and notes are its own; the thing itself if it can't be copied."""
    try:
        return copy(error)
    except Exception:
        return error


class Transport:
    """A collective's messages under way."""

    def __init__(self, meeting: Meeting, rounds: list[Round]) -> None:
        venue = meeting.group.venue
        self.meeting, self.loop, self.network = meeting, venue.loop, venue.network
        self.gamma = meeting.group.gamma
        self.rounds = iter(rounds)
        self.end = 0.0  # of the step: the latest arrival so far
        self.added = 0
        self.under_way = 0  # messages whose arrival is not known yet

    def go_on(self) -> None:
        """Post the messages of the next step, now."""
        now = end = self.loop.now
        step = next(self.rounds, None)
        if step is None:
            self.meeting._finish(now)
            return
        messages, self.added = step
        leave, arrive, hops = self.network.leave, self.network.arrive, self.network.hops
        self.end, self.under_way = now, len(messages)
        arrived = 0
        for path, nbytes in messages:
            start, last = leave(path, nbytes, now)
            if start > now or hops:
                self.loop.at(start, partial(self._left, path, nbytes, start, last))
            else:  # the short way: its port is free
                arrival = arrive(path, nbytes, start, last)
                arrived += 1
                if arrival > end:
                    end = arrival
        self._arrived(end, arrived)

    def _left(self, path: Path, nbytes: int, start: float, last: float) -> None:
        self.network.follow(self.loop, path, nbytes, start, last, self._arrived)

    def _arrived(self, time_s: float, messages: int = 1) -> None:
        """So many more arrive, the last at ``time_s``; after the last of the step all add up what they got."""
        self.end = max(self.end, time_s)
        self.under_way -= messages
        if not self.under_way:
            self.loop.at(self.end + self.added * self.gamma, self.go_on)
