"""strategy.prune: weights that are 0 stay 0 under every rule, on all ranks, and cost nothing any more."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minidp import nn, optim, parallel
from minidp.comm import comm_self
from minidp.compress import magnitude_masks
from minidp.nn import functional as F
from tests.test_compressed import RULES, WORLDS, build, everything, go_on
from tests.test_data_parallel import same_bits
from tests.told import told
from tests.training import spawned

pytestmark = pytest.mark.timeout(60)

MATRICES = ("first.weight", "last.weight")
SIZE = 16 * 40 + 40 * 8


# -- what stays 0 -------------------------------------------------------------------------------------------------


def pruned(comm: Any, compress: str, rule: str, density: float, scope: str, dtype: str) -> Any:
    s = build(comm, compress, rule, dtype=dtype)
    go_on(s, 3)
    before = s.state_dict()
    masks = s.prune(density, scope)
    want = magnitude_masks({name: before[name] for name in MATRICES}, density, scope)
    assert list(masks) == list(want) == list(MATRICES), "vectors are not pruned"
    assert all((masks[name] == want[name]).all() for name in want)
    after = everything(s)
    for name, array in before.items():
        mask = masks.get(name, True)
        assert (after[f"model.{name}"] == array * mask).all(), "the kept ones are what they were"
    history = [after]
    for step in range(4, 9):
        history.append(everything(go_on(s, step)))
        for slot in ("model", *s.optimizer.slots):
            for name, mask in masks.items():
                assert not history[-1][f"{slot}.{name}"][~mask].any(), (slot, name, step)
    for name in before:
        moved = history[0][f"model.{name}"] != history[-1][f"model.{name}"]
        if name in masks:
            assert moved[masks[name]].mean() > 0.2, "what is kept is trained"
        elif name != "first.bias":  # in front of batch norm it has a gradient of rounding errors
            assert moved.any()
    assert s.updates == 8
    return masks, history


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "compress", ["none", "int8", "topk:0.2+ef", "sign", "randomk:0.2+ef", "powersgd:2+ef", "qsgd:4"]
)
def test_zeros_stay_zeros_under_every_rule(compress: str, rule: str) -> None:
    """Weight decay, momentum and Adam's moments of before the pruning: none moves them."""
    results = spawned(pruned, 3, "virtual", compress, rule, 0.3, "global", "float64")
    for masks, history in results:
        assert sum(mask.sum() for mask in masks.values()) == round(0.3 * SIZE)
        assert all((masks[name] == results[0][0][name]).all() for name in masks), "the same on all ranks"
        for state, first in zip(history, results[0][1], strict=True):
            mine, theirs = (
                {k: v for k, v in of.items() if not k.startswith("compress.")} for of in (state, first)
            )
            assert same_bits(mine, theirs)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_of_each_matrix_its_part(world: str, dtype: str) -> None:
    for ranks in (1, 2):
        for masks, _ in spawned(pruned, ranks, world, "int8+ef", "momentum", 0.1, "each", dtype):
            assert [mask.sum() for mask in masks.values()] == [64, 32]


# -- what travels -------------------------------------------------------------------------------------------------


def bytes_of_steps(comm: Any, compress: str, density: float | None) -> list[int]:
    s = build(comm, compress, "plain", dtype="float32")
    go_on(s, 2)
    if density is not None:
        s.prune(density)
        go_on(s, 4)  # sizes are told anew in the first of these
    seen = []
    for step in range(s.updates, s.updates + 2):
        before = s.metrics["bytes_sent"]
        go_on(s, step + 1)
        seen.append(int(s.metrics["bytes_sent"] - before))
    return seen


@pytest.mark.parametrize("world", WORLDS)
def test_what_is_pruned_does_not_travel(world: str) -> None:
    """By arithmetic, two ranks: the vectors' bytes are the same, those of matrices the kept numbers'."""
    vectors = 40 + 40 + 40 + 8
    for density in (None, 0.25):
        masks = None
        if density is not None:
            masks = spawned(masks_of, 2, "virtual", density)[0]
        kept = [SIZE // 3 * 2, SIZE // 3] if masks is None else [int(mask.sum()) for mask in masks.values()]
        assert sum(kept) == (SIZE if density is None else round(density * SIZE))
        for rank, seen in enumerate(spawned(bytes_of_steps, 2, world, "none", density)):
            assert seen == [4 * (vectors + sum(kept))] * 2, rank
        for _, seen in enumerate(spawned(bytes_of_steps, 2, world, "topk:0.1+ef", density)):
            assert seen == [sum(topk_bytes(0.1, d) for d in (*kept, 40, 40, 40, 8))] * 2
        for rank, seen in enumerate(spawned(bytes_of_steps, 2, world, "int8", density)):
            assert seen == [sum(int8_bytes(d, rank) for d in (*kept, 40, 40, 40, 8))] * 2


def masks_of(comm: Any, density: float) -> Any:
    return go_on(build(comm, "none", "plain", dtype="float32"), 2).prune(density)


def topk_bytes(density: float, d: int) -> int:
    """k float32, and where they are: a bitmap, or a byte each and one for every 255."""
    k = int(np.ceil(density * d - 1e-9))
    return 4 * k + min(-(-d // 8), -(-d // 255) + k)


def int8_bytes(d: int, rank: int) -> int:
    """Of two ranks each owns a half, cut at a multiple of 64: what the other owns, and the sum of the own."""
    first = min(d, 64 * (-(-d // 64) // 2))
    mine, others = (first, d - first) if rank == 0 else (d - first, first)
    return sum(part + 4 * -(-part // 2048) for part in (mine, others))


# -- again, tied, in the middle -----------------------------------------------------------------------------------


def again(comm: Any, compress: str) -> Any:
    s = build(comm, compress)
    go_on(s, 2)
    first = s.prune(0.5)
    go_on(s, 4)
    second = s.prune(0.2)
    assert all((first[name] | ~second[name]).all() for name in first), "what was pruned is not kept now"
    state = everything(s)
    assert not any("residual/" in name for name in state), "residuals begin anew"
    calls = {name: int(count) for name, count in state.items() if name.startswith("compress.calls/")}
    assert calls, "random numbers go on"
    go_on(s, 6)
    for name, mask in second.items():
        assert not s.state_dict()[name][~mask].any()
    assert s.compressor.spec == compress
    return sum(mask.sum() for mask in second.values()), everything(s)


@pytest.mark.parametrize("compress", ["none", "int8+ef", "topk:0.2+ef", "powersgd:2+ef", "qsgd:4"])
def test_pruning_twice(compress: str) -> None:
    for ranks in (1, 3):
        for count, _ in spawned(again, ranks, "virtual", compress):
            assert count == round(0.2 * SIZE)


def test_everything_and_nothing_new() -> None:
    """Density 1 keeps all: with compress="none" training is as if nobody had pruned."""
    for ranks in (1, 3):
        plain, kept = (spawned(keeps_all, ranks, "virtual", prunes) for prunes in (False, True))
        assert all(same_bits(a, b) for a, b in zip(plain, kept, strict=True))


def keeps_all(comm: Any, prunes: bool) -> dict[str, np.ndarray]:
    s = go_on(build(comm, "none"), 2)
    if prunes:
        masks = s.prune(1)
        assert all(mask.all() for mask in masks.values())
    return go_on(s, 5).state_dict()  # type: ignore[no-any-return]


class Tied(nn.Module):
    def __init__(self) -> None:
        self.first, self.second, self.frozen = nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9)
        self.second.weight = self.first.weight
        self.frozen.weight.requires_grad = False

    def forward(self, x: Any) -> Any:
        return self.frozen(self.second(F.tanh(self.first(x))))


def tied(comm: Any, compress: str) -> Any:
    model = Tied().initialize(0).astype("float64")
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm, compress=compress)
    frozen = model.frozen.weight.data.copy()
    rng = np.random.default_rng(comm.rank)
    x, y = rng.standard_normal((6, 9)), rng.integers(0, 9, 6)
    masks = s.prune(0.4)  # type: ignore[attr-defined]
    assert list(masks) == ["first.weight"], "once, and not what is frozen"
    start = s.state_dict()
    for _ in range(4):
        s.forward_backward(x, y, F.cross_entropy)
        s.step()
    state = s.state_dict()
    assert model.first.weight is model.second.weight
    assert same_bits({"w": state["first.weight"]}, {"w": state["second.weight"]})
    assert not state["first.weight"][~masks["first.weight"]].any()
    assert (state["first.weight"] != start["first.weight"]).sum() == masks["first.weight"].sum() == round(0.4 * 81)
    assert (model.frozen.weight.data == frozen).all()
    return state


@pytest.mark.parametrize("world", WORLDS)
def test_tied_and_frozen_parameters(world: str) -> None:
    for compress in ("none", "int8"):
        states = spawned(tied, 2, world, compress)
        assert same_bits(*states)


def in_a_step(comm: Any) -> list[str]:
    s = go_on(build(comm, "topk:0.2+ef"), 2)
    before = everything(s)
    s.forward_backward(*batch_of(s), F.cross_entropy)
    said = [told(lambda: s.prune(0.5))]
    assert same_bits(before, everything(s))
    s.step()
    for density in (0, 1.5, float("nan")):
        before = everything(s)
        said.append(told(lambda density=density: s.prune(density)))
        said.append(told(lambda: s.prune(0.5, "all")))
        assert same_bits(before, everything(s)), "nothing has changed"
    s.release()
    said.append(told(lambda: s.prune(0.5)))
    return said


def batch_of(s: Any) -> Any:
    rng = np.random.default_rng(1)
    return rng.standard_normal((3, 16)), rng.integers(0, 8, 3)


def test_what_is_refused() -> None:
    for said in spawned(in_a_step, 2, "virtual"):
        assert said[0] == ("RuntimeError: prune in the middle of a step: call strategy.step() or discard() first")
        for density, scope in (said[1:3], said[3:5], said[5:7]):
            assert density.startswith("ValueError: density=")
            assert scope.startswith("ValueError: scope='all'")
        assert "the strategy has been released" in said[-1]


@pytest.mark.parametrize("world", WORLDS)
def test_without_compress_it_says_what_to_give(world: str) -> None:
    for said in spawned(plain_prune, 2, world):
        assert said.startswith("RuntimeError: ")
        assert 'compress="none"' in said


def plain_prune(comm: Any) -> str:
    return told(lambda: build(comm, None).prune(0.5))


def reloaded(comm: Any) -> Any:
    s = build(comm, "none", "momentum")
    go_on(s, 2)
    full = s.state_dict()
    masks = s.prune(0.3)
    s.load_state_dict(full)
    return full, masks, go_on(s, 3).state_dict()


def test_weights_that_are_loaded_are_pruned() -> None:
    """Their gradients do not travel: given other numbers than 0 they would never change again."""
    full, masks, after = spawned(reloaded, 2, "virtual")[0]
    for name, mask in masks.items():
        assert full[name][~mask].any()
        assert not after[name][~mask].any()
        assert after[name][mask].any()


def test_one_rank_alone() -> None:
    masks, _ = pruned(comm_self(), "topk:0.2+ef", "adam", 0.3, "global", "float64")
    assert sum(mask.sum() for mask in masks.values()) == round(0.3 * SIZE)
