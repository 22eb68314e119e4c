"""The parent's part while workers run: read their reports, notice the dead, end the rest, leave nothing.

One loop in the caller's thread waits for every worker's report pipe and sentinel. The first failure is written
to the board, where whoever waits in a collective sees it within 2 ms; the others are ended. Ranks that have
been told get a little time to tidy up in ``except RankFailed``; ranks that compute on are killed.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import signal
import time
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any

from minidp.comm.board import Board
from minidp.comm.errors import CollectiveMismatch, CollectiveTimeout, RankFailed, RankMismatch, RankTimeout
from minidp.launch.logs import RankHandler
from minidp.launch.progress import REFRESH_S, Display
from minidp.launch.worker import LAST

GRACE_S = 0.1  # for a rank that computes on and has not heard of the failure
TIDY_S = 5.0  # for a rank that has been told and may be saving something
_log = logging.getLogger("minidp.launch")


@dataclass
class Worker:
    """One worker as the parent sees it."""

    rank: int
    process: Any
    report: Connection
    log: RankHandler
    lifeline: Connection
    outcome: tuple[str, Any] | None = None
    lost: bool = False  # it has died, and the run goes on
    gone: bool = False
    pieces: list[bytes] = field(default_factory=list)  # of a report that is not complete yet

    def stop(self) -> None:
        """Kill it if it lives."""
        self.lifeline.close()
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.join(2)

    def end(self) -> None:
        """Kill it if it lives; then its pipes close without waiting for anybody."""
        self.stop()
        self.log.close()
        self.report.close()
        with contextlib.suppress(ValueError):
            self.process.close()


def run(workers: list[Worker], board: Board, display: Display, asked: list[bool]) -> list[Any]:
    """Wait until all have returned, and give what they returned, by rank; RankFailed for the first failure.

    Servers return nothing. Of a worker that has died where the others go on it is None.

    Whenever ``asked`` is not empty it says where all are.
    """
    failure: Exception | None = None
    deadline = tidy_deadline = float("inf")
    while not all(worker.gone or (worker.outcome and failure is None) for worker in workers):
        _read(workers, board, display)
        if asked:
            asked.clear()
            display.write(f"minidp: {board.where_all_are()}\n", "stderr")
        display.refresh()
        if failure is None:
            failure = _first_failure(workers, board)
            if failure is not None:
                deadline, tidy_deadline = time.monotonic() + GRACE_S, time.monotonic() + TIDY_S
        else:
            now = time.monotonic()
            patient = any(board.noticed(worker.rank) for worker in workers if not worker.gone)
            if now > (tidy_deadline if patient else deadline):
                break
    if failure is not None:
        for worker in workers:
            worker.stop()
        for worker in workers:
            _drain(worker, display, to_the_end=True)  # what the others had said before the news
        raise failure
    return [None if worker.lost else _returned(worker) for worker in workers if worker.rank < board.servers_from]


def _returned(worker: Worker) -> Any:
    assert worker.outcome is not None
    try:
        return pickle.loads(worker.outcome[1])
    except Exception as error:
        raise TypeError(f"what rank {worker.rank} returned can't be unpickled here: {error!r}") from error


def _read(workers: list[Worker], board: Board, display: Display) -> None:
    """Handle whatever has come within a tenth of a second."""
    by_handle: dict[Any, Worker] = {}
    for worker in workers:
        if not worker.gone:
            by_handle[worker.process.sentinel] = worker
            by_handle[worker.report] = worker
    for handle in connection.wait(list(by_handle), timeout=min(REFRESH_S, GRACE_S / 4)):
        worker = by_handle[handle]
        if not worker.gone:
            ended = handle is not worker.report
            _drain(worker, display, to_the_end=ended)
            worker.gone = worker.gone or ended


def _drain(worker: Worker, display: Display, to_the_end: bool) -> None:
    """Read reports that are there; all of them if the worker has ended."""
    try:
        while worker.report.poll(0):
            piece = worker.report.recv_bytes()
            worker.pieces.append(piece[1:])
            if piece[:1] != LAST:
                continue
            kind, _, data = b"".join(worker.pieces).partition(b"\0")
            worker.pieces.clear()
            if kind in (b"stdout", b"stderr"):
                display.write(pickle.loads(data), kind.decode())
            else:
                worker.outcome = kind.decode(), data
            if not to_the_end:
                break
    except (EOFError, OSError):
        if worker.outcome is None and not to_the_end:
            worker.process.join(1)  # its pipe is closed: its end is a matter of microseconds
        worker.gone = True


def _first_failure(workers: list[Worker], board: Board) -> Exception | None:
    for worker in workers:
        failure = None if worker.lost else _failure(worker, board)
        if failure is not None and worker.outcome is None and _can_be_spared(worker, workers, board):
            worker.lost = True
            board.lose(worker.rank, str(failure))
            _log.warning("%s; the others go on without it", failure)
        elif failure is not None:
            board.abort(worker.rank, str(failure))
            return failure
    return None


def _can_be_spared(worker: Worker, workers: list[Worker], board: Board) -> bool:
    """Whether the run goes on although this worker has died: if it said so, and is not the last."""
    others = [each for each in workers if each is not worker and each.rank < board.servers_from]
    alive = any(not each.lost and (each.outcome is not None or not each.gone) for each in others)
    return alive and board.is_expendable(worker.rank)


def _failure(worker: Worker, board: Board) -> Exception | None:
    """What went wrong with this worker, as the exception that the parent raises, or None."""
    who = board.name_of_all(worker.rank)
    if worker.outcome is not None and worker.outcome[0] == "raised":
        what, trace, data = pickle.loads(worker.outcome[1])
        cause = None
        with contextlib.suppress(Exception):  # a class that only the worker knows: the traceback tells all
            cause = pickle.loads(data)
        return failure_of(worker.rank, who, what, trace, cause)
    if worker.gone and worker.outcome is None:
        ended = f"{who} {_how_it_ended(worker.process.exitcode)}"
        return RankFailed(ended + _what_is_lost(worker.rank, board), worker.rank)
    return None


def _what_is_lost(rank: int, board: Board) -> str:
    """Of a server: what it alone has had."""
    updates, _, note = board.progress_of(rank)
    if rank < board.servers_from or not note:
        return ""
    held = note.removeprefix("holds ")
    return f"; lost with it, after {updates} updates: {held}, and the optimizer's state of them"


def failure_of(rank: int, who: str, what: str, trace: str, cause: BaseException | None) -> RankFailed:
    """What ``spawn`` raises where a rank, called ``who``, has raised ``what``, with its traceback as a note."""
    failed = _class_for(cause)(f"{who} raised {what}", rank)
    failed.add_note(f"\nTraceback of {who.partition(' of ')[0]}:\n{trace}")
    failed.__cause__ = cause
    return failed


def _class_for(cause: BaseException | None) -> type[RankFailed]:
    """RankFailed; for disagreement and absence one that can be caught as that error too."""
    if isinstance(cause, CollectiveMismatch):
        return RankMismatch
    return RankTimeout if isinstance(cause, CollectiveTimeout) else RankFailed


def _how_it_ended(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"was killed by {name}{hint}"
        return f"was killed by signal {-exitcode}"
    if exitcode == 255:  # what multiprocessing says when the server can't be asked any more
        return "ended with the process that workers are forked from: somebody killed that"
    return f"exited with code {exitcode} without a word: a library or os._exit ended it"
