"""Staleness: who may go on when, what w holds then, how late gradients are, and what that does to a training."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from minidp import backend, optim, parallel, sim
from minidp.nn import Parameter
from minidp.parallel.delay import DelayCompensation
from minidp.parallel.served import Rule
from minidp.parallel.wire import Status
from tests.servers import CLOCKS, Desk, Pot, counter, exact, merged, races, schedules, served, unit

pytestmark = pytest.mark.timeout(60)

STALENESS = (0, 1, 2, None)

# -- every schedule of the clocks ----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("s", STALENESS)
def test_running_clocks_differ_by_s_at_most_and_do(s: int | None, workers: int) -> None:
    apart: set[int] = set()
    for race in races(workers, s, leave=False, park=False):
        running = [c for c, does in zip(race.clocks.clocks, race.does) if does == "runs"]
        apart |= {abs(a - b) for a, b in combinations(running, 2)}
    most = CLOCKS if s is None else s
    assert apart == (set(range(most + 1)) if workers > 1 else set()), "s itself is reached, and no more"


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("s", STALENESS)
def test_who_leaves_or_waits_for_all_holds_nobody_back(s: int | None, workers: int) -> None:
    """At any point: `Race.check` is what is tested. And whoever has left does not count."""
    states = races(workers, s, leave=True, park=True)
    alone = [race for race in states if race.does.count("left") == workers - 1 and "runs" in race.does]
    assert {max(race.clocks.clocks) for race in alone} == set(range(CLOCKS + 1))
    assert all(race.clocks.present == [race.does.index("runs")] for race in alone)


# -- every schedule of a server's session --------------------------------------------------------------------


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("s", STALENESS)
def test_what_a_step_sees_under_every_schedule(s: int | None, workers: int) -> None:
    """`Schedule.goes_on` and `check` are what is tested; here: the bound of what is seen is tight."""
    lacking: Counter[int] = Counter()
    ends = 0
    for schedule in schedules(workers, s, others=False):
        ends += min(schedule.clocks) == CLOCKS
        for worker, given in enumerate(schedule.session.slice.given):
            if schedule.does[worker] == "runs" and s != 0:
                marks = (given > 0).reshape(-1, CLOCKS)
                for other in range(workers):
                    lacking.update((schedule.clocks[worker] - np.flatnonzero(~marks[other])).tolist())
    assert ends, "all come to their end"
    if s != 0:
        assert max(lacking) == (CLOCKS if s is None else s), "an update of step c − s may be missing at step c"


@pytest.mark.parametrize("s", STALENESS[1:])
def test_leaving_and_gathering_at_any_point(s: int | None) -> None:
    states = schedules(2, s, others=True)
    assert any(all(schedule.gathered) for schedule in states)


def test_after_a_collective_the_bound_holds_as_before() -> None:
    desk = Desk(np.zeros(4), 2, staleness=1)
    for worker in (0, 1):
        desk.session.gather(worker, b"", False)
    for worker in (0, 1):
        desk.take(worker)
    desk.push(1, unit(4, 0))
    desk.take(1)
    desk.push(1, unit(4, 1))
    assert 1 not in desk.answers, "worker 0 computes its step 0: step 2 has to wait"


# -- how late ------------------------------------------------------------------------------------------------


def asks(comm: Any, steps: int) -> tuple[list[tuple[int, int, int]], dict[int, int], list[int]]:
    """After each step of its own, of each server: updates, Σ τ, and the ages of what all are computing from."""
    model = counter(50)
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, staleness=None)
    seen = []
    for _ in range(steps):
        model.step(s)
        seen += [(i.version, i.staleness_sum, sum(i.version - p for p in i.pulled)) for i in s.servers()]
    comm.barrier()
    return seen, s.staleness_counts, [i.staleness_sum for i in s.servers()]


@pytest.mark.parametrize("workers", [1, 2, 4, "processes"])
@pytest.mark.parametrize("room", [{}, {"stragglers": {0: 3.0}, "jitter": 0.6}], ids=["equal", "unequal"])
def test_staleness_is_conserved(workers: Any, room: dict[str, Any]) -> None:
    if workers == "processes":
        workers, options = 2, {"world": "process"}
    else:
        options = {"cluster": sim.Cluster(nodes=workers + 2, flops=1e9, op_overhead_s=1e-3, **room)}
    results = served(asks, workers, 2, 12, **options)
    for seen, _, sums in results:
        assert {late + ages - (workers - 1) * updates for updates, late, ages in seen} == {0}, "(N − 1) · T"
        assert sums == results[0][2]
    counted = sum(late * times for _, counts, _ in results for late, times in counts.items())
    assert counted == sum(results[0][2]), "workers were told the same"


# -- stability -----------------------------------------------------------------------------------------------


def descend(comm: Any, lr: float, steps: int) -> tuple[list[float], dict[int, int]]:
    """On ½ x², until x is beyond doubt."""
    model = Pot([1.0])
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=lr), comm, staleness=None)
    seen = []
    while len(seen) < steps and abs(model.w.data[0]) < 1e60:
        model.step(s)
        seen.append(float(model.w.data[0]))
    return seen, s.staleness_counts


def grows(lr: float, delay: int) -> bool:
    """Whether x does, with τ + 1 equal workers. Windows are of whole periods of the swing at the border."""
    turns, period = (150 if delay else 60), 2 * (2 * delay + 1)
    cluster = sim.Cluster(nodes=delay + 2, flops=1e9, op_overhead_s=1e-3)
    results = served(descend, delay + 1, 1, lr, turns, cluster=cluster)
    if any(len(seen) < turns for seen, _ in results):
        return True
    results.sort(key=lambda result: min(result[1]))  # in their turn: the first of the i-th is i late
    counts = sum((Counter(counts) for _, counts in results), Counter())
    x = np.array(merged([seen for seen, _ in results]))
    assert counts[delay] == len(x) - delay, "but for the first of each worker all are τ late"
    assert (x[delay + 1 :] == x[delay:-1] - lr * x[: -delay - 1]).all(), "x_{t+1} = x_t − η x_{t−τ}"
    early, late = x[len(x) // 3 :][: 2 * period], x[-2 * period :]
    return bool(np.square(late / np.abs(early).max()).sum() > np.square(early / np.abs(early).max()).sum())


@pytest.mark.parametrize(("delay", "border"), [(0, 2), (1, 1), (3, 0.445), (7, 0.209)])
def test_the_stable_rate_of_a_delay(delay: int, border: float) -> None:
    law = 2 * math.sin(math.pi / (2 * (2 * delay + 1)))
    assert round(law, 3) == border
    stable, unstable = 0.05, 2.5
    while unstable / stable > 1.008:
        rate = math.sqrt(stable * unstable)
        stable, unstable = (stable, rate) if grows(rate, delay) else (rate, unstable)
    assert 0.99 * law < math.sqrt(stable * unstable) < 1.01 * law


# -- what waiting costs --------------------------------------------------------------------------------------

SECOND = 1e9  # FLOPs


def work(comm: Any, s: int | None, steps: int, until: float = math.inf) -> list[tuple[float, int]]:
    """Steps of a second each; after each of them the time, and the server's number of updates."""
    model = counter(8)
    strategy = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, staleness=s)
    seen = []
    while len(seen) < steps and comm.now() < until:
        backend.count(flops=SECOND)
        model.step(strategy)
        seen.append((comm.now(), strategy.servers()[0].version))
    return seen


def room(workers: int, **changes: Any) -> sim.Cluster:
    return sim.Cluster(nodes=workers + 1, flops=SECOND, latency_s=1e-5, **changes)


@pytest.mark.parametrize("s", [1, 2, 3])
def test_with_a_constant_straggler_ssp_has_a_head_start_and_no_more(s: int) -> None:
    workers, slow = 4, room(4, stragglers={0: 5.0})
    synchronous = served(work, workers, 1, 0, 20, cluster=slow)[0]
    bounded = served(work, workers, 1, s, 20 + s, cluster=slow)[0]
    for step, (_, updates) in enumerate(bounded[:20], start=1):
        assert updates == workers * step + (workers - 1) * s, "pushes"
    rates = [(seen[19][0] - seen[4][0]) / 15 for seen in (synchronous, bounded)]
    assert rates == pytest.approx([5, 5], rel=0.01)


def test_with_jitter_ssp_gains() -> None:
    ends = {}
    for s in (0, 1, 4, None):
        results = served(work, 4, 1, s, 30, cluster=room(4, jitter=0.7, seed=2))
        ends[s] = max(seen[-1][0] for seen in results)
    assert ends[None] <= ends[4] < ends[1] < 0.9 * ends[0]


def test_asynchronous_training_does_not_wait_for_the_slow() -> None:
    slow = room(4, stragglers={1: 5.0})
    pushes = [4 * len(served(work, 4, 1, 0, 12, cluster=slow)[0])]
    time = served(work, 4, 1, 0, 12, cluster=slow)[0][-1][0]
    pushes.append(sum(len(seen) for seen in served(work, 4, 1, None, 10**6, time, cluster=slow)))
    assert pushes[1] >= 3 * pushes[0]


# -- backup workers ------------------------------------------------------------------------------------------


def test_late_gradients_are_dropped_and_never_applied() -> None:
    """3 workers, 1 backup: worker i's gradient of round t leaves a mark at 3 t + i."""
    desk = Desk(np.zeros(9), 3, staleness=0, backups=1)
    for t, order in enumerate([(0, 2, 1), (1, 0, 2), (2, 1, 0)]):
        for worker in order[:2]:
            assert worker not in desk.answers
            desk.push(worker, unit(9, 3 * t + worker))
        for worker in order[:2]:
            reply, (w,) = desk.take(worker)
            assert (reply.status, reply.staleness, reply.version) == (Status.DONE, 0, t + 1)
            assert w.tobytes() == desk.w.tobytes()
        before = desk.w.copy()
        desk.push(order[2], unit(9, 3 * t + order[2]))
        reply, (w,) = desk.take(order[2])
        assert (reply.status, reply.staleness, reply.version) == (Status.LATE, -1, t + 1)
        assert w.tobytes() == desk.w.tobytes() == before.tobytes()
        assert desk.w.reshape(3, 3)[t].tolist() == [0.5 if worker in order[:2] else 0 for worker in range(3)]
    desk.push(1, unit(9, 0))
    desk.session.leave(0, died=True)
    desk.session.leave(2, died=True)
    assert desk.take(1)[0].status == Status.DIED, "too many have died"


@pytest.mark.parametrize(("workers", "b"), [(4, 0), (5, 1), (6, 3)])
def test_the_time_of_a_clock_with_backup_workers(workers: int, b: int) -> None:
    """E[T] = (H_{N+b} − H_b) μ, for exponential times of mean μ = 1 and workers that are late but once."""
    rng, rounds, total = np.random.default_rng(3), 2000, 0.0
    desk = Desk(np.zeros(1), workers, staleness=0, backups=b)
    for t in range(rounds):
        times = rng.exponential(size=workers)
        for worker in np.argsort(times).tolist():
            before = desk.session.slice.version
            desk.push(worker, np.ones(1))
            if desk.session.slice.version != before:
                total += times[worker]
        assert sorted(desk.answers) == list(range(workers))
        assert desk.session.slice.version == t + 1
        desk.answers.clear()
    law = sum(1 / k for k in range(b + 1, workers + 1))
    deviation = math.sqrt(sum(1 / k**2 for k in range(b + 1, workers + 1)) / rounds)
    assert abs(total / rounds - law) < 5 * deviation


# -- late gradients, made less wrong -------------------------------------------------------------------------


def rule(lr: Any, **facts: Any) -> Rule:
    return Rule(optim.SGD([Parameter(np.zeros(1))], lr=lr).without_parameters(), **facts)


def test_each_gradient_is_slowed_by_its_own_staleness() -> None:
    desk = Desk(exact([0]), 3, rule(Fraction(1, 2), staleness_aware=True))
    for worker, late in [(0, 0), (1, 1), (2, 2), (2, 0), (0, 3), (1, 3)]:
        before = desk.w[0]
        desk.push(worker, exact([1]))
        assert desk.take(worker)[0].staleness == late
        assert before - desk.w[0] == Fraction(1, 2) / max(1, late)


def test_delay_compensation_by_hand() -> None:
    """g + λ g² (w − w_bak), λ = 1/3; of two samples each, which is n̄."""
    desk = Desk(exact([2]), 2, rule(1, correction=DelayCompensation(Fraction(1, 3))), nominal_batch=2)
    for worker, g, w in [(0, 1, 1), (1, 2, Fraction(1, 3)), (0, 1, Fraction(-4, 9))]:
        desk.push(worker, exact([2 * g]), 2)
        desk.answers.clear()
        assert desk.w[0] == w


class Curvature:
    """g + H (w − w_bak): with a loss's own H nothing is left of the delay."""

    def __init__(self, diagonal: np.ndarray) -> None:
        self.diagonal = diagonal

    def __call__(self, g: Any, w: Any, given: Any, lo: int) -> Any:
        return g + self.diagonal[lo : lo + len(g)] * (w - given)

    def __repr__(self) -> str:  # the same on all ranks
        return "Curvature"


def bend(comm: Any, w: np.ndarray, slope: np.ndarray, lr: Any, options: dict[str, Any]) -> tuple[Any, set[int]]:
    model = Pot(w, slope)
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=lr), comm, staleness=None, **options)
    for _ in range(5 + comm.rank):
        model.step(s, samples=2)
    return s.state_dict()["w"], set(s.staleness_counts)


def test_with_the_true_hessian_delay_compensation_is_sequential_sgd() -> None:
    slope = exact([Fraction(1 + i, 9) for i in range(16)])
    start, lr = exact(range(1, 17)), Fraction(1, 4)
    options = {"delay_compensation": Curvature(slope)}
    cluster = sim.Cluster(nodes=5, flops=1e9, op_overhead_s=1e-3, stragglers={0: 2.5}, jitter=0.5)
    results = served(bend, 3, 2, start, slope, lr, options, cluster=cluster)
    assert len(set().union(*(late for _, late in results))) >= 3, "delays of several lengths"
    for w, _ in results:
        assert (w == start * (1 - lr * slope) ** (5 + 6 + 7)).all()


def test_delay_compensation_of_0_is_plain() -> None:
    start, slope = np.random.default_rng(0).standard_normal((2, 40))
    cluster = sim.Cluster(nodes=4, flops=1e9, op_overhead_s=1e-3, jitter=0.5)
    plain, zero, more, slowed = (
        served(bend, 3, 1, start, slope, 0.1, options, cluster=cluster)[0][0].tobytes()
        for options in ({}, {"delay_compensation": 0}, {"delay_compensation": 0.5}, {"staleness_aware": True})
    )
    assert plain == zero
    assert len({plain, more, slowed}) == 3
