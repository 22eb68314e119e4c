"""Pipelines: how a model becomes stages, and that what is learnt through them is the full batch's gradient."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.nn import functional as F
from minidp.parallel.stages import balanced, chain, count_flops, example_for
from tests.meshes import exact, is_exact
from tests.told import told
from tests.training import spawned

# -- the cut ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["random", "zeros", "one large", "equal"])
def test_the_balanced_cut_is_the_best_of_all(kind: str) -> None:
    rng = np.random.default_rng(3)
    for units in range(1, 8):
        for _ in range(6):
            costs = rng.integers(0, 6, units).astype(float).tolist()
            costs = {"zeros": [0.0] * units, "equal": [1.0] * units}.get(kind, costs)
            if kind == "one large":
                costs[int(rng.integers(units))] = 100.0
            for stages in range(1, units + 1):
                bounds = balanced(costs, stages)
                assert [lo for lo, _ in bounds[1:]] == [hi for _, hi in bounds[:-1]]
                assert (bounds[0][0], bounds[-1][1], len(bounds)) == (0, units, stages)
                assert all(lo < hi for lo, hi in bounds), "no stage is empty"
                all_cuts = [(0, *inner, units) for inner in combinations(range(1, units), stages - 1)]
                worst = {edges: max(sum(costs[i:j]) for i, j in pairwise(edges)) for edges in all_cuts}
                mine = (*(lo for lo, _ in bounds), units)
                assert worst[mine] == min(worst.values()), (costs, stages)
                assert mine == max(e for e, w in worst.items() if w == worst[mine]), "earlier stages full"


def test_too_many_stages() -> None:
    for stages in (0, 4):
        with pytest.raises(ValueError, match=f"{stages} stages for 3 units: give 1 to 3"):
            balanced([1.0, 1.0, 1.0], stages)


class Own(nn.Sequential):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * 2.0


class Unknown(nn.Module):
    def __init__(self) -> None:
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.layer(x)


class OwnGPT(nn.GPT):
    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens) * 2.0


def test_a_model_is_a_chain_of_units() -> None:
    nested = nn.Sequential(
        nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())), Own(nn.Linear(4, 4))
    )
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    tokens = np.arange(8).reshape(2, 4)
    models: list[tuple[nn.Module, Any, list[str], list[str]]] = [
        (nested, x, ["0", "1.0", "1.1.0", "1.1.1", "2.Own"], ["0", "1.0", "1.1.0", "1.1.1", "2.Own"]),
        (Unknown(), x, ["Unknown"], ["Unknown"]),
        (Own(nn.Linear(4, 4), nn.ReLU()), x, ["Own"], ["Own"]),
        (
            nn.GPT(9, 4, 8, 2, 2),
            tokens,
            ["embedding", "blocks.0", "blocks.1", "norm", "head"],
            ["embedding", "blocks.0", "blocks.1", "norm", "head"],
        ),
        (OwnGPT(9, 4, 8, 2, 2), tokens, ["OwnGPT"], ["OwnGPT"]),
        (
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4)),
            x,
            ["0", "1", "2", "3", "4"],
            ["0 … 2", "3", "4"],
        ),
    ]
    for model, given, names, with_pairs in models:
        want = model(given).numpy()
        for whole_pairs, expected in ((False, names), (True, with_pairs)):
            units = chain(model, whole_pairs)
            assert [unit.name for unit in units] == expected
            y = given
            for unit in units:
                y = unit.forward(y)
            assert y.numpy().tobytes() == want.tobytes()
        parameters = {n for n, _ in model.named_parameters()}
        of_units = [n for n in parameters for unit in units for m in unit.modules if n.startswith(m)]
        assert sorted(of_units) == sorted(parameters), "every Parameter is in one unit"


def test_costs_are_those_of_one_sample() -> None:
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Dropout(0.5), nn.Linear(8, 2, bias=False))
    first, drop, last = count_flops(model, chain(model, False))
    assert (drop, first) == (0, 2 * last)
    assert model[1].training
    assert count_flops(model, chain(model, False), np.zeros((5, 4), np.float32))[0] == 5 * first
    assert example_for(nn.GPT(9, 4, 8, 2, 1)).shape == (1, 4)
    assert example_for(nn.Sequential(nn.Embedding(3, 2))).dtype == np.int64
    with pytest.raises(ValueError, match=r"begins with a Tanh their FLOPs must be counted: give example="):
        example_for(nn.Sequential(nn.Tanh()))


# -- gradients, in Fractions -----------------------------------------------------------------------------------


def deep() -> nn.Sequential:
    layers = [nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)]
    model = nn.Sequential(*layers)
    for i, p in enumerate(model.parameters()):
        p.data = exact(*p.shape, seed=i)
    return model


def one_exact_step(comm: Any, mesh: dict[str, int], schedule: str, m: int) -> tuple[Any, Any]:
    """(loss, model after a step of rate 1/3 of gradients of shards of 4, 1 and 0 samples)."""
    model = deep()
    s = parallel.HybridParallel(
        model,
        optim.SGD(model.parameters(), lr=Fraction(1, 3)),
        parallel.Mesh(comm, **mesh),
        micro_batches=None if m == 3 else m,
        schedule=schedule,
    )
    lo, hi = {(0, 1): (0, 5), (0, 2): (0, 4), (1, 2): (4, 5)}[s.shard]
    if m == 2 and s.shard == (0, 1):
        lo, hi = 0, 4
    x, y = exact(5, 3)[lo:hi], exact(5, 2)[lo:hi]
    loss = s.forward_backward(x, y, F.mse_loss)
    s.step()
    return loss.item() * (hi - lo), s.state_dict()


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
def test_gradients_equal_the_full_batchs(schedule: str) -> None:
    meshes: list[tuple[dict[str, int], int]] = [({"pp": p}, m) for p in (1, 2, 3, 6) for m in (1, 2, 3)]
    meshes += [({"tp": 2}, 1), ({"tp": 4}, 2), ({"tp": 2, "pp": 3}, 3), ({"dp": 2, "tp": 2, "pp": 2}, 3)]
    for mesh, m in meshes:
        rows = 4 if m == 2 else 5
        dense = deep()
        loss = F.mse_loss(dense(exact(5, 3)[:rows]), exact(5, 2)[:rows])
        loss.backward()
        ranks = int(np.prod(list(mesh.values())))
        results = spawned(one_exact_step, ranks, "virtual", mesh, schedule, m)
        for name, p in dense.named_parameters():
            want = p.data - p.grad.numpy() / 3  # type: ignore[union-attr]
            for _, state in results:
                assert is_exact(state[name])
                assert (state[name] == want).all(), (mesh, m, name)
        replicas = [losses for losses, _ in results][:: ranks // mesh.get("dp", 1)]
        assert sum(replicas) / rows == loss.item()


# -- unusual models --------------------------------------------------------------------------------------------


def frozen(*which: int) -> Any:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3), seed=2)
        for i in which:
            for p in model[i].parameters():
                p.requires_grad = False
        return model

    return build


MODELS: dict[str, Any] = {
    "a stage of activations": lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3), seed=1),
    "nothing learnt in the first": frozen(0),
    "nothing learnt in the middle": frozen(2),
    "nothing learnt in the last": frozen(3),
    "tokens": lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 8), nn.Linear(8, 3), seed=1),
    "tokens pass through": lambda: nn.Sequential(
        nn.Identity(), nn.Embedding(9, 4), nn.Flatten(), nn.Linear(24, 3)
    ),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 6)), nn.Tanh(), nn.Linear(6, 3), seed=4),
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3)),
}


def unusual(comm: Any, which: str, mesh: dict[str, int] | None, compress: str | None) -> tuple[Any, ...]:
    model = MODELS[which]().astype("float64")
    rule = optim.Adam(model.parameters(), lr=0.01)
    tokens = which.startswith("tokens")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 9, (4, 16, 6)) if tokens else rng.standard_normal((4, 16, 6))
    y = rng.integers(0, 3, (4, 16))
    s: Any
    if mesh is None:
        s = parallel.DataParallel(model, rule, comm, accumulation_steps=4, compress=compress, clip_norm=0.5)
    else:
        s = parallel.HybridParallel(
            model,
            rule,
            parallel.Mesh(comm, **mesh),
            micro_batches=4,
            compress=compress,
            clip_norm=0.5,
            example=x[0, :1],
        )
    index, count = s.shard
    for a, b in zip(x, y):
        a, b = np.array_split(a, count)[index], np.array_split(b, count)[index]
        for i, j in zip(np.split(a, 4), np.split(b, 4)) if mesh is None else [(a, b)]:
            s.forward_backward(i, j, F.cross_entropy)
        s.step()
    state = s.state_dict()
    model.eval()
    predicted = s.predict(x[0]).numpy()
    return state, predicted, None if mesh is None else s.bounds


@pytest.mark.parametrize("compress", [None, "topk:0.3+ef"])
@pytest.mark.parametrize("which", MODELS)
def test_unusual_models_are_trained_and_predict_to_the_bit(which: str, compress: str | None) -> None:
    """Also with a clipped norm: it is summed as by one rank."""
    for mesh in ({"pp": 3}, {"pp": 2}, {"dp": 2, "pp": 3}):
        want, predicted, _ = spawned(unusual, mesh.get("dp", 1), "virtual", which, None, compress)[0]
        ranks = int(np.prod(list(mesh.values())))
        for state, also, bounds in spawned(unusual, ranks, "virtual", which, mesh, compress):
            assert len(bounds) == mesh["pp"]
            assert state.keys() == want.keys()
            assert all(state[k].tobytes() == want[k].tobytes() for k in want), (mesh, bounds)
            assert also.tobytes() == predicted.tobytes(), "predict: the same on all ranks"


# -- refused ---------------------------------------------------------------------------------------------------


def refused(comm: Any) -> list[str]:
    said, pp = [], comm.world_size

    def build(model: nn.Module, **options: Any) -> Any:
        before, text, values = model.state_dict(), repr(model), [p.data for p in model.parameters()]
        rule = optim.SGD(model.parameters(), lr=0.1)
        mesh = parallel.Mesh(comm, pp=pp)
        try:
            return parallel.HybridParallel(model, rule, mesh, **options)
        except ValueError:
            assert repr(model) == text
            assert all(p.data is data for p, data in zip(model.parameters(), values, strict=True))
            assert all((model.state_dict()[k] == v).all() for k, v in before.items())
            raise

    tied = nn.GPT(9, 4, 8, 2, 2)
    tied.head.weight = tied.token_embedding.weight
    said.append(told(lambda: build(tied)))
    alone = nn.GPT(9, 4, 8, 2, 2)
    tied(np.zeros((1, 4), np.int64)).sum().backward()  # it still is a model
    said.append(told(lambda: build(nn.Sequential(nn.Linear(4, 4)))))
    said.append(told(lambda: build(Unknown())))
    said.append(told(lambda: build(nn.Sequential(nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 4)))))
    for wrong in ({"micro_batches": 0}, {"micro_batches": True}, {"schedule": "zigzag"}):
        said.append(told(lambda: build(alone, **wrong)))  # noqa: B023, PERF401
    s = build(alone, micro_batches=4)
    said.append(told(lambda: s.forward_backward(np.zeros((6, 4), int), np.zeros((6, 4), int), F.cross_entropy)))
    mine = np.full((4, 4), comm.rank)
    said.append(told(lambda: s.forward_backward(mine, mine, F.cross_entropy)))
    x = np.zeros((4, 4), int)
    said.append(told(lambda: s.backward(F.cross_entropy(minidp.tensor(np.zeros((1, 2))), np.zeros(1, int)), 1)))
    s.forward_backward(x, x, F.cross_entropy)
    said.append(told(lambda: s.forward_backward(x, x, F.cross_entropy)))
    said.append(told(lambda: s.model(x)).replace("stage 0", "stage …").replace("stage 1", "stage …"))
    s.step()
    s.step()  # without a forward: it counts, nothing changes
    assert s.updates == 2
    return said


@pytest.mark.parametrize("world", ["virtual", "process"])
def test_what_can_not_be_a_pipeline_is_refused(world: str) -> None:
    results = spawned(refused, 2, world)
    assert results[0] == results[1], "all ranks say the same"
    starts = (
        "ValueError: head.weight is tied to token_embedding.weight, and the one would be on stage 1",
        "ValueError: pp=2 stages, but the model is a chain of 1 layers (0): take pp of 1 to 1",
        "ValueError: pp=2 stages, but the model is a chain of 1 layers (Unknown): take pp of 1 to 1",
        "ValueError: to share out the layers of a model that begins with a Tanh their FLOPs must be counted",
        "ValueError: micro_batches=0: give a whole number of at least 1, or None",
        "ValueError: micro_batches=True: give",
        "ValueError: schedule='zigzag': there are '1f1b', 'gpipe'",
        "ValueError: a batch of 6 samples does not split into micro_batches=4 equal ones: take 1, 2, 3, "
        "6 of them, or a batch of 4 or 8 samples",
        "ValueError: the ranks of one replica were given different batches: build the DataLoader with shard=",
        "RuntimeError: backward of a loss in a pipeline of 2 stages",
        "RuntimeError: forward_backward was called 2 times before step(): give the strategy accumulation_steps=2",
        "RuntimeError: this layer is on stage … of the pipeline: no rank can run the model alone",
    )
    for said, start in zip(results[0], starts, strict=True):
        assert said.startswith(start), said
