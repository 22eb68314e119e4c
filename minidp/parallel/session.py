"""One strategy as one server sees it: its slice of w, its workers' clocks, and what each request does to them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from minidp.parallel.clocks import Clocks
from minidp.parallel.parcels import Parcel
from minidp.parallel.served import Rule, ServedSlice
from minidp.parallel.slabs import Flat, private
from minidp.parallel.wire import Reply, Request, Status

Answer = Callable[..., None]
"""``answer(worker, reply, *arrays)``: arrays stay as they are until the worker's next request."""


@dataclass(frozen=True)
class Opening:
    """What a server must know of a strategy.

    Attributes:
        workers: their ranks among the endpoints, in order of their rank in the strategy's communicator.
        lo, hi: the server's slice of the flat parameters; ``runs``: (lo, hi, group) within it.
        dtype: of the parameters; ``digest``: of their layout.
        rule: how gradients are applied.
        staleness: 0, s or None; ``backups``: how many workers' gradients a step can do without.
        nominal_batch: n̄, if it was given.
        turn: the worker that is answered first, where all are: each server begins with another.
        follows: whether another server tells who is in time (`followers.py`).
        holds: in words, what is in the slice.
        push, pull: how gradients, and changes of w, are packed; None: they are not.
        shares: whether gradients have been divided by Σ n_i already.
    """

    workers: tuple[int, ...]
    lo: int
    hi: int
    runs: tuple[tuple[int, int, int], ...]
    dtype: np.dtype[Any]
    digest: int
    rule: Rule
    staleness: int | None
    backups: int
    nominal_batch: Any = None
    turn: int = 0
    follows: bool = False
    holds: str = ""
    push: Parcel | None = None
    shares: bool = False
    pull: Parcel | None = None


class Session:
    """The state machine of a session: each method is a request that has come, or a worker's leaving.

    With staleness 0 the gradients of a round, one of each worker (of all but ``backups``), make one update
    together; otherwise each makes one by itself when it comes.
    """

    def __init__(self, opening: Opening, answer: Answer) -> None:
        self.opening, self._answer = opening, answer
        workers = len(opening.workers)
        self.rounds = opening.staleness == 0
        self._died: set[int] = set()
        keeps = not self.rounds or opening.backups > 0 or opening.pull is not None
        self.slice = ServedSlice(opening.lo, opening.hi, opening.runs, opening.dtype, opening.rule, workers, keeps)
        self.clocks = Clocks(workers, opening.staleness)
        self.staleness_sum = self.applied = 0
        size = opening.hi - opening.lo
        self._inbox = [private(size, opening.dtype) for _ in range(workers if self.rounds else 1)]
        self._round: dict[int, Request] = {}
        self._pending: dict[int, Reply] = {}  # what waiting workers will be told
        self._gathered: dict[int, bytes] = {}
        self._with_w = False
        self._first: dict[int, int] = {}  # each worker's first batch
        # Alike for all: where all are given the same w, they are given the same bits.
        self._pull = None if opening.pull is None else [deepcopy(opening.pull) for _ in opening.workers]
        self._votes = opening.rule.votes

    def inbox(self, worker: int) -> Flat:
        """Where the gradient of ``worker`` is to be received."""
        return self._inbox[worker if self.rounds else 0]

    def unpack(self, worker: int, data: Flat) -> None:
        """A parcel with the gradient of ``worker`` into its inbox."""
        assert self.opening.push is not None
        self.opening.push.unpack(data, self.inbox(worker))

    # -- requests ----------------------------------------------------------------------------------------

    def push(self, worker: int, request: Request) -> None:
        """A gradient lies in the inbox (none if there were no samples)."""
        if not self.rounds:
            self._apply(worker, request)
        elif self.slice.pulled[worker] != self.slice.version and self.opening.backups:
            self._tell(worker, Reply(Status.LATE, size=1))
        else:
            if not request.samples:
                self.inbox(worker)[...] = 0
            self._round[worker] = request
            self._close_round()

    def _apply(self, worker: int, request: Request) -> None:
        """One update a push: w ← rule(w, n_i ∇L_i / n̄)."""
        late = -1
        if request.samples:
            late = self.slice.staleness(worker)
            nominal = 1 if self._votes else self._nominal_batch(worker, request.samples)
            self.slice.update([self.inbox(worker)], nominal, worker)
            self._count(late)
        self._pending[worker] = Reply(Status.DONE, staleness=late, size=1)
        self.clocks.push(worker)
        self._let_go()

    def _close_round(self) -> None:
        """One update a round, when all needed are there: w ← rule(w, Σ n_i ∇L_i / Σ n_i), in order of rank."""
        backups, present, everybody = self.opening.backups, self.clocks.present, len(self.opening.workers)
        if len(self._died) > backups:
            self._refuse(Reply(Status.DIED, worker=min(self._died)))
        elif not backups and len(present) < everybody:
            self._refuse(Reply(Status.LEFT, worker=min(set(range(everybody)) - set(present))))
        needed = everybody
        if backups:
            # Late workers are as many steps behind as they were late. When the others have made all of theirs, and
            # wait for all or have returned, the late ones make up a round by themselves.
            coming = {worker for worker in present if worker not in self._gathered} | self._round.keys()
            needed = min(everybody - backups, len(coming))
        if not self._round or len(self._round) < needed:
            return
        came = dict(self._round)
        self._round.clear()
        self._update(came)

    def _update(self, pushed: dict[int, Request]) -> None:
        """Make a round of these pushes, and answer."""
        came, total = sorted(pushed), sum(request.samples for request in pushed.values())
        bad = min(((pushed[w].element, w) for w in came if pushed[w].element >= 0), default=None)
        if bad is None:
            if total:
                self.slice.update(
                    [self.inbox(worker) for worker in came], 1 if self._votes or self.opening.shares else total
                )
                self._count(0)
            else:
                self.slice.skip()
            members = sum(1 << worker for worker in came) if self.opening.backups else 0
            reply = Reply(Status.DONE, staleness=0 if total else -1, size=1, members=members)
        else:
            reply = Reply(Status.NOT_FINITE, element=bad[0], worker=bad[1], value=pushed[bad[1]].value)
        everybody, turn = len(self.opening.workers), self.opening.turn
        for worker in sorted(came, key=lambda worker: (worker - turn) % everybody):
            self._tell(worker, reply)

    def _count(self, staleness: int) -> None:
        self.staleness_sum += staleness
        self.applied += 1

    def _nominal_batch(self, worker: int, samples: int) -> Any:
        """n̄: unless it was given, the mean of the first batches of all workers that have pushed so far."""
        if self.opening.nominal_batch is not None:
            return self.opening.nominal_batch
        self._first.setdefault(worker, samples)
        mean = Fraction(sum(self._first.values()), len(self._first))
        if mean.denominator == 1:
            return int(mean)
        return mean if self.opening.dtype.hasobject else float(mean)

    def gather(self, worker: int, data: bytes, with_w: bool) -> None:
        """``worker`` waits for all others, and holds nobody back meanwhile. It brings something."""
        self._gathered[worker] = data
        self._with_w = with_w
        self.clocks.park(worker)
        self._somebody_else()

    def put(self, worker: int, w: Flat, state: dict[str, Flat] | None, updates: int | None) -> None:
        self.slice.put(w, state, updates)
        self._pull_anew()
        self._answer(worker, Reply(Status.DONE))

    def state(self, worker: int) -> None:
        slots = [array.copy() for array in self.slice.state.values()]  # others may push while these are read
        size = len(self.slice.w) * len(slots)
        self._answer(worker, Reply(Status.DONE, self.slice.version, size=size), *slots)

    def info(self, worker: int) -> None:
        """pid, updates, gradients applied, Σ τ of them; then of each worker the version that it has."""
        numbers = [os.getpid(), self.slice.version, self.applied, self.staleness_sum, *self.slice.pulled]
        self._answer(worker, Reply(Status.DONE, size=len(numbers)), np.array(numbers, np.int64))

    def leave(self, worker: int, died: bool) -> None:
        """``worker`` has died, or has returned or closed its part of the session. What it has pushed counts."""
        self.clocks.leave(worker)
        self._gathered.pop(worker, None)
        if died:
            self._died.add(worker)
        self._somebody_else()

    def _somebody_else(self) -> None:
        """Others may go on, now that one is not waited for any more."""
        self._let_go()
        if self.rounds:
            self._close_round()
        self._close_gathering()

    def _refuse(self, reply: Reply) -> None:
        """There will be no round."""
        for worker in self._round:
            self._answer(worker, reply)
        self._round.clear()

    # -- answers -----------------------------------------------------------------------------------------

    def _tell(self, worker: int, reply: Reply) -> None:
        """Answer; ``size`` not 0 means: with w."""
        if not reply.size:
            self._answer(worker, reply._replace(version=self.slice.version))
            return
        if self._pull is None:
            content = self.slice.give(worker)
        else:
            content = self.slice.give_change(worker, self._pull[worker])
        self._answer(worker, reply._replace(version=self.slice.version, size=len(content)), content)

    def _pull_anew(self) -> None:
        """All have the whole w, as when a checkpoint is saved or loaded: what is random begins anew, too."""
        for parcel in self._pull or ():
            parcel.compressor.load_state_dict({})

    def _let_go(self) -> None:
        for worker in self.clocks.let_go():
            self._tell(worker, self._pending.pop(worker))

    def _close_gathering(self) -> None:
        """Answer when all are there: with the same w to all, for nobody pushes before he is answered."""
        if not self._gathered or not self._gathered.keys() >= set(self.clocks.present):
            return
        everybody = sorted(self._gathered.items())
        data = pickle.dumps(everybody) if any(self._gathered.values()) else b""
        self._gathered.clear()
        self.clocks.come_back()
        if self._with_w:
            self._pull_anew()
        for worker, _ in everybody:
            arrays = [np.frombuffer(data, np.uint8), *([self.slice.give(worker)] if self._with_w else [])]
            self._answer(worker, Reply(Status.DONE, self.slice.version, size=len(data)), *arrays)
