"""A server's life: requests come from all workers, one at a time, until the last worker has left."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable
from textwrap import shorten
from typing import Any, Protocol

import numpy as np

from minidp.comm import ANY, RankLost
from minidp.comm.endpoint import Endpoint
from minidp.parallel.followers import FollowingSession
from minidp.parallel.session import Opening, Session
from minidp.parallel.slabs import Flat
from minidp.parallel.wire import REPLY, Mail, Op, Reply, Request, Status, begin


class Arrivals(Protocol):
    """In which order requests are handled."""

    def next(self, mail: Mail) -> tuple[int, Request] | None:
        """The next request and its worker; op LOST if the worker has died. None: there are no more."""


class Observer(Protocol):
    """Is told of all that a server does."""

    def handles(self, worker: int, request: Request, session: Session | None) -> None:
        """What has come, before it is done."""

    def ended(self, number: int, session: Session) -> None:
        """No worker is left in a session, or it ends with the run."""


class AsTheyCome:
    """The order of arrival."""

    def next(self, mail: Mail) -> tuple[int, Request]:
        try:
            return mail.request(ANY)
        except RankLost as lost:
            return lost.rank, Request(Op.LOST, -1)


def serve(
    endpoint: Endpoint,
    arrivals: Arrivals | None = None,
    observers: Iterable[Observer] = (),
    revise: Callable[[Opening], Opening] | None = None,
) -> None:
    """Serve all ``ParameterServer`` strategies of a run's workers until these have returned or died.

    What ``spawn(..., servers=M)`` runs on each server. A strategy that all its workers have released is forgotten.

    Args:
        arrivals: the order in which requests are handled; default: as they come.
        observers: are told of each.
        revise: changes what strategies ask for, such as their rule.
    """
    _Server(endpoint, arrivals or AsTheyCome(), list(observers), revise or (lambda asked: asked)).run()


class _Server:
    def __init__(
        self,
        endpoint: Endpoint,
        arrivals: Arrivals,
        observers: list[Observer],
        revise: Callable[[Opening], Opening],
    ) -> None:
        self._comm, self._revise = endpoint.comm, revise
        self._arrivals, self._observers = arrivals, observers
        self._mail = Mail(self._comm)
        self._workers = set(range(endpoint.workers))
        self._sessions: dict[int, Session] = {}

    def run(self) -> None:
        while self._workers:
            arrival = self._arrivals.next(self._mail)
            if arrival is None:
                break
            worker, request = arrival
            try:
                content = self._content(worker, request)
            except RankLost:  # in the middle of a message, which is as if it had never begun
                request, content = Request(Op.LOST, -1), None
            for observer in self._observers:
                observer.handles(worker, request, self._sessions.get(request.session))
            self._handle(worker, request, content)
        for number in list(self._sessions):
            self._end(number)

    def _end(self, number: int) -> None:
        session = self._sessions.pop(number)
        for observer in self._observers:
            observer.ended(number, session)

    def _content(self, rank: int, request: Request) -> Any:
        """What comes after the header; a gradient goes straight to its session's inbox."""
        op, size, mail = request.op, request.size, self._mail
        if op == Op.OPEN:
            opening = self._revise(pickle.loads(mail.contents(rank, size).tobytes()))
            w = np.empty(opening.hi - opening.lo, opening.dtype)
            return opening, mail.content(rank, w) if len(w) else w
        if op == Op.GATHER:
            return mail.contents(rank, size).tobytes() if size else b""
        session = self._sessions.get(request.session)
        if session is None or not size:
            return None
        dtype = session.opening.dtype
        if op == Op.PUSH and session.opening.push is not None:
            parcel = mail.contents(rank, size)
            if self._fits(request, session):
                session.unpack(session.opening.workers.index(rank), parcel)
            return None
        if op == Op.PUT:
            return [mail.contents(rank, size, dtype) for _ in range(1 + request.samples)]
        if op == Op.PUSH:
            mine = self._fits(request, session)
            inbox = session.inbox(session.opening.workers.index(rank)) if mine else np.empty(size, dtype)
            mail.content(rank, inbox)
        return None

    @staticmethod
    def _fits(request: Request, session: Session) -> bool:
        whole = session.opening.push is not None or request.size in (0, len(session.slice.w))
        return whole and request.digest == session.opening.digest

    def _handle(self, rank: int, request: Request, content: Any) -> None:
        op = request.op
        if op in (Op.GOODBYE, Op.LOST):
            self._workers.discard(rank)
            for session in self._sessions.values():
                if rank in session.opening.workers:
                    session.leave(session.opening.workers.index(rank), op == Op.LOST)
            return
        if op == Op.OPEN:
            self._open(rank, request, *content)
            return
        session = self._sessions[request.session]
        worker = session.opening.workers.index(rank)
        if op == Op.PUSH:
            if self._fits(request, session):
                session.push(worker, request)
                self._comm.progress(session.slice.version)
            else:
                self._answer(rank, Reply(Status.FOREIGN))
        elif op == Op.GATHER:
            session.gather(worker, content, request.samples > 0)
        elif op == Op.PUT:
            w, *slots = content or [session.slice.w]
            state = dict(zip(session.slice.state, slots)) if slots else None
            session.put(worker, w, state, None if request.element < 0 else request.element)
        elif op == Op.STATE:
            session.state(worker)
        elif op == Op.INFO:
            session.info(worker)
        elif op == Op.CLOSE:
            session.leave(worker, False)
            if not session.clocks.present:
                self._end(request.session)

    def _open(self, rank: int, request: Request, opening: Opening, w: Flat) -> None:
        def answer(worker: int, reply: Reply, *arrays: Any) -> None:
            self._answer(opening.workers[worker], reply, *arrays)

        kind = FollowingSession if opening.follows else Session
        session = self._sessions[request.session] = kind(opening, answer)
        session.slice.put(w, None, None)
        held = "; ".join(each.opening.holds for each in self._sessions.values())
        self._comm.progress(0, note=shorten(f"holds {held}", 180, placeholder=" …"))
        self._answer(rank, Reply(Status.DONE))

    def _answer(self, rank: int, reply: Reply, *arrays: Any) -> None:
        """Begin to answer. A worker that reads slowly, or not at all, keeps nobody waiting."""
        begin(self._comm, rank, REPLY, reply, *(array for array in arrays if len(array)))
