"""Waiting that ends: every wait of the process world looks now and then whether what it waits for can still come.

A wait ends in one of five ways: the counter arrives; its rank is dead, or the run has failed by another one's
death (RankFailed); its rank has returned, or ranks wait for each other in a circle (CollectiveMismatch: they
disagree); or ``timeout_s`` is over (CollectiveTimeout, which names the absent and says if one is stopped). Arrived
beats everything else, so a rank that died after it had done its part does not hurt those who only needed that.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from minidp.comm.arena import Arena
from minidp.comm.board import GONE, LOST, NOBODY, Board, Wait
from minidp.comm.errors import CollectiveMismatch, CollectiveTimeout, RankFailed, RankLost
from minidp.comm.word import SLEEP_S, Bell, Word
from minidp.comm.wording import left_waiting, name_ranks, stuck

LOOK_S = 0.05  # between two looks for circles and returned ranks
SETTLE_S = 0.25  # for the others to arrive, before a rank's early return is reported


class Watch:
    """What a rank needs to wait safely: the board, the arena, its world rank and its patience.

    ``pumps`` are the mailboxes of all its groups: whoever waits, for whatever, moves all their messages on.
    """

    def __init__(self, board: Board, arena: Arena, rank: int, timeout_s: float) -> None:
        self.board, self.arena, self.rank, self.timeout_s = board, arena, rank, timeout_s
        self.pumps: weakref.WeakSet[Pump] = weakref.WeakSet()
        self._serial = 0

    def vigil(
        self,
        word: Word | None,
        value: int,
        place: Callable[[], str],
        *,
        since: float | None = None,
        absent: Callable[[], list[int]] | None = None,
        arrived: Callable[[], bool] | None = None,
        news: Callable[[], int | None] | None = None,
        bell: Bell | None = None,
    ) -> Vigil:
        """A wait for ``word`` to reach ``value``; ``place`` says where, for messages.

        With ``word`` None it is a wait for any rank, ``arrived`` tells whether it is over, ``news`` which rank has
        been lost that the waiter has not heard of, and ``bell`` is rung when something comes.
        The patience is counted from ``since`` (monotonic seconds;
        default: now), ``absent`` names who has not come.
        """
        self._serial += 1
        return Vigil(self, self._serial, word, value, place(), since, absent, arrived, news, bell)

    def pump(self) -> None:
        """Move all messages of this rank on."""
        for each in list(self.pumps):
            if each.busy:
                each.pump()


class Pump(Protocol):
    """Something with messages on their way: a mailbox."""

    @property
    def busy(self) -> bool: ...
    def pump(self) -> bool: ...


class Vigil:
    """One wait. ``nap`` sleeps 2 ms at most and is True when what it waits for is there."""

    def __init__(
        self,
        watch: Watch,
        serial: int,
        word: Word | None,
        value: int,
        place: str,
        since: float | None,
        absent: Callable[[], list[int]] | None,
        arrived: Callable[[], bool] | None,
        news: Callable[[], int | None] | None,
        bell: Bell | None,
    ) -> None:
        self.watch, self.word, self.value, self.absent, self.arrived = watch, word, value, absent, arrived
        self.news, self.bell = news, bell
        owner, offset = (NOBODY, 0) if word is None else (word.owner, word.offset)
        self.wait = Wait(serial, owner, offset, value, place)
        self._start = time.monotonic() if since is None else since
        self._suspects: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Vigil:
        self.watch.board.wait(self.watch.rank, self.wait)
        self._next_look = time.monotonic() + LOOK_S / 2
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, CollectiveTimeout):  # who gives up at the same moment is still to be named here
            self.watch.board.waits_no_more(self.watch.rank)

    def nap(self) -> bool:
        """Sleep a little; True if what is waited for has arrived, an error if it never will."""
        if self.word is None:
            assert self.bell is not None
            self.bell.sleep(self._arrived)
            if self._arrived():
                return True
        elif self.word.sleep(self.value):
            return True
        self.watch.pump()
        board = self.watch.board
        board.napped(self.watch.rank)
        now = time.monotonic()
        lost = self._lost(board) if board.losses() else None
        if now >= self._next_look and lost is None:
            self._next_look = now + LOOK_S
            self._look(board)
        verdict, abort = board.verdict(), board.aborted()
        if verdict is None and abort is None and lost is None and now - self._start < self.watch.timeout_s:
            return False
        if self._arrived():  # looked at again after the news: arrived beats aborted
            return True
        if verdict is not None:
            raise CollectiveMismatch(verdict)
        if abort is not None:
            self._returned(board)
            board.notice(self.watch.rank)
            rank, reason = abort
            raise RankFailed(
                f"{reason}; this is {board.name(self.watch.rank)}, waiting in {self.wait.place}", rank
            )
        if lost is not None:
            me = board.name(self.watch.rank)
            raise RankLost(f"{board.why_lost(lost)}; this is {me}, waiting in {self.wait.place}", lost)
        raise CollectiveTimeout(self._timeout_message(board))

    def _arrived(self) -> bool:
        if self.arrived is not None:
            return self.arrived()
        return self.word is not None and self.word.reached(self.value)

    def _lost(self, board: Board) -> int | None:
        """The rank that this wait is for, if it has been lost."""
        if self.wait.owner == NOBODY:
            return None if self.news is None else self.news()
        return self.wait.owner if board.state(self.wait.owner) == LOST else None

    def _look(self, board: Board) -> None:
        self._returned(board)
        suspects = self._stuck(board)
        # Twice in a row the same waits, all unmet, and everybody in them was awake meanwhile: nobody can move.
        if suspects and suspects.keys() == self._suspects.keys():
            before = self._suspects
            if all(s == before[r][0] and naps > before[r][1] + 1 for r, (s, naps) in suspects.items()):
                board.condemn(stuck(board.where_all_are()))
            return  # the first look at them stays, until they have napped twice or moved
        self._suspects = suspects

    def _returned(self, board: Board) -> None:
        """Raise if the rank that this one waits for has left its function."""
        me, owner = self.watch.rank, self.wait.owner
        peers = [rank for rank in range(board.world_size) if rank != me] if owner == NOBODY else [owner]
        gone = all(board.state(peer) in GONE for peer in peers) and not self._arrived()
        if gone and not (board.losses() and self._lost(board) is not None):  # that is said otherwise
            settled = time.monotonic() + SETTLE_S
            while time.monotonic() < settled and board.verdict() is None and not board.all_wait_or_returned():
                time.sleep(SLEEP_S)  # so that those who are about to wait as well are named too
            board.condemn(left_waiting(board.where_all_are()))
            raise CollectiveMismatch(board.verdict())  # of who came first: all say the same

    def _stuck(self, board: Board) -> dict[int, tuple[int, int]]:
        """Who must move before this rank can: {rank: (serial of its wait, its naps)}; empty if somebody can.

        From each wait to the rank that it is for (from a wait for anybody: to all). Each wait is checked against
        the counter itself, so a rank that was stopped after its counter had arrived counts as one that can move.
        """
        found: dict[int, tuple[int, int]] = {}
        frontier = [self.watch.rank]
        while frontier:
            rank = frontier.pop()
            if rank in found or board.state(rank) in GONE:
                continue
            naps, wait = board.naps(rank), board.waiting(rank)
            if wait is None or (wait.owner != NOBODY and self.watch.arena.peek(wait.offset) >= wait.value):
                return {}
            found[rank] = wait.serial, naps
            frontier += range(board.world_size) if wait.owner == NOBODY else [wait.owner]
        return found

    def _timeout_message(self, board: Board) -> str:
        absent = self.absent() if self.absent is not None else [self.wait.owner]
        absent = [rank for rank in absent if rank != NOBODY]
        # A rank that others wait for may itself be waiting for the one that is stopped: look at all.
        stopped = [rank for rank in range(board.world_size) if is_stopped(board.pid(rank))]
        limit = f"within {self.watch.timeout_s:g} s"
        servers_from = board.servers_from
        message = f"{name_ranks(absent, '', servers_from)} did not come to" if absent else "nobody came to"
        message += f" {self.wait.place} {limit}"
        if stopped:
            verb = "is" if len(stopped) == 1 else "are"
            message += f"; {name_ranks(stopped, '', servers_from)} {verb} stopped (SIGSTOP)"
        return f"{message}; {board.where_all_are()}. If it is only slow, give spawn a larger timeout_s"


def is_stopped(pid: int) -> bool:
    """Whether process ``pid`` is in state T: stopped by a signal or a debugger (Linux only, else False)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except (OSError, IndexError):
        return False
