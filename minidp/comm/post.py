"""Messages from rank to rank in the virtual world: buffered sends, receives that match in order.

A send copies the array, and is done when its last byte has left the sender's port. A receive is done when the last
byte has arrived. Messages of one pair and tag arrive in order; a receive from anybody takes what arrives first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy.typing as npt

from minidp import trace
from minidp.comm.communicator import ANY
from minidp.comm.errors import CollectiveMismatch
from minidp.comm.mailbox import kind_of
from minidp.comm.venue import Venue
from minidp.comm.work import Work
from minidp.sim.loop import Task

Array = npt.NDArray[Any]


class Letter:
    """A message that has left, with its array."""

    __slots__ = ("arrival", "data", "src")

    def __init__(self, src: int, data: Array, arrival: float) -> None:
        self.src, self.data, self.arrival = src, data, arrival


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


class Receipt(Work):
    """A receive that has been posted."""

    def __init__(self, venue: Venue, rank: int, member: int, x: Array, src: int, tag: int, posted: float) -> None:
        self.venue, self.rank, self.member, self.src, self.tag = venue, rank, member, src, tag
        self.x, self.posted = x, posted
        self.letter: Letter | None = None
        self.waiter: Task | None = None
        self.taken: int | None = None

    def wait(self) -> int:
        if self.taken is None:
            task = self.venue.here(self.rank)
            came = task.clock
            if self.letter is None:
                self.waiter = task
                task.block(self._place)
            letter = self.letter
            assert letter is not None
            task.clock = came
            arrived(task, letter)
            put(self.x, letter, self.tag, self.member)
            self.taken = letter.src
        return self.taken

    def _place(self) -> str:
        src = "any rank" if self.src == ANY else f"rank {self.src}"
        return f"recv from {src}, tag {self.tag} ({kind_of(self.x)})"


def arrived(task: Task, letter: Letter) -> None:
    """Let the task's clock be no earlier than the letter's arrival."""
    came, arrival = task.clock, letter.arrival
    if arrival > came:
        task.clock = arrival
        task.waited()
        recorder = trace.current()
        if recorder is not None:
            recorder.add(f"recv from rank {letter.src}", "wait", came, arrival)


def put(x: Array, letter: Letter, tag: int, member: int) -> None:
    """What the letter holds into ``x``."""
    data = letter.data
    if x.size != data.size or x.dtype != data.dtype:
        raise CollectiveMismatch(
            f"rank {letter.src} sent {kind_of(data)} with tag {tag}; rank {member} receives {kind_of(x)}"
        )
    x[...] = data if x.ndim == 1 else data.reshape(x.shape)


class _Box:
    """What is for one member, of one tag: letters whose arrival is known, receipts that have no letter yet."""

    __slots__ = ("letters", "receipts")

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self.receipts: list[Receipt] = []


class PostOffice:
    """The mail of one group."""

    def __init__(self, venue: Venue, ranks: list[int]) -> None:
        self.venue, self.ranks = venue, ranks
        self._boxes: dict[tuple[int, int], _Box] = {}

    def send(self, member: int, x: Array, dst: int, tag: int) -> None:
        """Returns when the last byte has left."""
        venue, ranks = self.venue, self.ranks
        rank = ranks[member]
        task = venue.here(rank)
        if task.clock > venue.loop.now:
            task.sleep()  # until the world's clock is there, too: others may have sent through the same links
            venue.check(rank)
        task.clock = self._post(member, rank, dst, ranks[dst], tag, x.flatten())

    def begin_send(self, member: int, x: Array, dst: int, tag: int) -> Sending:
        venue, rank = self.venue, self.ranks[member]
        task, data = venue.here(rank), x.flatten()
        sending = Sending(venue, rank, f"send to rank {dst}, tag {tag} ({kind_of(x)})")

        def post() -> None:
            sending.left = self._post(member, rank, dst, self.ranks[dst], tag, data)
            if sending.waiter is not None:
                sending.waiter.wake(sending.left)

        if task.clock > venue.loop.now:
            venue.loop.at(task.clock, post)
        else:
            post()
        return sending

    def recv(self, member: int, x: Array, src: int, tag: int) -> int:
        """Receive into ``x``; returns the member that sent it."""
        rank = self.ranks[member]
        box = self._box(member, tag)
        if box.letters and not box.receipts and src != ANY:
            for letter in box.letters:
                if letter.src == src:  # the short way: it has left already, so when it arrives is known
                    task = self.venue.here(rank)
                    box.letters.remove(letter)
                    arrived(task, letter)
                    put(x, letter, tag, member)
                    return src
        return self.begin_recv(member, x, src, tag).wait()

    def begin_recv(self, member: int, x: Array, src: int, tag: int) -> Receipt:
        rank = self.ranks[member]
        task = self.venue.here(rank)
        receipt = Receipt(self.venue, rank, member, x, src, tag, task.clock)
        box = self._box(member, tag)
        box.receipts.append(receipt)
        if box.letters:
            self._serve(box)
        return receipt

    def _box(self, member: int, tag: int) -> _Box:
        box = self._boxes.get((member, tag))
        if box is None:
            box = self._boxes[member, tag] = _Box()
        return box

    def _post(self, src: int, rank: int, dst: int, dst_rank: int, tag: int, data: Array) -> float:
        """Put a message into its sender's port now: when its last byte leaves."""
        venue = self.venue
        network, now, nbytes = venue.network, venue.loop.now, data.nbytes
        path = network.path(rank, dst_rank)
        start, left = network.leave(path, nbytes, now)
        if start > now:
            venue.loop.at(
                start,
                lambda: self._deliver(Letter(src, data, network.arrive(path, nbytes, start, left)), dst, tag),
            )
        else:
            self._deliver(Letter(src, data, network.arrive(path, nbytes, start, left)), dst, tag)
        return left

    def _deliver(self, letter: Letter, dst: int, tag: int) -> None:
        """Its arrival is known: whoever waits for just this one need not wait for the event."""
        box = self._box(dst, tag)
        box.letters.append(letter)
        if box.receipts:
            self._serve(box)

    def _serve(self, box: _Box) -> None:
        """Give letters to receipts, in the order in which these were posted."""
        for receipt in tuple(box.receipts):
            if receipt.src == ANY:
                letter = self._first(box, receipt)
                if letter is None:  # not yet decided; later receipts must not take what may be this one's
                    break
            else:
                for letter in box.letters:
                    if letter.src == receipt.src:
                        break
                else:
                    continue
            box.letters.remove(letter)
            box.receipts.remove(receipt)
            receipt.letter = letter
            if receipt.waiter is not None:
                receipt.waiter.wake(letter.arrival)

    def _first(self, box: _Box, receipt: Receipt) -> Letter | None:
        """The letter that arrives first, once it has: an earlier one might still be sent until then."""
        if not box.letters:
            return None
        letter = min(box.letters, key=lambda letter: letter.arrival)
        time_s = max(letter.arrival, receipt.posted)
        if time_s > self.venue.loop.now:
            self.venue.loop.at(time_s, partial(self._serve, box))
            return None
        return letter
