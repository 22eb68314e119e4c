"""Log records of all ranks in the parent: multiprocessing-logging, one private pipe a worker.

The library's handler is used as it is, except for the queue that it makes itself: a pipe has no lock, so a
worker that is killed in the middle of a record takes nobody else's records with it, and closing needs no wait.
"""

from __future__ import annotations

import logging
import logging.handlers
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import Connection
from typing import Any

from multiprocessing_logging import MultiProcessingHandler


class _PipeQueue:
    """The part of a queue that the handler calls, over the reading end of a one-way pipe."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, timeout: float) -> logging.LogRecord:
        if not self._connection.poll(timeout):
            raise queue.Empty
        record: logging.LogRecord = self._connection.recv()
        return record

    def qsize(self) -> int:
        return int(self._connection.poll(0))

    def close(self) -> None:
        self._connection.close()

    def join_thread(self) -> None:
        """Nothing to join: a pipe has no feeder."""


class _Relay(logging.Handler):
    """Hands a worker's record to the parent's logger of that name, tagged with the rank, while bars are hidden."""

    def __init__(self, rank: int, name: str, hidden: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.rank, self.who, self.hidden = rank, name, hidden

    def emit(self, record: logging.LogRecord) -> None:
        record.rank = self.rank
        record.msg, record.args = f"[{self.who}] {record.getMessage()}", None
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            with self.hidden():
                logger.handle(record)


class RankHandler(MultiProcessingHandler):  # type: ignore[misc]
    """The parent's end of one worker's log: a thread that receives records until the worker is gone."""

    def __init__(
        self,
        rank: int,
        name: str,
        connection: Connection,
        hidden: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        logging.Handler.__init__(self)
        self.sub_handler = _Relay(rank, name, hidden)
        self.queue = _PipeQueue(connection)
        self._is_closed = False
        self._receive_thread = threading.Thread(target=self._receive, name=f"minidp-log-{rank}", daemon=True)
        self._receive_thread.start()


class _Sender:
    """What the standard library's QueueHandler puts records into."""

    def __init__(self, connection: Connection) -> None:
        self.put_nowait = connection.send


def levels() -> dict[str, int]:
    """Levels that this process has set, by logger name; "" is the root."""
    named = logging.root.manager.loggerDict.items()
    set_here = {name: x.level for name, x in named if isinstance(x, logging.Logger) and x.level}
    return {"": logging.root.level, **set_here}


def send_to(connection: Connection, logger_levels: dict[str, int]) -> None:
    """In a worker: send every record that the parent would log there, and handle none here."""
    sender: Any = _Sender(connection)
    logging.root.handlers[:] = [logging.handlers.QueueHandler(sender)]
    for name, level in logger_levels.items():
        logging.getLogger(name or None).setLevel(level)
