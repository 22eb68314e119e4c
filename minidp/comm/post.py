"""Messages from rank to rank in the virtual world: buffered sends, receives that match in order.

A send copies the array, and is done when its last byte has left the sender's port. A receive is done when the last
byte has arrived. Messages of one pair and tag arrive in order; a receive from anybody takes what arrives first.
"""

from __future__ import annotations

from collections import deque
from functools import partial
from heapq import heappop, heappush
from typing import Any

import numpy.typing as npt

from minidp import trace
from minidp.comm.communicator import ANY
from minidp.comm.errors import CollectiveMismatch
from minidp.comm.mailbox import kind_of
from minidp.comm.venue import Venue
from minidp.comm.work import Work
from minidp.sim.loop import Task
from minidp.sim.network import Path

Array = npt.NDArray[Any]


class Letter:
    """A message that has left. ``data`` None: it is already where it was waited for."""

    __slots__ = ("arrival", "data", "src")

    def __init__(self, src: int, data: Array | None, arrival: float) -> None:
        self.src, self.data, self.arrival = src, data, arrival


class Receipt:
    """A receive that has been posted, and its letter, once that has left."""

    __slots__ = ("letter", "posted", "src", "tag", "waiter", "x")

    def __init__(self, x: Array, src: int, tag: int, posted: float) -> None:
        self.x, self.src, self.tag, self.posted = x, src, tag, posted
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
            arrived(task, letter, came)
        if letter.data is not None:
            put(self.x, letter, self.tag, member)
        return letter.src

    def give(self, letter: Letter) -> None:
        self.letter = letter
        if self.waiter is not None:
            self.waiter.wake(letter.arrival)

    def _place(self) -> str:
        src = "any rank" if self.src == ANY else f"rank {self.src}"
        return f"recv from {src}, tag {self.tag} ({kind_of(self.x)})"


class Sending(Work):
    """A send that goes on by itself."""

    def __init__(self, venue: Venue, rank: int, place: str) -> None:
        self.venue, self.rank, self.place = venue, rank, place
        self.left: float | None = None  # when its last byte leaves, once that is known
        self.waiter: Task | None = None

    def wait(self) -> None:
        task = self.venue.here(self.rank)
        if self.left is None:
            self.waiter = task
            task.block(lambda: self.place)
        assert self.left is not None
        task.clock = max(task.clock, self.left)


class Receiving(Work):
    """A receive that goes on by itself."""

    def __init__(self, venue: Venue, rank: int, member: int, receipt: Receipt) -> None:
        self.venue, self.rank, self.member, self.receipt = venue, rank, member, receipt
        self.taken: int | None = None

    def wait(self) -> int:
        if self.taken is None:
            self.taken = self.receipt.take(self.venue.here(self.rank), self.member)
        return self.taken


def arrived(task: Task, letter: Letter, came: float) -> None:
    """The task has waited for the letter since ``came``."""
    task.clock = letter.arrival
    task.waited()
    recorder = trace.current()
    if recorder is not None:
        recorder.add(f"recv from rank {letter.src}", "wait", came, letter.arrival)


def put(x: Array, letter: Letter, tag: int, member: int) -> None:
    """What has been sent into ``x``."""
    data = letter.data
    assert data is not None
    if x.size != data.size or x.dtype != data.dtype:
        raise CollectiveMismatch(
            f"rank {letter.src} sent {kind_of(data)} with tag {tag}; rank {member} receives {kind_of(x)}"
        )
    x[...] = data if x.shape == data.shape else data.reshape(x.shape)


class _Box:
    """What is for one member, of one tag: letters whose arrival is known, receipts that have no letter yet."""

    __slots__ = ("arrivals", "letters", "receipts", "sequence")

    def __init__(self) -> None:
        self.letters: dict[int, deque[Letter]] = {}
        """Those of each sender, as they were sent, which is also as they arrive."""
        self.receipts: list[Receipt] = []
        """As they were posted."""
        self.arrivals: list[tuple[float, int, Letter]] | None = None
        """A heap of all letters by arrival, some already taken; made when a receive from anybody comes."""
        self.sequence = 0

    def add(self, letter: Letter) -> None:
        queue = self.letters.get(letter.src)
        if queue is None:
            queue = self.letters[letter.src] = deque()
        queue.append(letter)
        if self.arrivals is not None:
            self._arrives(letter)

    def _arrives(self, letter: Letter) -> None:
        assert self.arrivals is not None
        self.sequence += 1
        heappush(self.arrivals, (letter.arrival, self.sequence, letter))

    def first(self) -> Letter | None:
        """Of the letters that are here, the one that arrives first."""
        if self.arrivals is None:
            self.arrivals = []
            for queue in self.letters.values():
                for letter in queue:
                    self._arrives(letter)
        while self.arrivals:
            letter = self.arrivals[0][-1]
            queue = self.letters[letter.src]
            if queue and queue[0] is letter:
                return letter
            heappop(self.arrivals)  # it was taken by a receive from just that sender
        return None

    @property
    def empty(self) -> bool:
        return not self.receipts and not any(self.letters.values())


class PostOffice:
    """The mail of one group."""

    def __init__(self, venue: Venue, ranks: list[int]) -> None:
        self.venue, self.ranks = venue, ranks
        self._loop, self._network = venue.loop, venue.network
        self._boxes: dict[tuple[int, int], _Box] = {}
        self._most_boxes = 1024  # before those that are empty are thrown away

    def send(self, member: int, x: Array, dst: int, tag: int) -> None:
        """Returns when the last byte has left."""
        rank = self.ranks[member]
        task = self.venue.here(rank)
        if task.clock > self._loop.now:
            task.sleep()  # until the world's clock is there, too: others may have sent through the same links
            self.venue.check(rank)
        task.clock = self._post(member, dst, tag, x)

    def begin_send(self, member: int, x: Array, dst: int, tag: int) -> Sending:
        venue, rank = self.venue, self.ranks[member]
        task, data = venue.here(rank), x.copy()
        sending = Sending(venue, rank, f"send to rank {dst}, tag {tag} ({kind_of(x)})")

        def post() -> None:
            sending.left = self._post(member, dst, tag, data)
            if sending.waiter is not None:
                sending.waiter.wake(sending.left)

        if task.clock > venue.loop.now:
            venue.loop.at(task.clock, post)
        else:
            post()
        return sending

    def recv(self, member: int, x: Array, src: int, tag: int) -> int:
        """Receive into ``x``; returns the member that sent it."""
        task = self.venue.here(self.ranks[member])
        box = self._boxes.get((member, tag)) or self._box(member, tag)
        letters = box.letters.get(src)
        if letters and not box.receipts:  # the short way: it has left already, so when it arrives is known
            letter = letters.popleft()
            if letter.arrival > task.clock:
                arrived(task, letter, task.clock)
            put(x, letter, tag, member)
            return src
        receipt = Receipt(x, src, tag, task.clock)
        box.receipts.append(receipt)
        if letters or src == ANY:
            self._serve(box)
        return receipt.take(task, member)

    def begin_recv(self, member: int, x: Array, src: int, tag: int) -> Receiving:
        rank = self.ranks[member]
        receipt = Receipt(x, src, tag, self.venue.here(rank).clock)
        box = self._box(member, tag)
        box.receipts.append(receipt)
        self._serve(box)
        return Receiving(self.venue, rank, member, receipt)

    def _box(self, member: int, tag: int) -> _Box:
        box = self._boxes.get((member, tag))
        if box is None:
            if len(self._boxes) >= self._most_boxes:  # a program may use each tag once
                self._boxes = {key: box for key, box in self._boxes.items() if not box.empty}
                self._most_boxes = max(1024, 2 * len(self._boxes))
            box = self._boxes[member, tag] = _Box()
        return box

    def _post(self, src: int, dst: int, tag: int, x: Array) -> float:
        """Put a message into its sender's port now: when its last byte leaves. ``x`` may change afterwards."""
        network, now, nbytes = self._network, self._loop.now, x.nbytes
        path = network.path(self.ranks[src], self.ranks[dst])
        start, left = network.leave(path, nbytes, now)
        if start > now or network.hops:
            self._loop.at(start, partial(self._later, src, dst, tag, x.copy(), path, start, left))
            return left
        arrival = network.arrive(path, nbytes, start, left)
        box = self._boxes.get((dst, tag)) or self._box(dst, tag)
        if box.receipts:
            receipt = box.receipts[0]
            waiter, into = receipt.waiter, receipt.x
            if receipt.src == src and waiter is not None and into.shape == x.shape and into.dtype == x.dtype:
                into[...] = x  # the usual case: it is waited for, so one copy is enough
                del box.receipts[0]
                receipt.letter = Letter(src, None, arrival)
                waiter.wake(arrival)
                return left
        self._deliver(box, Letter(src, x.copy(), arrival))
        return left

    def _later(self, src: int, dst: int, tag: int, data: Array, path: Path, start: float, left: float) -> None:
        """The message's first byte leaves now."""
        self._network.follow(
            self._loop,
            path,
            data.nbytes,
            start,
            left,
            lambda arrival: self._deliver(self._box(dst, tag), Letter(src, data, arrival)),
        )

    def _deliver(self, box: _Box, letter: Letter) -> None:
        """Its arrival is known: whoever waits for just this one need not wait for the event."""
        for i, receipt in enumerate(box.receipts):
            if receipt.src == letter.src:  # nothing earlier of this sender is here: it would have been given
                del box.receipts[i]
                receipt.give(letter)
                return
            if receipt.src == ANY:
                box.add(letter)
                self._serve(box)
                return
        box.add(letter)

    def _serve(self, box: _Box) -> None:
        """Give letters to receipts, in the order in which these were posted."""
        for receipt in tuple(box.receipts):
            if receipt.src == ANY:
                letter = box.first()
                if letter is None or self._not_yet(box, max(letter.arrival, receipt.posted)):
                    return  # later receipts must not take what may be this one's
            elif letters := box.letters.get(receipt.src):
                letter = letters[0]
            else:
                continue
            box.letters[letter.src].popleft()
            box.receipts.remove(receipt)
            receipt.give(letter)

    def _not_yet(self, box: _Box, time_s: float) -> bool:
        """Whether ``time_s`` is to come; if so, the box is served again then: an earlier letter might be sent."""
        loop = self.venue.loop
        if time_s > loop.now:
            loop.at(time_s, partial(self._serve, box))
            return True
        return False
