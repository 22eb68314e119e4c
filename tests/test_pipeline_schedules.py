"""Pipeline schedules, entry by entry; and that a run of them takes as long as they say, on the virtual clock."""

from __future__ import annotations

import weakref
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.autograd.function import Function
from minidp.parallel import pipeline_schedules as schedules
from minidp.parallel.pipeline_schedules import Action, PipelineSchedule, idle_share, timetable
from minidp.sim import Cluster

SIZES = [*product(range(1, 9), range(1, 9))]
FREE: dict[str, Any] = {"latency_s": 0.0, "bandwidth_bytes_per_s": np.inf, "op_overhead_s": 0.0}


def problems(schedule: PipelineSchedule) -> list[str]:
    """All that a schedule must hold, told anew from the laws: nothing is found in a right one."""
    p, m, found = schedule.stages, schedule.micro_batches, []
    everything = sorted((s, j, kind) for s in range(p) for j in range(m) for kind in ("forward", "backward"))
    if sorted((a.stage, a.micro_batch, a.kind) for a in schedule.actions) != everything:
        found.append("an action is missing, or there twice")
    if list(schedule.actions) != sorted(schedule.actions, key=lambda a: (a.step, a.stage)):
        found.append("not by step, then by stage")
    if len({(a.step, a.stage) for a in schedule.actions}) != len(schedule.actions):
        found.append("a stage does two things at a time")
    at = {(a.kind, a.stage, a.micro_batch): a.step for a in schedule.actions}
    for s, j in product(range(p), range(m)):
        forward, backward = at.get(("forward", s, j), -1), at.get(("backward", s, j), -1)
        if not forward < backward:
            found.append(f"backward of {j} before its forward on stage {s}")
        if s and not at.get(("forward", s - 1, j), -1) < forward:
            found.append(f"forward of {j} on stage {s} before its input is there")
        if s and not backward < at.get(("backward", s - 1, j), -1):
            found.append(f"backward of {j} on stage {s - 1} before its gradient is there")
    for s in range(p):
        mine = [a for a in schedule.actions if a.stage == s]
        in_order = [[a.micro_batch for a in mine if a.kind == kind] for kind in ("forward", "backward")]
        if in_order != [list(range(m))] * 2:
            found.append(f"micro-batches of stage {s} out of order: sums would have other bits")
        kept = np.cumsum([1 if a.kind == "forward" else -1 for a in mine])
        if max(kept, default=0) != (m if schedule.name == "gpipe" else min(m, p - s)):
            found.append(f"stage {s} keeps {max(kept, default=0)}")
    if max((a.step for a in schedule.actions), default=-1) + 1 != 2 * (m + p - 1):
        found.append("takes another time than 2 (m + p - 1)")
    return found


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_every_schedule_is_right(name: str) -> None:
    for p, m in SIZES:
        schedule = schedules.get(name, p, m)
        assert (schedule.name, schedule.stages, schedule.micro_batches) == (name, p, m)
        assert problems(schedule) == [], (p, m)
        for s in range(p):
            assert schedule.of_stage(s) == [a for a in schedule.actions if a.stage == s]
            assert (
                schedule.most_in_flight()[s] == (m if name == "gpipe" else min(m, p - s)) <= (m, p)[name == "1f1b"]
            )


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_one_wrong_entry_is_noticed(name: str) -> None:
    for p, m in product(range(1, 5), range(1, 5)):
        good = schedules.get(name, p, m)
        actions = good.actions

        def noticed(changed: list[Action], good: PipelineSchedule = good) -> bool:
            return bool(problems(good._replace(actions=tuple(changed))))

        for i, a in enumerate(actions):
            rest = [*actions[:i], *actions[i + 1 :]]
            assert noticed(rest), f"{a} is missing"
            assert noticed([*actions, a]), f"{a} is there twice"
            wrong = [a._replace(micro_batch=j) for j in range(m + 1) if j != a.micro_batch]
            wrong += [a._replace(stage=s) for s in range(p + 1) if s != a.stage]
            wrong += [a._replace(kind="forward" if a.kind == "backward" else "backward")]
            wrong += [a._replace(step=a.step + 2 * (p + m))]
            for w in wrong:
                assert noticed([*actions[:i], w, *actions[i + 1 :]]), f"{w} instead of {a}"
        for i, j in combinations(range(len(actions)), 2):
            one, two, swapped = actions[i], actions[j], list(actions)
            if one.stage == two.stage:
                swapped[i], swapped[j] = two._replace(step=one.step), one._replace(step=two.step)
                assert noticed(swapped), f"{one} and {two} in each other's place"


def test_drawings_of_the_docs() -> None:
    def drawn(schedule: PipelineSchedule) -> list[str]:
        rows = [[". "] * 12 for _ in range(schedule.stages)]
        for step, stage, j, kind in schedule.actions:
            rows[stage][step] = f"{kind[0].upper()}{j}"
        return [" ".join(row).rstrip() for row in rows]

    text = schedules.__doc__ or ""
    for s, (left, right) in enumerate(zip(drawn(schedules.gpipe(3, 4)), drawn(schedules.one_f_one_b(3, 4)))):
        line = next(line for line in text.splitlines() if line.strip().startswith(f"stage {s} "))
        assert line.split()[2:] == [*left.split(), *right.split()]


def test_errors_of_schedules() -> None:
    with pytest.raises(ValueError, match=r"schedule='zb': there are '1f1b', 'gpipe'"):
        schedules.get("zb", 2, 2)
    for p, m in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"a pipeline of {p} stages and {m} micro-batches: give at least 1"):
            schedules.gpipe(p, m)


# -- time --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("forward_s", "backward_s"), [(1.0, 1.0), (1.0, 2.0), (3.0, 1.0)])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_idle_share_of_equal_stages(name: str, forward_s: float, backward_s: float) -> None:
    for p, m in SIZES:
        spans = timetable(schedules.get(name, p, m), [forward_s] * p, [backward_s] * p)
        assert max(span.end for span in spans) == (m + p - 1) * (forward_s + backward_s)
        assert idle_share(spans) == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
    if forward_s == backward_s:
        assert all(span.start == span.action.step for span in spans), "a slot is a second"


def test_timetable_of_messages_that_differ() -> None:
    """From stage 0 to 1 half a second, back a quarter."""
    spans = timetable(
        schedules.gpipe(2, 1), [1.0, 1.0], [1.0, 1.0], lambda src, dst: {(0, 1): 0.5, (1, 0): 0.25}[src, dst]
    )
    assert [(start, end) for _, start, end in spans] == [(0, 1), (1.5, 2.5), (2.5, 3.5), (3.75, 4.75)]


def test_timetable_of_unequal_stages_and_slow_messages() -> None:
    """By hand: stage 1 takes twice as long, a message half a second."""
    spans = timetable(schedules.gpipe(2, 2), [1.0, 2.0], [1.0, 2.0], transfer_s=0.5)
    at = {(a.kind[0], a.stage, a.micro_batch): (start, end) for a, start, end in spans}
    assert at["f", 0, 0], at["f", 0, 1] == ((0, 1), (1, 2))
    assert (at["f", 1, 0], at["f", 1, 1]) == ((1.5, 3.5), (3.5, 5.5))
    assert (at["b", 1, 0], at["b", 1, 1]) == ((5.5, 7.5), (7.5, 9.5))
    assert (at["b", 0, 0], at["b", 0, 1]) == ((8.0, 9.0), (10.0, 11.0))
    assert idle_share(spans) == pytest.approx(1 - 12 / 22)


class _Work(Function):
    """w x, which takes as long as we say: forward a million operations, backward two."""

    def forward(self, x: Any, w: Any) -> Any:
        self.saved = x, w
        return x * w

    def backward(self, grad: Any) -> Any:
        x, w = self.saved
        return grad * w, (grad * x).sum().reshape(1)

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 1e6, 2e6


class _Mean(Function):
    """A loss that costs nothing."""

    def forward(self, x: Any) -> Any:
        self.saved = x.shape
        return x.mean() if x.size else self.xp.zeros(())

    def backward(self, grad: Any) -> Any:
        return self.xp.full(self.saved, grad / max(1, self.saved[0] * self.saved[1]))

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0.0, 0.0


class Busy(nn.Module):
    """Counts which of its results still live when it makes another."""

    def __init__(self) -> None:
        self.w = nn.Parameter(np.ones(1))
        self.results: list[Any] = []
        self.most_alive = 0

    def forward(self, x: Any) -> Any:
        y = _Work.apply(x, self.w)
        self.results.append(weakref.ref(y.data))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.results))
        return y


def busy_stages(comm: Any, m: int, name: str) -> tuple[float, float, float, float, float]:
    """(start, end, seconds of waiting, of work, of all) of a step's forwards and backwards."""
    p = comm.world_size
    model = nn.Sequential(*(Busy() for _ in range(p)))
    mesh = parallel.Mesh(comm, pp=p)
    s = parallel.HybridParallel(
        model, optim.SGD(model.parameters(), lr=0.1), mesh, micro_batches=m, schedule=name, example=np.ones((1, 3))
    )
    x = np.ones((2 * m, 3))
    comm.barrier()
    start = comm.now()
    s.forward_backward(x, x, lambda y, _: _Mean.apply(y))
    end = comm.now()
    metrics = s.metrics
    stage = mesh.coordinates.pp
    kept = schedules.get(name, p, m).most_in_flight()[stage]
    assert metrics["most_activations"] == kept <= (p if name == "1f1b" else m)
    layer = next(layer for layer in model if isinstance(layer, Busy))
    assert len(layer.results) == m + (comm.rank == 0 and p > 1)  # rank 0 has counted FLOPs
    assert layer.most_alive <= kept + 1, "arrays that nobody needs are let go"
    if stage == p - 1:
        assert layer.most_alive <= kept
    return start, end, *(metrics[name] for name in ("pipeline_wait_s", "pipeline_work_s", "pipeline_s"))


@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_idle_share_on_the_virtual_clock(name: str) -> None:
    for p, m in ((1, 3), (2, 1), (2, 4), (3, 2), (4, 4), (4, 8), (5, 3)):
        cluster = Cluster(nodes=p, flops=1e6, **FREE)
        results = minidp.spawn(busy_stages, p, m, name, world="virtual", cluster=cluster, progress=False)
        (start,) = {start for start, *_ in results}
        whole = max(end for _, end, *_ in results) - start
        assert whole == pytest.approx((m + p - 1) * 3.0, rel=1e-12)
        assert 1 - m * 3.0 / whole == pytest.approx((p - 1) / (m + p - 1), abs=1e-12)
        assert results[0][1] - start == pytest.approx(whole, rel=1e-12), "the first stage is the last to end"
        assert results[0][2] == pytest.approx((p - 1) * 3.0, abs=1e-9), "and waits for all the others"
        told = 1 - sum(work for *_, work, _ in results) / (p * results[0][4])
        assert told == pytest.approx((p - 1) / (m + p - 1), abs=1e-12), "what metrics tell"
