"""What tests of parameter servers share: models whose w can be foretold, and a server without messages."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

import numpy as np

import minidp
from minidp import nn, optim
from minidp.autograd import Tensor
from minidp.parallel.clocks import Clocks
from minidp.parallel.served import Rule
from minidp.parallel.session import Opening, Session
from minidp.parallel.wire import Op, Reply, Request, Status


def decayed(update: int) -> float:
    return 0.1 / (1 + update)


def served(function: Any, workers: int, servers: int, *args: Any, world: str = "virtual", **options: Any) -> Any:
    """What each worker returned; one BLAS thread each, no progress."""
    options = {"progress": False, "blas_threads": 1, **options}
    return minidp.spawn(function, workers, *args, servers=servers, world=world, **options)


class Pot(nn.Module):
    """w alone. Its forward is ½ Σ λ w², or Σ λ w if it is ``flat``: the gradient is λ w, or λ whatever w is.

    The input's length is the number of samples; its values do not matter.
    """

    def __init__(self, w: Any, slope: Any = 1, flat: bool = False) -> None:
        self.w = nn.Parameter(np.asarray(w))
        self.slope, self.flat = np.asarray(slope, self.w.dtype), flat

    def forward(self, x: Any) -> Tensor:
        slope = Tensor(self.slope)
        if self.flat:
            return (self.w * slope).sum()
        half = Fraction(1, 2) if self.w.dtype == object else 0.5
        return (self.w * self.w * slope).sum() * half

    def step(self, strategy: Any, samples: int = 1) -> None:
        """One step of the strategy that trains it."""
        strategy.backward(self(None), samples=samples)
        strategy.step()


def counter(size: int) -> Pot:
    """With SGD of η = 1 each push moves all of w by −1 for each sample, exactly: −w counts what was applied."""
    return Pot(np.zeros(size), flat=True)


def exact(values: Any) -> np.ndarray:
    """As Fractions."""
    values = np.asarray(values, object)
    return np.array([Fraction(v) for v in values.ravel()] + [None], object)[:-1].reshape(values.shape)


class Desk:
    """A server's session without a server: pushes by hand; ``answers`` has what each worker was told last."""

    def __init__(self, w: Any, workers: int, rule: optim.Optimizer | Rule | None = None, **opening: Any) -> None:
        w = np.asarray(w)
        self.answers: dict[int, tuple[Reply, list[Any]]] = {}
        """What was answered and is not taken yet."""
        optimizer = optim.SGD([nn.Parameter(np.zeros(1))], lr=1).without_parameters()
        rule = rule if isinstance(rule, Rule) else Rule(rule or optimizer)
        facts = {"staleness": None, "backups": 0, "nominal_batch": 1} | opening
        self.session = Session(
            Opening(tuple(range(workers)), 0, len(w), ((0, len(w), 0),), w.dtype, 0, rule, **facts), self._answer
        )
        self.session.slice.put(w, None, None)

    def _answer(self, worker: int, reply: Reply, *arrays: Any) -> None:
        assert worker not in self.answers, "a worker has one request open at most, and is answered once"
        self.answers[worker] = reply, [np.array(array) for array in arrays]

    def push(self, worker: int, gradient: Any, samples: int = 1, **request: Any) -> None:
        """Push n_i ∇L_i."""
        if samples:
            self.session.inbox(worker)[...] = gradient
        self.session.push(worker, Request(Op.PUSH, 0, samples, size=len(self.w) if samples else 0, **request))

    def take(self, worker: int) -> tuple[Reply, list[Any]]:
        """What ``worker`` was told; it goes on now."""
        return self.answers.pop(worker)

    @property
    def w(self) -> Any:
        return self.session.slice.w


def unit(size: int, *places: int) -> np.ndarray:
    """−1 at ``places``: with η = 1 an update by it leaves a mark there."""
    gradient = np.zeros(size)
    gradient[list(places)] = -1
    return gradient


def merged(trajectories: Sequence[Sequence[Any]]) -> list[Any]:
    """What workers saw who took turns: one thing of each, again and again."""
    return [seen for turn in zip(*trajectories, strict=True) for seen in turn]


# -- every schedule ------------------------------------------------------------------------------------------

CLOCKS = 3
"""Steps of each worker, where all schedules are gone through."""


class Race:
    """Workers and their `Clocks`, in one of all the states that they can come to."""

    def __init__(self, workers: int, staleness: int | None) -> None:
        self.clocks, self.s = Clocks(workers, staleness), staleness
        self.does = ["runs"] * workers

    @property
    def state(self) -> tuple[Any, ...]:
        return tuple(self.clocks.clocks), tuple(self.does), frozenset(self.clocks._apart)

    def moves(self, leave: bool, park: bool) -> list[tuple[str, int]]:
        workers = range(len(self.does))
        running = [w for w in workers if self.does[w] == "runs"]
        found = [("push", w) for w in running if self.clocks.clocks[w] < CLOCKS]
        found += [("park", w) for w in running if park]
        return found + [("leave", w) for w in workers if leave and self.does[w] != "left"]

    def after(self, what: str, worker: int) -> Race:
        race = deepcopy(self)
        getattr(race.clocks, what)(worker)
        race.does[worker] = {"push": "waits", "park": "parked", "leave": "left"}[what]
        free = race.clocks.let_go()
        assert free == sorted(free), "in order"
        for w in free:
            assert race.does[w] == "waits", "only who waits can be let go"
            race.does[w] = "runs"
        if not {"runs", "waits"} & set(race.does):  # all that are left are there: the collective is over
            race.does = ["runs" if does == "parked" else does for does in race.does]
            race.clocks.come_back()
        return race

    def check(self) -> None:
        clocks = self.clocks.clocks
        running = [w for w, does in enumerate(self.does) if does == "runs"]
        for w, does in enumerate(self.does):
            if does == "waits":
                slower = [v for v in running if self.s is not None and clocks[v] < clocks[w] - self.s]
                assert slower, f"{w} waits for nobody: {self.state}"


def races(workers: int, staleness: int | None, **moves: bool) -> list[Race]:
    """All states, each checked: those who wait do it for somebody who runs, so there is no deadlock."""
    start = Race(workers, staleness)
    found, frontier = {start.state: start}, [start]
    while frontier:
        race = frontier.pop()
        race.check()
        for move in race.moves(**moves):
            then = race.after(*move)
            if then.state not in found:
                found[then.state] = then
                frontier.append(then)
    return list(found.values())


class Schedule:
    """One order of events so far, on a real session. Push t of worker i leaves its mark in element 3 i + t."""

    def __init__(self, workers: int, s: int | None) -> None:
        self.s, self.desk = s, Desk(np.zeros(workers * CLOCKS), workers, staleness=s)
        self.does, self.clocks = ["runs"] * workers, [0] * workers
        self.gathered = [False] * workers
        self.apart: set[int] = set()  # gather, and are not waited for
        self.beside = 0  # Σ over updates of the gradients in flight besides the applied one

    @property
    def session(self) -> Session:
        return self.desk.session

    @property
    def state(self) -> tuple[Any, ...]:
        given = b"".join(g.tobytes() for g in self.session.slice.given)
        lateness = tuple(self.session.slice.pulled), self.session.staleness_sum
        who = tuple(self.does), tuple(self.clocks), tuple(self.gathered), frozenset(self.apart)
        return *who, self.desk.w.tobytes(), given, lateness

    def moves(self, others: bool) -> list[tuple[str, int]]:
        workers = range(len(self.does))
        running = [w for w in workers if self.does[w] == "runs"]
        found = [("push", w) for w in running if self.clocks[w] < CLOCKS]
        found += [("gather", w) for w in running if others and not self.gathered[w]]
        return found + [("leave", w) for w in workers if others and self.does[w] != "left"]

    def do(self, what: str, worker: int) -> None:
        before = self.desk.w.copy()
        if what == "push":
            place = worker * CLOCKS + self.clocks[worker]
            self.clocks[worker] += 1
            self.does[worker] = "waits"
            self.beside += self.does.count("runs")
            self.desk.push(worker, unit(len(before), place))
            if self.s != 0:
                assert np.flatnonzero(self.desk.w != before).tolist() == [place], "one update a push, at once"
        elif what == "gather":
            self.does[worker], self.gathered[worker] = "gathers", True
            self.apart.add(worker)
            self.session.gather(worker, b"%d" % worker, False)
        else:
            self.does[worker] = "left"
            self.session.leave(worker, died=False)
        over = not {"runs", "waits"} & set(self.does)
        if over:
            self.apart.clear()
        for w in sorted(self.desk.answers):
            reply, arrays = self.desk.take(w)
            if self.does[w] == "waits":
                self.goes_on(w, reply, arrays[0])
            else:
                assert over, "all present gather, or nobody is answered"
                assert self.does[w] == "gathers"
                self.does[w] = "runs"
        assert not over or "gathers" not in self.does, "those who gather wait for nobody else"

    def goes_on(self, worker: int, reply: Any, w: np.ndarray) -> None:
        """``worker`` starts its step c: what does it see?"""
        c, marks = self.clocks[worker], (w > 0).reshape(-1, CLOCKS)
        assert reply.status == Status.DONE
        assert w.tobytes() == self.desk.w.tobytes(), "all that has come"
        assert marks[worker, :c].all(), "its own"
        if self.s is not None:
            present = {other for other, does in enumerate(self.does) if does != "left"} - self.apart
            for other in present if c > self.s else ():
                assert marks[other, : c - self.s].all(), f"timestamps up to c − s − 1 = {c - self.s - 1}"
        self.does[worker] = "runs"

    def check(self) -> None:
        running = [w for w, does in enumerate(self.does) if does == "runs"]
        for w, does in enumerate(self.does):
            slower = [v for v in running if self.s is not None and self.clocks[v] < self.clocks[w] - self.s]
            assert does != "waits" or slower, "who waits, waits for somebody who computes"
        if self.s != 0 and not any(self.gathered) and "left" not in self.does:
            ages = sum(self.session.slice.staleness(w) for w in running)
            assert self.session.staleness_sum + ages == self.beside, "conservation of staleness"


def schedules(workers: int, s: int | None, others: bool) -> list[Schedule]:
    start = Schedule(workers, s)
    found, frontier = {start.state: start}, [start]
    while frontier:
        schedule = frontier.pop()
        schedule.check()
        for move in schedule.moves(others):
            then = deepcopy(schedule)
            then.do(*move)
            if then.state not in found:
                found[then.state] = then
                frontier.append(then)
    return list(found.values())
