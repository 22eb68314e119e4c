"""Works of the virtual world that go on by themselves, beside what their rank computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from minidp import trace
from minidp.comm.venue import Venue
from minidp.comm.work import Work
from minidp.sim.loop import Task


class Stream:
    """A task beside the rank's that runs its deferred collectives, one after the other."""

    def __init__(self, venue: Venue, rank: int, name: str) -> None:
        self.venue, self.rank = venue, rank
        self.task = Task(venue.loop, rank, self._run, name)
        venue.streams.append(self.task)
        self.last: Running | None = None
        self.failed: list[Running] = []
        """Works whose error nobody has seen."""
        self._queue: deque[Running] = deque()
        self._idle = True

    def add(self, run: Callable[[], Any], caller: Task) -> Running:
        self.last = work = Running(self, run, caller.clock)
        self._queue.append(work)
        if self._idle:
            self._idle = False
            self.venue.loop.at(caller.clock, self.task.switch)
        return work

    def _run(self) -> None:
        while True:
            while self._queue:
                work = self._queue.popleft()
                self.task.clock = max(self.task.clock, work.posted)
                work.run()
            self._idle = True
            self.venue.loop.hub.switch()


class Running(Work):
    """A collective on a stream."""

    def __init__(self, stream: Stream, run: Callable[[], Any], posted: float) -> None:
        self._stream, self.posted = stream, posted
        self._run: Callable[[], Any] | None = run
        self._recorder = trace.current()
        self._done = False
        self._value: Any = None
        self._error: Exception | None = None
        self._ended = 0.0
        self._waiters: list[Task] = []

    def run(self) -> None:
        """On the stream's task."""
        run, self._run = self._run, None  # it holds arrays, which are not to live until somebody collects garbage
        assert run is not None
        try:
            if self._recorder is None:
                self._value = run()
            else:
                with trace.recording(self._recorder):
                    self._value = run()
        except Exception as error:
            self._error = error
            self._stream.failed.append(self)
        self._done, self._ended = True, self._stream.task.clock
        for task in self._waiters:
            task.wake(self._ended)
        self._waiters.clear()

    def wait(self) -> Any:
        self.settle()
        if self._error is not None:
            if self in self._stream.failed:
                self._stream.failed.remove(self)
            raise self._error
        return self._value

    def settle(self) -> None:
        """Wait until it has ended, well or badly."""
        task = self._stream.venue.here(self._stream.rank)
        came = task.clock
        if not self._done:
            self._waiters.append(task)
            task.block(self._place)
        task.clock = max(task.clock, self._ended)
        task.waited()
        recorder = trace.current()
        if recorder is not None and task.clock > came:
            recorder.add(f"wait for {self._stream.task.name}", "wait", came, task.clock)

    def _place(self) -> str:
        waits_for = self._stream.task.waits_for
        return waits_for() if waits_for is not None else f"an operation of {self._stream.task.name}"
