"""Letters of the virtual world, receipts that wait for them, and the boxes where they meet."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from typing import Any

import numpy.typing as npt

from minidp import trace
from minidp.comm.communicator import ANY
from minidp.comm.errors import CollectiveMismatch
from minidp.comm.mailbox import kind_of
from minidp.sim.loop import Task

Array = npt.NDArray[Any]


class Letter:
    """A message that has left. ``data`` None: it is already where it was waited for."""

    __slots__ = ("arrival", "data", "number", "src")

    def __init__(self, src: int, data: Array | None, arrival: float) -> None:
        self.src, self.data, self.arrival = src, data, arrival
        self.number = 0  # in its box


class Receipt:
    """A receive that has been posted, and its letter, once that has left. ``names`` are the members'."""

    __slots__ = ("letter", "names", "posted", "src", "tag", "waiter", "x")

    def __init__(self, x: Array, src: int, tag: int, posted: float, names: Sequence[str]) -> None:
        self.x, self.src, self.tag, self.posted, self.names = x, src, tag, posted, names
        self.letter: Letter | None = None
        self.waiter: Task | None = None

    def take(self, task: Task, member: int) -> int:
        """Let ``task``, of ``member``, wait until the letter has arrived; the member that sent it."""
        came, letter = task.clock, self.letter
        if letter is None:
            self.waiter = task
            task.block(self._place)
            letter = self.letter
            assert letter is not None
        if letter.arrival > came:
            arrived(task, letter, came, self.names)
        if letter.data is not None:
            put(self.x, letter, self.tag, member, self.names)
        return letter.src

    def give(self, letter: Letter) -> None:
        self.letter = letter
        if self.waiter is not None:
            self.waiter.wake(letter.arrival)

    def _place(self) -> str:
        src = "any rank" if self.src == ANY else self.names[self.src]
        return f"recv from {src}, tag {self.tag} ({kind_of(self.x)})"


def arrived(task: Task, letter: Letter, came: float, names: Sequence[str]) -> None:
    """The task has waited for the letter since ``came``."""
    task.clock = letter.arrival
    task.waited()
    recorder = trace.current()
    if recorder is not None:
        recorder.add(f"recv from {names[letter.src]}", "wait", came, letter.arrival)


def put(x: Array, letter: Letter, tag: int, member: int, names: Sequence[str]) -> None:
    """What has been sent into ``x``."""
    data = letter.data
    assert data is not None
    if x.size != data.size or x.dtype != data.dtype:
        raise CollectiveMismatch(
            f"{names[letter.src]} sent {kind_of(data)} with tag {tag}; {names[member]} receives {kind_of(x)}"
        )
    x[...] = data if x.shape == data.shape else data.reshape(x.shape)


class Box:
    """What is for one member, of one tag: letters whose arrival is known, receipts that have no letter yet."""

    __slots__ = ("arrivals", "due", "letters", "receipts", "sent", "taken")

    def __init__(self) -> None:
        self.letters: dict[int, deque[Letter]] = {}
        """Those of each sender, as they were sent, which is also as they arrive."""
        self.receipts: list[Receipt] = []
        """As they were posted."""
        self.sent = self.taken = 0
        self.due: float | None = None
        """When a receipt from anybody is to be looked at again."""
        self.arrivals: list[tuple[float, int, Letter]] | None = None
        """A heap of all letters by arrival, some already taken; made when a receive from anybody comes."""

    def add(self, letter: Letter) -> None:
        self.sent += 1
        letter.number = self.sent
        queue = self.letters.get(letter.src)
        if queue is None:
            queue = self.letters[letter.src] = deque()
        queue.append(letter)
        heap = self.arrivals
        if heap is not None:
            if len(heap) > 2 * (self.sent - self.taken) + 64:
                self.arrivals = None  # mostly letters that are taken: made anew when it is needed
            else:
                heappush(heap, (letter.arrival, letter.number, letter))

    def take(self, src: int) -> Letter:
        """The first letter of that sender, who has one here."""
        self.taken += 1
        return self.letters[src].popleft()

    def first(self) -> Letter | None:
        """Of the letters that are here, the one that arrives first; of equal ones the one that left first."""
        heap = self.arrivals
        if heap is None:
            here = (letter for queue in self.letters.values() for letter in queue)
            heap = self.arrivals = [(letter.arrival, letter.number, letter) for letter in here]
            heapify(heap)
        while heap:
            letter = heap[0][-1]
            queue = self.letters[letter.src]
            if queue and queue[0] is letter:
                return letter
            heappop(heap)  # it was taken by a receive from just that sender
        return None
