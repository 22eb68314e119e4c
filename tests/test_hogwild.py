"""Hogwild!: one w, no lock. What is disjoint is serial to the bit; what overlaps gets lost, and is counted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend, data, nn, optim, parallel, sim
from minidp.comm import comm_self
from minidp.comm.virtual import VirtualCommunicator
from minidp.nn import functional as F
from minidp.parallel import blocks
from tests.test_data_parallel import OPTIMIZERS, same_bits
from tests.training import go_on, spawned

pytestmark = pytest.mark.timeout(60)

WORLDS = ("process", "virtual")
# An operation takes a second, whatever it is, and nothing else takes any: schedules can be worked out by hand.
SECONDS: dict[str, Any] = {
    "flops": 2.0**80,
    "op_overhead_s": 1.0,
    "latency_s": 0.0,
    "bandwidth_bytes_per_s": 2.0**80,
}


class Dense(parallel.Hogwild):
    """What Hogwild must not be: zeros of the gradient are written as well."""

    def _update(self, block: Any, size: int, nominal: int, hyper: Any) -> int:
        return super()._update(block, int(np.count_nonzero(block.parts[0])), nominal, hyper)


# -- disjoint supports ---------------------------------------------------------------------------------------

ROWS, WIDTH = 12, 5


def rows_of(rank: int, ranks: int, step: int, all_of_them: bool) -> np.ndarray:
    """Rows of the table that one rank alone touches, a power of two of them: n·g / n is exact then."""
    mine = np.arange(rank, ROWS, ranks)[:4]
    return mine if all_of_them else np.roll(mine, step)[: 1 + step % 2]


def targets(rank: int, step: int, count: int) -> np.ndarray:
    return np.random.default_rng([rank, step]).standard_normal((count, WIDTH))


def table() -> nn.Module:
    return nn.Sequential(nn.Embedding(ROWS, WIDTH), seed=0).astype("float64")


def train_rows(
    comm: Any, kind: type[parallel.Hogwild], rule: str
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    model = table()
    s = kind(model, OPTIMIZERS[rule](model.parameters()), comm, nominal_batch=4)
    for step in range(30 + comm.rank):
        rows = rows_of(comm.rank, comm.world_size, step, rule == "adam")
        s.forward_backward(rows, targets(comm.rank, step, len(rows)), F.mse_loss)
        s.step()
    return s.state_dict(), s.metrics


def serial_rows(rule: str, ranks: int) -> np.ndarray:
    """One process, an optimizer a rank: all steps of rank 0, then all of rank 1 …"""
    model = table()
    for rank in range(ranks):
        opt = OPTIMIZERS[rule](model.parameters())
        for step in range(30 + rank):
            opt.zero_grad()
            rows = rows_of(rank, ranks, step, rule == "adam")
            F.mse_loss(model(rows), targets(rank, step, len(rows))).backward(gradient=len(rows) / 4)
            opt.step()
    return model.state_dict()["0.weight"]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_disjoint_supports_equal_serial_training(rule: str, world: str) -> None:
    for ranks in (1, 2, 3):
        expected = serial_rows(rule, ranks)
        for state, metrics in spawned(train_rows, ranks, world, parallel.Hogwild, rule):
            assert state["0.weight"].tobytes() == expected.tobytes(), (ranks, rule)
            assert metrics["lost_updates"] == 0
            counts = [rows_of(r, ranks, step, rule == "adam").size for r in range(ranks) for step in range(30 + r)]
            assert metrics["updates_written"] == WIDTH * sum(counts), "the support, and nothing else"


def test_a_dense_write_would_lose_what_others_wrote() -> None:
    expected = serial_rows("sgd", 3)
    for state, _ in spawned(train_rows, 3, "virtual", Dense, "sgd"):
        assert not np.allclose(state["0.weight"], expected)


# -- overlapping supports: hand-worked, and by brute force ---------------------------------------------------


def line(size: int) -> nn.Module:
    """x ↦ x·w: of the mean over a batch the gradient is the mean of x, whatever w is."""
    model = nn.Sequential(nn.Linear(size, 1, bias=False)).astype("float64")
    next(iter(model.parameters())).data[...] = 0
    return model


def mean(output: Any, _: Any) -> Any:
    return output.mean()


def walk(comm: Any, size: int, plan: list[list[tuple[int, list[float]]]], kind: Any) -> tuple[list[float], Any]:
    """Make this rank's steps of the plan: gradients, and how many seconds (of an ordinary node) each takes."""
    model = line(size)
    s = kind(model, optim.SGD(model.parameters(), lr=1.0), comm)
    for seconds, gradient in plan[comm.rank]:
        with backend.meter() as meter:
            s.forward_backward(np.array([gradient]), None, mean)
            while meter.operations < seconds:
                backend.count()
            assert meter.operations == seconds, "forward and backward alone take longer"
        s.step()
    weight = s.state_dict()["0.weight"]
    return [-float(w) for w in weight.ravel()], s.metrics


def walked(size: int, plan: Any, kind: Any = parallel.Hogwild, **cluster: Any) -> list[tuple[list[float], Any]]:
    room = sim.Cluster(nodes=len(plan), **SECONDS, **cluster)
    return minidp.spawn(walk, len(plan), size, plan, kind, world="virtual", cluster=room)


def test_a_schedule_worked_out_by_hand() -> None:
    """Rank 1 takes 1.75 s for what rank 0 does in 1 s. A gradient takes 9 and 5 operations, an update one.

        time    rank 0                  rank 1                 element 1, which both move
         8.75                           reads                  0
         9      reads                                          0
        10      writes                                         2
        10.5                            writes                 4       rank 0's write is lost
        19      reads                                          4
        19.25                           reads                  4
        20      writes                                         6
        21                              writes                 8       and again
        29      reads                                          8
        30      writes                                         10

    Gradients of rank 0 begin at 0, 10 and 20: by their updates at 9, 19 and 29 rank 1 has written 0, 1 and 1
    steps. Those of rank 1 begin at 0 and 10.5; at 8.75 and 19.25 rank 0 has written none.
    """
    plan = [[(9, [1.0, 2.0, 0.0])] * 3, [(5, [0.0, 4.0, 8.0])] * 2]
    results = walked(3, plan, stragglers={1: 1.75})
    for moved, metrics in results:
        assert moved == [3, 10, 16]
        assert metrics["updates_written"] == 10
        assert metrics["lost_updates"] == 2
    assert [m["staleness_mean"] for _, m in results] == [2 / 3, 0]
    assert [m["staleness_max"] for _, m in results] == [1, 0]
    assert [m["steps"] for _, m in results] == [3, 2]
    # What one wrote the other has read, 8 bytes an element.
    assert [(m["bytes_sent"], m["bytes_received"]) for _, m in results] == [(48, 32), (32, 32)]


def brute_force(size: int, plan: Any, slowness: list[float]) -> tuple[list[float], int, int, list[list[int]]]:
    """w, writes, lost writes and each rank's staleness, event by event."""
    events = []
    for rank, steps in enumerate(plan):
        clock = 0.0
        for seconds, gradient in steps:
            read, write = clock + seconds * slowness[rank], clock + (seconds + 1) * slowness[rank]
            events += [
                (clock, "begin", rank, gradient),
                (read, "read", rank, gradient),
                (write, "write", rank, gradient),
            ]
            clock = write
    w, last_writers = [0.0] * size, [[] for _ in range(size)]  # type: ignore[var-annotated]
    written = steps = 0
    begun, held, ages = {}, {}, [[] for _ in plan]  # type: ignore[var-annotated]
    for time_s, what, rank, gradient in sorted(events, key=lambda event: (event[0], event[1] == "begin")):
        support = [i for i in range(size) if gradient[i]]
        if what == "begin":
            begun[rank] = steps
        elif what == "read":
            ages[rank].append(steps - begun[rank])
            held[rank] = {i: (w[i], list(last_writers[i])) for i in support}
        else:
            for i in support:
                w[i] = held[rank][i][0] + gradient[i]
                last_writers[i] = [*held[rank][i][1], (time_s, rank)]  # whose updates are in it
            written += len(support)
            steps += 1
    lost = written - sum(len(inside) for inside in last_writers)
    return w, written, lost, ages


def gradient(rng: np.random.Generator, size: int) -> tuple[int, list[float]]:
    """Seconds, and whole numbers at a random support, which is not empty."""
    support = rng.random(size) < 0.6
    support[rng.integers(size)] = True
    return int(rng.integers(5, 12)), (rng.integers(1, 9, size) * support).astype(float).tolist()


@pytest.mark.parametrize("seed", range(6))
def test_lost_updates_and_staleness_equal_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size, ranks = 7, 4
    slowness = [1.0, *(1 + rng.random(ranks - 1)).tolist()]
    plan = [[gradient(rng, size) for _ in range(int(rng.integers(3, 15)))] for _ in range(ranks)]
    w, written, lost, ages = brute_force(size, plan, slowness)
    assert lost > 0
    results = walked(size, plan, stragglers=dict(enumerate(slowness)))
    for (moved, metrics), mine in zip(results, ages, strict=True):
        assert moved == w
        assert (metrics["updates_written"], metrics["lost_updates"]) == (written, lost)
        assert metrics["staleness_mean"] == pytest.approx(np.mean(mine))
        assert metrics["staleness_max"] == max(mine)


def test_in_lock_step_all_but_one_are_lost() -> None:
    for moved, metrics in walked(3, [[(6, [1.0, 1.0, 1.0])] * 5] * 4):
        assert moved == [5, 5, 5]
        assert metrics["updates_written"] == 4 * 5 * 3
        assert metrics["lost_updates"] == 3 * 5 * 3
        assert metrics["staleness_max"] == 0, "each gradient is of the w that it changes"


def test_what_comes_one_after_the_other_adds_up() -> None:
    """N ranks' steps together move w N times as far as one step of all, if none is lost."""
    plan = [[(6 + 10 * rank, [1.0, 1.0])] for rank in range(4)]
    for moved, metrics in walked(2, plan):
        assert moved == [4, 4]
        assert metrics["lost_updates"] == 0
        assert metrics["updates_written"] == 8, "elements of w, not its padding to cache lines"


def at_leisure(comm: Any, accumulate: int) -> tuple[list[float], list[float]]:
    """Two gradients of rank 1, 10 s apart, while rank 0 makes a step every 7 s.

    Rank 1's staleness and steps; how far w had come when its forwards read it.
    """
    read = []

    def loss(output: Any, _: Any) -> Any:
        read.append(-float(output.data[0, 0]) / 2)
        return output.mean()

    model = line(2)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm, accumulation_steps=accumulate)
    for _ in range(5 if comm.rank == 0 else 2):
        for _ in range(10 if comm.rank else 0):
            backend.count()
        with backend.meter() as meter:
            s.forward_backward(np.ones((1, 2)), None, loss)
            while meter.operations < 6:
                backend.count()
        if comm.rank == 0 or s._backwards == accumulate:
            s.step()
    return [s.metrics["staleness_mean"], s.metrics["staleness_max"], s.updates], read


def test_a_gradient_is_as_old_as_its_first_forward() -> None:
    """Rank 0 writes at 7, 14, 21, 28, 35. Rank 1's forwards begin at 10 and, if nothing was written between, 26.

    With a step for each: forward at 10, update at 16; written at 17; forward at 27, update at 33. Each time rank 0
    has written one step since the forward, whatever happened while rank 1 did something else.
    """
    room = sim.Cluster(nodes=2, **SECONDS)
    one, both = (minidp.spawn(at_leisure, 2, n, world="virtual", cluster=room)[1] for n in (1, 2))
    assert one == ([1, 1, 2], [1, 4]), "a second forward reads its own step as well"
    assert both == ([3, 3, 1], [1, 3]), "from 10 to 32: 14, 21, 28"


# -- batches -------------------------------------------------------------------------------------------------


def batches(comm: Any, sizes: list[int], nominal: int | None) -> tuple[list[float], list[float], int]:
    """How far each batch moves w, how many elements are written by each, and the steps that were counted."""
    model = line(2)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm, nominal_batch=nominal)
    moved, written = [], []
    for size in sizes:
        before, wrote = s.state_dict()["0.weight"][0, 0], s.metrics["updates_written"]
        if size >= 0:
            s.backward(F.mse_loss(model(np.zeros((0, 2))), np.zeros((0, 1))) if size == 0 else model(
                np.ones((size, 2))).mean(), samples=size)  # fmt: skip
        s.step()
        moved.append(float(before - s.state_dict()["0.weight"][0, 0]))
        written.append(s.metrics["updates_written"] - wrote)
    return moved, written, s.updates


@pytest.mark.parametrize("world", WORLDS)
def test_batches_weigh_as_many_samples_as_they_have(world: str) -> None:
    """n_i / n̄, with n̄ the first batch that has samples; none: nothing is written, -1: nor was there a backward."""
    assert spawned(batches, 1, world, [0, -1, 8, 8, 2, 0, 16], None) == [
        ([0, 0, 1, 1, 0.25, 0, 2], [0, 0, 2, 2, 2, 0, 2], 7)
    ]
    assert spawned(batches, 1, world, [8, 2, 0], 16) == [([0.5, 0.125, 0], [2, 2, 0], 3)]


# -- one rank alone ------------------------------------------------------------------------------------------


def alone(kind: str, activation: type[nn.Module], rule: str, dtype: str, **options: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    model = nn.Sequential(nn.Linear(6, 9), activation(), nn.Linear(9, 3), seed=0).astype(dtype)
    groups = [
        {"params": [p for p in model.parameters() if p.data.ndim == ndim], **({"lr": 0.03} if ndim == 1 else {})}
        for ndim in (1, 2)
    ]
    s = getattr(parallel, kind)(model, OPTIMIZERS[rule](groups), comm_self(), **options)
    for _ in range(8):
        for _ in range(s.accumulation_steps):
            s.forward_backward(rng.standard_normal((11, 6)).astype(dtype), rng.integers(0, 3, 11), F.cross_entropy)
        s.step()
    return s.state_dict()


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_one_rank_alone_has_the_bits_of_data_parallel(rule: str, dtype: str) -> None:
    """Two groups of parameters, whose blocks are of one parameter each."""
    if dtype == "float16" and "adam" in rule:
        pytest.skip("ε = 1e-8 is 0 in half precision, and w soon infinite")
    for options in ({}, {"accumulation_steps": 3}):
        expected = alone("DataParallel", nn.Tanh, rule, dtype, **options)
        assert same_bits(alone("Hogwild", nn.Tanh, rule, dtype, **options), expected), options


def test_zeros_of_the_gradient_change_nothing_for_plain_sgd(monkeypatch: pytest.MonkeyPatch) -> None:
    """ReLU: parts of the gradient are 0. In blocks of any size."""
    expected = alone("DataParallel", nn.ReLU, "sgd", "float32")
    for size in (blocks.BLOCK_BYTES, 64, 4):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", size)
        assert same_bits(alone("Hogwild", nn.ReLU, "sgd", "float32"), expected)


def test_state_moves_only_where_w_does() -> None:
    """The same gradient, given for all of w at once or for one half after the other: momentum rests meanwhile."""
    ends = []
    for halves in ([[1.0, 1.0]] * 3, [[1.0, 0.0], [0.0, 1.0]] * 3):
        model = line(2)
        s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0, momentum=0.5), comm_self())
        for gradient in halves:
            s.forward_backward(np.array([gradient]), None, mean)
            s.step()
        ends.append((s.state_dict()["0.weight"], s.optimizer_state()["momentum_buffer"]["0.weight"]))
    assert np.array_equal(ends[0][0], ends[1][0])
    assert np.array_equal(ends[0][0], [[-4.25, -4.25]])
    assert np.array_equal(ends[0][1], ends[1][1])


# -- training ------------------------------------------------------------------------------------------------


def learn_digits(comm: Any, updates: int) -> tuple[float, dict[str, np.ndarray], dict[str, float], float]:
    train_set, test_set = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10), seed=comm.rank)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
    go_on(s, train_set, 32 * comm.world_size, updates + 7 * comm.rank)  # not as many steps on every rank
    state = s.state_dict()
    x, y = test_set[:]
    with minidp.no_grad():
        return float((model(x).numpy().argmax(1) == y).mean()), state, s.metrics, comm.now()


@pytest.mark.parametrize("world", WORLDS)
def test_it_learns(world: str) -> None:
    results = spawned(learn_digits, 2, world, 150)
    for rank, (accuracy, state, metrics, _) in enumerate(results):
        assert accuracy > 0.9
        assert same_bits(state, results[0][1])
        assert metrics["steps"] == 150 + 7 * rank
        assert 0 <= metrics["lost_updates"] <= metrics["updates_written"] / 2
        assert 0 <= metrics["staleness_mean"] <= metrics["staleness_max"]
        assert metrics["lost_updates"] == results[0][2]["lost_updates"]


def test_virtual_runs_are_repeated_to_the_bit() -> None:
    room = sim.Cluster(nodes=3, flops=1e9, memory_bytes_per_s=1e9, jitter=0.3, seed=1)
    first, again = (minidp.spawn(learn_digits, 3, 40, world="virtual", cluster=room) for _ in range(2))
    assert first[0][2]["lost_updates"] > 0
    assert first[0][2]["staleness_mean"] > 0
    for (accuracy, state, metrics, now), other in zip(first, again, strict=True):
        assert (accuracy, metrics, now) == (other[0], other[2], other[3])
        assert same_bits(state, other[1])


def march(comm: Any, steps: int) -> tuple[np.ndarray, dict[str, float]]:
    model = line(1000)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm)
    for _ in range(steps):
        s.forward_backward(np.ones((1, 1000)), None, mean)
        s.step()
    return -s.state_dict()["0.weight"], s.metrics


def test_what_processes_lose_is_counted_within_what_is_possible() -> None:
    """Each write moves an element by 1: so far as w has not come, writes are lost."""
    steps = 300
    for moved, metrics in spawned(march, 2, "process", steps):
        assert metrics["updates_written"] == 2 * steps * 1000
        assert 0 <= metrics["lost_updates"] < 2 * steps * 1000
        assert (moved == np.round(moved)).all()
        assert ((moved >= 1) & (moved <= 2 * steps)).all()
        assert metrics["staleness_max"] <= steps
    for moved, metrics in spawned(march, 1, "process", steps):
        assert (moved == steps).all()
        assert metrics["lost_updates"] == metrics["staleness_max"] == metrics["bytes_sent"] == 0


def uncounted(comm: Any) -> dict[str, float]:
    model = line(3)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm, count_lost=False)
    s.forward_backward(np.ones((1, 3)), None, mean)
    s.step()
    s.state_dict()
    return s.metrics


def test_counting_can_be_left_out() -> None:
    for metrics in spawned(uncounted, 2, "virtual"):
        assert metrics["updates_written"] == 6
        assert "lost_updates" not in metrics


class Sometimes(nn.Module):
    """Uses its second part in every other forward."""

    def __init__(self) -> None:
        self.always, self.now_and_then = (nn.Linear(3, 1, bias=False) for _ in range(2))
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.always(x) + self.now_and_then(x) if self.calls % 2 else self.always(x)


def test_what_was_not_used_does_not_move() -> None:
    model = Sometimes().astype("float64")
    start = model.state_dict()
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm_self())
    for _ in range(4):
        s.forward_backward(np.ones((1, 3)), None, mean)
        s.step()
    moved = {name: start[name] - value for name, value in s.state_dict().items()}
    assert np.allclose(moved["always.weight"], 4)
    assert np.allclose(moved["now_and_then.weight"], 2)
    assert s.metrics["updates_written"] == 3 * (4 + 2)


def with_norm(seed: int) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1), seed=seed).astype("float64")


def normed(comm: Any) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """A frozen parameter and buffers beside w; ranks are built differently, and make 1, 2, 3 … steps."""
    model = with_norm(comm.rank)
    next(iter(model.parameters())).requires_grad = False
    for buffer in model.buffers():
        buffer += comm.rank
    opt = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    s = parallel.Hogwild(model, opt, comm)
    states = [model.state_dict()]
    comm.barrier()
    for _ in range(1 + comm.rank):
        s.forward_backward(np.random.default_rng(comm.rank).standard_normal((8, 3)), None, mean)
        s.step()
    states.append(model.state_dict())
    end = s.state_dict()
    if comm.rank == 2:  # alone, and so from now on the buffers are its own
        s.forward_backward(np.ones((8, 3)), None, mean)
        s.step()
    states.append(model.state_dict())
    return [*states, s.state_dict()], end


@pytest.mark.parametrize("world", WORLDS)
def test_all_begin_as_rank_0_and_layers_keep_their_own(world: str) -> None:
    results = spawned(normed, 3, world)
    (first, *_), end = results[0]
    last = results[2][0][2]
    assert np.array_equal(first["2.weight"], with_norm(0).state_dict()["2.weight"])
    for rank, ((start, after, _, later), state) in enumerate(results):
        assert same_bits(start, first)
        assert np.array_equal(later["1.running_mean"], last["1.running_mean"]), "nobody else has moved it"
        assert np.array_equal(after["0.weight"], first["0.weight"]), "it is frozen"
        assert after["1.num_batches_tracked"] == 1 + rank
        assert not np.array_equal(after["1.running_mean"], first["1.running_mean"])
        assert same_bits(state, end), "buffers are averaged"
        assert state["1.num_batches_tracked"] == 3
    means = [8 * (1 + rank) * after["1.running_mean"] for rank, ((_, after, *_), _) in enumerate(results)]
    assert np.allclose(end["1.running_mean"], sum(means) / (8 * (1 + 2 + 3)), rtol=1e-12), "by samples"


# -- state ---------------------------------------------------------------------------------------------------


def slow_reader(comm: Any) -> float:
    model = line(3)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm)
    if comm.rank == 1:
        at_once = model.state_dict
        model.state_dict = lambda: (time.sleep(0.3), at_once())[1]  # type: ignore[method-assign]
    state = s.state_dict()
    s.forward_backward(np.ones((1, 3)), None, mean)
    s.step()
    return float(state["0.weight"][0, 0])


def test_nobody_writes_while_others_copy_the_state() -> None:
    assert spawned(slow_reader, 2, "process") == [0, 0]


def loaded(comm: Any) -> list[Any]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1), seed=0).astype("float64")
    list(model.parameters())[-1].requires_grad = False
    opt = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    s = parallel.Hogwild(model, opt, comm)
    s.forward_backward(np.ones((1, 3)), None, mean)
    s.step()
    buffers = {name: array.copy() for name, array in s.optimizer_state()["momentum_buffer"].items()}
    wanted = {name: np.full_like(value, 7 + comm.rank) for name, value in s.state_dict().items()}
    s.load_state_dict(wanted)
    found = s.state_dict()
    assert same_bits(buffers, dict(s.optimizer_state()["momentum_buffer"])), "the optimizer's state stays"
    assert not next(iter(model.parameters())).data.flags.writeable
    s.forward_backward(np.ones((1, 3)), None, mean)
    s.step()
    return [sorted({float(x) for value in found.values() for x in value.ravel()}), s.state_dict()]


@pytest.mark.parametrize("world", WORLDS)
def test_load_state_dict_gives_all_what_rank_0_has(world: str) -> None:
    results = spawned(loaded, 2, world)
    assert [values for values, _ in results] == [[7.0], [7.0]]
    assert same_bits(results[0][1], results[1][1])
    assert not (results[0][1]["0.weight"] == 7).all()


def slow_loader(comm: Any) -> float:
    model = line(3)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm)
    if comm.rank == 0:
        at_once = s._own.stage
        s._own.stage = lambda *args: (time.sleep(0.3), at_once(*args))[1]  # type: ignore[method-assign]
    s.load_state_dict({"0.weight": np.full((1, 3), 7.0)})
    return float(next(iter(model.parameters())).data[0, 0])


def test_nobody_goes_on_before_all_is_loaded() -> None:
    assert spawned(slow_loader, 2, "process") == [7, 7]


def resumed(comm: Any, folder: Path, rule: str) -> bool:
    def build() -> parallel.Hogwild:
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1), seed=0).astype("float64")
        return parallel.Hogwild(model, OPTIMIZERS[rule](model.parameters()), comm)

    def train(s: parallel.Hogwild, steps: int) -> None:
        for _ in range(steps):
            rng = np.random.default_rng([comm.rank, s.updates])
            s.forward_backward(rng.standard_normal((4, 5)), rng.standard_normal((4, 1)), F.mse_loss)
            s.step()

    s = build()
    train(s, 5)
    s.save(folder)
    train(s, 5)
    expected = s.state_dict()
    again = build()
    again.load(folder)
    train(again, 5)
    return again.updates == 10 and same_bits(again.state_dict(), expected)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_checkpoints_go_on_to_the_bit(rule: str, ranks: int, tmp_path: Path) -> None:
    assert spawned(resumed, ranks, "virtual", tmp_path, rule) == [True] * ranks


def parted(comm: Any) -> tuple[float, float, bool]:
    """Rank 0 lets go; rank 1 goes on."""
    model = line(3)
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm)
    if comm.rank == 0:
        s.release()
    comm.barrier()
    if comm.rank == 1:
        s.forward_backward(np.ones((1, 3)), None, mean)
        s.step()
    comm.barrier()
    w = next(iter(model.parameters())).data
    return float(w[0, 0]), s.metrics["updates_written"], w.flags.writeable


@pytest.mark.parametrize("world", WORLDS)
def test_release_leaves_private_copies(world: str) -> None:
    assert spawned(parted, 2, world) == [(0, 3, True), (-1, 3, False)]


# -- errors --------------------------------------------------------------------------------------------------


def poisoned(comm: Any, check: bool) -> tuple[str, float, list[float]]:
    """Rank 1's second gradient has a NaN, in the last of its blocks."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 1)).astype("float64")
    s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm, check_finite=check)
    said = ""
    for step in range(3):
        loss = model(np.ones((1, 3))).mean()
        if comm.rank == 1 and step == 1:
            loss = loss * np.nan
        s.backward(loss, samples=1)
        before = s.metrics["updates_written"]
        try:
            s.step()
        except parallel.NonFiniteGradient as error:
            said = f"{error.parameter} {error.rank} {error.step} {error.value}"
            assert s.metrics["updates_written"] == before
            with pytest.raises(RuntimeError, match="discard"):
                s.step()
            s.discard()
    return said, s.state_dict()["1.bias"][0], [s.updates]


def test_a_gradient_that_is_not_finite_is_not_written() -> None:
    (fine, bias, _), (said, _, updates) = spawned(poisoned, 2, "virtual", True)
    assert (fine, said, updates) == ("", "0.weight 1 1 nan", [2])
    assert np.isfinite(bias)
    assert all(np.isnan(bias) for _, bias, _ in spawned(poisoned, 2, "virtual", False))


def refused(comm: Any, what: str) -> str:
    model = line(3)
    options: dict[str, Any] = {}
    if what == "fractions":
        model = nn.Sequential(nn.Linear(3, 1))
        for parameter in model.parameters():
            parameter.data = np.full(parameter.shape, None, object)
    elif what == "no batch":
        options = {"nominal_batch": 0}
    elif what == "other batch":
        options = {"nominal_batch": 1 + comm.rank}
    try:
        s = parallel.Hogwild(model, optim.SGD(model.parameters(), lr=1.0), comm, **options)
        next(iter(s.model.parameters())).data[...] = 1
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("fractions", "TypeError: Hogwild: the parameters hold Python objects"),
        ("no batch", "ValueError: nominal_batch=0"),
        ("other batch", "CollectiveMismatch: rank 1 has built another Hogwild"),
        ("write", "ValueError: assignment destination is read-only"),
    ],
)
def test_what_can_not_be(what: str, says: str) -> None:
    for message in spawned(refused, 2, "virtual", what):
        assert message.startswith(says), message


def test_ranks_that_share_no_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def apart(self: Any, nbytes: int) -> list[np.ndarray]:
        return [np.zeros(size, np.uint8) for size in self.all_gather_int(nbytes)]

    monkeypatch.setattr(VirtualCommunicator, "allocate", apart)
    for message in spawned(refused, 2, "virtual", "memory"):
        assert message.startswith("ValueError: VirtualCommunicator gives each rank memory of its own"), message
