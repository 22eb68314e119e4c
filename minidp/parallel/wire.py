"""What workers and servers say to each other: a header of 80 bytes, then perhaps an array. Nothing else travels.

    worker → server    Request, then an array of ``size`` elements if it is not 0
    server → worker    Reply, then an array of ``size`` elements if it is not 0

A worker has at most one request open with each server. Messages of a pair arrive in order, so a server handles a
worker's requests in the order in which they were made.
"""

from __future__ import annotations

from enum import IntEnum
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from minidp.comm import Communicator, Work

REQUEST, REPLY, CONTENT = 1, 2, 3  # tags
_FORM = Struct("<8q2d")
Header = np.ndarray[Any, np.dtype[np.int64]]


class Op(IntEnum):
    """What a worker asks for."""

    GOODBYE = 0  # its function has returned
    OPEN = 1  # a session; content: its description, then w
    PUSH = 2  # content: n_i ∇L_i of the server's slice; the answer is w, when the rule allows the next step
    GATHER = 3  # it waits for all others; content: bytes; the answer is everybody's, and w if ``samples`` is not 0
    PUT = 4  # content: w, then ``samples`` slots of the optimizer's state; ``element``: updates made, or −1
    STATE = 5  # the optimizer's state
    INFO = 6  # numbers about the server
    CLOSE = 7  # it is not part of the session any more; no answer
    LOST = 8  # never sent: in a log, that the worker has died


class Status(IntEnum):
    """How a request went."""

    DONE = 0
    LATE = 1  # enough others had pushed this step (backup workers): the gradient was dropped
    NOT_FINITE = 2  # nothing was changed; element, worker and value tell where
    LEFT = 3  # a worker that is needed has left; ``worker`` tells which
    FOREIGN = 4  # the session is of another model
    DIED = 5  # more workers have died than the session can do without; ``worker`` is one


class Request(NamedTuple):
    """From a worker. ``digest`` is that of the model's layout, ``loss`` the mean over ``samples``.

    ``round`` and ``members`` are what the first server has told, for the others (`followers.py`).
    """

    op: int
    session: int
    samples: int = 0
    size: int = 0
    element: int = -1  # of the flat gradient that is not finite, if there is one; ``value`` is what it is
    digest: int = 0
    round: int = 0
    members: int = 0
    loss: float = 0.0
    value: float = 0.0


class Reply(NamedTuple):
    """From a server. ``staleness`` is that of the pushed gradient, −1 if it was not applied; ``members``, as bits,
    whose gradients made this update, where some can be done without."""

    status: int
    version: int = 0
    staleness: int = -1
    size: int = 0
    element: int = -1
    worker: int = -1
    members: int = 0
    spare: int = 0
    value: float = 0.0
    spare_value: float = 0.0


def packed(message: Request | Reply) -> Header:
    return np.frombuffer(_FORM.pack(*message), np.int64)


def begin(comm: Communicator, peer: int, tag: int, message: Request | Reply, *contents: Any) -> list[Work]:
    """Start to send a header and arrays; these must not change before all of it has left."""
    tags = [tag, *[CONTENT] * len(contents)]
    return [comm.send(x, peer, t, async_op=True) for t, x in zip(tags, (packed(message), *contents))]


class Mail:
    """Headers that come in, one buffer for all."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._header = comm, np.empty(_FORM.size // 8, np.int64)

    def request(self, src: int) -> tuple[int, Request]:
        """The next request from ``src`` (or ANY): (its worker, what it says)."""
        src = self._comm.recv(self._header, src, REQUEST)
        return src, Request(*_FORM.unpack(self._header.tobytes()))

    def reply(self, server: int) -> Reply:
        """The answer of ``server``."""
        self._comm.recv(self._header, server, REPLY)
        return Reply(*_FORM.unpack(self._header.tobytes()))

    def content(self, peer: int, out: Any) -> Any:
        """The array that follows a header, into ``out``."""
        self._comm.recv(out, peer, CONTENT)
        return out

    def contents(self, peer: int, size: int, dtype: Any = np.uint8) -> Any:
        """The array that follows a header."""
        return self.content(peer, np.empty(size, dtype))
