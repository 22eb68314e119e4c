"""Corners of HybridParallel: what it refuses, what it leaves as it was, unusual models and batches."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.nn import functional as F
from minidp.parallel import HybridParallel, Mesh, NonFiniteGradient
from tests.device_double import DoubleDevice

MESHES = ({"dp": 2}, {"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "pp": 2})


def spawned(fn: Any, mesh: dict[str, int], *args: Any, **options: Any) -> list[Any]:
    size = int(np.prod(list(mesh.values()), dtype=int))
    return minidp.spawn(fn, size, mesh, *args, world="virtual", progress=False, **options)


def mlp(*between: nn.Module, seed: int = 0) -> nn.Sequential:
    layers = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), *between, nn.ReLU(), nn.Linear(8, 4)
    return nn.Sequential(*layers, seed=seed).astype("float64")


def built(comm: Any, mesh: dict[str, int], model: nn.Module, rule: Any = optim.SGD, **options: Any) -> Any:
    return HybridParallel(model, rule(model.parameters(), lr=0.1), Mesh(comm, **mesh), **options)


def batch(step: int, samples: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    return rng.normal(size=(samples, 6)), rng.integers(0, 4, samples)


def steps(strategy: Any, count: int, first: int = 0) -> None:
    index, ranks = strategy.shard
    for step in range(first, first + count):
        x, y = batch(step)
        mine = slice(index * 8 // ranks, (index + 1) * 8 // ranks)
        strategy.forward_backward(x[mine], y[mine], F.cross_entropy)
        strategy.step()


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and (a[k] == b[k]).all() for k in a)


# --- state ------------------------------------------------------------------------------------------------------


def batch_normed(comm: Any, mesh: dict[str, int], folder: Path) -> bool:
    strategy = built(comm, mesh, mlp(nn.BatchNorm1d(8)), optim.Adam, micro_batches=2)
    steps(strategy, 3)
    strategy.save(folder)
    again = built(comm, mesh, mlp(nn.BatchNorm1d(8), seed=1), optim.Adam, micro_batches=2)
    again.load(folder)
    loaded = same(again.state_dict(), strategy.state_dict())
    steps(strategy, 2, 3)
    steps(again, 2, 3)
    return loaded and same(again.state_dict(), strategy.state_dict()) and again.updates == 5


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_batch_norm_is_saved_and_loaded(mesh: dict[str, int], tmp_path: Path) -> None:
    assert all(spawned(batch_normed, mesh, tmp_path))


def compressed(comm: Any, mesh: dict[str, int], spec: str, folder: Path, save: bool) -> dict[str, np.ndarray]:
    strategy = built(comm, mesh, mlp(), compress=spec)
    if not save:
        strategy.load(folder)
    steps(strategy, 3, strategy.updates)
    if save:
        strategy.save(folder)
    return dict(strategy.state_dict())


@pytest.mark.parametrize("spec", ["randomk:0.5", "qsgd:4", "powersgd:2"])
@pytest.mark.parametrize(("before", "after"), [("pp", "dp"), ("pp", "tp"), ("tp", "dp"), ("dp", "pp")])
def test_compressors_without_residuals_go_on_alike_in_another_mesh(
    spec: str, before: str, after: str, tmp_path: Path
) -> None:
    spawned(compressed, {before: 2}, spec, tmp_path, True)
    one, two = spawned(compressed, {after: 2}, spec, tmp_path, False)
    assert same(one, two)


def test_residuals_belong_to_their_mesh(tmp_path: Path) -> None:
    spawned(compressed, {"pp": 2}, "topk:0.5+ef", tmp_path, True)
    spawned(compressed, {"pp": 2}, "topk:0.5+ef", tmp_path, False)
    with pytest.raises(minidp.CommError, match="ValueError: the checkpoint holds residuals"):
        spawned(compressed, {"dp": 2}, "topk:0.5+ef", tmp_path, False)


def bad_at_the_end(comm: Any, mesh: dict[str, int]) -> tuple[int, int]:
    strategy = built(comm, mesh, mlp())
    steps(strategy, 2)
    x, y = batch(2)
    strategy.forward_backward(x * np.nan, y, F.cross_entropy)
    strategy.step()
    with pytest.raises(NonFiniteGradient):
        strategy.state_dict()
    return strategy.updates, strategy._inner.updates


def test_what_a_device_takes_back_is_not_counted() -> None:
    assert spawned(bad_at_the_end, {"tp": 2}, device=DoubleDevice()) == [(2, 2)] * 2


# --- refused, and nothing changed -----------------------------------------------------------------------------


def refused(comm: Any, mesh: dict[str, int], options: dict[str, Any]) -> tuple[str, bool, bool]:
    model = mlp()
    before, parameters = model.state_dict(), list(model.parameters())
    with pytest.raises(ValueError, match=r".") as error:
        built(comm, mesh, model, **options)
    whole = same(model.state_dict(), before) and [*model.parameters()] == parameters
    steps(built(comm, mesh, model), 1)  # it can still be used
    return str(error.value), whole, True


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"compress": "nonsense"}, "nonsense"),
        ({"accumulation_steps": 0}, "accumulation_steps=0"),
        ({"bucket_cap_mb": -1}, "bucket_cap_mb=-1"),
        ({"micro_batches": 0}, "micro_batches=0"),
        ({"schedule": "zigzag"}, "there are '1f1b', 'gpipe'"),
    ],
)
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_refused_option_leaves_the_model_whole(mesh: dict[str, int], options: dict[str, Any], text: str) -> None:
    for said, *whole in spawned(refused, mesh, options):
        assert text in said
        assert all(whole)


def with_own(comm: Any, mesh: dict[str, int], options: list[dict[str, Any]]) -> None:
    built(comm, mesh, mlp(), **options[comm.rank])


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        [{"clip_norm": 0.1}, {"clip_norm": 0.5}],
        [{}, {"compress": "int8"}],
        [{"check_finite": False}, {}],
        [{"micro_batches": 2}, {"micro_batches": 4}],
    ],
    ids=str,
)
def test_all_ranks_must_give_the_same_options(mesh: dict[str, int], options: list[dict[str, Any]]) -> None:
    with pytest.raises(minidp.CommError, match="rank 1 has built another HybridParallel than rank 0"):
        spawned(with_own, mesh, options)


def cut_twice(comm: Any, mesh: dict[str, int]) -> str:
    model = mlp()
    built(comm, mesh, model).release()
    with pytest.raises(ValueError, match=r".") as error:
        built(comm, mesh, model)
    return str(error.value)


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"pp": 2}], ids=str)
def test_a_model_is_cut_once(mesh: dict[str, int]) -> None:
    assert "has been cut already" in spawned(cut_twice, mesh)[0]


def one_dropout_twice(comm: Any, mesh: dict[str, int]) -> None:
    drop = nn.Dropout(0.5)
    built(comm, mesh, nn.Sequential(nn.Linear(6, 8), drop, nn.Linear(8, 8), drop, nn.Linear(8, 4)))


def test_a_dropout_on_two_stages_is_refused() -> None:
    with pytest.raises(minidp.CommError, match="are one Dropout, on stages"):
        spawned(one_dropout_twice, {"pp": 3})


# --- models and batches out of the way -------------------------------------------------------------------------


def halves(comm: Any, mesh: dict[str, int], compress: str | None) -> list[dict[str, np.ndarray]]:
    """A stage of the three has no parameters, so that it does not know that the others' are halves."""
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).astype("float16")
    strategy = built(comm, mesh, model, compress=compress)
    steps(strategy, 3)
    return [strategy.state_dict()]


@pytest.mark.parametrize("compress", [None, "int8", "topk:0.5+ef"])
def test_a_stage_without_parameters_beside_halves(compress: str | None) -> None:
    (whole,) = spawned(halves, {"pp": 1}, compress)[0]
    for (spread,) in spawned(halves, {"pp": 3}, compress):
        assert all(np.allclose(spread[name], whole[name], atol=2e-3) for name in whole)


def starts_with_nothing(comm: Any, mesh: dict[str, int]) -> tuple[bool, dict[str, np.ndarray]]:
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 4)).astype("float64")
    strategy = built(comm, mesh, model, example=np.zeros((1, 6)), micro_batches=2)
    steps(strategy, 2)
    x, _ = batch(0)
    return strategy.predict(x).shape == (8, 4), strategy.state_dict()


def test_a_stage_that_makes_no_tensor() -> None:
    (_, whole), *_ = spawned(starts_with_nothing, {"pp": 1})
    assert all(right and same(state, whole) for right, state in spawned(starts_with_nothing, {"pp": 2}))


def by_hand(comm: Any, mesh: dict[str, int]) -> bool:
    model = mlp()
    strategy = built(comm, mesh, model)
    steps(strategy, 1)
    before = strategy.state_dict()
    strategy.optimizer.groups[0]["lr"] = 0.0
    steps(strategy, 1, 1)
    return same(strategy.state_dict(), before)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_rate_that_is_changed_by_hand_counts(mesh: dict[str, int]) -> None:
    assert all(spawned(by_hand, mesh))


def all_frozen(comm: Any, mesh: dict[str, int], folder: Path) -> None:
    model = mlp()
    for parameter in model.parameters():
        parameter.requires_grad = False
    built(comm, mesh, model, optim.Adam).save(folder)


def test_all_frozen_can_be_saved(tmp_path: Path) -> None:
    spawned(all_frozen, {"pp": 2}, tmp_path)


def losses_of(comm: Any, mesh: dict[str, int], dtype: Any, loss_fn: Callable[..., Any], micro: int) -> Any:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).astype(dtype)
    strategy = built(comm, mesh, model, micro_batches=micro)
    x, _ = batch(0)
    x = np.vectorize(Fraction)(np.round(x * 8)) / 8 if dtype is object else x
    loss = strategy.forward_backward(x, x[:, :4] * 1, loss_fn)
    return loss.data.dtype, loss.item()


@pytest.mark.parametrize("mesh", [{"pp": 2}, {"tp": 2}], ids=str)
def test_a_loss_keeps_its_kind(mesh: dict[str, int]) -> None:
    (want,) = spawned(losses_of, {"dp": 1}, object, F.mse_loss, 1)
    assert isinstance(want[1], Fraction)
    assert spawned(losses_of, mesh, object, F.mse_loss, 4) == [want] * 2
    kind, loss = spawned(losses_of, mesh, "float16", lambda out, y: F.mse_loss(out, y) * 2_000, 4)[0]
    assert kind == np.float16
    assert 1_000 < loss < 60_000  # eight times as much would be infinite


def short_batches(comm: Any, mesh: dict[str, int], folder: Path) -> bool:
    strategy = built(comm, mesh, mlp(), micro_batches=4)
    steps(strategy, 1)
    strategy.save(folder)
    resumed = built(comm, mesh, mlp(seed=1), micro_batches=4)
    resumed.load(folder)
    for each in (strategy, resumed):
        for samples in (6, 3, 0, 8):  # an epoch's last ones
            each.forward_backward(*batch(samples, samples), F.cross_entropy)
            each.step()
    return same(strategy.state_dict(), resumed.state_dict())


def test_only_the_first_batch_must_be_cut_equally(tmp_path: Path) -> None:
    assert all(spawned(short_batches, {"pp": 2}, tmp_path))


def direct(comm: Any, mesh: dict[str, int]) -> str:
    model = mlp()
    strategy = built(comm, mesh, model, micro_batches=2)
    x, y = batch(0)
    for _ in range(2):
        strategy.backward(F.cross_entropy(model(x), y), samples=8)
    with pytest.raises(RuntimeError) as error:
        strategy.backward(F.cross_entropy(model(x), y), samples=8)
    return str(error.value)


def test_backward_without_a_pipeline_may_be_called_as_often_as_there_are_micro_batches() -> None:
    assert "backward was called 3 times before step()" in spawned(direct, {"tp": 2})[0]


def over_wrong_ranks(comm: Any, mesh: dict[str, int]) -> None:
    model = nn.Sequential(nn.Linear(6, 8), parallel.SyncBatchNorm(8, comm), nn.Linear(8, 4))
    built(comm, mesh, model)


def test_a_sync_batch_norm_is_over_dp() -> None:
    with pytest.raises(minidp.CommError, match="is a SyncBatchNorm over 4 ranks, and there are 2 along dp"):
        spawned(over_wrong_ranks, {"dp": 2, "pp": 2})
