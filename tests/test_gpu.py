"""The laws on a real GPU: the CPU's results, ranks that share it, the same bits where they are promised.

    pytest -m gpu

Collected everywhere; skipped, with the reason, where there is no GPU.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend, compress, data, nn, optim, parallel
from minidp.autograd import Tensor
from minidp.backend import products
from minidp.nn import functional as F
from tests import device_cases
from tests.leftovers import nothing_is_left
from tests.test_autograd_ops import CASES, make
from tests.test_device_double import HOLD_ARRAYS, normalised_cnn, pictures, text

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]
ONE = "cuda:0"  # all ranks share it


@pytest.fixture(scope="module")
def xp() -> Any:
    device = backend.get_device(ONE)
    device.start()
    return device.xp


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> bool:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    return bool(np.allclose(found, expected, rtol=tolerance, atol=tolerance * scale, equal_nan=True))


# -- the engine ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "shapes"), [c for c in CASES if c.values[0].name not in HOLD_ARRAYS])
def test_every_operation(op: Any, shapes: Any, xp: Any) -> None:
    host = [Tensor(x, requires_grad=True) for x in make(op, shapes)]
    device = [Tensor(xp.asarray(x), requires_grad=True) for x in make(op, shapes)]
    expected, out = op.function(*host), op.function(*device)
    gradient = np.random.default_rng(0).standard_normal(out.shape)
    expected.backward(gradient)
    out.backward(xp.asarray(gradient))
    assert close(out.numpy(), expected.numpy(), 1e-9)
    for h, d in zip(host, device):
        assert close(d.grad.numpy(), h.grad.numpy(), 1e-9)


@pytest.mark.parametrize(
    ("build", "batch"),
    [
        (lambda: nn.cnn((2, 7, 6), (3, 4), 3), pictures),
        (lambda: nn.GPT(11, 9, 8, 2, 2, dropout=0.2), text),
        (normalised_cnn, pictures),
    ],
    ids=["cnn", "GPT", "BatchNorm"],
)
def test_models(build: Any, batch: Any, xp: Any) -> None:
    host, device = build(), build().to(ONE)
    optimizers = [optim.SGD(model.parameters(), lr=0.05, momentum=0.9) for model in (host, device)]
    for t in range(5):
        x, y = batch(np.random.default_rng(t))
        for model, optimizer in zip((host, device), optimizers):
            with nn.dropout_scope(update=t):
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    reference = host.state_dict()
    assert all(close(array, reference[name]) for name, array in device.state_dict().items())


def test_dropout_has_the_masks_of_the_host(xp: Any) -> None:
    for n in (1, 7, 1000, 300_001):
        masks = [F.dropout(a, 0.3, ("layer", n)).numpy() for a in (np.ones(n, np.float32), xp.ones(n, np.float32))]
        assert masks[0].tobytes() == masks[1].tobytes()


@pytest.mark.parametrize("rule", [optim.SGD, optim.Adam, optim.AdamW])
def test_update_rules_have_the_bits_of_the_cpu(rule: Any, xp: Any) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal(100_003).astype(np.float32)
    options = {"momentum": 0.9, "nesterov": True} if rule is optim.SGD else {}
    models = [nn.Parameter(values), nn.Parameter(xp.asarray(values))]
    optimizers = [rule([p], lr=0.01, weight_decay=0.1, **options) for p in models]
    for _ in range(5):
        g = rng.standard_normal(values.size).astype(np.float32)
        for p, optimizer in zip(models, optimizers):
            p.grad = backend.asarray(g, backend.array_module(p.data))
            optimizer.step()
    assert models[0].numpy().tobytes() == models[1].numpy().tobytes()


@pytest.mark.parametrize("spec", ["fp16", "bf16", "bf16:truncate", "int8", "sign", "topk:0.01", "topk:0.01+ef"])
def test_compressors_have_the_bits_of_the_cpu(spec: str, xp: Any) -> None:
    here, there = compress.get(spec), compress.get(spec)
    for t in range(3):
        x = np.random.default_rng(t).standard_normal((300, 70)).astype(np.float32)
        mine, theirs = here.compress(x, "w"), there.compress(xp.asarray(x), "w")
        for a, b in zip(mine.arrays, theirs.arrays, strict=True):
            assert backend.to_numpy(b).tobytes() == a.tobytes()
        assert backend.to_numpy(there.decompress(theirs)).tobytes() == here.decompress(mine).tobytes()


@pytest.mark.parametrize("factors", ["tf32", "bfloat16", "float16"])
def test_products_of_rounded_factors(factors: str, xp: Any) -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 64, 96), (3, 96, 32)))
    with backend.matmul_precision(factors):
        found = backend.matmul(xp.asarray(a), xp.asarray(b)).get()
        expected = backend.matmul(a, b)
    assert close(found, expected, 2e-3 if factors == "tf32" else 1e-5)  # the card may round TF32 towards zero
    assert not close(found, a @ b, 1e-6)
    assert close(products.matmul(xp.asarray(a), xp.asarray(b)).get(), a @ b, 1e-5)


# -- ranks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("case", device_cases.CASES, ids=lambda case: case.__name__)
def test_collectives(case: Any, n: int) -> None:
    with nothing_is_left():
        minidp.spawn(case, n, device=ONE, timeout_s=60, progress=False)


def train(comm: Any, steps: int, options: dict[str, Any]) -> tuple[Any, str, tuple[int, int, int]]:
    train_set, _ = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10), seed=0)
    strategy = parallel.DataParallel(model, optim.Adam(model.parameters(), lr=1e-3), comm, **options)
    loader = data.DataLoader(train_set, global_batch_size=64, shard=strategy.shard, shuffle=True, seed=0)
    moved = (0, 0, 0)
    for (x, y), _ in zip(loader.epoch(0), range(steps)):
        with backend.meter() as m:
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
        moved = m.to_device, m.to_host, x.nbytes + y.nbytes
    transport = "" if comm.device.on_host else comm.transport.name
    return strategy.state_dict(), transport, moved


@pytest.mark.parametrize("options", [{"micro_shards": 4}, {"micro_shards": 4, "clip_norm": 0.1}], ids=str)
def test_training_equals_the_cpu_and_has_the_same_bits_for_any_number_of_ranks(options: dict[str, Any]) -> None:
    (expected, _, _), *_ = minidp.spawn(train, 1, 20, options, progress=False)
    states = []
    for n in (1, 2, 4):
        results = minidp.spawn(train, n, 20, options, device=ONE, timeout_s=60, progress=False)
        states.append(results[0][0])
        for state, transport, (to_device, to_host, batch) in results:
            assert transport == "memory of the device that all ranks see"
            assert (to_device, to_host) == (batch, 8)
            assert all(state[name].tobytes() == results[0][0][name].tobytes() for name in state)
    for name, array in expected.items():
        assert close(states[0][name], array)
        assert all(state[name].tobytes() == states[0][name].tobytes() for state in states)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"compress": "int8+ef"}], ids=str)
def test_n_workers_on_a_gpu_equal_one_on_the_cpu(options: dict[str, Any], n: int) -> None:
    (expected, _, _), *_ = minidp.spawn(train_without_dropout, 1, 20, options, progress=False)
    found, _, _ = minidp.spawn(train_without_dropout, n, 20, options, device=ONE, timeout_s=60, progress=False)[0]
    lossy = "compress" in options  # each rank rounds by itself
    assert all(close(found[name], array, 0.1 if lossy else 1e-5) for name, array in expected.items())


def train_without_dropout(comm: Any, steps: int, options: dict[str, Any]) -> Any:
    original, F_dropout = nn.Dropout.forward, lambda self, x: x
    nn.Dropout.forward = F_dropout  # type: ignore[method-assign]
    try:
        return train(comm, steps, options)
    finally:
        nn.Dropout.forward = original  # type: ignore[method-assign]


def train_spread(comm: Any, mesh: dict[str, int] | None, stage: int) -> dict[str, np.ndarray]:
    """A GPT after some steps, spread over a mesh, or with its state sharded."""
    model = nn.GPT(29, context=8, embed_dim=32, num_heads=4, num_layers=4)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    strategy: Any
    if mesh is None:
        strategy = parallel.ShardedDataParallel(model, optimizer, comm, stage=stage, clip_norm=1.0)
    else:
        strategy = parallel.HybridParallel(model, optimizer, parallel.Mesh(comm, **mesh), clip_norm=1.0)
    index, count = strategy.shard
    for batch in np.random.default_rng(0).integers(0, 29, (5, 16, 9)):
        mine = batch[index * 16 // count : (index + 1) * 16 // count]
        strategy.forward_backward(mine[:, :-1], mine[:, 1:], F.cross_entropy)
        strategy.step()
    return strategy.state_dict()


@pytest.mark.parametrize(
    ("mesh", "stage"),
    [({"tp": 2}, 0), ({"pp": 2}, 0), ({"dp": 2}, 0), ({"tp": 2, "pp": 2}, 0), (None, 1), (None, 2)],
    ids=str,
)
def test_a_model_spread_over_ranks_on_a_gpu_equals_one_on_the_cpu(mesh: dict[str, int] | None, stage: int) -> None:
    (expected,) = minidp.spawn(train_spread, 1, {}, 0, progress=False)
    n = int(np.prod(list(mesh.values()))) if mesh else 2
    for found in minidp.spawn(train_spread, n, mesh, stage, device=ONE, timeout_s=60, progress=False):
        assert all(close(found[name], array, 1e-4) for name, array in expected.items())


def bad_then_good(comm: Any) -> tuple[str, bool]:
    model = nn.Linear(8, 3)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    x, y = np.ones((4, 8), np.float32), np.array([0, 1, 2, 0])
    strategy.forward_backward(x, y, F.cross_entropy)
    strategy.step()
    before = strategy.state_dict()
    x[0, 0] = np.nan if comm.rank == comm.world_size - 1 else 1
    strategy.forward_backward(x, y, F.cross_entropy)
    strategy.step()
    strategy.forward_backward(np.ones_like(x), y, F.cross_entropy)
    try:
        strategy.step()
    except parallel.NonFiniteGradient as error:
        strategy.discard()
        after = strategy.state_dict()
        return str(error), all(after[name].tobytes() == before[name].tobytes() for name in before)
    return "", False


@pytest.mark.parametrize("n", [1, 2])
def test_a_bad_step_is_told_one_step_later_and_undone(n: int) -> None:
    for message, undone in minidp.spawn(bad_then_good, n, device=ONE, timeout_s=60, progress=False):
        assert f"rank {n - 1}" in message
        assert undone


def dies(comm: Any) -> None:
    comm.allocate(2**28)
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    x = comm.device.xp.ones(1000, np.float32)
    while True:
        comm.all_reduce(x)
        float(x[0])


def test_a_killed_rank_is_noticed_and_its_memory_is_free_again(xp: Any) -> None:
    free, _ = xp.cuda.runtime.memGetInfo()
    with nothing_is_left(), pytest.raises(minidp.RankFailed, match="rank 1 of 2 was killed by SIGKILL"):
        minidp.spawn(dies, 2, device=ONE, timeout_s=60, progress=False)
    deadline = time.monotonic() + 5
    while xp.cuda.runtime.memGetInfo()[0] < free - 2**27 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert xp.cuda.runtime.memGetInfo()[0] >= free - 2**27
