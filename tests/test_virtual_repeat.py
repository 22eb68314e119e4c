"""Two virtual runs are equal to the bit, whatever else happens; and both worlds give the same bits."""

from __future__ import annotations

import gc
import itertools
import logging
import sys
import threading
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import minidp
from minidp import data, nn, optim, parallel, trace
from minidp.comm import ANY, AVG, MAX, MIN, SUM
from minidp.comm.schedules import ALL_REDUCE
from minidp.nn import functional as F
from minidp.sim import Cluster, FatTree

STRANGE = Cluster(
    6,
    flops=3e9,
    op_overhead_s=1e-6,
    memory_bytes_per_s=9e9,
    reduce_bytes_per_s=7e9,
    stragglers={1: 3.0},
    jitter=0.3,
    seed=7,
    topology=FatTree(3, 2.5),
    ranks_per_node=2,
)


THREADS = threadpoolctl.ThreadpoolController()


def run(fn: Any, world_size: int, *args: Any, **options: Any) -> list[Any]:
    return minidp.spawn(fn, world_size, *args, world="virtual", **options)


# --- the same again -----------------------------------------------------------------------------------------


def train(comm: Any) -> tuple[list[bytes], list[float], list[Any], int]:
    """Training, messages from anybody, works on streams: weights, losses and clocks, trace, bytes."""
    recorder = trace.Recorder(comm.rank, comm.now)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((64, 700)).astype(np.float32), rng.integers(0, 5, 64)
    model = nn.Sequential(nn.Linear(700, 600), nn.ReLU(), nn.Linear(600, 5), seed=0)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, bucket_cap_mb=0.5)
    loader = data.DataLoader(data.ArrayDataset(x, y), batch_size=8, shard=strategy.shard, shuffle=True, seed=0)
    numbers = []
    with trace.recording(recorder):
        for bx, by in loader.epoch(0):
            loss = strategy.forward_backward(bx, by, F.cross_entropy)
            strategy.step()
            numbers += [float(loss), comm.now()]
        token = np.zeros(1)
        if comm.rank == 0:
            numbers += [comm.recv(token, ANY) for _ in range(comm.world_size - 1)]
        else:
            comm.send(token, 0)
        with trace.span("state_dict"):
            state = strategy.state_dict()
    events = [(e.name, e.category, e.start_s, e.end_s, str(e.args)) for e in recorder.events]
    return [value.tobytes() for value in state.values()], [*numbers, comm.now()], events, comm.traffic.bytes_sent


def other_runs() -> None:
    run(train, 3)
    with pytest.raises(minidp.RankFailed):
        run(lambda comm: comm.recv(np.zeros(1), 0), 3)


def global_state() -> None:
    np.random.seed(5)
    np.random.random(17)
    threadpoolctl.threadpool_limits(2, user_api="blas")


def test_runs_are_equal_to_the_bit_whatever_ran_before() -> None:
    threads = [(module["filepath"], module["num_threads"]) for module in threadpoolctl.threadpool_info()]
    first = run(train, 7, cluster=STRANGE)
    assert all(result[0] == first[0][0] for result in first), "the same weights on all ranks"
    assert len({result[1][-1] for result in first}) == 1
    assert any("stream" in event[4] for event in first[0][2])
    try:
        for disturb in (other_runs, global_state):
            disturb()
            state = str(np.random.get_state())
            assert run(train, 7, cluster=STRANGE) == first
            assert str(np.random.get_state()) == state
        with threadpoolctl.threadpool_limits(2, user_api="blas"):
            assert run(train, 7, cluster=STRANGE) == first
            info = threadpoolctl.threadpool_info()
            assert all(m["num_threads"] == 2 for m in info if m["user_api"] == "blas"), "as it was set"
    finally:
        for path, number in threads:
            threadpoolctl.ThreadpoolController().select(filepath=path).limit(limits=number)


def test_one_thread_is_what_blas_has_inside() -> None:
    def threads(comm: Any) -> set[int]:
        return {m["num_threads"] for m in threadpoolctl.threadpool_info() if m["user_api"] == "blas"}

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        assert run(threads, 2) == [{1}, {1}]


def test_two_threads_may_have_a_run_each() -> None:
    """What a run sets, BLAS threads above all, is not put back while another runs, and is put back at the end."""
    results: dict[int, Any] = {}

    def settings() -> list[Any]:
        return [gc.get_threshold(), logging.getLogRecordFactory(), [m["num_threads"] for m in THREADS.info()]]

    before = settings()

    def one(seed: int) -> None:
        def work(comm: Any) -> list[float]:
            x = np.random.default_rng(seed + comm.rank).standard_normal(100)
            for _ in range(50):
                comm.all_reduce(x, minidp.ReduceOp.AVG)
            return [*x, comm.now()]

        results[seed] = run(work, 4)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # else the first may be done before the second begins
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert settings() == before
    together = dict(results)
    for seed in range(2):
        one(seed)
        assert results[seed] == together[seed]


# --- the process world --------------------------------------------------------------------------------------


def every_collective(comm: Any) -> list[tuple[str, bytes]]:
    p, r = comm.world_size, comm.rank
    found: list[tuple[str, bytes]] = []
    for n, dtype in itertools.product((1, p - 1, p, 1000, 4096 * p + 1), ("float32", "float16")):
        rng = np.random.default_rng((r, n))
        fresh = (rng.standard_normal((p, n)) * 10.0 ** rng.integers(-2, 3, (p, n))).astype(dtype)

        def note(what: object, x: np.ndarray | None, n: int = n, dtype: str = dtype) -> None:
            found.append((f"{what} {dtype}[{n}]", b"" if x is None else x.tobytes()))

        for op in (SUM, AVG, MAX, MIN):
            for algorithm in (None, *ALL_REDUCE):
                x = fresh[0].copy()
                comm.all_reduce(x, op, algorithm)
                note((op.value, algorithm), x)
            x, out = fresh[0].copy(), np.empty(n, dtype)
            comm.reduce(x, p - 1, op)
            note((op.value, "reduce"), x)
            comm.reduce_scatter(out, fresh, op)
            note((op.value, "reduce_scatter"), out)
        x, out = fresh[0].copy(), np.empty_like(fresh)
        comm.broadcast(x, p - 1)
        note("broadcast", x)
        comm.all_gather(out, fresh[0])
        note("all_gather", out)
        comm.all_to_all(out, fresh)
        note("all_to_all", out)
        note("gather", comm.gather(fresh[0], p - 1))
        note("scatter", comm.scatter(fresh if r == 0 else None, 0))
        comm.all_reduce(x, async_op=True).wait()
        note("async", x)
    return found


@pytest.mark.parametrize("p", [1, 2, 3])
def test_both_worlds_give_the_same_bits(p: int) -> None:
    virtual, process = run(every_collective, p), minidp.spawn(every_collective, p, timeout_s=60)
    for rank in range(p):
        different = [what for (what, a), (_, b) in zip(virtual[rank], process[rank]) if a != b]
        assert not different, f"rank {rank}: {different}"


def halves_beyond_their_range(comm: Any) -> list[float]:
    x = np.full(comm.world_size, 40_000, np.float16)  # the sum is larger than float16 can hold
    comm.all_reduce(x, AVG)
    return x.tolist()


def test_half_precision_is_averaged_before_it_is_rounded() -> None:
    assert run(halves_beyond_their_range, 2) == [[40_000.0] * 2] * 2


# --- exact numbers ------------------------------------------------------------------------------------------


def fraction(rank: int, i: int) -> Fraction:
    return Fraction(2 * i - 7 * rank + 1, 3 + 2 * rank + i)


def fractions_reduced(comm: Any) -> None:
    p, r = comm.world_size, comm.rank
    for n in (0, 1, p - 1, p + 1, 23):
        columns = [[fraction(rank, i) for rank in range(p)] for i in range(n)]
        for algorithm in (None, *ALL_REDUCE):
            for op, want in ((SUM, sum), (AVG, lambda c: sum(c) / p), (MAX, max), (MIN, min)):
                x = np.array([fraction(r, i) for i in range(n)], object)
                comm.all_reduce(x, op, algorithm)
                assert x.tolist() == [want(column) for column in columns], (n, algorithm, op)
                assert all(type(value) is Fraction for value in x)
    mine, out = np.array([[fraction(r, 9 * i + r)] for i in range(p)], object), np.empty((p, 1), object)
    comm.all_to_all(out, mine)
    assert out[:, 0].tolist() == [fraction(j, 9 * r + j) for j in range(p)]
    part = np.empty(1, object)
    comm.reduce_scatter(part, mine)
    assert part[0] == sum(fraction(j, 9 * r + j) for j in range(p))
    before = comm.traffic.bytes_sent
    got = np.empty((2, 1), object)
    sending = comm.send(np.array([fraction(r, 1), fraction(r, 2)], object), (r + 1) % p, async_op=True)
    assert comm.recv(got, (r - 1) % p) == (r - 1) % p
    sending.wait()
    assert got[:, 0].tolist() == [fraction((r - 1) % p, 1), fraction((r - 1) % p, 2)]
    assert comm.traffic.bytes_sent - before == 16 * (comm.world_size > 1), "a reference counts 8 bytes"


@pytest.mark.parametrize("p", range(1, 10))
def test_fractions_are_reduced_exactly_and_travel(p: int) -> None:
    run(fractions_reduced, p)
