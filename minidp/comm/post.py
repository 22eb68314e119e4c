"""Messages from rank to rank in the virtual world: buffered sends, receives that match in order.

A send copies the array, and is done when its last byte has left the sender's port. A receive is done when the last
byte has arrived. Messages of one pair and tag arrive in order; a receive from anybody takes what arrives first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from minidp import trace
from minidp.comm.errors import CollectiveMismatch
from minidp.comm.mailbox import kind_of
from minidp.comm.venue import Venue
from minidp.comm.work import Work
from minidp.sim.loop import Task
from minidp.sim.network import Path

Array = npt.NDArray[Any]
ANY = -1


class Letter(Work):
    """A message; as a Work, the sender's part of it."""

    def __init__(self, venue: Venue, rank: int, src: int, dst: int, tag: int, x: Array, path: Path) -> None:
        self.venue, self.rank, self.src, self.dst, self.tag, self.path = venue, rank, src, dst, tag, path
        self.data = x.flatten()
        self.left: float | None = None  # when its last byte leaves, once that is known
        self.arrival = 0.0
        self.waiter: Task | None = None

    def wait(self) -> None:
        task = self.venue.here(self.rank)
        if self.left is None:
            self.waiter = task
            task.block(lambda: f"send to rank {self.dst}, tag {self.tag} ({kind_of(self.data)})")
        assert self.left is not None
        task.clock = max(task.clock, self.left)


class Receipt(Work):
    """A receive that has been posted."""

    def __init__(self, venue: Venue, rank: int, member: int, x: Array, src: int, tag: int, posted: float) -> None:
        self.venue, self.rank, self.member, self.src, self.tag = venue, rank, member, src, tag
        self.x, self.posted = x, posted
        self.letter: Letter | None = None
        self.waiter: Task | None = None
        self.done = False

    def wait(self) -> int:
        letter = self.letter
        if not self.done:
            task = self.venue.here(self.rank)
            came = task.clock
            if letter is None:
                self.waiter = task
                task.block(self._place)
                letter = self.letter
            assert letter is not None
            task.clock = max(task.clock, letter.arrival)
            task.waited()
            recorder = trace.current()
            if recorder is not None:
                recorder.add(f"recv from rank {letter.src}", "wait", came, task.clock)
            self._take(letter)
        assert letter is not None
        return letter.src

    def _take(self, letter: Letter) -> None:
        x, data = self.x, letter.data
        self.done = True
        if x.size != data.size or x.dtype != data.dtype:
            raise CollectiveMismatch(
                f"rank {letter.src} sent {kind_of(data)} with tag {self.tag}; rank {self.member} receives {kind_of(x)}"
            )
        if x.ndim == 1:
            x[:] = data
        else:
            x[...] = data.reshape(x.shape)

    def _place(self) -> str:
        src = "any rank" if self.src == ANY else f"rank {self.src}"
        return f"recv from {src}, tag {self.tag} ({kind_of(self.x)})"


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

    def send(self, member: int, x: Array, dst: int, tag: int) -> Letter:
        venue, ranks = self.venue, self.ranks
        rank = ranks[member]
        task = venue.here(rank)
        letter = Letter(venue, rank, member, dst, tag, x, venue.network.path(rank, ranks[dst]))
        if task.clock > venue.loop.now:
            venue.loop.at(task.clock, partial(self._post, letter))
        else:
            self._post(letter)
        return letter

    def recv(self, member: int, x: Array, src: int, tag: int) -> Receipt:
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

    def _post(self, letter: Letter) -> None:
        now = self.venue.loop.now
        start, left = self.venue.network.leave(letter.path, letter.data.nbytes, now)
        letter.left = left
        if letter.waiter is not None:
            letter.waiter.wake(left)
        if start > now:
            self.venue.loop.at(start, partial(self._travel, letter, start))
        else:
            self._travel(letter, start)

    def _travel(self, letter: Letter, start: float) -> None:
        assert letter.left is not None
        letter.arrival = self.venue.network.arrive(letter.path, letter.data.nbytes, start, letter.left)
        box = self._box(letter.dst, letter.tag)
        box.letters.append(letter)
        if box.receipts:
            self._serve(box)

    def _serve(self, box: _Box) -> None:
        """Give letters to receipts, in the order in which these were posted."""
        for receipt in list(box.receipts):
            if receipt.src == ANY:
                letter = self._first(box, receipt)
                if letter is None:  # not yet decided; later receipts must not take what may be this one's
                    break
            else:
                letter = next((letter for letter in box.letters if letter.src == receipt.src), None)
                if letter is None:
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
