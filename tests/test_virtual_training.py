"""Training in the virtual world: the bits of processes, exact arithmetic, and a clock that obeys the laws."""

from __future__ import annotations

import logging
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import minidp
from minidp import backend, data, nn, optim, parallel, sim, trace
from minidp.comm import costs
from minidp.nn import functional as F
from tests.test_data_parallel import distance, plain_training, same_bits, train

# Powers of two: every sum of times is then exact, and laws hold with ==.
ALPHA, BETA, FLOP_S = 2.0**-17, 2.0**-30, 2.0**-33


def cluster(nodes: int, **changes: Any) -> sim.Cluster:
    return sim.Cluster(nodes=nodes, flops=1 / FLOP_S, latency_s=ALPHA, bandwidth_bytes_per_s=1 / BETA, **changes)


# --- the same training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["DataParallel", "NaiveDataParallel"])
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_bits_of_processes(strategy: str, optimizer: str, dtype: str) -> None:
    for n in (1, 2, 3, 4):
        options = {"dtype": dtype, "steps": 8, "clip_norm": 0.5 if n == 3 else None}
        real = minidp.spawn(train, n, strategy, optimizer, dict(options), blas_threads=1)
        virtual = minidp.spawn(train, n, strategy, optimizer, dict(options), world="virtual")
        for (state, _), (expected, _) in zip(virtual, real, strict=True):
            assert same_bits(state, expected), n


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "adam", "adamw"])
def test_n_workers_equal_one(optimizer: str) -> None:
    expected = plain_training(optimizer)
    for n in (1, 2, 5, 20):  # 20 ranks share a batch of 17: some have no sample
        for state, _ in minidp.spawn(train, n, "DataParallel", optimizer, {"bucket_cap_mb": 0}, world="virtual"):
            assert distance(state, expected) < (1e-9 if "adam" in optimizer else 1e-12)


def fractions(values: np.ndarray, denominator: int = 1) -> np.ndarray:
    exact = np.empty(values.shape, object)
    for i in np.ndindex(values.shape):
        exact[i] = Fraction(int(values[i]), denominator)
    return exact


def exact_training(comm: Any, strategy: str, sizes: list[int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    for parameter in model.parameters():
        parameter.data = fractions(rng.integers(-9, 10, parameter.shape), 7)
    x, y = fractions(rng.integers(-5, 6, (12, 3))), fractions(rng.integers(-5, 6, (12, 2)))
    optimizer = optim.SGD(model.parameters(), lr=Fraction(1, 50), momentum=Fraction(9, 10))
    s = getattr(parallel, strategy)(model, optimizer, comm)
    start = sum(sizes[: comm.rank])
    mine = slice(start, start + sizes[comm.rank])
    for _ in range(3):
        s.forward_backward(x[mine], y[mine], F.mse_loss)
        s.step()
    return s.state_dict()  # type: ignore[no-any-return]


@pytest.mark.parametrize("strategy", ["DataParallel", "NaiveDataParallel"])
def test_exactly_equal_in_fractions(strategy: str) -> None:
    """Every N, every split, empty shards: == to one worker, in exact arithmetic."""
    expected = minidp.spawn(exact_training, 1, strategy, [12], world="virtual")[0]
    assert all(isinstance(value, Fraction) for array in expected.values() for value in array.ravel())
    for sizes in ([6, 6], [1, 11], [3, 0, 9], [0, 0, 12], [4, 4, 4], [1, 2, 3, 6], [1] * 12):
        for state in minidp.spawn(exact_training, len(sizes), strategy, sizes, world="virtual"):
            assert all((state[name] == expected[name]).all() for name in expected), sizes


# --- the clock --------------------------------------------------------------------------------------------


def steps(comm: Any, counts: list[int], cap: float, record: bool = False) -> tuple[list[float], list[trace.Event]]:
    """Three steps; each rank has its own number of samples. Clocks after each step, and the trace."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), seed=0)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, bucket_cap_mb=cap)
    rng = np.random.default_rng(comm.rank)
    x, y = rng.standard_normal((counts[comm.rank], 64)).astype("f4"), rng.integers(0, 16, counts[comm.rank])
    recorder, clocks = trace.Recorder(comm.rank, comm.now), [comm.now()]
    with trace.recording(recorder):
        for _ in range(3):
            s.forward_backward(x, y, F.cross_entropy)
            s.step()
            clocks.append(comm.now())
    return clocks, recorder.events if record else []


def work(samples: int) -> tuple[float, float]:
    """FLOPs of one step's gradient, and of its update, as the meter counts them."""
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), seed=0)
    x, y = np.zeros((samples, 64), np.float32), np.zeros(samples, np.int64)
    with backend.meter() as gradient:
        F.cross_entropy(model(x), y).backward(samples)
    size = nn.Layout(model).size
    return gradient.flops, 2.0 * size


@pytest.mark.parametrize("p", [2, 3, 8, 64])
def test_a_step_is_the_slowest_rank_plus_communication(p: int) -> None:
    """Article 3.3.1, exactly: one bucket, which leaves when backward has ended."""
    counts = [1 + rank % 5 for rank in range(p)]
    machine = cluster(p, stragglers={p - 1: 4.0})
    results = minidp.spawn(steps, p, counts, 25.0, world="virtual", cluster=machine)
    nbytes = 4 * nn.Layout(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), seed=0)).size
    name = costs.fastest(p, nbytes, ALPHA, BETA)
    communication = costs.ALL_REDUCE[name](p, nbytes, ALPHA, BETA)
    gradient, update = work(counts[p - 1])[0] * FLOP_S * 4.0, work(1)[1] * FLOP_S * 4.0  # of the slowest rank
    for clocks, _ in results:
        for before, after in pairwise(clocks[1:]):
            assert after - before == update + gradient + communication


def test_buckets_overlap_with_backward() -> None:
    """finish_k = max(finish_{k−1}, ready_k) + comm_k, and what backward covers costs nothing."""
    p, counts = 4, [8, 8, 8, 8]
    machine = cluster(p)
    (one_bucket, _), *_ = minidp.spawn(steps, p, counts, 25.0, world="virtual", cluster=machine)
    results = minidp.spawn(steps, p, counts, 0.0, True, world="virtual", cluster=machine)
    for clocks, events in results:
        moves = [e for e in events if e.args.get("stream") == "DataParallel buckets" and e.name == "all_reduce"]
        backwards = [e for e in events if e.name == "backward"]
        assert len(moves) == 3 * 4, "a bucket a parameter"
        assert min(e.start_s for e in moves[:4]) < backwards[0].end_s, "the first leaves before backward ends"
        for k, (before, after) in enumerate(pairwise(moves)):
            if (k + 1) % 4:
                assert after.start_s >= before.end_s
                idle = after.start_s - before.end_s
                assert idle == 0 or after.start_s < backwards[(k + 1) // 4].end_s, (
                    "idle only for want of gradients"
                )
        assert clocks[1] - clocks[0] != one_bucket[1] - one_bucket[0]


def test_two_runs_are_equal_to_the_bit() -> None:
    """Clocks and traces too, whatever ran before and whatever BLAS threads were set."""
    machine = cluster(6, jitter=0.2, seed=3, stragglers={2: 1.7})
    first = minidp.spawn(steps, 6, [3, 1, 4, 1, 5, 0], 0.001, True, world="virtual", cluster=machine)
    np.random.default_rng().standard_normal((300, 300)) @ np.ones((300, 300))
    with threadpoolctl.threadpool_limits(2):
        minidp.spawn(steps, 2, [3, 1], 25.0, world="virtual")
        second = minidp.spawn(steps, 6, [3, 1, 4, 1, 5, 0], 0.001, True, world="virtual", cluster=machine)
        assert all(pool["num_threads"] <= 2 for pool in threadpoolctl.threadpool_info())
    assert first == second
    other = minidp.spawn(
        steps, 6, [3, 1, 4, 1, 5, 0], 0.001, world="virtual", cluster=cluster(6, jitter=0.2, seed=4)
    )
    assert other[0][0] != first[0][0]


def test_log_records_say_whose_they_are(caplog: pytest.LogCaptureFixture) -> None:
    def speak(comm: Any) -> None:
        logging.getLogger("mine").warning("%d of %d", comm.rank, comm.world_size)
        comm.barrier()
        logging.getLogger("mine").debug("not shown")

    minidp.spawn(speak, 3, world="virtual")
    logging.getLogger("mine").warning("afterwards")
    assert caplog.messages == ["[rank 0] 0 of 3", "[rank 1] 1 of 3", "[rank 2] 2 of 3", "afterwards"]
    assert [getattr(record, "rank", None) for record in caplog.records] == [0, 1, 2, None]


# --- load balance -----------------------------------------------------------------------------------------


def balanced(comm: Any, balance: bool) -> tuple[list[float], float, dict[str, np.ndarray], list[int]]:
    train_set, _ = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10), seed=0).astype("float64")
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    speeds = parallel.measure_speeds(s, *train_set[:96], F.cross_entropy)
    loader = data.DataLoader(
        train_set, global_batch_size=96, shard=s.shard, shuffle=True, seed=0, weights=speeds if balance else None
    )
    sizes: list[int] = []
    times: list[float] = []
    for x, y in loader.epoch(0):
        start = comm.now()
        s.forward_backward(x.astype("float64"), y, F.cross_entropy)
        ready = comm.now()
        s.step()
        sizes.append(len(x))
        times.append(ready - start)
    return speeds, times[0], s.state_dict(), sizes


def test_shares_in_proportion_to_speed() -> None:
    """Article 2.4: the same ∇L, and computing takes max n_i / speed_i instead of n / N times the slowest's."""
    machine = cluster(4, stragglers={1: 3.0, 3: 6.0})
    equal = minidp.spawn(balanced, 4, False, world="virtual", cluster=machine)
    shared = minidp.spawn(balanced, 4, True, world="virtual", cluster=machine)
    speeds = shared[0][0]
    assert all(result[0] == speeds for result in (*equal, *shared))
    assert [speeds[0] / speed for speed in speeds] == pytest.approx([1, 3, 1, 6], rel=1e-9)
    sizes = [result[3][0] for result in shared]
    assert sizes == data.sharding.proportional(96, speeds)
    assert all(abs(n - fair) < 1 for n, fair in zip(sizes, (38.4, 12.8, 38.4, 6.4)))
    assert [result[3][0] for result in equal] == [24] * 4
    for (_, _, state, _), (_, _, expected, _) in zip(shared, equal):
        assert distance(state, expected) < 1e-12
    slowest = max(result[1] for result in shared)
    assert slowest == pytest.approx(max(n / speed for n, speed in zip(sizes, speeds)), rel=0.05)
    assert slowest < max(result[1] for result in equal) / 3


def test_speeds_are_refused_in_a_step_and_without_samples() -> None:
    def run(comm: Any) -> None:
        model = nn.Linear(3, 2)
        s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
        x, y = np.zeros((4, 3), np.float32), np.zeros(4, np.int64)
        with pytest.raises(ValueError, match="needs samples"):
            parallel.measure_speeds(s, x[:0], y[:0], F.cross_entropy)
        s.forward_backward(x, y, F.cross_entropy)
        with pytest.raises(RuntimeError, match="in the middle of a step"):
            parallel.measure_speeds(s, x, y, F.cross_entropy)
        s.step()
        before = s.state_dict()
        assert len(parallel.measure_speeds(s, x, y, F.cross_entropy)) == comm.world_size
        after = s.state_dict()
        assert all((before[k] == after[k]).all() for k in before)

    minidp.spawn(run, 2, world="virtual")
    minidp.spawn(run, 2)
