"""Bounded queues of array slots in shared memory: how one rank sends arrays to another.

One queue a direction and a pair, made by its sender at the first message. A message is an array: its bytes are
copied into slots, never pickled; a long one is cut into chunks of one slot; when all slots are full, the sender
waits (back-pressure). The receiver copies each chunk straight to where it belongs.

    line 0    tail: chunks written so far, published by the sender
    line 1    head: chunks taken out so far, published by the receiver
    slots     8 × (128 bytes of header + 64 KB of payload)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minidp.comm.arena import Arena, Bytes
from minidp.comm.word import LINE, Word

SLOTS = 8
SLOT_BYTES = 64 * 1024  # half of L2 holds a whole queue; larger slots measured no faster
_HEADER = 128
KIND_BYTES = _HEADER - 32
_STRIDE = _HEADER + SLOT_BYTES
QUEUE_BYTES = 2 * LINE + SLOTS * _STRIDE


class Chunk(NamedTuple):
    """A slot's header: the message's tag, its size, how much of it this chunk holds, its dtype and shape."""

    tag: int
    message_bytes: int
    chunk_bytes: int
    kind: str


class ArrayQueue:
    """One direction of one pair of ranks. Single producer, single consumer, no lock."""

    def __init__(self, arena: Arena, offset: int, src: int, dst: int) -> None:
        memory = arena.map(offset, QUEUE_BYTES)
        self.tail = Word(memory[:LINE], offset, src)
        self.head = Word(memory[LINE : 2 * LINE], offset + LINE, dst)
        slots = memory[2 * LINE :].reshape(SLOTS, _STRIDE)
        self._headers = [slot[:_HEADER].data for slot in slots]
        self._numbers = [header[:32].cast("q") for header in self._headers]
        self._payloads = [slot[_HEADER:] for slot in slots]
        self.written = self.taken = 0

    def full(self) -> bool:
        """All slots hold chunks that the receiver has not taken."""
        return self.written - self.head.cell[0] >= SLOTS

    def empty(self) -> bool:
        return self.tail.cell[0] <= self.taken

    def put(self, chunk: Chunk, payload: Bytes) -> None:
        """Write one chunk. The queue must not be full."""
        i = self.written % SLOTS
        self._payloads[i][: len(payload)] = payload
        text = chunk.kind.encode()  # KIND_BYTES at most
        numbers = self._numbers[i]
        numbers[0], numbers[1], numbers[2], numbers[3] = chunk.tag, chunk.message_bytes, len(payload), len(text)
        self._headers[i][32 : 32 + len(text)] = text
        self.written += 1
        self.tail.publish(self.written)

    def peek(self) -> Chunk:
        """The next chunk's header. The queue must not be empty."""
        i = self.taken % SLOTS
        tag, message_bytes, chunk_bytes, length = self._numbers[i]
        return Chunk(tag, message_bytes, chunk_bytes, bytes(self._headers[i][32 : 32 + length]).decode())

    def take(self, out: Bytes) -> None:
        """Copy the next chunk's payload to ``out`` and free its slot."""
        out[:] = self._payloads[self.taken % SLOTS][: len(out)]
        self.taken += 1
        self.head.publish(self.taken)


@dataclass(slots=True)
class Outgoing:
    """A message on its way out."""

    tag: int
    kind: str
    data: Bytes
    sent: int = 0
    done: bool = False

    def push(self, queue: ArrayQueue) -> bool:
        """Put chunks until the message has left or the queue is full; True if anything moved."""
        moved = False
        while not self.done and not queue.full():
            piece = self.data[self.sent : self.sent + SLOT_BYTES]
            queue.put(Chunk(self.tag, len(self.data), len(piece), self.kind), piece)
            self.sent += len(piece)
            self.done = self.sent == len(self.data)
            moved = True
        return moved


@dataclass(slots=True)
class Incoming:
    """A message on its way in: straight into a posted receive's array, or aside until one is posted."""

    src: int
    tag: int
    kind: str
    data: Bytes
    received: int = 0

    @property
    def done(self) -> bool:
        return self.received == len(self.data)

    @classmethod
    def aside(cls, src: int, chunk: Chunk) -> Incoming:
        """A message that nobody has asked for yet, kept in private memory."""
        return cls(src, chunk.tag, chunk.kind, np.empty(chunk.message_bytes, np.uint8))

    def pull(self, queue: ArrayQueue) -> None:
        """Take this message's next chunk."""
        size = queue.peek().chunk_bytes
        queue.take(self.data[self.received : self.received + size])
        self.received += size
