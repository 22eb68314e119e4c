"""Where the ranks of a group meet: a barrier whose arrival carries a header and a piece of payload.

Every rank owns one block of shared memory in each of its groups: a generation counter, two header slots, two
payload slots, and a door to each peer (for queues). To arrive is to write header and payload into the slots of
this generation's parity and to publish the generation; when all have arrived, everybody reads everybody's. Two
slots are enough, and one barrier a round: nobody can write a slot again before it has passed the *next* barrier,
where all arrive only after they have read.

The header (operation, shape, dtype, ReduceOp, and which collective and barrier of the group this is) is compared
at every arrival, by its hash. It is checked always: that costs 1 µs, a desynchronised run costs a day.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from minidp.comm.arena import Arena, Bytes, round_up
from minidp.comm.errors import CollectiveMismatch, CommError
from minidp.comm.vigil import Watch
from minidp.comm.word import LINE, SPINS, Bell, Word, fence
from minidp.comm.wording import describe, disagreement

CHUNK = 512 * 1024  # bytes a payload slot: two of them and the sum stay in a core's L2 cache
_HEADER, _HEADER_BYTES, _TEXT = 256, 512, 448
_BELL = 1280  # the line that wakes a member who waits for whichever message
_DOORS = 2048  # where the lines begin through which a rank tells each peer of the queue that it made for it


def control_bytes(size: int) -> int:
    """Of a member's block in a group of ``size`` ranks, without its payload slots."""
    return round_up(_DOORS + LINE * size)


class Header:
    """What a rank says when it arrives: equal hashes mean that the ranks agree."""

    __slots__ = ("hash", "text")

    def __init__(self, text: str) -> None:
        self.text = text.encode()[:_TEXT]
        self.hash = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


class Rendezvous:
    """The barrier of a group.

    Args:
        watch: how this rank waits.
        offsets: the arena offset of each member's block, in order of the group's ranks.
        ranks: the world rank of each member.
        rank: this rank's index in the group.
        name: of the group, for messages.
    """

    def __init__(
        self, watch: Watch, arena: Arena, offsets: Sequence[int], ranks: Sequence[int], rank: int, name: str
    ) -> None:
        self.watch, self.arena, self.rank, self.name = watch, arena, rank, name
        self.ranks = list(ranks)
        self.size = len(self.ranks)
        self.offsets = list(offsets)
        self.sequence = 0  # collectives that this group has begun
        self.generation = 0  # barriers that this rank has arrived at
        self.broken: str | None = None  # the error after which this rank no longer knows where the others are
        control = control_bytes(self.size)
        blocks = [arena.map(offset, control + 2 * CHUNK) for offset in offsets]
        self._control, self._blocks = control, blocks
        self._words = [
            Word(block[:LINE], offset, world) for block, offset, world in zip(blocks, offsets, self.ranks)
        ]
        self._mine = self._words[rank]
        self._peers = [(i, w, w.cell) for i, w in enumerate(self._words) if i != rank]
        self._headers = [
            [b[_at(parity) : _at(parity) + _HEADER_BYTES].data.cast("q") for b in blocks] for parity in (0, 1)
        ]
        self._texts = [blocks[rank][_at(p) + 64 : _at(p) + _HEADER_BYTES].data for p in (0, 1)]
        self._slots = [
            [block[control + parity * CHUNK : control + (parity + 1) * CHUNK] for block in blocks]
            for parity in (0, 1)
        ]
        self._reserved = False

    @staticmethod
    def reserve(arena: Arena, region: int, size: int) -> int:
        """A block in ``region`` for a group of ``size``; its payload slots are reserved at their first use."""
        offset = arena.take(region, control_bytes(size) + 2 * CHUNK)
        arena.reserve(offset, control_bytes(size))
        return offset

    def door(self, src: int, dst: int) -> Word:
        """The counter through which member ``src`` tells member ``dst`` where its queue is."""
        at = _DOORS + LINE * dst
        return Word(self._blocks[src][at : at + LINE], self.offsets[src] + at, self.ranks[src])

    def bell(self, member: int) -> Bell:
        """What wakes a member who waits for a message from anybody."""
        return Bell(self._blocks[member][_BELL : _BELL + LINE])

    def parity(self) -> int:
        """Which of the two slots belongs to the coming arrival."""
        return (self.generation + 1) & 1

    def slots(self, parity: int) -> list[Bytes]:
        """All members' payload slots of a parity: CHUNK bytes each, in rank order."""
        if not self._reserved:
            self.arena.reserve(self.offsets[self.rank] + self._control, 2 * CHUNK)
            self._reserved = True
        return self._slots[parity]

    def enter(self, header: Header, note: int = 0) -> list[int]:
        """Begin a collective: arrive with ``header``, wait for all, and see that all have brought the same.

        Returns every rank's ``note``, an int64 that travels in the header. Raises CollectiveMismatch on every rank
        if the headers differ, and what ``arrive`` raises.
        """
        self.sequence += 1
        return self.arrive(header, note)

    def arrive(self, header: Header, note: int = 0) -> list[int]:
        """A barrier inside a collective: publish this rank's header, note and payload, wait for all others'."""
        if not self._peers:  # a group of one has met
            self.generation += 1
            return [note]
        if self.broken is not None:
            raise CommError(f"this communicator is out of step since an earlier error: {self.broken}")
        parity, sequence = self.parity(), self.sequence
        mine = self._headers[parity][self.rank]
        mine[0], mine[3], mine[4] = header.hash, note, sequence
        if mine[1] != header.hash:  # the text of this slot is another header's
            mine[1] = 0
            mine[2] = len(header.text)
            self._texts[parity][: len(header.text)] = header.text
            mine[1] = header.hash
        self.generation = generation = self.generation + 1
        self._mine.publish(generation)
        since = None
        for _, word, cell in self._peers:
            if cell[0] >= generation:
                continue
            for _ in range(SPINS):
                if cell[0] >= generation:
                    break
            else:
                since = since or time.monotonic()
                self._wait(word, generation, header, since)
        if fence is not None:
            fence()
        notes = []
        for words in self._headers[parity]:
            if words[0] != header.hash or words[4] != sequence:
                raise CollectiveMismatch(self._disagreement(parity))
            notes.append(words[3])
        return notes

    def describe(self, header: Header) -> str:
        """``all_reduce #412 (float32 (784, 512), sum)``, for messages."""
        return describe(header.text.decode(errors="replace"), self.sequence, self.name)

    def _wait(self, word: Word, generation: int, header: Header, since: float) -> None:
        def absent() -> list[int]:
            return [self.ranks[i] for i, _, cell in self._peers if cell[0] < generation]

        try:
            with self.watch.vigil(
                word, generation, lambda: self.describe(header), since=since, absent=absent
            ) as vigil:
                while not vigil.nap():
                    pass
        except CommError as error:
            self.broken = str(error)  # this rank has arrived where others have not: it can't take that back
            raise

    def _disagreement(self, parity: int) -> str:
        said: dict[str, list[int]] = {}
        for i, words in enumerate(self._headers[parity]):
            text = bytes(words.cast("B")[64 : 64 + words[2]]).decode(errors="replace")
            if words[4] != self.sequence:
                text += f" as collective #{words[4]}"
            said.setdefault(text, []).append(self.ranks[i])
        return disagreement(said, self.sequence, self.name)


def _at(parity: int) -> int:
    return _HEADER + parity * _HEADER_BYTES
