"""Virtual time: events in order of (time, sequence), and tasks that wait for them.

A task is a greenlet: plain code that runs until it waits. While one runs, nothing else does, and no virtual time
passes except what the task charges to its own clock. So a run depends on nothing but its inputs.

A task's clock may run ahead of the loop's: a rank that computes for a second charges a second, and goes on at
once. It looks back into the past of others only through events, which the loop takes in order of time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextvars import copy_context
from heapq import heappop, heappush
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

Action = Callable[[], Any]


class Loop:
    """The clock of a virtual world. ``now`` is the time of the event that is being handled, in seconds.

    Events in order of (time, sequence): a heap of times, each once, and for each a queue of what is due then.
    Ranks that go in step have many events at one time; a heap of all of them would compare them all.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.events = 0  # handled so far
        self._today: deque[Action] = deque()  # what is due now
        self._due = {self.now: self._today}
        self._later: list[float] = []  # the heap
        self._hub: greenlet | None = None

    def at(self, time_s: float, action: Action) -> None:
        """Call ``action()`` at ``time_s``; of equal times, first asked is first called. Not before ``now``."""
        due = self._due.get(time_s)
        if due is None:
            due = self._due[time_s] = deque()
            heappush(self._later, time_s)
        due.append(action)

    def run(self) -> None:
        """Handle events until there are none. What an action raises ends the loop."""
        self._hub = getcurrent()
        while today := self._today or self._next_day():
            self.events += 1
            today.popleft()()

    def hand_over(self) -> None:
        """Leave the task that runs: to the hub, or at once to the task that is to go on next."""
        today = self._today or self._next_day()
        action = today[0] if today else None
        if isinstance(action, Task):  # half the switches, where tasks wake each other
            self.events += 1
            today.popleft()
            action.switch()
        else:
            self.hub.switch()

    def _next_day(self) -> deque[Action]:
        """What is due at the next time at which anything is; empty if nothing is any more."""
        if self._later:
            del self._due[self.now]
            self.now = heappop(self._later)
            self._today = self._due[self.now]
        return self._today

    @property
    def hub(self) -> greenlet:
        """Where a task goes that waits."""
        assert self._hub is not None
        return self._hub


class Task(greenlet):  # type: ignore[misc]  # it has no types
    """A greenlet with a clock. Its context variables are its own.

    Args:
        loop: the clock of its world.
        rank: whose task it is.
        run: what it does.
        name: for messages; "" for the rank itself.
    """

    def __init__(self, loop: Loop, rank: int, run: Action, name: str = "") -> None:
        super().__init__(run, loop.hub if loop._hub is not None else None)
        self.gr_context = copy_context()
        self.loop, self.rank, self.name = loop, rank, name
        self.clock = 0.0
        self.waits_for: Callable[[], str] | None = None
        """In words, while it waits."""

    def __call__(self) -> None:
        """Go on: a task may be an event's action."""
        self.switch()

    def block(self, what: Callable[[], str]) -> None:
        """Wait, in this task, until someone wakes it."""
        self.waits_for = what
        self.loop.hand_over()
        self.waits_for = None

    def sleep(self) -> None:
        """Let the others go on until the loop's clock has reached this task's own."""
        self.loop.at(self.clock, self)
        self.loop.hand_over()

    def wake(self, time_s: float) -> None:
        """Let this task go on at ``time_s``, or at its own clock's time if that is later; if it waits at all."""
        if self.waits_for is None:
            return
        self.waits_for = None
        if time_s > self.clock:
            self.clock = time_s
        self.loop.at(self.clock, self)

    def waited(self) -> None:
        """A wait is over."""

    def fail(self, error: BaseException) -> None:
        """Let this waiting task go on now, with an exception."""
        self.waits_for = None
        self.clock = max(self.clock, self.loop.now)
        self.loop.at(self.loop.now, lambda: None if self.dead else self.throw(error))

    def stop(self) -> None:
        """End this waiting task; its ``finally`` blocks run."""
        if not self.dead:
            self.throw(GreenletExit)


def rank_here() -> int | None:
    """The rank whose task the caller runs in; None outside of all virtual worlds."""
    task = getcurrent()
    return task.rank if isinstance(task, Task) else None
