"""Messages from rank to rank in the virtual world: buffered sends, receives that match in order.

A send copies the array, and is done when its last byte has left the sender's port. A receive is done when the last
byte has arrived. Messages of one pair and tag arrive in order; a receive from anybody takes what arrives first.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy.typing as npt

from minidp.comm.communicator import ANY
from minidp.comm.letters import Box, Letter, Receipt, arrived, put
from minidp.comm.mailbox import kind_of
from minidp.comm.traffic import Traffic
from minidp.comm.venue import Venue
from minidp.comm.work import Work
from minidp.sim.loop import Task
from minidp.sim.network import Path

Array = npt.NDArray[Any]


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
    """A receive that goes on by itself. What has arrived is counted by who waits for it."""

    def __init__(self, venue: Venue, rank: int, member: int, receipt: Receipt, traffic: Traffic) -> None:
        self.venue, self.rank, self.member, self.receipt = venue, rank, member, receipt
        self.traffic = traffic
        self.taken: int | None = None

    def wait(self) -> int:
        if self.taken is None:
            self.taken = self.receipt.take(self.venue.here(self.rank), self.member)
            if self.taken != self.member:
                self.traffic.add(0, self.receipt.x.nbytes, 0)
        return self.taken


class PostOffice:
    """The mail of one group."""

    def __init__(self, venue: Venue, ranks: list[int]) -> None:
        self.venue, self.ranks = venue, ranks
        self._loop, self._network = venue.loop, venue.network
        first = venue.servers_from
        self._names = [f"rank {i}" if rank < first else venue.name(rank) for i, rank in enumerate(ranks)]
        self._boxes: dict[tuple[int, int], Box] = {}
        self._most_boxes = 1024  # before those that are empty are thrown away
        self._queued = [0] * len(ranks)  # by member, messages whose first byte has yet to leave

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
        sending = Sending(venue, rank, f"send to {self._names[dst]}, tag {tag} ({kind_of(x)})")

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
            letter = box.take(src)
            if letter.arrival > task.clock:
                arrived(task, letter, task.clock, self._names)
            put(x, letter, tag, member, self._names)
            return src
        receipt = Receipt(x, src, tag, task.clock, self._names)
        box.receipts.append(receipt)
        if letters or src == ANY:
            self._serve(box)
        return receipt.take(task, member)

    def begin_recv(self, member: int, x: Array, src: int, tag: int, traffic: Traffic) -> Receiving:
        rank = self.ranks[member]
        receipt = Receipt(x, src, tag, self.venue.here(rank).clock, self._names)
        box = self._box(member, tag)
        box.receipts.append(receipt)
        if src == ANY or box.letters.get(src):
            self._serve(box)
        return Receiving(self.venue, rank, member, receipt, traffic)

    def _box(self, member: int, tag: int) -> Box:
        box = self._boxes.get((member, tag))
        if box is None:
            if len(self._boxes) >= self._most_boxes:  # a program may use each tag once
                self._boxes = {
                    key: box for key, box in self._boxes.items() if box.receipts or box.sent > box.taken
                }
                self._most_boxes = max(1024, 2 * len(self._boxes))
            box = self._boxes[member, tag] = Box()
        return box

    def _post(self, src: int, dst: int, tag: int, x: Array) -> float:
        """Put a message into its sender's port now: when its last byte leaves. ``x`` may change afterwards."""
        network, now, nbytes = self._network, self._loop.now, x.nbytes
        path = network.path(self.ranks[src], self.ranks[dst])
        start, left = network.leave(path, nbytes, now)
        # Behind one that has yet to leave, even if it takes no time: those of a pair arrive in order.
        if start > now or network.hops or self._queued[src]:
            self._queued[src] += 1
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
        self._queued[src] -= 1
        self._network.follow(
            self._loop,
            path,
            data.nbytes,
            start,
            left,
            lambda arrival: self._deliver(self._box(dst, tag), Letter(src, data, arrival)),
        )

    def _deliver(self, box: Box, letter: Letter) -> None:
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

    def _serve(self, box: Box) -> None:
        """Give letters to receipts, in the order in which these were posted."""
        receipts, i = box.receipts, 0
        while i < len(receipts):
            src = receipts[i].src
            if src == ANY:
                letter = box.first()
                if letter is None or self._not_yet(box, max(letter.arrival, receipts[i].posted)):
                    return  # later receipts must not take what may be this one's
                src = letter.src
            elif not box.letters.get(src):
                i += 1
                continue
            receipts.pop(i).give(box.take(src))

    def _not_yet(self, box: Box, time_s: float) -> bool:
        """Whether ``time_s`` is to come; if so, the box is served again then: an earlier letter might be sent."""
        if time_s <= self._loop.now:
            return False
        if box.due is None or time_s < box.due:
            box.due = time_s
            self._loop.at(time_s, partial(self._served_again, box, time_s))
        return True

    def _served_again(self, box: Box, time_s: float) -> None:
        if box.due == time_s:
            box.due = None
        self._serve(box)
