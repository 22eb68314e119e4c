"""Batch norm's statistics: how batches are put together, and who holds what, alone and under strategies."""

from __future__ import annotations

import copy
import gc
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp import data, nn, optim, parallel
from minidp.comm import comm_self
from minidp.nn import functional as F
from minidp.parallel.moments import as_row, combine
from tests.told import told
from tests.training import go_on, spawned

pytestmark = pytest.mark.timeout(120)

WORLDS = ("process", "virtual")
STRATEGIES = ("DataParallel", "NaiveDataParallel")
RNG = np.random.default_rng(5)
X, Y = RNG.standard_normal((38, 3, 4, 4)) * 2 + 1, RNG.integers(0, 3, 38)  # batches of 16: the last one has 6
SAMPLES = data.ArrayDataset(X, Y)


def buffers_of(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value for name, value in state.items() if "running" in name or "num_batches" in name}


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest max|Δ| / max|·| of an array."""
    return max(float(np.abs(a[k] - b[k]).max() / max(np.abs(b[k]).max(), 1e-300)) for k in b)


# --- μ and σ² of several batches together ---------------------------------------------------------------------


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6), st.sampled_from([0.0, 1e8]))
def test_combined_moments_are_those_of_all_values(counts: list[int], offset: float) -> None:
    """Far from 0 as well, where E[x²] − μ² has lost every digit."""
    rng = np.random.default_rng(sum(counts))
    batches = [rng.standard_normal((n, 3)) + offset for n in counts]
    moments = [(x.mean(axis=0), x.var(axis=0)) if len(x) else (np.zeros(3), np.zeros(3)) for x in batches]
    total, mean, var = combine(np.stack([as_row(n, *each) for n, each in zip(counts, moments)]))
    together = np.concatenate(batches)
    assert total == len(together)
    if total == 0:
        assert not mean.any()
        assert not var.any()
        return
    assert np.allclose(mean, together.mean(axis=0), rtol=1e-15 if offset else 1e-12, atol=1e-12)
    assert np.allclose(var, together.var(axis=0), rtol=1e-7, atol=1e-12)


def test_a_mean_of_means_would_be_wrong() -> None:
    total, mean, var = combine(np.array([[1.0, 0.0, 0.0], [3.0, 4.0, 0.0]]))
    assert (total, mean, var) == (4, 3, 3)  # (1 · 9 + 3 · 1) / 4


# --- by itself ------------------------------------------------------------------------------------------------


def test_running_statistics_move_by_momentum_towards_unbiased_ones() -> None:
    layer = nn.BatchNorm2d(3, momentum=0.25).astype("float64")
    layer(X)
    layer(X[:8])
    mean, var = np.zeros(3), np.ones(3)
    for x in (X, X[:8]):
        mean = 0.75 * mean + 0.25 * x.mean(axis=(0, 2, 3))
        var = 0.75 * var + 0.25 * x.var(axis=(0, 2, 3), ddof=1)
    assert np.allclose(layer.running_mean, mean, rtol=1e-12)
    assert np.allclose(layer.running_var, var, rtol=1e-12)
    assert layer.num_batches_tracked == 2


def test_without_momentum_they_are_the_mean_over_batches() -> None:
    layer = nn.BatchNorm1d(3, momentum=None).astype("float64")
    batches = [X[i : i + 5, :, 0, 0] for i in (0, 5, 10)]
    for x in batches:
        layer(x)
    assert np.allclose(layer.running_mean, np.mean([x.mean(axis=0) for x in batches], axis=0), rtol=1e-12)


def test_evaluation_uses_them_and_leaves_them() -> None:
    layer = nn.BatchNorm2d(3).astype("float64")
    layer(X)
    before = buffers_of(layer.state_dict())
    y = layer.eval()(X[:1]).numpy()  # one sample is no exception
    mean, var = (before[name].reshape(3, 1, 1) for name in ("running_mean", "running_var"))
    assert np.allclose(y, (X[:1] - mean) / np.sqrt(var + 1e-5), rtol=1e-12)
    assert distance(buffers_of(layer.state_dict()), before) == 0


def test_training_output_has_mean_0_and_variance_1() -> None:
    y = nn.BatchNorm2d(3, eps=1e-12).astype("float64")(X).numpy()
    assert np.allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-12)
    assert np.allclose(y.var(axis=(0, 2, 3)), 1, atol=1e-9)


def test_an_empty_batch_changes_nothing() -> None:
    layer = nn.BatchNorm2d(3)
    y = layer(X[:0].astype("float32"))
    y.sum().backward()
    assert y.shape == (0, 3, 4, 4)
    assert layer.num_batches_tracked == 0
    assert not layer.weight.grad.numpy().any()


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.BatchNorm1d(3), (1, 3), "BatchNorm1d: one value a channel has no variance"),
        (nn.BatchNorm2d(3), (1, 3, 1, 1), "2 samples or more"),
        (nn.BatchNorm2d(3), (2, 3), r"must have shape \(n, c, height, width\) with c = 3, not \(2, 3\)"),
        (nn.BatchNorm1d(3), (2, 3, 4, 4), r"\(n, c\) or \(n, c, length\)"),
        (nn.BatchNorm2d(4), (2, 3, 4, 4), "c = 4"),
    ],
)
def test_wrong_batches(layer: nn.Module, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(np.ones(shape, np.float32))


def test_the_layer_that_can_not_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match=r"^1\.0: one value a channel"):
        model(np.ones((1, 2), np.float32))
    model.eval()(np.ones((1, 2), np.float32))


def test_a_single_sample_with_several_places_is_a_batch() -> None:
    nn.BatchNorm2d(3)(np.ones((1, 3, 2, 1), np.float32))


@pytest.mark.parametrize("options", [{"num_features": 0}, {"eps": 0}, {"momentum": 1.5}, {"momentum": -0.1}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"BatchNorm1d: {next(iter(options))}="):
        nn.BatchNorm1d(**{"num_features": 3, **options})


# --- under strategies -----------------------------------------------------------------------------------------


def model_of(first: bool = False, dropout: bool = False) -> nn.Sequential:
    """Two batch norms, of images and of features. `first`: one is where all ranks see what one worker would."""
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    head = [nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)]
    return nn.Sequential(
        *([nn.BatchNorm2d(3)] if first else []), *body, *([nn.Dropout(0.2)] if dropout else []), *head, seed=0
    ).astype("float64")


def trained(comm: Any, kind: str, sync: bool = False, first: bool = False, size: int = 16, **options: Any) -> Any:
    model: Any = model_of(first)
    if sync:
        model = parallel.SyncBatchNorm.convert(model, comm)
    rule = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    strategy = getattr(parallel, kind)(model, rule, comm, **options)
    go_on(strategy, SAMPLES, size, 7)
    return strategy.state_dict()


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("world", WORLDS)
def test_synchronised_n_workers_equal_one(world: str, kind: str) -> None:
    """Shards of 6, 5 and 5, in the last batch 2 each; and on all ranks the same bits, buffers included."""
    one = trained(comm_self(), "DataParallel")
    many = spawned(trained, 3, world, kind, True)
    assert distance(many[0], one) < 1e-12
    for other in many[1:]:
        assert all(np.array_equal(other[k], many[0][k]) for k in one)


def test_synchronised_with_ranks_that_have_one_sample_or_none() -> None:
    """Batches of 5 on 7 ranks: no rank could normalise its own."""
    one = trained(comm_self(), "DataParallel", size=5)
    assert distance(spawned(trained, 7, "virtual", "DataParallel", True, False, 5)[0], one) < 1e-12


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("world", WORLDS)
def test_local_ones_hold_the_same_buffers_on_all_ranks(world: str, kind: str) -> None:
    """And where activations are one worker's, the statistics are, too: those of the whole batch, cut unevenly."""
    one = buffers_of(trained(comm_self(), "DataParallel", first=True))
    many = [buffers_of(state) for state in spawned(trained, 3, world, kind, False, True)]
    assert all(np.array_equal(other[k], many[0][k]) for other in many[1:] for k in one)
    first = [name for name in one if name.startswith("0.")]
    assert len(first) == 3
    assert distance(many[0], {name: one[name] for name in first}) < 1e-12
    assert distance(many[0], one) > 1e-3  # the other layers see what differently normalised ones give them


def in_parts(comm: Any, parts: int) -> dict[str, np.ndarray]:
    """One worker that takes each batch in the parts that `parts` workers would get."""
    model = model_of()
    rule = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    strategy = parallel.DataParallel(model, rule, comm, accumulation_steps=parts)
    loaders = [
        data.DataLoader(SAMPLES, global_batch_size=16, shard=(i, parts), shuffle=True) for i in range(parts)
    ]
    while strategy.updates < 7:
        epoch, step = loaders[0].position(strategy.updates)
        for batches in zip(*(loader.epoch(epoch, start_step=step) for loader in loaders)):
            for x, y in batches:
                strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
            if strategy.updates == 7:
                break
    return strategy.state_dict()


def test_n_local_ones_equal_one_worker_that_takes_n_parts() -> None:
    """What local batch norm is, exactly: not one worker with the whole batch, but one with its parts."""
    many = spawned(trained, 3, "virtual", "DataParallel")[0]
    assert distance(many, in_parts(comm_self(), 3)) < 1e-12
    assert distance(many, trained(comm_self(), "DataParallel")) > 1e-3


def hashed(comm: Any, dropout: bool, size: int, options: dict[str, Any]) -> str:
    from hashlib import sha256

    model = model_of(dropout=dropout)
    strategy = parallel.DataParallel(model, optim.Adam(model.parameters(), lr=0.01), comm, **options)
    go_on(strategy, SAMPLES, size, 9)
    state = strategy.state_dict()
    assert int(state["1.num_batches_tracked"]) == 9
    return sha256(b"".join(state[name].tobytes() for name in sorted(state))).hexdigest()


@pytest.mark.parametrize("dropout", [False, True])
def test_micro_shards_give_the_same_bits_buffers_included(dropout: bool) -> None:
    """Batches of 19: micro-shards of 3 and 2 samples."""
    options = {"micro_shards": 8, "clip_norm": 1.0}
    where = [(1, "process"), (2, "process"), *((ranks, "virtual") for ranks in (1, 2, 4, 8))]
    hashes = {spawned(hashed, ranks, world, dropout, 19, options)[0] for ranks, world in where}
    assert len(hashes) == 1


def failing(comm: Any) -> list[float]:
    """Whether the first channel's running mean has moved: after a discarded batch, a diverged one, a good one."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    x, y = np.arange(8, dtype=np.float32).reshape(4, 2), np.array([0, 1, 0, 1])
    running = model[0].running_mean
    means: list[float] = []
    strategy.forward_backward(x, y, F.cross_entropy)
    strategy.discard()
    means.append(float(running[0]))
    strategy.forward_backward(x * (np.nan if comm.rank else 1), y, F.cross_entropy)
    with pytest.raises(parallel.NonFiniteGradient):
        strategy.step()
    strategy.discard()
    means.append(float(running[0]))
    strategy.step()  # no batch at all
    means.append(float(running[0]))
    strategy.forward_backward(x, y, F.cross_entropy)
    strategy.step()
    means.append(float(running[0]))
    strategy.release()
    model(x)  # nobody's any more: it keeps its statistics itself
    means.append(float(model[0].running_mean[0]))
    return means


@pytest.mark.parametrize("world", WORLDS)
def test_only_a_committed_step_moves_them(world: str) -> None:
    for means in spawned(failing, 2, world):
        assert means == pytest.approx([0, 0, 0, 0.3, 0.57])


def saved(comm: Any, folder: Path, updates: int, save_at: int | None) -> dict[str, np.ndarray]:
    model = model_of()
    strategy = parallel.DataParallel(model, optim.Adam(model.parameters(), lr=0.01), comm)
    if save_at is None:
        strategy.load(folder)
    else:
        go_on(strategy, SAMPLES, 16, save_at)
        strategy.save(folder)
    go_on(strategy, SAMPLES, 16, updates)
    return strategy.state_dict()


def test_a_checkpoint_holds_them(tmp_path: Path) -> None:
    whole = spawned(saved, 2, "virtual", tmp_path, 7, 4)[0]
    resumed = spawned(saved, 2, "virtual", tmp_path, 7, None)[0]
    assert all(np.array_equal(resumed[k], whole[k]) for k in whole)


# --- SyncBatchNorm: bad input, conversion -----------------------------------------------------------------------


def one_each(comm: Any, share: int) -> tuple[str, int]:
    layer = parallel.SyncBatchNorm(2, comm)
    x = np.full((share if comm.rank == 0 else 1 - share, 2), 1.0 + comm.rank, np.float32)
    message = told(lambda: layer(x))
    both = layer(np.full((1, 2), 1.0 + comm.rank, np.float32))
    assert np.allclose(both.numpy(), (-1, -1) if comm.rank == 0 else (1, 1), atol=1e-4)
    alone = layer.eval()(x) if comm.rank == 0 else None  # evaluation asks nobody
    return message, 0 if alone is None else len(alone)


@pytest.mark.parametrize("world", WORLDS)
def test_one_sample_on_all_ranks_together_is_refused_by_all(world: str) -> None:
    for message, _ in spawned(one_each, 2, world, 1):
        assert "a batch of one sample on all ranks together can't be normalised" in message


def refused(comm: Any) -> str:
    model = parallel.SyncBatchNorm.convert(model_of(), comm)
    return told(lambda: parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, micro_shards=4))


def test_with_micro_shards_it_is_refused_at_construction() -> None:
    for message in spawned(refused, 2, "virtual"):
        assert message.startswith("ValueError: micro_shards with a SyncBatchNorm (1)")


def test_conversion_keeps_what_there_is() -> None:
    shared = nn.BatchNorm1d(3, eps=1e-3, momentum=None)
    model = nn.Sequential(shared, nn.Sequential(nn.Linear(3, 3), shared), nn.BatchNorm1d(3).eval())
    before, parameters = model.state_dict(), list(model.parameters())
    converted = parallel.SyncBatchNorm.convert(model, comm_self())
    assert converted is model
    assert isinstance(model[0], parallel.SyncBatchNorm)
    assert model[0] is vars(model[1])["1"], "a tied layer stays tied"
    assert (model[0].eps, model[0].momentum, model[0].training, model[2].training) == (1e-3, None, True, False)
    assert list(model.state_dict()) == list(before)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(np.ones((4, 3), np.float32))
    assert model[0].num_batches_tracked == 2, "it was called twice"
    again = model[0]
    assert parallel.SyncBatchNorm.convert(model, comm_self())[0] is again
    assert isinstance(parallel.SyncBatchNorm.convert(nn.BatchNorm2d(2), comm_self()), parallel.SyncBatchNorm)


# --- what else must not go wrong ------------------------------------------------------------------------------


def empty_rank(comm: Any, kind: str) -> dict[str, np.ndarray]:
    model = model_of(first=True)
    strategy = getattr(parallel, kind)(model, optim.SGD(model.parameters(), lr=0.1), comm)
    share = slice(0, 6) if comm.rank == 0 else slice(6, 6)
    strategy.forward_backward(X[share], Y[share], F.cross_entropy)
    strategy.step()
    return strategy.state_dict()


@pytest.mark.parametrize("kind", STRATEGIES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_rank_without_samples_holds_the_same_buffers(world: str, kind: str) -> None:
    full, empty = spawned(empty_rank, 2, world, kind)
    assert full["0.num_batches_tracked"] == 1
    assert all(np.array_equal(full[k], empty[k]) for k in full)
    assert distance(buffers_of(full), buffers_of(empty_rank(comm_self(), kind))) == 0


def huge(comm: Any) -> tuple[str, bool]:
    """One rank sees a value whose square is beyond float32."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    before = buffers_of(model.state_dict())
    x = np.ones((4, 3), np.float32)
    x[0, 0] = 1e25 if comm.rank == 1 else 2
    with np.errstate(over="ignore", invalid="ignore"):
        strategy.forward_backward(x, np.array([0, 1, 2, 0]), F.cross_entropy)
    message = told(strategy.step)
    strategy.discard()
    after = buffers_of(model.state_dict())
    return message, all(np.array_equal(after[k], before[k]) for k in before)


@pytest.mark.parametrize("world", WORLDS)
def test_statistics_that_overflow_are_never_committed(world: str) -> None:
    for message, kept in spawned(huge, 2, world):
        assert message.startswith("NonFiniteGradient: the batch's statistics of '1' is inf on rank 1 at step 0")
        assert kept


def blamed(comm: Any) -> str:
    model = parallel.SyncBatchNorm.convert(model_of(first=True), comm)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    strategy.forward_backward(X[:8] * (np.nan if comm.rank == 1 else 1), Y[:8], F.cross_entropy)
    return told(strategy.step)


@pytest.mark.parametrize("world", WORLDS)
def test_synchronised_nan_is_told_of_the_rank_that_brought_it(world: str) -> None:
    """Though every rank's gradients have become NaN by it."""
    for message in spawned(blamed, 2, world):
        assert message.startswith("NonFiniteGradient: the batch's statistics of '0' is nan on rank 1")


def alone(comm: Any) -> dict[str, np.ndarray]:
    layer = parallel.SyncBatchNorm(3, comm).astype("float64")
    layer(X[:5] if comm.rank == 0 else X[5:16] if comm.rank == 1 else X[:0])
    return layer.state_dict()


@pytest.mark.parametrize("world", WORLDS)
def test_synchronised_ones_without_a_strategy_hold_the_same_buffers(world: str) -> None:
    one = nn.BatchNorm2d(3).astype("float64")
    one(X[:16])
    for state in spawned(alone, 3, world):
        assert distance(state, one.state_dict()) < 1e-12


def refused_late(comm: Any) -> str:
    model = model_of()
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    message = told(lambda: parallel.SyncBatchNorm.convert(model, comm))
    strategy.release()
    parallel.SyncBatchNorm.convert(model, comm)
    return message


def test_conversion_comes_before_the_strategy() -> None:
    for message in spawned(refused_late, 2, "virtual"):
        assert message.startswith("RuntimeError: a strategy trains this model already: convert it first")


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_belongs_to_nobody(sync: bool, copied: Any) -> None:
    model = model_of()
    if sync:
        model = parallel.SyncBatchNorm.convert(model, comm_self())
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm_self())
    go_on(strategy, SAMPLES, 16, 2)
    other = copied(model)
    assert distance(other.state_dict(), model.state_dict()) == 0
    assert np.array_equal(other.eval()(X[:3]).numpy(), model.eval()(X[:3]).numpy())
    other.train()
    if sync:
        with pytest.raises(RuntimeError, match="a copy of a SyncBatchNorm has no ranks"):
            other(X[:3])
    else:
        other(X[:3])
        assert other[1].num_batches_tracked == 3, "it keeps its own statistics"
    assert model[1].num_batches_tracked == 2


def test_layers_of_a_strategy_that_is_no_more_keep_their_statistics_again() -> None:
    model = model_of()
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm_self())
    model(X[:4])
    assert model[1].num_batches_tracked == 0
    del strategy
    gc.collect()
    model(X[:4])
    assert model[1].num_batches_tracked == 1
