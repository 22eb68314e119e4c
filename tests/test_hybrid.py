"""dp × tp × pp ranks equal one: every mesh trains the model that DataParallel trains, and that one rank trains."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from minidp import nn, optim, parallel
from minidp.nn import functional as F
from tests.leftovers import nothing_is_left
from tests.meshes import batch, build, distance, factorisations, forward, gpt, losses_of, same, train
from tests.training import spawned

pytestmark = pytest.mark.timeout(60)
UNEVEN = [16, 16, 13, 5, 1, 0, 16, 3]  # short batches, and fewer samples than ranks
MORE = {"dropout": 0.2, "clip_norm": 0.5}


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    with nothing_is_left():
        yield


@cache
def dense(dp: int, world: str, sizes: tuple[int, ...], m: int, options: tuple[tuple[str, Any], ...]) -> list[Any]:
    return spawned(train, dp, world, None, list(sizes), m, dict(options))


@pytest.mark.parametrize("mesh", factorisations(8), ids=str)
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_eight_ranks_equal_one(rule: str, mesh: tuple[int, int, int]) -> None:
    """Eight heads, eight blocks, ten steps, two micro-batches."""
    sizes, options = [16] * 10, {"rule": rule, "heads": 8, "blocks": 8}
    alone = dense(1, "virtual", tuple(sizes), 1, tuple(options.items()))
    schedule = "gpipe" if mesh[2] == 4 else "1f1b"
    results = spawned(train, 8, "virtual", mesh, sizes, 2, options | {"schedule": schedule})
    want, found = losses_of(alone, sizes), losses_of(results, sizes)
    np.testing.assert_allclose(found, want, rtol=1e-9)
    assert want[0] - want[-1] > 1e-3, "something is learnt"
    assert all(same(results[0][1], state) for _, state, *_ in results), "all ranks hold the same w"
    assert distance(alone[0][1], results[0][1]) < 1e-9


def compare(mesh: tuple[int, int, int], world: str, rule: str, m: int, options: dict[str, Any]) -> None:
    """With DataParallel on dp ranks, dropout included: to the bit, where no sum is in another order."""
    dp, tp, pp = mesh
    options = {"rule": rule, **options}
    want = dense(dp, world, tuple(UNEVEN), m, tuple(options.items()))
    results = spawned(train, dp * tp * pp, world, mesh, UNEVEN, m, options)
    np.testing.assert_allclose(losses_of(results, UNEVEN), losses_of(want, UNEVEN), rtol=1e-9, atol=1e-12)
    assert all(same(results[0][1], state) for _, state, *_ in results)
    if tp == 1:
        assert same(want[0][1], results[0][1])
    assert distance(want[0][1], results[0][1]) < 1e-9


@pytest.mark.parametrize("mesh", [*factorisations(8), *factorisations(4), (1, 2, 3), (3, 1, 2)], ids=str)
def test_dropout_clipping_and_uneven_batches(mesh: tuple[int, int, int]) -> None:
    compare(mesh, "virtual", "adam", 1 if mesh[0] == 3 else 2, MORE | {"heads": 8, "blocks": 5})


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"dropout": 0.3}], ids=str)
def test_each_by_itself(options: dict[str, Any]) -> None:
    for mesh in ((2, 1, 2), (2, 2, 1), (1, 2, 2)):
        compare(mesh, "virtual", "momentum", 1, options)


@pytest.mark.parametrize("mesh", [*factorisations(2), *factorisations(4)], ids=str)
def test_in_processes(mesh: tuple[int, int, int]) -> None:
    compare(mesh, "process", "adam", 2, MORE)


def test_it_does_clip() -> None:
    """Else a norm that is wrong would not be seen."""
    clipped, free = (
        dense(1, "virtual", tuple(UNEVEN), 1, (("rule", "momentum"), *o)) for o in [(("clip_norm", 0.5),), ()]
    )
    assert distance(free[0][1], clipped[0][1]) > 1e-4


# -- compression along dp ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["topk:0.1+ef", "int8", "powersgd:2", "qsgd:4+ef"])
def test_compressed_gradients(spec: str) -> None:
    """tp = 1: the bits of CompressedDataParallel. tp = 2: parts are compressed by themselves, copies alike."""
    sizes, options = [16] * 6, {"rule": "momentum", "compress": spec}
    want = dense(2, "virtual", tuple(sizes), 2, tuple(options.items()))
    for mesh in ((2, 1, 2), (2, 1, 1), (2, 2, 1), (2, 2, 2)):
        ranks = int(np.prod(mesh))
        results = spawned(train, ranks, "virtual", mesh, sizes, 2, options)
        assert all(same(results[0][1], state) for _, state, *_ in results), "copies are the same, bit for bit"
        assert same(want[0][1], results[0][1]) == (mesh[1] == 1)
        losses = losses_of(results, sizes)
        np.testing.assert_allclose(losses, losses_of(want, sizes), rtol=1e-2)
    at_once = spawned(train, 4, "process", (2, 1, 2), sizes, 2, options)
    assert same(want[0][1], at_once[0][1])


# -- what a step is ------------------------------------------------------------------------------------------


def accumulated(comm: Any, mesh: tuple[int, int, int], times: int) -> dict[str, np.ndarray]:
    s = build(comm, mesh, accumulation_steps=times)
    for step in range(3):
        x, y = batch(step, 8)
        for i in range(times):
            rows = slice(i * 8 // times, (i + 1) * 8 // times)
            s.forward_backward(x[rows], y[rows], F.cross_entropy)
        s.step()
    return s.state_dict()


@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2)], ids=str)
def test_accumulation_equals_one_batch(mesh: tuple[int, int, int]) -> None:
    once, twice = (spawned(accumulated, 2, "virtual", mesh, times)[0] for times in (1, 2))
    assert distance(once, twice) < 1e-9


def direct(comm: Any, by_hand: bool) -> dict[str, np.ndarray]:
    s = build(comm, (1, 2, 1))
    for step in range(3):
        x, y = batch(step, 8)
        if by_hand:
            s.backward(F.cross_entropy(s.model(x), y), samples=8)
        else:
            s.forward_backward(x, y, F.cross_entropy)
        s.step()
    return s.state_dict()


def test_backward_without_a_pipeline() -> None:
    assert same(*(spawned(direct, 2, "virtual", by_hand)[0] for by_hand in (False, True)))


def synchronised(comm: Any, mesh: dict[str, int]) -> tuple[dict[str, np.ndarray], Any]:
    place = parallel.Mesh(comm, **mesh)
    norm = parallel.SyncBatchNorm(8, place.data)
    model = nn.Sequential(
        nn.Linear(6, 8), norm, nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)
    ).initialize(1)
    model.astype("float64")
    s = parallel.HybridParallel(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), place)
    rng = np.random.default_rng(0)
    index, count = s.shard
    for _ in range(4):
        x, y = rng.standard_normal((12, 6)), rng.integers(0, 3, 12)
        mine = slice(index * 12 // count, (index + 1) * 12 // count)
        s.forward_backward(x[mine], y[mine], F.cross_entropy)
        s.step()
    return s.state_dict(), None


def test_a_batch_norm_over_dp() -> None:
    """Without a pipeline a batch is one, whatever the mesh."""
    want = spawned(synchronised, 1, "virtual", {})[0][0]
    for mesh in ({"dp": 2}, {"dp": 2, "tp": 2}, {"dp": 3}, {"tp": 4}):
        for state, _ in spawned(synchronised, int(np.prod(list(mesh.values()))), "virtual", mesh):
            assert distance(want, state) < 1e-12


def predicted(comm: Any, mesh: tuple[int, int, int]) -> np.ndarray:
    s = build(comm, mesh, dropout=0.5)
    forward(s, 0, 8)
    s.step()
    s.model.eval()
    got: np.ndarray = s.predict(batch(5, 3)[0]).numpy()
    whole = gpt()
    whole.load_state_dict(s.state_dict())
    np.testing.assert_allclose(got, whole(batch(5, 3)[0]).numpy(), rtol=1e-12, atol=1e-13)
    assert s.predict(batch(5, 0)[0]).shape == (0, 4, 32)
    return got


@pytest.mark.parametrize("mesh", factorisations(4), ids=str)
def test_predict_is_the_whole_model_on_every_rank(mesh: tuple[int, int, int]) -> None:
    first, *others = spawned(predicted, 4, "virtual", mesh)
    assert all(other.tobytes() == first.tobytes() for other in others)
