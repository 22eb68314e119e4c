"""Point-to-point messages of one rank in one group: what is on its way out, what is on its way in.

Nothing runs in the background. Whoever waits, for whatever, pumps: it puts chunks of its own messages into
queues with room and takes out what has arrived for it. So two ranks that both send before they receive do not
lock each other out, however long the messages are.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from minidp.comm.board import LOST
from minidp.comm.communicator import ANY
from minidp.comm.errors import CollectiveMismatch, RankLost
from minidp.comm.queue import KIND_BYTES, QUEUE_BYTES, SLOTS, ArrayQueue, Incoming, Outgoing
from minidp.comm.rendezvous import Rendezvous
from minidp.comm.traffic import Traffic
from minidp.comm.word import Word
from minidp.comm.work import Work

_TRIES = 100  # pumps before a waiter sleeps, about 100 µs

Array = npt.NDArray[Any]


class Sending(Work):
    """A message that leaves."""

    def __init__(self, box: Mailbox, x: Array, dst: int, tag: int) -> None:
        self.box, self.dst, self.tag = box, dst, tag
        flat = np.ascontiguousarray(x).reshape(-1)
        self.message = Outgoing(tag, kind_of(x), flat.view(np.uint8))

    @property
    def done(self) -> bool:
        return self.message.done

    def wait(self) -> None:
        self.box.finish(self)

    def place(self) -> str:
        return f"send to {self.box.name(self.dst)}, tag {self.tag} ({self.message.kind})"


class Receiving(Work):
    """A message that somebody has asked for."""

    def __init__(self, box: Mailbox, x: Array, src: int, tag: int) -> None:
        self.box, self.x, self.src, self.tag, self.kind = box, x, src, tag, kind_of(x)
        self.direct = x.flags.c_contiguous
        flat = x.reshape(-1) if self.direct else np.empty(x.size, x.dtype)
        self.data = flat.view(np.uint8)
        self.source: int | None = None
        self.done = False

    def wants(self, src: int, tag: int) -> bool:
        return tag == self.tag and self.src in (ANY, src)

    def check(self, src: int, kind: str) -> None:
        if kind != self.kind:
            me = self.box.name(self.box.rank)
            raise CollectiveMismatch(
                f"{self.box.name(src)} sent {kind} with tag {self.tag}; {me} receives {self.kind}"
            )

    def take(self, message: Incoming) -> None:
        """Receive a complete message that lay aside."""
        self.check(message.src, message.kind)
        self.data[:] = message.data
        self.finish(message.src)

    def finish(self, src: int) -> None:
        if not self.direct:
            self.x[...] = self.data.view(self.x.dtype).reshape(self.x.shape)
        self.source, self.done = src, True

    def wait(self) -> int | None:
        self.box.finish(self)
        return self.source

    def place(self) -> str:
        src = "any rank" if self.src == ANY else self.box.name(self.src)
        return f"recv from {src}, tag {self.tag} ({self.kind})"


class Mailbox:
    """All messages of one rank in one group."""

    def __init__(self, rendezvous: Rendezvous, region: int, traffic: Traffic) -> None:
        self.rendezvous, self.region, self.traffic = rendezvous, region, traffic
        self.rank = rendezvous.rank
        peers = [rank for rank in range(rendezvous.size) if rank != self.rank]
        self._bell, self._bells = rendezvous.bell(self.rank), {peer: rendezvous.bell(peer) for peer in peers}
        self._doors_in = {src: rendezvous.door(src, self.rank) for src in peers}
        self._out: dict[int, ArrayQueue] = {}
        self._in: dict[int, ArrayQueue] = {}
        self._leaving: dict[int, deque[Sending]] = {}
        self._posted: list[Receiving] = []
        self._aside: list[Incoming] = []  # complete messages that nobody has asked for yet
        self._arriving: dict[int, tuple[Incoming, Receiving | None]] = {}
        self._mourned: set[int] = set()  # lost members of whom somebody who waited for any has been told
        rendezvous.watch.pumps.add(self)

    @property
    def busy(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._leaving or self._posted or self._arriving)

    def send(self, x: Array, dst: int, tag: int) -> Sending:
        sending = Sending(self, x, dst, tag)
        if dst == self.rank:
            self._to_self(sending)
        else:
            self._leaving.setdefault(dst, deque()).append(sending)
            self.pump()
        return sending

    def recv(self, x: Array, src: int, tag: int) -> Receiving:
        receiving = Receiving(self, x, src, tag)
        for message in self._aside:
            if receiving.wants(message.src, message.tag):
                receiving.take(message)
                self._aside.remove(message)
                return receiving
        self._posted.append(receiving)
        return receiving

    def pump(self) -> bool:
        """Move what can be moved without waiting; True if anything was."""
        moved = False
        for dst, waiting in list(self._leaving.items()):
            queue = self._queue_to(dst)
            while waiting and waiting[0].message.push(queue):
                moved = True
                self._bells[dst].ring()
                if waiting[0].done:
                    size = len(waiting.popleft().message.data)
                    self.traffic.add(size)
            if not waiting:
                del self._leaving[dst]
        for src in self._doors_in:
            queue_in = self._in.get(src) or self._queue_from(src)
            while queue_in is not None and not queue_in.empty():
                self._accept(src, queue_in)
                self._bells[src].ring()  # the rest of a long message may be waiting there for a slot
                moved = True
        return moved

    def finish(self, work: Sending | Receiving) -> None:
        """Pump until ``work`` is done.

        RankLost if it is for a rank that has been lost; once for each lost rank, if it is a receive from any. What
        had come of a message from there is dropped, and so is ``work``.
        """
        try:
            self._finish(work)
        except RankLost as lost:
            ranks = self.rendezvous.ranks
            self._mourn(ranks.index(lost.rank))
            self._forget(work)
            raise

    def _finish(self, work: Sending | Receiving) -> None:
        tries, since = 0, None
        while not work.done:
            if self.pump():
                tries = 0
                continue
            tries += 1
            if tries >= _TRIES:
                word, value = self._awaited(work)
                since = since or time.monotonic()
                # Whoever pumps, the vigil too, may have taken in what is waited for: then it is there.
                arrived = (lambda: work.done or self._something()) if word is None else None
                news = self._unmourned if word is None else None
                watch = self.rendezvous.watch
                vigil = watch.vigil(
                    word, value, work.place, since=since, arrived=arrived, news=news, bell=self._bell
                )
                with vigil:
                    while not work.done and not self.pump():
                        vigil.nap()
                tries = 0

    def _accept(self, src: int, queue: ArrayQueue) -> None:
        """Take the next chunk from ``src`` to where it belongs."""
        if src not in self._arriving:
            chunk = queue.peek()
            for receiving in self._posted:
                if receiving.wants(src, chunk.tag):
                    receiving.check(src, chunk.kind)
                    self._posted.remove(receiving)
                    self._arriving[src] = Incoming(src, chunk.tag, chunk.kind, receiving.data), receiving
                    break
            else:
                self._arriving[src] = Incoming.aside(src, chunk), None
        message, wanted = self._arriving[src]
        message.pull(queue)
        if message.done:
            del self._arriving[src]
            self.traffic.add(0, len(message.data), 0)
            if wanted is not None:
                wanted.finish(src)
            else:
                self._deliver(message)

    def _deliver(self, message: Incoming) -> None:
        """A complete message that lay aside: to the first who has asked meanwhile, or on the pile."""
        for receiving in self._posted:
            if receiving.wants(message.src, message.tag):
                receiving.take(message)
                self._posted.remove(receiving)
                return
        self._aside.append(message)

    def _to_self(self, sending: Sending) -> None:
        message = sending.message
        message.sent, message.done = len(message.data), True
        self._deliver(Incoming(self.rank, sending.tag, message.kind, message.data.copy(), message.sent))

    def _awaited(self, work: Sending | Receiving) -> tuple[Word | None, int]:
        """The counter whose change lets ``work`` go on, and the value that it must reach."""
        if isinstance(work, Sending):
            queue = self._queue_to(work.dst)
            return queue.head, queue.written - SLOTS + 1
        if work.src in (ANY, self.rank):
            return None, 0
        incoming = self._in.get(work.src)
        if incoming is None:
            return self._doors_in[work.src], 1
        return incoming.tail, incoming.taken + 1

    def _something(self) -> bool:
        """A chunk has come from somebody."""
        queues = (self._in.get(src) or self._queue_from(src) for src in self._doors_in)
        return any(queue is not None and not queue.empty() for queue in queues)

    def _unmourned(self) -> int | None:
        """The world rank of a member that has been lost, and of whom nobody here has been told; or None."""
        board, ranks = self.rendezvous.watch.board, self.rendezvous.ranks
        lost = (rank for i, rank in enumerate(ranks) if i not in self._mourned and board.state(rank) == LOST)
        return next(lost, None)

    def _mourn(self, member: int) -> None:
        """Nothing more will come from a member, nor go there."""
        self._mourned.add(member)
        self._leaving.pop(member, None)
        self._arriving.pop(member, None)

    def _forget(self, work: Sending | Receiving) -> None:
        """Whoever waited for this has left, and his array with him: what is on its way there goes aside."""
        if isinstance(work, Receiving) and work in self._posted:
            self._posted.remove(work)
        for src, (message, receiving) in self._arriving.items():
            if receiving is work:
                message.data = message.data.copy()
                self._arriving[src] = message, None

    def name(self, member: int) -> str:
        """``rank 2``, counted in this group, or ``server 0``."""
        board, world = self.rendezvous.watch.board, self.rendezvous.ranks[member]
        return f"rank {member}" if world < board.servers_from else board.name(world)

    def _queue_to(self, dst: int) -> ArrayQueue:
        queue = self._out.get(dst)
        if queue is None:
            rendezvous = self.rendezvous
            offset = rendezvous.arena.take(self.region, QUEUE_BYTES)
            rendezvous.arena.reserve(offset, QUEUE_BYTES)
            ranks = rendezvous.ranks
            queue = self._out[dst] = ArrayQueue(rendezvous.arena, offset, ranks[self.rank], ranks[dst])
            rendezvous.door(self.rank, dst).publish(offset + 1)  # + 1: offset 0 is a place too
        return queue

    def _queue_from(self, src: int) -> ArrayQueue | None:
        door = self._doors_in[src].cell[0]
        if door:
            ranks = self.rendezvous.ranks
            self._in[src] = ArrayQueue(self.rendezvous.arena, door - 1, ranks[src], ranks[self.rank])
        return self._in.get(src)


def kind_of(x: Array) -> str:
    """What sender and receiver must agree on."""
    return _kind(x.dtype, x.size)


@lru_cache(1024)  # to write out a dtype takes longer than a small message
def _kind(dtype: np.dtype[Any], size: int) -> str:
    """By a digest if it is too long for the header of a slot."""
    kind = f"{dtype}[{size}]"
    if len(kind.encode()) > KIND_BYTES:
        digest = hashlib.blake2b(str(dtype).encode(), digest_size=8).hexdigest()
        kind = f"structured {digest} of {dtype.itemsize} bytes[{size}]"
    return kind
