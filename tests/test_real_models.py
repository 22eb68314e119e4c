"""What holds for an MLP holds for a CNN and a transformer: N workers equal one, the same bits, exact resume."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import data, nn, optim, parallel
from minidp.comm import comm_self
from minidp.nn import functional as F
from tests.training import go_on, spawned

pytestmark = pytest.mark.timeout(120)

MODELS = ("cnn", "transformer")
STRATEGIES = ("DataParallel", "NaiveDataParallel")
TEXT = "so many ranks, so many shards; one gradient, one step, one model. " * 12


def task(kind: str) -> tuple[nn.Module, data.ArrayDataset]:
    """A small model in float64, and 40 samples for it: of global batches of 17 the third of an epoch has 6."""
    if kind == "cnn":
        x, y = data.load_digits()[0][:40]
        images = data.ArrayDataset(x.reshape(-1, 1, 8, 8).astype("float64"), y)
        return nn.cnn((1, 8, 8), (4, 6)).astype("float64"), images
    windows = data.TextDataset(TEXT, context=12)
    model = nn.GPT(len(windows.vocabulary), context=12, embed_dim=16, num_heads=2, num_layers=2, dropout=0.1)
    return model.astype("float64"), data.ArrayDataset(*windows[:40])


def trained(comm: Any, kind: str, strategy: str, rule: str, options: dict[str, Any]) -> dict[str, np.ndarray]:
    model, dataset = task(kind)
    if "micro_shards" not in options:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # its masks are functions of the rank
    rules: dict[str, Any] = {
        "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
        "adam": lambda p: optim.Adam(p, lr=0.01),
    }
    s = getattr(parallel, strategy)(model, rules[rule](model.parameters()), comm, **options)
    go_on(s, dataset, 17, 12)
    return s.state_dict()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("rule", "bar"), [("momentum", 1e-12), ("adam", 1e-9)])
def test_n_workers_equal_one(kind: str, strategy: str, rule: str, bar: float) -> None:
    """As the law for MLPs has it: max|Δw| / max|w|, and the same bits on all ranks."""
    one = trained(comm_self(), kind, "DataParallel", rule, {})
    for ranks, world in ((2, "process"), (3, "virtual")):
        many = spawned(trained, ranks, world, kind, strategy, rule, {})
        difference = max(np.abs(many[0][k] - one[k]).max() for k in one) / max(
            np.abs(v).max() for v in one.values()
        )
        assert difference < bar
        assert all(np.array_equal(other[k], many[0][k]) for other in many[1:] for k in one)


def hashed(comm: Any, kind: str) -> str:
    options = {"micro_shards": 8, "clip_norm": 0.5}
    state = trained(comm, kind, "DataParallel", "adam", options)
    return sha256(b"".join(state[name].tobytes() for name in sorted(state))).hexdigest()


@pytest.mark.parametrize("kind", MODELS)
def test_micro_shards_give_the_same_bits(kind: str) -> None:
    """Micro-shards of 3 and 2 samples, in the short batch of 1 and 0; the transformer's dropout is on."""
    where = [(1, "process"), (2, "process"), *((ranks, "virtual") for ranks in (1, 2, 4, 8))]
    assert len({spawned(hashed, ranks, world, kind)[0] for ranks, world in where}) == 1


def resumed(comm: Any, kind: str, folder: Path, save: bool) -> dict[str, np.ndarray]:
    model, dataset = task(kind)
    s = parallel.DataParallel(model, optim.Adam(model.parameters(), lr=0.01), comm)
    if save:
        go_on(s, dataset, 17, 5)
        s.save(folder)
    else:
        s.load(folder)
    go_on(s, dataset, 17, 9)
    return s.state_dict()


@pytest.mark.parametrize("kind", MODELS)
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    whole, again = (spawned(resumed, 2, "virtual", kind, tmp_path, save)[0] for save in (True, False))
    assert all(np.array_equal(again[k], whole[k]) for k in whole)


def wrong_token(comm: Any) -> None:
    model, dataset = task("transformer")
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    x, y = dataset[:4]
    s.forward_backward(np.where(comm.rank == 1, 99, x), y, F.cross_entropy)
    s.step()


@pytest.mark.parametrize("world", ["process", "virtual"])
def test_a_token_out_of_range_on_one_rank_ends_all(world: str) -> None:
    with pytest.raises(
        minidp.RankFailed, match=r"(?s)rank 1 of 2 raised IndexError: embedding: token 99 at place 0"
    ):
        spawned(wrong_token, 2, world)
