"""The notice board: one record a rank in shared memory that says who waits where, and who is gone.

Each rank writes its own record and the parent writes the head; everybody reads. A rank writes only when it is
about to sleep or has made progress, so the board costs nothing while all goes well. It is what turns "the run
hangs" into a sentence with ranks in it.

    head:    aborted, rank, length, text          verdict, length, text          losses
    record:  state, pid, serial, owner, offset, value, noticed, done, total, lengths, naps, since, seen,
             expendable, place, note, whereabouts
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from minidp.comm.arena import REGION, Arena, round_up
from minidp.comm.word import publish_fence
from minidp.comm.wording import name_of_all, name_places, name_ranks

STARTING, RUNNING, RETURNED, LOST = 0, 1, 2, 3
GONE = (RETURNED, LOST)
"""States of ranks that will not come to anything again."""
NOBODY = -1  # waits for any rank, not for one

_RECORD = 768
_TEXT = 192
_PLACE, _NOTE, _WHERE = 128, 128 + _TEXT, 128 + 2 * _TEXT
_STATE, _PID, _SERIAL, _OWNER, _OFFSET, _VALUE, _NOTICED, _DONE, _TOTAL, _PLACE_LEN, _NOTE_LEN, _NAPS = range(12)
_SINCE, _SEEN, _WHERE_LEN, _EXPENDABLE = range(12, 16)
_FRESH_S = 1.5  # since a rank was last seen: longer, and it may be somewhere else by now
_HEAD = 2048
_ABORTED, _ABORT_RANK, _ABORT_LEN, _VERDICT, _VERDICT_LEN, _LOSSES = range(6)
_ABORT_TEXT, _VERDICT_TEXT, _HEAD_TEXT = 64, 1024, 960


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank waits until the counter at ``offset``, written by world rank ``owner``, reaches ``value``."""

    serial: int
    owner: int
    offset: int
    value: int
    place: str


class Board:
    """The board of a run of ``world_size`` ranks, in the arena's last region (the parent's).

    Ranks from ``servers_from`` on are servers, and are called so.
    """

    def __init__(self, arena: Arena, world_size: int, servers_from: int | None = None) -> None:
        self.world_size = world_size
        self.servers_from = world_size if servers_from is None else servers_from
        self._view = arena.map((arena.regions - 1) * REGION, self.nbytes(world_size)).data
        self._head = self._view.cast("q")
        self._records = [
            self._view[_HEAD + _RECORD * r : _HEAD + _RECORD * (r + 1)].cast("q") for r in range(world_size)
        ]

    @staticmethod
    def nbytes(world_size: int) -> int:
        """Bytes that the board takes."""
        return round_up(_HEAD + _RECORD * world_size)

    @staticmethod
    def reserve(arena: Arena, world_size: int) -> None:
        """Reserve the board's memory; once, by the parent."""
        size = Board.nbytes(world_size)
        arena.reserve(arena.take(arena.regions - 1, size), size)

    def close(self) -> None:
        """Unmap the board now: an exception that is kept alive keeps its frames, and the board in them, alive."""
        del self._head, self._records, self._view

    # -- the head: the parent aborts, a rank that sees a deadlock says so -------------------------------

    def abort(self, rank: int, reason: str) -> None:
        """Parent only: ``rank`` is dead, for ``reason``; all who wait leave with RankFailed. The first stays."""
        if not self._head[_ABORTED]:
            self._head[_ABORT_LEN] = self._write(_ABORT_TEXT, reason, _HEAD_TEXT)
            self._head[_ABORT_RANK] = rank
            publish_fence()
            self._head[_ABORTED] = 1

    def aborted(self) -> tuple[int, str] | None:
        """The dead rank and why it died, or None."""
        if not self._head[_ABORTED]:
            return None
        return self._head[_ABORT_RANK], self._read(_ABORT_TEXT, self._head[_ABORT_LEN])

    def condemn(self, verdict: str) -> None:
        """Tell all ranks that some of them wait for what can't come. The first verdict stays."""
        if not self._head[_VERDICT]:
            self._head[_VERDICT_LEN] = self._write(_VERDICT_TEXT, verdict, _HEAD_TEXT)
            publish_fence()
            self._head[_VERDICT] = 1

    def verdict(self) -> str | None:
        """What a rank found out about waits that can't end, or None."""
        if not self._head[_VERDICT]:
            return None
        return self._read(_VERDICT_TEXT, self._head[_VERDICT_LEN])

    # -- ranks that may die ------------------------------------------------------------------------------

    def expendable(self, rank: int, yes: bool) -> None:
        """Say whether the run goes on, should ``rank`` die."""
        self._records[rank][_EXPENDABLE] = yes

    def is_expendable(self, rank: int) -> bool:
        return bool(self._records[rank][_EXPENDABLE])

    def lose(self, rank: int, reason: str) -> None:
        """Parent only: ``rank`` has died, for ``reason``, and the run goes on. Who waits for it leaves."""
        record = self._records[rank]
        record[_SERIAL] = 0
        record[_PLACE_LEN] = self._write(_HEAD + _RECORD * rank + _PLACE, reason, _TEXT)
        self._head[_LOSSES] += 1  # first: who sees the state without it would think that nobody has died
        publish_fence()
        record[_STATE] = LOST

    def losses(self) -> int:
        """How many ranks have been lost."""
        return self._head[_LOSSES]

    def why_lost(self, rank: int) -> str:
        return self._read(_HEAD + _RECORD * rank + _PLACE, self._records[rank][_PLACE_LEN])

    # -- a rank's record --------------------------------------------------------------------------------

    def running(self, rank: int, pid: int) -> None:
        self._records[rank][_PID] = pid
        self._records[rank][_STATE] = RUNNING

    def returned(self, rank: int) -> None:
        """``rank`` has left its function and will not come to any collective again."""
        self._records[rank][_STATE] = RETURNED

    def state(self, rank: int) -> int:
        return self._records[rank][_STATE]

    def pid(self, rank: int) -> int:
        return self._records[rank][_PID]

    def notice(self, rank: int) -> None:
        """``rank`` has been told of a failure and may be tidying up."""
        self._records[rank][_NOTICED] = 1

    def noticed(self, rank: int) -> bool:
        return bool(self._records[rank][_NOTICED])

    def wait(self, rank: int, wait: Wait) -> None:
        record = self._records[rank]
        record[_SERIAL] = 0  # readers take a record whose serial is 0, or changes, as nothing
        record[_OWNER], record[_OFFSET], record[_VALUE] = wait.owner, wait.offset, wait.value
        record[_PLACE_LEN] = self._write(_HEAD + _RECORD * rank + _PLACE, wait.place, _TEXT)
        publish_fence()
        record[_SERIAL] = wait.serial

    def napped(self, rank: int) -> None:
        """``rank`` waits and has looked around once more: it is awake, and has moved what it could."""
        self._records[rank][_NAPS] += 1

    def naps(self, rank: int) -> int:
        return self._records[rank][_NAPS]

    def waits_no_more(self, rank: int) -> None:
        self._records[rank][_SERIAL] = 0

    def waiting(self, rank: int) -> Wait | None:
        """Where ``rank`` waits, or None if it computes."""
        record = self._records[rank]
        serial = record[_SERIAL]
        if not serial:
            return None
        place = self._read(_HEAD + _RECORD * rank + _PLACE, record[_PLACE_LEN])
        wait = Wait(serial, record[_OWNER], record[_OFFSET], record[_VALUE], place)
        return wait if record[_SERIAL] == serial else None

    def progress(self, rank: int, done: int, total: int, note: str | None) -> None:
        record = self._records[rank]
        record[_DONE], record[_TOTAL] = done, total or record[_TOTAL]
        if note is not None:
            record[_NOTE_LEN] = self._write(_HEAD + _RECORD * rank + _NOTE, note, _TEXT)

    def progress_of(self, rank: int) -> tuple[int, int, str]:
        """(steps done, steps in all or 0 if not known, note)."""
        record = self._records[rank]
        return record[_DONE], record[_TOTAL], self._read(_HEAD + _RECORD * rank + _NOTE, record[_NOTE_LEN])

    def seen(self, rank: int, place: str, since_ns: int, now_ns: int) -> None:
        """``rank`` is at ``place``, and has been since then (``time.monotonic_ns``)."""
        record = self._records[rank]
        if record[_SINCE] != since_ns:
            record[_SINCE] = 0  # as of a wait: readers take it as nothing
            record[_WHERE_LEN] = self._write(_HEAD + _RECORD * rank + _WHERE, place, _TEXT)
            publish_fence()
            record[_SINCE] = since_ns
        record[_SEEN] = now_ns

    def whereabouts(self, rank: int) -> str | None:
        """``forward, layer 3 (conv2), 1.2 s``: where ``rank`` was last seen; None if it has not been."""
        record = self._records[rank]
        since, seen = record[_SINCE], record[_SEEN]
        place = self._read(_HEAD + _RECORD * rank + _WHERE, record[_WHERE_LEN])
        if not since or record[_SINCE] != since:
            return None
        now = time.monotonic_ns()
        if now - seen > _FRESH_S * 1e9:
            return f"{place}, last seen {(now - seen) / 1e9:.1f} s ago"
        return f"{place}, {(now - since) / 1e9:.1f} s"

    def all_wait_or_returned(self) -> bool:
        """Nobody computes."""
        ranks = range(self.world_size)
        return all(self.state(rank) in GONE or self.waiting(rank) is not None for rank in ranks)

    def where_all_are(self) -> str:
        """One sentence: ``rank 2: forward, layer 3 (conv2), 1.2 s; ranks 0, 1, 3 wait in all_reduce #412``."""
        places: dict[str, list[int]] = {}
        for rank in range(self.world_size):
            wait = self.waiting(rank)
            if self.state(rank) in GONE:
                place = "returned" if self.state(rank) == RETURNED else "died"
            elif wait is not None:
                place = f"wait in {wait.place}"
            else:
                whereabouts = self.whereabouts(rank)
                place = "compute" if whereabouts is None else f": {whereabouts}"
            places.setdefault(place, []).append(rank)
        return name_places(places, self.servers_from)

    def name(self, rank: int) -> str:
        """``rank 2``, or ``server 0``."""
        return name_ranks([rank], servers_from=self.servers_from)

    def name_of_all(self, rank: int) -> str:
        """``rank 2 of 4``, or ``server 0 of 2``."""
        return name_of_all(rank, self.world_size, self.servers_from)

    def _write(self, start: int, text: str, limit: int) -> int:
        data = text.encode(errors="replace")[:limit]
        self._view[start : start + len(data)] = data
        return len(data)

    def _read(self, start: int, length: int) -> str:
        return bytes(self._view[start : start + length]).decode(errors="replace")
