"""Micro-shards: weights are the same bits for every number of ranks, in both worlds, and those of plain code."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import threadpoolctl

import minidp
from minidp import data, nn, optim, parallel
from minidp.comm import comm_self
from minidp.data.sharding import cut
from minidp.nn import functional as F
from minidp.parallel import norms
from minidp.parallel.buckets import pieces
from minidp.parallel.micro_shards import add_in_tree
from tests.told import told

pytestmark = pytest.mark.timeout(120)

V = 8
RULES: dict[str, Any] = {
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=1e-3),
    "clipped": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
}
DTYPES = ("float32", "float64")
UPDATES = 200


def model_of(dtype: str, dropout: bool = False) -> nn.Module:
    dropped = [nn.Dropout(0.25)] if dropout else []
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), *dropped, nn.Linear(512, 10), seed=0).astype(dtype)


def clip_of(rule: str) -> float | None:
    return 0.3 if rule == "clipped" else None


def batches(dtype: str, shard: tuple[int, int], count: int = UPDATES, size: int = 100) -> Iterator[Any]:
    """1437 samples: the last batch of an epoch has 37, so its micro-shards have 5 or 4."""
    loader = data.DataLoader(data.load_digits()[0], global_batch_size=size, shard=shard, shuffle=True, seed=0)
    for update in range(count):
        epoch, step = divmod(update, len(loader))
        if step == 0:
            epoch_batches = loader.epoch(epoch)
        x, y = next(epoch_batches)
        yield x.astype(dtype), y


def hashed(state: dict[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(state[name].tobytes() for name in sorted(state))).hexdigest()


# --- the same bits for any N ----------------------------------------------------------------------------------


def trained(comm: Any, rule: str, dtype: str) -> str:
    model = model_of(dtype)
    strategy = parallel.DataParallel(
        model, RULES[rule](model.parameters()), comm, micro_shards=V, clip_norm=clip_of(rule), bucket_cap_mb=0.05
    )
    for x, y in batches(dtype, strategy.shard):
        strategy.forward_backward(x, y, F.cross_entropy)
        strategy.step()
    return hashed(strategy.state_dict())


def all_trained(comm: Any) -> dict[str, str]:
    return {f"{rule} {dtype}": trained(comm, rule, dtype) for rule in RULES for dtype in DTYPES}


@lru_cache
def plain() -> dict[str, str]:
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        return {f"{rule} {dtype}": plainly_trained(rule, dtype) for rule in RULES for dtype in DTYPES}


def plainly_trained(rule: str, dtype: str) -> str:
    """The definition as a loop: V gradients, their tree, the mean, the update. No strategy, no slabs, no ranks."""
    model, clip = model_of(dtype), clip_of(rule)
    optimizer = RULES[rule](model.parameters())
    parameters = list(model.parameters())
    state = [{slot: np.zeros(p.size, dtype) for slot in optimizer.slots} for p in parameters]
    for update, (x, y) in enumerate(batches(dtype, (0, 1))):
        leaves = []
        for start, stop in cut(len(x), V):
            for p in parameters:
                p.grad = None
            F.cross_entropy(model(x[start:stop]), y[start:stop]).backward(gradient=stop - start)
            leaves.append([p.grad.numpy().copy() for p in parameters])
        gradients = [in_tree([leaf[i] for leaf in leaves]) / len(x) for i in range(len(parameters))]
        if clip is not None:
            gradients = clipped(model, gradients, clip)
        for p, g, s in zip(parameters, gradients, state):
            w = p.data.reshape(-1)
            scratch = tuple(np.empty_like(w) for _ in range(optimizer.scratch))
            hyper = optimizer.hyper(0, update)
            optimizer.update(w, g.reshape(-1), s, w, s, lr=hyper["lr"], t=update, hyper=hyper, scratch=scratch)
    return hashed(model.state_dict())


def in_tree(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return in_tree(parts[:half]) + in_tree(parts[half:])


def clipped(model: nn.Module, gradients: list[np.ndarray], clip: float) -> list[np.ndarray]:
    layout = nn.Layout(model)
    flat = np.zeros(layout.size, layout.dtype)
    for view, gradient in zip(layout.views(flat), gradients):
        view[...] = gradient
    cuts = pieces(layout, 0, layout.size)
    squares = np.zeros(len(cuts))
    norms.add_squares(squares, cuts, flat, 0, layout.size)
    scale = norms.clip_scale(squares, clip)
    return [gradient * gradient.dtype.type(scale) for gradient in gradients]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("world", ["process", "virtual"])
def test_weights_are_the_same_bits_for_any_number_of_ranks(world: str, world_size: int) -> None:
    options = {"blas_threads": 2} if world == "process" and world_size <= 2 else {}  # to no effect
    for found in minidp.spawn(all_trained, world_size, world=world, progress=False, **options):
        assert found == plain()


def variants(comm: Any) -> dict[str, str]:
    """Dropout; gradients that accumulate; batches of which some micro-shards, or ranks, have no sample."""
    found = {}
    for name, size, rounds, dropout in (
        ("dropout", 100, 1, True),
        ("accumulated", 100, 3, False),
        ("accumulated with dropout", 30, 2, True),
        ("fewer samples than micro-shards", 5, 1, True),
        ("one sample", 1, 1, False),
    ):
        model = model_of("float32", dropout)
        optimizer = optim.Adam(model.parameters(), lr=1e-3)
        strategy = parallel.DataParallel(model, optimizer, comm, micro_shards=V, accumulation_steps=rounds)
        for i, (x, y) in enumerate(batches("float32", strategy.shard, 20, size), 1):
            strategy.forward_backward(x, y, F.cross_entropy)
            if i % rounds == 0:
                strategy.step()
        if strategy.in_step:  # 20 = 6 · 3 + 2: the last step has one round less
            strategy.step()
        strategy.step()  # of no samples at all
        found[name] = hashed(strategy.state_dict())
    return found


def test_dropout_accumulation_and_empty_micro_shards_are_the_same_bits_too() -> None:
    everything = [
        found
        for world in ("process", "virtual")
        for world_size in (1, 2, 4, 8)
        for found in minidp.spawn(variants, world_size, world=world, progress=False)
    ]
    assert len(everything) == 2 * 15
    assert all(found == everything[0] for found in everything)
    assert len(set(everything[0].values())) == 5


class Sometimes(nn.Module):
    """Leaves out a layer where the first sample says so: some micro-shards do not use its parameters."""

    def __init__(self) -> None:
        self.first, self.extra, self.last = nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 10)

    def forward(self, x: Any) -> Any:
        h = F.relu(self.first(x))
        return self.last(F.relu(self.extra(h)) if len(x) and x[0].sum() > 300 / 16 else h)


def sometimes(comm: Any, rounds: int) -> tuple[str, int]:
    model = Sometimes().initialize(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    strategy = parallel.DataParallel(
        model, optimizer, comm, micro_shards=V, bucket_cap_mb=0, accumulation_steps=rounds
    )
    used = 0
    for i, (x, y) in enumerate(batches("float32", strategy.shard, 12, 40), 1):
        used += sum(len(x) > a and bool(x[a].sum() > 300 / 16) for a, _ in cut(len(x), V // comm.world_size))
        strategy.forward_backward(x, y, F.cross_entropy)
        if i % rounds == 0:
            strategy.step()
    return hashed(strategy.state_dict()), used


@pytest.mark.parametrize("rounds", [1, 2])
def test_parameters_that_some_micro_shards_do_not_use(rounds: int) -> None:
    found: dict[tuple[str, int], list[Any]] = {
        (world, n): minidp.spawn(sometimes, n, rounds, world=world, progress=False)
        for world in ("process", "virtual")
        for n in (1, 2, 4, 8)
    }
    assert len({bits for each in found.values() for bits, _ in each}) == 1
    used = sum(count for _, count in found["virtual", 8])
    assert 0.2 * 12 * V < used < 0.8 * 12 * V, "some do, some do not"
    assert next(iter(found.values()))[0][0] == plainly_sometimes(rounds)


def plainly_sometimes(rounds: int) -> str:
    model = Sometimes().initialize(0)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parameters = list(model.parameters())
    momenta = [np.zeros_like(p.data) for p in parameters]
    leaves: list[list[np.ndarray]] = []
    samples = 0
    for i, (x, y) in enumerate(batches("float32", (0, 1), 12, 40), 1):
        for leaf, (start, stop) in enumerate(cut(len(x), V)):
            for p in parameters:
                p.grad = None
            F.cross_entropy(model(x[start:stop]), y[start:stop]).backward(gradient=stop - start)
            mine = [np.zeros_like(p.data) if p.grad is None else p.grad.numpy().copy() for p in parameters]
            if len(leaves) < V:
                leaves.append(mine)
            else:
                leaves[leaf] = [a + b for a, b in zip(leaves[leaf], mine)]
        samples += len(x)
        if i % rounds == 0:
            for k, (p, m) in enumerate(zip(parameters, momenta)):
                w, g = p.data.reshape(-1), (in_tree([each[k] for each in leaves]) / samples).reshape(-1)
                state = {"momentum_buffer": m.reshape(-1)}
                hyper = optimizer.hyper(0, i // rounds - 1)
                scratch = tuple(np.empty_like(w) for _ in range(optimizer.scratch))
                t = i // rounds - 1
                optimizer.update(w, g, state, w, state, lr=hyper["lr"], t=t, hyper=hyper, scratch=scratch)
            leaves, samples = [], 0
    return hashed(model.state_dict())


def wide(comm: Any, how: str) -> str:
    """784 inputs, micro-shards of 16: a product of these sizes shows how many threads BLAS has."""

    def build() -> parallel.DataParallel:
        model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10), seed=0)
        return parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, micro_shards=V)

    other = build()
    strategy = build()
    if how == "another lets go":
        other.release()
    elif how == "another is forgotten":
        del other
    rng = np.random.default_rng(0)
    for step in range(4):
        if how == "somebody sets threads" and step == 2:
            threadpoolctl.threadpool_limits(2, user_api="blas")
        x, y = rng.random((128, 784), dtype=np.float32), rng.integers(0, 10, 128)
        start, stop = cut(128, comm.world_size)[comm.rank]
        strategy.forward_backward(x[start:stop], y[start:stop], F.cross_entropy)
        strategy.step()
    return hashed(strategy.state_dict())


@pytest.mark.parametrize("how", ["", "another lets go", "another is forgotten", "somebody sets threads"])
def test_blas_has_one_thread_whatever_others_do(how: str) -> None:
    (want,) = minidp.spawn(wide, 1, "", world="virtual")
    for world_size in (1, 2):
        assert set(minidp.spawn(wide, world_size, how, blas_threads=2, progress=False)) == {want}


# --- and the right ones ---------------------------------------------------------------------------------------


def in_fractions(comm: Any) -> list[Any]:
    rng = np.random.default_rng(0)
    x, y, w = (np.vectorize(Fraction)(rng.integers(-9, 10, shape)) for shape in ((11, 3), (11, 2), (2, 3)))
    model = nn.Linear(3, 2, bias=False).astype(object)
    model.weight.data = w
    optimizer = optim.SGD(model.parameters(), lr=Fraction(1, 7))
    strategy = parallel.DataParallel(model, optimizer, comm, micro_shards=4)
    start, stop = cut(len(x), comm.world_size)[comm.rank]
    strategy.forward_backward(x[start:stop], y[start:stop], F.mse_loss)
    strategy.step()
    gradient = 2 * (x @ w.T - y).T @ x / Fraction(y.size)  # ∇ of mean (x wᵀ − y)²
    assert (model.weight.data == w - Fraction(1, 7) * gradient).all()
    return [str(v) for v in model.weight.data.ravel()]


def test_the_gradient_is_that_of_the_whole_batch_exactly() -> None:
    found = [each for n in (1, 2, 4) for each in minidp.spawn(in_fractions, n, world="virtual")]
    assert all(each == found[0] for each in found)


def test_loss_and_gradients_of_a_rank_are_those_of_its_batch() -> None:
    x, y = next(batches("float64", (0, 1)))
    whole, cut_up = model_of("float64"), model_of("float64")
    loss = F.cross_entropy(whole(x), y)
    loss.backward(gradient=len(x))
    strategy = parallel.DataParallel(cut_up, optim.SGD(cut_up.parameters(), lr=0.1), comm_self(), micro_shards=V)
    assert strategy.forward_backward(x, y, F.cross_entropy).item() == pytest.approx(loss.item(), rel=1e-12)
    for p, q in zip(whole.parameters(), cut_up.parameters()):
        np.testing.assert_allclose(p.grad.numpy(), q.grad.numpy(), rtol=1e-9, atol=1e-12)
    strategy.discard()
    empty = strategy.forward_backward(x[:0], y[:0], F.cross_entropy)
    assert (empty.item(), empty.shape, empty.dtype) == (0.0, (), np.float64)


@pytest.mark.parametrize("count", [2, 4, 8, 16])
def test_upper_levels_are_the_tree_of_the_ranks(count: int) -> None:
    parts = [np.random.default_rng(i).standard_normal(1000).astype(np.float32) for i in range(count)]
    work = [np.empty(1000, np.float32) for _ in range(count.bit_length() - 1)]
    assert add_in_tree(parts, work).tobytes() == in_tree(parts).tobytes()


# --- directly, and when something goes wrong --------------------------------------------------------------------


def directly(comm: Any, how: str) -> str:
    model = model_of("float32")
    strategy = parallel.DataParallel(
        model, optim.Adam(model.parameters()), comm, micro_shards=V, accumulation_steps=2, bucket_cap_mb=0.05
    )
    for i, (x, y) in enumerate(batches("float32", strategy.shard, 6)):
        if how == "backward":
            for start, stop in cut(len(x), V // comm.world_size):
                strategy.backward(F.cross_entropy(model(x[start:stop]), y[start:stop]), samples=stop - start)
        else:
            if how == "discard" and i == 2 and comm.rank == comm.world_size - 1:
                strategy.forward_backward(x[::-1], y, F.cross_entropy)
                strategy.forward_backward(x[::-1], y, F.cross_entropy)  # a whole step: all of it has left
                strategy.discard()
                if comm.world_size < V:
                    strategy.backward(F.cross_entropy(model(x[:3]), y[:3]), samples=3)  # one micro-shard
                    assert "micro-shards make this rank's batch" in told(strategy.step)
                    strategy.discard()
            strategy.forward_backward(x, y, F.cross_entropy)
            if i == 1:
                strategy.forward_backward(x, y, F.cross_entropy)
                most = "backward was called 3 times" + (", 4 micro-shards each," if comm.world_size == 2 else "")
                assert most in told(lambda x=x, y=y: strategy.forward_backward(x, y, F.cross_entropy))
                strategy.discard()
                strategy.forward_backward(x, y, F.cross_entropy)
        strategy.step()
    return hashed(strategy.state_dict())


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("world", ["process", "virtual"])
def test_what_was_discarded_leaves_no_trace(world: str, world_size: int) -> None:
    bits = {how: minidp.spawn(directly, world_size, how, world=world, progress=False) for how in ("", "backward")}
    bits["discard"] = minidp.spawn(directly, world_size, "discard", world=world, progress=False)
    assert len({each for found in bits.values() for each in found}) == 1, bits


@pytest.mark.parametrize(
    ("micro_shards", "world_size", "says"),
    [
        (6, 2, "micro_shards=6: give a power of two"),
        (0, 1, "micro_shards=0: give a power of two"),
        (2.0, 1, "micro_shards=2.0: give a power of two"),
        (True, 1, "micro_shards=True: give a power of two"),
        (2, 4, "micro_shards=2 can't be shared by 4 ranks alike"),
        (8, 3, "micro_shards=8 can't be shared by 3 ranks alike"),
    ],
)
def test_numbers_that_make_no_tree_are_refused(micro_shards: Any, world_size: int, says: str) -> None:
    def build(comm: Any) -> None:
        model = nn.Linear(2, 2)
        parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, micro_shards=micro_shards)

    with pytest.raises(minidp.RankFailed, match=says):
        minidp.spawn(build, world_size, world="virtual")


def test_half_precision_is_refused() -> None:
    model = nn.Linear(2, 2).astype("float16")
    with pytest.raises(TypeError, match="train in float32"):
        parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), micro_shards=2)


def test_ranks_that_disagree_are_told() -> None:
    def build(comm: Any) -> None:
        model = nn.Linear(2, 2)
        options = {"micro_shards": 4 << comm.rank}
        parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, **options)

    with pytest.raises(minidp.CollectiveMismatch, match="rank 1 has built another DataParallel"):
        minidp.spawn(build, 2, world="virtual")


def threads() -> set[int]:
    return {library["num_threads"] for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"}


def test_blas_has_its_threads_back_when_the_last_strategy_is_gone() -> None:
    def build() -> parallel.DataParallel:
        model = model_of("float32")
        return parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), micro_shards=2)

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = threads()
        first, second = build(), build()
        assert threads() == {1}
        first.release()
        assert threads() == {1}
        second.release()
        second.release()
        assert threads() == before
        third = build()
        assert threads() == {1}
        del third  # without release
        gc.collect()
        assert threads() == before
        model = nn.Linear(2, 2).astype("float16")
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(TypeError, match="train in float32"):
            parallel.DataParallel(model, optimizer, comm_self(), micro_shards=2)
        assert threads() == before


# --- gradients that change ------------------------------------------------------------------------------------


def stray_write(comm: Any, where: int, value: float) -> list[Any]:
    """Rank 0 writes into rank 1's gradients after their backward: it is found, and the batch can be repeated."""
    model = nn.Linear(4, 3).initialize(0)  # 12 + 3 elements, of which 4 + 13 are padding
    strategy = parallel.DataParallel(
        model, optim.SGD(model.parameters(), lr=0.1), comm, checksum=True, clip_norm=0.1, micro_shards=4
    )
    rng = np.random.default_rng(comm.rank)
    x, y = rng.standard_normal((8, 4)).astype(np.float32), rng.integers(0, 3, 8)
    said = []
    for step in range(3):
        strategy.forward_backward(x, y, F.cross_entropy)
        comm.barrier()
        if comm.rank == 0 and step == 1 and where >= 0:
            strategy._slabs.grads[1][where] = value
        comm.barrier()
        try:
            strategy.step()
        except parallel.CorruptGradient as error:
            said.append((error.rank, error.step, "discard() and repeat the batch" in str(error)))
            strategy.discard()
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
    return [hashed(strategy.state_dict()), said]


def test_gradients_that_change_after_backward_are_found_and_forgotten() -> None:
    ((clean, said), _) = minidp.spawn(stray_write, 2, -1, 0.0, progress=False)
    assert said == []
    for where, value in ((0, 1000.0), (13, 1000.0), (13, float("nan")), (20, -0.0)):  # 13: padding
        for found in minidp.spawn(stray_write, 2, where, value, progress=False):
            assert found == [clean, [(1, 1, True)]], (where, value)


def test_ranks_without_samples_have_a_checksum_too() -> None:
    model = nn.Linear(4, 3)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), checksum=True)
    strategy.step()
    strategy.forward_backward(np.ones((2, 4), np.float32), np.zeros(2, int), F.cross_entropy)
    strategy.step()
    assert strategy.updates == 2
