"""Run a log again: all workers and servers in one process, each server handling requests in the order of the log.

The virtual world is what they live in, but its clock decides nothing: the log does. Each worker computes what it
computed then, from the same versions of w, so w comes out with the same bits. With another rule on the servers it
comes out otherwise, on the same order of arrivals: what the rule is worth, with chance taken out.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minidp.backend import Device, get_device
from minidp.comm import ANY, CommError, RankFailed
from minidp.comm.endpoint import Endpoint
from minidp.comm.transport import on_device
from minidp.launch.virtual import run
from minidp.parallel import DelayCompensation, serve
from minidp.parallel.event_log import Event, RunLog, digest
from minidp.parallel.links import say_goodbye
from minidp.parallel.served import Rule
from minidp.parallel.session import Opening, Session
from minidp.parallel.wire import Mail, Op, Request

_NEVER = 1_000_000  # a tag that nobody sends: who waits for it stays where it is
_PATIENCE_S = 3600.0


@dataclass(frozen=True)
class Met:
    """A gradient as it met w again: its event in this run, its place among its server's, its 2-norm."""

    event: Event
    number: int
    norm: float


@dataclass
class Rerun:
    """What came of a log that was run again.

    Attributes:
        pushes: the gradients that server 0 was given, in order, with their losses now.
        ends: {(server, session): (version, digest)}, as in the log.
        found: the gradient that ended the run, if one was looked for.
        raised: what workers raised, by rank.
        finished: servers that came to the end of their events.
    """

    pushes: list[Met] = field(default_factory=list)
    ends: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)
    found: Met | None = None
    raised: dict[int, BaseException] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)


class NothingLate(CommError):
    """A rule for late gradients was asked for, where none is."""


class DepartedFromLog(CommError):
    """The program did something else than it had done when it was recorded."""


def rerun(
    log: RunLog,
    revise: Callable[[Rule], Rule] | None = None,
    until: float | None = None,
    device: Device | None = None,
) -> Rerun:
    """Run a log again.

    Args:
        revise: another rule for the servers, made from the one of the run.
        until: stop at the first gradient whose loss is above this, or is not a number.
        device: where the workers' models lie; None: on the device of the run, by its name in the log. On another
            kind of device gradients have other bits.

    Raises DepartedFromLog if the program no longer does what it did: it depends on something besides its data, its
    seeds and what it receives, such as the time; or with another rule it stops at another step.
    """
    outcome = Rerun()
    where = device or get_device(log.facts.get("device", "cpu"))
    where.check()

    def opened(opening: Opening) -> Opening:
        if revise is None:
            return opening
        rule = revise(opening.rule)
        if opening.staleness == 0 and (rule.staleness_aware or rule.correction is not None):
            raise NothingLate("this run was synchronous, so that no gradient was late: lr=η is the rule to try")
        return replace(opening, rule=rule)

    def life(endpoint: Endpoint) -> Any:
        comm = endpoint.worker_group()
        if comm is None:
            server = endpoint.comm.rank - endpoint.workers
            watcher = _Watcher(server, outcome, until)
            serve(endpoint, _AsInLog(log.events[server]), [watcher], opened)
            outcome.finished.add(server)
            return None
        try:
            comm = on_device(comm, where)
            fn, args = pickle.loads(log.function)
            value = fn(comm, *args)
        except CommError:
            raise  # of a world that ends
        except Exception as error:  # as it did then: the servers go on to the end of their logs
            outcome.raised[comm.rank] = error
            endpoint.comm.recv(np.empty(0), ANY, _NEVER)
        say_goodbye(endpoint)
        return value

    with _search_path(log.facts.get("search", [])):
        try:
            run(log.function, log.workers, None, _PATIENCE_S, log.servers, life, where)
        except RankFailed as failed:
            departed = failed.__cause__
            if isinstance(departed, DepartedFromLog | NothingLate):
                raise departed from None
            # Where the run did not end well, workers are left waiting when the servers have come to the end; and
            # servers are, where a worker has raised what it did not raise then.
            if outcome.found is None and len(outcome.finished) < log.servers and not outcome.raised:
                raise
    return outcome


def revised(what: str) -> Callable[[Rule], Rule]:
    """The change that ``--what-if`` names: ``dc-asgd``, ``dc-asgd=λ``, ``staleness-aware`` or ``lr=η``.

    ValueError for what it can't be.
    """
    name, _, text = what.partition("=")
    try:
        number = float(text) if text else None
    except ValueError:
        raise ValueError(f"{what!r}: after the = comes a number") from None
    if name == "dc-asgd":
        correction = DelayCompensation(0.04 if number is None else number)
        return lambda rule: replace(rule, correction=correction)
    if name == "staleness-aware" and not text:
        return lambda rule: replace(rule, staleness_aware=True)
    if name == "lr" and number is not None and 0 <= number < float("inf"):
        return lambda rule: _with_rate(rule, number)
    raise ValueError(f"{what!r}: give dc-asgd, dc-asgd=λ, staleness-aware or lr=η (a number ≥ 0)")


def _with_rate(rule: Rule, lr: float) -> Rule:
    for group in rule.optimizer.groups:
        group["lr"] = lr
    return rule


class _AsInLog:
    """Requests in the order of the log: `Arrivals` of `serve`."""

    def __init__(self, events: list[Event]) -> None:
        self._events = iter(enumerate(events))

    def next(self, mail: Mail) -> tuple[int, Request] | None:
        number, event = next(self._events, (0, None))
        if event is None:
            return None
        if event.op == Op.LOST:
            return event.worker, Request(Op.LOST, -1)
        worker, request = mail.request(event.worker)
        if (request.op, request.session) != (event.op, event.session):
            raise DepartedFromLog(
                f"event {number} of server {event.server} was {event.op.name} of rank {worker}, and now it is "
                f"{Op(request.op).name}: the program depends on something besides data, seeds and messages, or "
                "stops at another step than then"
            )
        return worker, request


class _Watcher:
    """Notes each gradient that server 0 is given, and ends the run at the one that is looked for."""

    def __init__(self, server: int, outcome: Rerun, until: float | None) -> None:
        self._server, self._outcome, self._until = server, outcome, until
        self._number = 0

    def handles(self, worker: int, request: Request, session: Session | None) -> None:
        self._number += 1
        if session is None or request.op != Op.PUSH or self._server:
            return
        index = session.opening.workers.index(worker)
        served, gradient = session.slice, session.inbox(index)
        event = Event(
            0,
            Op.PUSH,
            request.session,
            worker,
            served.version,
            served.pulled[index],
            request.samples,
            request.loss,
        )
        norm = float(np.linalg.norm(gradient.astype(float))) / max(1, request.samples)
        met = Met(event, self._number, norm)
        self._outcome.pushes.append(met)
        if self._until is not None and request.samples and not request.loss <= self._until:
            self._outcome.found = met
            raise _Found

    def ended(self, number: int, session: Session) -> None:
        self._outcome.ends[self._server, number] = session.slice.version, digest(session.slice)


class _Found(CommError):
    """What was looked for has come."""


@contextlib.contextmanager
def _search_path(recorded: list[str]) -> Any:
    """Modules are found where they were found when the run was recorded, too."""
    before = list(sys.path)
    sys.path += [place for place in recorded if place not in before]
    try:
        yield
    finally:
        sys.path[:] = before
