"""Waiting that ends: every wait of the process world looks now and then whether what it waits for can still come.

A wait ends in one of five ways: the counter arrives; its rank is dead (RankFailed); its rank has returned, or
ranks wait for each other in a circle (CollectiveMismatch: they disagree); or ``timeout_s`` is over
(CollectiveTimeout, which names the absent and says if one is stopped). Arrived beats everything else, so a
rank that died after it had done its part does not hurt those who only needed that part.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from minidp.comm.arena import Arena
from minidp.comm.board import NOBODY, RETURNED, Board, Wait, name_ranks
from minidp.comm.errors import CollectiveMismatch, CollectiveTimeout, RankFailed
from minidp.comm.word import SLEEP_S, Word

LOOK_S = 0.05  # between two looks for circles and returned ranks
SETTLE_S = 0.25  # for the others to arrive, before a rank's early return is reported


class Watch:
    """What a rank needs to wait safely: the board, the arena, its world rank and its patience."""

    def __init__(self, board: Board, arena: Arena, rank: int, timeout_s: float) -> None:
        self.board, self.arena, self.rank, self.timeout_s = board, arena, rank, timeout_s
        self._serial = 0

    def vigil(
        self,
        word: Word | None,
        value: int,
        place: Callable[[], str],
        absent: Callable[[], list[int]] | None = None,
    ) -> Vigil:
        """A wait for ``word`` (None: any rank's) to reach ``value``; ``place`` says where, for messages."""
        self._serial += 1
        return Vigil(self, self._serial, word, value, place(), absent)

    def wait(
        self, word: Word, value: int, place: Callable[[], str], absent: Callable[[], list[int]] | None = None
    ) -> None:
        """Return when ``word`` has reached ``value``; CommError if it can't."""
        if not word.reached(value):
            with self.vigil(word, value, place, absent) as vigil:
                while not vigil.nap():
                    pass


class Vigil:
    """One wait. ``nap`` sleeps 2 ms at most and is True when the counter has arrived."""

    def __init__(
        self,
        watch: Watch,
        serial: int,
        word: Word | None,
        value: int,
        place: str,
        absent: Callable[[], list[int]] | None,
    ) -> None:
        self.watch, self.word, self.value, self.absent = watch, word, value, absent
        owner, offset = (NOBODY, 0) if word is None else (word.owner, word.offset)
        self.wait = Wait(serial, owner, offset, value, place)
        self._suspected: tuple[tuple[int, int], ...] | None = None

    def __enter__(self) -> Vigil:
        self.watch.board.wait(self.watch.rank, self.wait)
        self._start = time.monotonic()
        self._next_look = self._start + LOOK_S / 2
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.watch.board.notice(self.watch.rank)
        self.watch.board.waits_no_more(self.watch.rank)

    def nap(self) -> bool:
        """Sleep a little; True if the counter has arrived, an error if it never will."""
        if self.word is None:
            time.sleep(5e-5)
        elif self.word.sleep(self.value):
            return True
        board = self.watch.board
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_S
            self._look(board)
        verdict, abort = board.verdict(), board.aborted()
        if verdict is None and abort is None and now - self._start < self.watch.timeout_s:
            return False
        if self._arrived():  # looked at again after the news: arrived beats aborted
            return True
        if verdict is not None:
            raise CollectiveMismatch(verdict)
        if abort is not None:
            self._returned(board)
            rank, reason = abort
            raise RankFailed(f"{reason}; this is rank {self.watch.rank}, waiting in {self.wait.place}", rank)
        raise CollectiveTimeout(self._timeout_message(board))

    def _arrived(self) -> bool:
        return self.word is not None and self.word.reached(self.value)

    def _look(self, board: Board) -> None:
        self._returned(board)
        circle = self._circle(board)
        # Seen twice in a row, with the same waits, all still unmet: nobody in it can move any more.
        if circle is not None and circle == self._suspected:
            verdict = f"ranks wait for each other and none can go on: {board.where_all_are()}"
            board.condemn(f"{verdict}. All ranks must call the same operations in the same order")
        self._suspected = circle

    def _returned(self, board: Board) -> None:
        """Raise if the rank that this one waits for has left its function."""
        me, owner = self.watch.rank, self.wait.owner
        peers = [rank for rank in range(board.world_size) if rank != me] if owner == NOBODY else [owner]
        if all(board.state(peer) == RETURNED for peer in peers) and not self._arrived():
            settled = time.monotonic() + SETTLE_S
            while time.monotonic() < settled and board.verdict() is None and not board.all_wait_or_returned():
                time.sleep(SLEEP_S)  # so that those who are about to wait as well are named too
            board.condemn(
                f"{board.where_all_are()}. A rank that returns must leave nobody waiting: all ranks must call "
                "the same operations in the same order"
            )
            raise CollectiveMismatch(board.verdict())  # of who came first: all say the same

    def _circle(self, board: Board) -> tuple[tuple[int, int], ...] | None:
        """The waits that lead from this rank back to it, as (rank, serial), or None.

        Each link is checked against the counter itself, so a rank that has been overtaken by events (it was
        stopped after its counter arrived) is not taken for a member of a circle.
        """
        circle: list[tuple[int, int]] = []
        rank = self.watch.rank
        while True:
            wait = board.waiting(rank)
            if wait is None or wait.owner == NOBODY or self.watch.arena.peek(wait.offset) >= wait.value:
                return None
            circle.append((rank, wait.serial))
            rank = wait.owner
            if rank == self.watch.rank:
                return tuple(circle)
            if any(rank == seen for seen, _ in circle):
                return None  # a circle, but of others: they will say so

    def _timeout_message(self, board: Board) -> str:
        absent = self.absent() if self.absent is not None else [self.wait.owner]
        absent = [rank for rank in absent if rank != NOBODY]
        stopped = [rank for rank in absent if is_stopped(board.pid(rank))]
        who = name_ranks(absent) if absent else "no rank"
        message = f"{who} did not come to {self.wait.place} within {self.watch.timeout_s:g} s"
        if stopped:
            message += f"; {name_ranks(stopped)} {'is' if len(stopped) == 1 else 'are'} stopped (SIGSTOP)"
        return f"{message}; {board.where_all_are()}. If it is only slow, give spawn a larger timeout_s"


def is_stopped(pid: int) -> bool:
    """Whether process ``pid`` is in state T: stopped by a signal or a debugger (Linux only, else False)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
