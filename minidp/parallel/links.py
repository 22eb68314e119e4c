"""A worker's links to the servers: each operation asks all servers at once, then takes their answers."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import cloudpickle
import numpy as np

from minidp.comm.endpoint import Endpoint
from minidp.compress import Compressor
from minidp.nn import Layout
from minidp.nn.layout import ALIGNMENT_BYTES
from minidp.parallel.parcels import Parcel, parts_of
from minidp.parallel.session import Opening
from minidp.parallel.slabs import Flat
from minidp.parallel.wire import REQUEST, Mail, Op, Reply, Request, Status, begin


def server_slices(size: int, itemsize: int, servers: int) -> list[tuple[int, int]]:
    """Cut ``size`` elements into contiguous slices, one a server: whole cache lines, their numbers equal to 1."""
    line = ALIGNMENT_BYTES // itemsize
    lines = -(-size // line)
    edges = [min(size, line * (lines * j // servers)) for j in range(servers + 1)]
    return list(pairwise(edges))


def say_goodbye(endpoint: Endpoint) -> None:
    """This worker has returned: no server is to wait for it."""
    for server in endpoint.servers:
        for work in begin(endpoint.comm, server, REQUEST, Request(Op.GOODBYE, -1)):
            work.wait()


class Links:
    """The servers of a session, from one of its workers.

    Workers begin with different servers: if all sent to the first one first, the others' links would be idle.

    Args:
        turn: the server that this worker begins with.
        push, pull: how gradients, and changes of w, travel; None: as they are.

    Attributes:
        slices: (lo, hi) of the flat parameters, of each server.
        digest: of the layout; it goes with every push.
        bytes_sent, bytes_received: of gradients and parameters, until now.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        session: int,
        layout: Layout,
        turn: int,
        push: Compressor | None = None,
        pull: Compressor | None = None,
    ) -> None:
        self._comm, self._servers, self._session = endpoint.comm, list(endpoint.servers), session
        self._turn = turn
        self._dtype = layout.dtype
        self.slices = server_slices(layout.size, layout.itemsize, len(self._servers))
        parts = [parts_of(layout, j, *bounds) for j, bounds in enumerate(self.slices)]
        self.push = None if push is None else [Parcel(push, each, layout.dtype) for each in parts]
        self.pull = None if pull is None else [Parcel(pull, each, layout.dtype) for each in parts]
        self.bytes_sent = self.bytes_received = 0
        self.digest = int.from_bytes(blake2b(repr(layout.describe()).encode(), digest_size=7).digest())
        self._mail = Mail(self._comm)

    def open(self, openings: Sequence[Opening], w: Flat) -> None:
        """Begin the session: one worker, for all."""
        data = [np.frombuffer(cloudpickle.dumps(opening), np.uint8) for opening in openings]
        self._ask(
            [Request(Op.OPEN, self._session, size=len(each)) for each in data],
            [[each, w[lo:hi]] for each, (lo, hi) in zip(data, self.slices)],
        )
        self._answers()

    def exchange(self, request: Request, gradient: Flat | None, w: Flat) -> list[Reply]:
        """Push ``gradient`` (None: without samples there is none) and receive into ``w``, where w is answered."""
        return self._exchange(request, gradient, w, slice(None))

    def exchange_in_turn(self, request: Request, gradient: Flat | None, w: Flat) -> list[Reply]:
        """The same, but the first server's answer tells the others whether this gradient is in time."""
        (first,) = replies = self._exchange(request, gradient, w, slice(0, 1))
        if first.status == Status.DONE:
            request = request._replace(round=first.version - 1, members=first.members)
        elif first.status == Status.LATE:
            request, gradient = request._replace(round=first.version, samples=0), None
        else:
            return replies  # there is no round
        return replies + self._exchange(request, gradient, w, slice(1, None))

    def _exchange(self, request: Request, gradient: Flat | None, w: Flat, which: slice) -> list[Reply]:
        requests, contents = [], []
        for j, (lo, hi) in list(enumerate(self.slices))[which]:
            content = None
            if gradient is not None:
                content = gradient[lo:hi] if self.push is None else self.push[j].pack(gradient[lo:hi])
                self.bytes_sent += content.nbytes
            size = 0 if content is None else len(content)
            requests.append(request._replace(session=self._session, size=size, digest=self.digest))
            contents.append([] if content is None else [content])
        self._ask(requests, contents, which)
        return self._answers(w, which)

    def gather(self, value: Any, w: Flat | None = None) -> list[tuple[int, Any]]:
        """(worker, its value) of all workers that live and have not returned. Collective among these.

        With ``w`` the servers' parameters are received there: the same on all.
        """
        data = np.frombuffer(pickle.dumps(value), np.uint8)
        contents = [[data], *[[] for _ in self._servers[1:]]]  # the first server hands it on, all wait
        with_w = int(w is not None)
        self._ask([self._request(Op.GATHER, with_w, sum(map(len, each))) for each in contents], contents)
        everybody: list[tuple[int, bytes]] = []
        for server, (lo, hi) in zip(self._servers, self.slices):
            size = self._mail.reply(server).size
            if size:
                everybody = pickle.loads(self._mail.contents(server, size).tobytes())
            if w is not None and hi > lo:
                self._mail.content(server, w[lo:hi])
        return [(worker, pickle.loads(theirs)) for worker, theirs in everybody]

    def put(self, w: Flat, state: Mapping[str, Flat] | None, updates: int | None) -> None:
        """Replace the servers' parameters; state and number of updates unless None. Nobody pushes meanwhile."""
        slots = list((state or {}).values())
        self._ask(
            [
                self._request(Op.PUT, len(slots), size=hi - lo, element=-1 if updates is None else updates)
                for lo, hi in self.slices
            ],
            [[flat[lo:hi] for flat in (w, *slots)] for lo, hi in self.slices],
        )
        self._answers()

    def state(self, slots: Sequence[str]) -> dict[str, Flat]:
        """The optimizer's state, flat, by slot."""
        size = self.slices[-1][1]
        flats = {slot: np.zeros(size, self._dtype) for slot in slots}
        self._ask_all(Op.STATE)
        for server, (lo, hi) in zip(self._servers, self.slices):
            if self._mail.reply(server).size:
                for flat in flats.values():
                    self._mail.content(server, flat[lo:hi])
        return flats

    def info(self) -> list[list[int]]:
        """See `Session.info`, of each server."""
        self._ask_all(Op.INFO)
        return [
            self._mail.contents(server, self._mail.reply(server).size, np.int64).tolist()
            for server in self._servers
        ]

    def close(self) -> None:
        """This worker is not part of the session any more."""
        self._ask_all(Op.CLOSE)

    def _request(self, op: Op, samples: int = 0, size: int = 0, element: int = -1) -> Request:
        return Request(op, self._session, samples, size, element)

    def _ask_all(self, op: Op) -> None:
        self._ask([self._request(op)] * len(self._servers), [[]] * len(self._servers))

    def _ask(
        self, requests: Sequence[Request], contents: Sequence[Sequence[Any]], which: slice = slice(None)
    ) -> None:
        asked = list(zip(self._servers[which], requests, contents))
        works = [
            work
            for server, request, arrays in asked[self._turn :] + asked[: self._turn]
            for work in begin(self._comm, server, REQUEST, request, *(a for a in arrays if len(a)))
        ]
        for work in works:
            work.wait()

    def _answers(self, w: Flat | None = None, which: slice = slice(None)) -> list[Reply]:
        """Every server's reply, with its slice of ``w`` if that comes too."""
        replies = []
        for j, (lo, hi) in list(enumerate(self.slices))[which]:
            reply = self._mail.reply(self._servers[j])
            if reply.size and w is not None:
                self._receive(j, reply.size, w[lo:hi])
            replies.append(reply)
        return replies

    def _receive(self, j: int, size: int, w: Flat) -> None:
        """Server j's slice of w, or by how much it has changed."""
        if self.pull is None:
            self.bytes_received += self._mail.content(self._servers[j], w).nbytes
            return
        packed = self._mail.contents(self._servers[j], size)
        self.bytes_received += packed.nbytes
        w += self.pull[j].unpack(packed, np.empty_like(w))
