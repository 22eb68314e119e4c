"""ParameterServer: with staleness 0 the bits of DataParallel; what travels, who holds what, what outlives it."""

from __future__ import annotations

import os
import time
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.nn import functional as F
from minidp.parallel.links import server_slices
from tests.servers import Desk, Pot, counter, exact, served
from tests.test_data_parallel import OPTIMIZERS, dataset, same_bits, small_model, train

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
    """A tied weight, a frozen one, one that only rank 0 uses, batch norm, dropout."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.first, self.second, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen.weight.requires_grad = False
        self.norm, self.dropout, self.sometimes = nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        x = self.dropout(self.norm(self.frozen(self.second(self.first(x)))))
        return self.sometimes(x) if self.rank == 0 else x


def decayed(update: int) -> float:
    return 0.1 / (1 + update)


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
    for _ in range(4):
        model.step(s)
    moved = [comm.traffic.bytes_sent - before[0], comm.traffic.bytes_received - before[1]]
    comm.barrier()
    return moved, s.metrics, s.layout.nbytes, s.servers(), os.getpid()


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("staleness", [0, None])
def test_a_step_sends_n_and_receives_n(staleness: int | None, world: str) -> None:
    results = served(traffic, 2, 2, staleness, world=world)
    for moved, metrics, n, servers, _ in results:
        assert metrics["bytes_sent"] == metrics["bytes_received"] == 4 * n
        assert moved == [4 * (n + 2 * 64)] * 2, "a header of 64 bytes to and from each server"
        assert [(i.lo, i.hi) for i in servers] == server_slices(n // 8, 8, 2)
        assert [i.version for i in servers] == [4 if staleness == 0 else 8] * 2
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


# -- state ---------------------------------------------------------------------------------------------------


def stateful(comm: Any, staleness: int | None) -> list[dict[str, np.ndarray]]:
    """Ranks are built differently, make 3, 4 … steps, load rank 0's state, and go on."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), seed=comm.rank).astype("float64")
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=0.1), comm, staleness=staleness)
    x, y = dataset().arrays
    states = [s.state_dict()]
    comm.barrier()
    for _ in range(3 + (comm.rank if staleness != 0 else 0)):
        s.forward_backward(x[comm.rank :: 3], y[comm.rank :: 3], F.cross_entropy)
        s.step()
    states.append(s.state_dict())
    states.append({k: p.data.copy() for k, p in model.named_parameters()})
    comm.barrier()
    s.load_state_dict({name: value * 0 + 7 + comm.rank for name, value in states[1].items()})
    states.append(s.state_dict())
    comm.barrier()
    with pytest.raises(ValueError, match="read-only"):
        next(iter(model.parameters())).data[0] = 1.0
    s.forward_backward(x[:9], y[:9], F.cross_entropy)
    s.step()
    states.append(s.state_dict())
    s.release()
    next(iter(model.parameters())).data[...] = 1.0  # its own again
    with pytest.raises(RuntimeError, match="released"):
        s.step()
    return states


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("staleness", [0, 1, None])
def test_the_state_is_the_same_on_all_ranks(staleness: int | None, world: str) -> None:
    results = served(stateful, 2, 2, staleness, world=world)
    start, trained, mine, loaded, more = results[0]
    for states in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(states, results[0], strict=True))
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), seed=0).astype("float64")
    assert same_bits(start, model.state_dict()), "rank 0's"
    assert same_bits({k: trained[k] for k in mine}, mine), "this rank computes from it as well"
    assert not same_bits(trained, start)
    assert all((value == 7).all() for value in loaded.values()), "rank 0's"
    assert not same_bits(more, loaded)


def slow_reader(comm: Any, staleness: int | None) -> float:
    model = counter(3)
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, staleness=staleness)
    if comm.rank == 1:
        reply = s._links._mail.reply
        s._links._mail.reply = lambda server: (time.sleep(0.2), reply(server))[1]  # type: ignore[method-assign]
    state = s.state_dict()
    model.step(s)
    return float(state["w"][0])


@pytest.mark.parametrize("staleness", [1, None])
def test_nobody_pushes_while_others_read_the_state(staleness: int | None) -> None:
    assert served(slow_reader, 2, 1, staleness, world="process") == [0, 0]


def saved(comm: Any, folder: Path, steps: int, staleness: int | None, resume: bool) -> tuple[Any, list[int]]:
    model = small_model()
    s = parallel.ParameterServer(model, optim.Adam(model.parameters(), lr=decayed), comm, staleness=staleness)
    if resume:
        s.load(folder)
    loaded = s.state_dict()
    x, y = dataset().arrays
    for _ in range(steps):
        rows = np.random.default_rng([comm.rank, s.updates]).integers(0, 90, 4 + comm.rank)
        s.forward_backward(x[rows], y[rows], F.cross_entropy)
        s.step()
    if not resume:
        s.save(folder)
    return (loaded, s.state_dict()), [i.version for i in s.servers()]


@pytest.mark.parametrize("world", WORLDS)
def test_a_synchronous_checkpoint_goes_on_to_the_bit(world: str, tmp_path: Path) -> None:
    at_once = served(saved, 2, 2, tmp_path / "whole", 6, 0, False, world=world)
    first = served(saved, 2, 2, tmp_path / "parts", 3, 0, False, world=world)
    then = served(saved, 2, 3, tmp_path / "parts", 3, 0, True, world=world)  # on another number of servers
    for rank in range(2):
        assert same_bits(then[rank][0][0], first[rank][0][1])
        assert same_bits(then[rank][0][1], at_once[rank][0][1])
        assert then[rank][1] == [6, 6, 6]


def several(comm: Any, at_once: bool) -> list[float]:
    """Two strategies on the same servers, one after the other, or in turns; of different models and rules."""
    models = [counter(40), counter(90)]
    build = [
        lambda: parallel.ParameterServer(models[0], optim.SGD(models[0].parameters(), lr=1), comm),
        lambda: parallel.ParameterServer(models[1], optim.SGD(models[1].parameters(), lr=2), comm, staleness=None),
    ]
    strategies = [build[0](), build[1]()] if at_once else [build[0]()]
    for i in range(3 if at_once else 1):
        models[0].step(strategies[0])
        if at_once:
            for _ in range(1 + i % 2):
                models[1].step(strategies[1])
    if not at_once:
        strategies[0].release()
        strategies.append(build[1]())
        models[1].step(strategies[1])
    last = float(strategies[1].state_dict()["w"][7])
    return [float(models[0].w.data[3]), last]


@pytest.mark.parametrize("world", WORLDS)
def test_several_strategies_on_the_same_servers(world: str) -> None:
    assert served(several, 2, 2, False, world=world) == [[-1.0, -4.0]] * 2
    assert served(several, 2, 2, True, world=world) == [[-3.0, -16.0]] * 2
