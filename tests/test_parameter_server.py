"""ParameterServer: with staleness 0 the bits of DataParallel; what travels, who holds what, what outlives it."""

from __future__ import annotations

import os
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.nn import functional as F
from minidp.parallel.links import server_slices
from tests.servers import Desk, Pot, counter, decayed, exact, served
from tests.test_data_parallel import OPTIMIZERS, dataset, same_bits, train

pytestmark = pytest.mark.timeout(60)

WORLDS = ("process", "virtual")


# -- synchronous: the bits of DataParallel -------------------------------------------------------------------


def both(function: Any, workers: int, servers: int, *args: Any, world: str = "virtual") -> tuple[Any, Any]:
    """What each worker returned, by DataParallel and by ParameterServer; ``function(comm, strategy, *args)``."""
    plain = minidp.spawn(function, workers, "DataParallel", *args, world=world, progress=False, blas_threads=1)
    return plain, served(function, workers, servers, "ParameterServer", *args, world=world)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_staleness_0_is_data_parallel_to_the_bit(optimizer: str, workers: int) -> None:
    """Shuffled global batches of 17, so shards are unequal, and the last one is short."""
    options = {"steps": 8}
    plain = minidp.spawn(train, workers, "DataParallel", optimizer, dict(options), world="virtual")
    for servers in (1, 2, 3):
        for state, _ in served(train, workers, servers, "ParameterServer", optimizer, dict(options)):
            assert same_bits(state, plain[0][0]), servers


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("options", [{"partition": "dataset"}, {"global_batch_size": 2}], ids=str)
def test_of_every_dtype_and_with_empty_shards(dtype: str, options: dict[str, Any]) -> None:
    for optimizer in ("momentum", "sgd" if dtype == "float16" else "adam"):  # whose ε is 0 in half precision
        plain, ours = both(train, 3, 2, optimizer, {"dtype": dtype, "steps": 8, **options})
        assert all(same_bits(state, plain[0][0]) for state, _ in ours)
        assert plain[0][0]["0.weight"].dtype == dtype


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_in_processes_too(optimizer: str) -> None:
    plain, ours = both(train, 2, 2, optimizer, {"steps": 8, "dtype": "float32"}, world="process")
    assert all(same_bits(state, plain[0][0]) for state, _ in ours)


class Odd(nn.Module):
    """A tied weight, a frozen one, one that only rank 0 uses, now and then, batch norm, dropout."""

    def __init__(self, rank: int) -> None:
        self.rank, self.calls = rank, 0
        self.first, self.second, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen.weight.requires_grad = False
        self.norm, self.dropout, self.sometimes = nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        x = self.dropout(self.norm(self.frozen(self.second(self.first(x)))))
        self.calls += 1
        return self.sometimes(x) if self.rank == 0 and self.calls % 2 else x


def odd_training(comm: Any, strategy: str, rule: str, parts: int, **options: Any) -> Any:
    """Two groups, one with a schedule; some steps have no samples on some ranks, the third has none at all."""
    model = Odd(comm.rank).initialize(comm.rank).astype("float64")
    groups: list[Any] = [
        {"params": [p for n, p in model.named_parameters() if "norm" in n], "lr": decayed},
        {"params": [p for n, p in model.named_parameters() if "norm" not in n and p.requires_grad]},
    ]
    opt = optim.SGD(groups, lr=0.1, momentum=0.9) if rule == "sgd" else optim.AdamW(groups, lr=0.01)
    s = getattr(parallel, strategy)(model, opt, comm, accumulation_steps=parts, **options)
    x, y = dataset().arrays
    rng = np.random.default_rng([comm.rank, comm.world_size])
    for step in range(6):
        for _ in range(parts):
            count = 0 if step == 2 else int(rng.choice([0, 0, 2, 3, 5, 8]))  # one sample has no variance
            if comm.rank != 1 or step != 4:  # never calls backward
                rows = rng.integers(0, len(x), count)
                s.forward_backward(x[rows], y[rows], F.cross_entropy)
        s.step()
    state = {f"{slot}.{n}": a for slot, of in s.optimizer_state().items() for n, a in of.items()}
    return s.state_dict(), {name: np.array(array) for name, array in state.items()}, s.updates


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rule", ["sgd", "adamw"])
def test_odd_models_groups_schedules_and_batches(rule: str, parts: int) -> None:
    for workers, servers in [(1, 2), (2, 1), (3, 3), (4, 2)]:
        plain, ours = both(odd_training, workers, servers, rule, parts)
        for rank, (state, slots, updates) in enumerate(ours):
            assert same_bits(state, plain[rank][0])
            assert same_bits(slots, plain[rank][1])
            assert updates == 6


def test_a_chain_longer_than_blocks_and_chunks() -> None:
    """Slices of several blocks (512 KB) and of several chunks of a message (64 KB)."""
    for world in WORLDS:
        plain, ours = both(long_training, 2, 2, world=world)
        assert same_bits({"w": plain[0]}, {"w": ours[0]})
        assert same_bits({"w": plain[0]}, {"w": ours[1]})


def long_training(comm: Any, strategy: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    model = Pot(rng.standard_normal(300_001).astype("float32"), rng.standard_normal(300_001))
    s = getattr(parallel, strategy)(model, optim.Adam(model.parameters(), lr=0.01), comm)
    for _ in range(3):
        model.step(s, samples=1 + 2 * comm.rank)
    return s.state_dict()["w"]


# -- exact, by hand ------------------------------------------------------------------------------------------


def halving(comm: Any, staleness: int | None, batches: list[int], **options: Any) -> list[Any]:
    """On ½ w² with η = ½, from w = 1: w after each step."""
    model = Pot(exact([1]))
    s = parallel.ParameterServer(
        model, optim.SGD(model.parameters(), lr=Fraction(1, 2)), comm, staleness=staleness, **options
    )
    seen = []
    for samples in batches:
        model.step(s, samples=samples)
        seen.append(model.w.data[0])
    return [*seen, s.servers()[0].version, s.staleness_counts]


def test_synchronous_in_fractions() -> None:
    """Σ n_i ∇L_i / Σ n_i = w, whatever the n_i."""
    for workers in (1, 2, 3):
        for *w, version, counts in served(halving, workers, 1, 0, [2, 0, 3]):
            assert w == [Fraction(1, 2), Fraction(1, 2), Fraction(1, 4)]
            assert (version, counts) == (3, {0: 2}), "without samples a step counts, and nothing is applied"


def test_asynchronous_in_fractions() -> None:
    """w ← w − η (n_i / n̄) w; n̄ is 2, the first batch, unless it is given."""
    ((*w, version, counts),) = served(halving, 1, 1, None, [2, 3, 0, 1])
    assert w == [Fraction(1, 2), Fraction(1, 8), Fraction(1, 8), Fraction(3, 32)]
    assert (version, counts) == (3, {0: 3}), "no samples: no update"
    ((*w, _, _),) = served(given_batch, 1, 1)
    assert w == [Fraction(3, 4), Fraction(15, 32)]


def given_batch(comm: Any) -> list[Any]:
    return halving(comm, 2, [2, 3], nominal_batch=4)


def test_the_nominal_batch_is_the_mean_of_first_batches() -> None:
    desk = Desk(exact([0]), 3, nominal_batch=None)
    for worker, samples, moved in [
        (0, 2, Fraction(1)),
        (1, 3, Fraction(6, 5)),  # n̄ = (2 + 3) / 2
        (0, 5, Fraction(2)),
        (2, 0, Fraction(0)),  # no batch is not a first one
        (2, 4, Fraction(4, 3)),  # n̄ = 3
    ]:
        before, version = desk.w[0], desk.session.slice.version
        desk.push(worker, exact([samples]), samples)
        reply, _ = desk.take(worker)
        assert before - desk.w[0] == moved
        assert desk.session.slice.version == version + (samples > 0) == reply.version
        assert (reply.staleness >= 0) == (samples > 0)
    assert desk.session.clocks.clocks == [2, 1, 2], "a step without samples moves the clock"


# -- what travels, and where ---------------------------------------------------------------------------------


def test_slices_cover_the_parameters_once_and_are_alike() -> None:
    for itemsize in (2, 4, 8):
        line = 64 // itemsize
        for size in [0, *(line * n for n in (1, 2, 3, 7, 10, 1001))]:
            for servers in range(1, 9):
                slices = server_slices(size, itemsize, servers)
                assert len(slices) == servers
                assert [slices[0][0], slices[-1][1]] == [0, size]
                assert all(a[1] == b[0] for a, b in pairwise(slices))
                assert all(lo % line == 0 for lo, _ in slices)
                lengths = [hi - lo for lo, hi in slices]
                assert max(lengths) - min(lengths) <= line


def traffic(comm: Any, staleness: int | None) -> tuple[list[int], dict[str, float], int, list[Any], int]:
    model = counter(1000)
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, staleness=staleness)
    comm.barrier()
    before = comm.traffic.bytes_sent, comm.traffic.bytes_received
    for samples in (1, 0, 2, 1):
        model.step(s, samples=samples)
    moved = [comm.traffic.bytes_sent - before[0], comm.traffic.bytes_received - before[1]]
    comm.barrier()
    return moved, s.metrics, s.layout.nbytes, s.servers(), os.getpid()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("staleness", [0, None])
def test_a_step_sends_n_and_receives_n(staleness: int | None, world: str) -> None:
    results = served(traffic, 2, 2, staleness, world=world)
    for moved, metrics, n, servers, _ in results:
        assert (metrics["bytes_sent"], metrics["bytes_received"]) == (3 * n, 4 * n), "no samples: nothing to send"
        headers = 4 * 2 * 80  # of a step, to and from each server
        assert moved == [3 * n + headers, 4 * n + headers]
        assert [(i.lo, i.hi) for i in servers] == server_slices(n // 8, 8, 2)
        assert [i.version for i in servers] == [4 if staleness == 0 else 6] * 2
    if world == "process":
        pids = [*(i.pid for i in results[0][3]), *(result[-1] for result in results), os.getpid()]
        assert len(set(pids)) == 5, "each a process of its own"


def small_pushes(comm: Any, size: int, staleness: int | None) -> Any:
    model = counter(size)
    s = parallel.ParameterServer(
        model, optim.SGD(model.parameters(), lr=1, momentum=0.0), comm, staleness=staleness
    )
    for _ in range(3):
        model.step(s)
    s.load_state_dict({"w": s.state_dict()["w"] + 1})
    return s.state_dict()["w"], [i.hi - i.lo for i in s.servers()]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("staleness", [0, 1, None])
def test_more_servers_than_cache_lines(staleness: int | None, world: str) -> None:
    for w, sizes in served(small_pushes, 2, 3, 9, staleness, world=world):  # 9 float64: two lines
        assert sorted(sizes) == [0, 8, 8]
        assert (w == 1 - (3 if staleness == 0 else 6)).all()
