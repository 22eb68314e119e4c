"""Of a model that is spread over a mesh: checkpoints that reshape, states; memory and traffic, by names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minidp import nn, optim, parallel
from minidp.comm import comm_self
from tests.meshes import RULES, State, build, distance, everything, factorisations, forward, gpt, same
from tests.told import told
from tests.training import spawned

pytestmark = pytest.mark.timeout(60)
WORLDS = ("virtual", "process")
# What of a GPT is cut over tp; all else is whole on each of its stage's ranks.
CUT = re.compile(r"token_embedding|in_proj|out_proj\.weight|linear1|linear2\.weight|^head")


# -- checkpoints -------------------------------------------------------------------------------------------------


def trained(s: Any, steps: int, m: int) -> Any:
    while s.updates < steps:
        forward(s, s.updates, 16, m)
        s.step()
    return s


def saves(comm: Any, mesh: Any, folder: Path) -> tuple[State, State]:
    """(everything after three steps, which are saved; everything after five)."""
    s = trained(build(comm, mesh, m=2, dropout=0.2), 3, 2)
    at_three = everything(s)
    s.save(folder, keep=1)
    return at_three, everything(trained(s, 5, 2))


def loads(comm: Any, mesh: Any, folder: Path) -> tuple[State, State]:
    s = build(comm, mesh, m=2, dropout=0.2, seed=9 + comm.rank)  # all comes from the file
    assert s.load(folder).updates == s.updates == 3
    return everything(s), everything(trained(s, 5, 2))


def reshapes(comm: Any, before: Any, folder: Path, meshes: list[Any]) -> None:
    want, later = saves(comm, before, folder)
    assert all(same(want, other) for other in comm.all_gather_object(want)), "the whole, on every rank"
    for after in meshes:
        found, then = loads(comm, after, folder)
        assert same(want, found), (before, after)
        shards = (comm.world_size if mesh is None else mesh[0] for mesh in (before, after))
        if len(set(shards)) == 1:  # else dropout has other masks
            assert distance(later, then) < 1e-9, (before, after)
            if before == after or (before and before[1] == 1 and after and after[1] == 1):
                assert same(later, then), "bit for bit"


@pytest.mark.parametrize("before", [*factorisations(4), None], ids=str)
def test_any_mesh_goes_on_from_any_other(before: Any, tmp_path: Path) -> None:
    spawned(reshapes, 4, "virtual", before, tmp_path, [*factorisations(4), None])
    want, later = loads(comm_self(), None, tmp_path)
    found, then = loads(comm_self(), (1, 1, 1), tmp_path)
    assert same(want, found)
    assert same(later, then)


def test_in_processes_and_with_other_numbers_of_ranks(tmp_path: Path) -> None:
    want, _ = spawned(saves, 4, "process", (1, 2, 2), tmp_path)[3]
    for mesh, ranks, world in (((2, 1, 1), 2, "process"), ((2, 2, 2), 8, "virtual"), (None, 3, "virtual")):
        for found, _ in spawned(loads, ranks, world, mesh, tmp_path):
            assert same(want, found)
    found, _ = loads(comm_self(), (1, 1, 1), tmp_path)
    assert same(want, found)


# -- states ------------------------------------------------------------------------------------------------------


def given_states(comm: Any, mesh: tuple[int, int, int]) -> list[str]:
    s = trained(build(comm, mesh), 2, 1)
    before = everything(s)
    other = gpt(seed=4 + comm.rank).state_dict()  # rank 0's counts
    s.load_state_dict(other)
    after = everything(s)
    rank_0s = gpt(seed=4).state_dict()
    assert all(after[f"model.{k}"].tobytes() == v.tobytes() for k, v in rank_0s.items())
    assert all(after[k].tobytes() == before[k].tobytes() for k in before if not k.startswith("model."))
    assert s.updates == 2
    whole = gpt()
    whole.load_state_dict(s.state_dict())
    assert list(s.state_dict()) == list(gpt().state_dict()), "names and order of the dense model"
    assert s.shapes == {name: p.shape for name, p in gpt().named_parameters()}
    lacking = {k: v for k, v in rank_0s.items() if k != "head.bias"}
    said = [
        told(lambda: s.load_state_dict(lacking)),
        told(lambda: s.load_state_dict(rank_0s | {"head.bias": np.zeros(3)})),
        told(lambda: s.load_state_dict(rank_0s | {"more": np.zeros(3)})),
    ]
    assert same(after, everything(s)), "nothing has changed"
    trained(s, 3, 1)
    return said


@pytest.mark.parametrize("mesh", factorisations(4), ids=str)
def test_a_state_is_the_whole_models(mesh: tuple[int, int, int]) -> None:
    results = spawned(given_states, 4, "virtual", mesh)
    for said in results:
        assert said[0].startswith("ValueError: this state does not fit the model: missing head.bias")
        assert "head.bias has shape (3,), the model's has (32,)" in said[1]
        assert "unexpected more" in said[2]


def tied_model(comm: Any, mesh: tuple[int, int, int]) -> State:
    """Tied rows and columns; a frozen layer; a buffer."""
    model = gpt()
    model.head.weight = model.token_embedding.weight
    model.position_embedding.weight.requires_grad = False
    model.register_buffer("seen", np.arange(3.0) + comm.rank)
    place = parallel.Mesh(comm, dp=mesh[0], tp=mesh[1], pp=mesh[2])
    s = parallel.HybridParallel(model, RULES["adam"](model.parameters()), place)
    trained(s, 3, 1)
    assert model.head.weight is model.token_embedding.weight
    return everything(s)


@pytest.mark.parametrize("mesh", [(1, 2, 1), (2, 2, 1), (1, 4, 1)], ids=str)
def test_tied_frozen_and_buffers(mesh: tuple[int, int, int]) -> None:
    want = spawned(tied_model, mesh[0], "virtual", (mesh[0], 1, 1))[0]
    for state in spawned(tied_model, int(np.prod(mesh)), "virtual", mesh):
        assert distance(want, state) < 1e-9
        assert (state["model.seen"] == np.arange(3)).all(), "rank 0's"
        assert same({"w": state["model.head.weight"]}, {"w": state["model.token_embedding.weight"]})
        assert same(
            {"w": state["model.position_embedding.weight"]}, {"w": want["model.position_embedding.weight"]}
        )


def let_go(comm: Any, mesh: tuple[int, int, int]) -> list[str]:
    s = trained(build(comm, mesh), 1, 1)
    parts = {name: p.data.copy() for name, p in s.model.named_parameters()}
    s.release()
    for name, p in s.model.named_parameters():
        assert p.data.tobytes() == parts[name].tobytes(), "its part stays"
        assert p.data.flags.writeable or not p.size
    return [told(lambda: forward(s, 1, 16)), told(s.step), told(lambda: s.load_state_dict({})), told(s.discard)]


@pytest.mark.parametrize("world", WORLDS)
def test_a_released_strategy_is_over(world: str) -> None:
    for mesh in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
        for said in spawned(let_go, 2, world, mesh):
            assert all(text.startswith("RuntimeError") for text in said)
            assert all("the strategy has been released" in text for text in said[2:])


# -- counted -----------------------------------------------------------------------------------------------------


def elements(bounds: list[tuple[int, int]], stage: int, tp: int) -> int:
    """d_cut / T + d_whole of a stage, derived from the names of the dense model."""
    dense = gpt()
    units = ["embedding", *(f"blocks.{i}." for i in range(2)), "norm", "head"][slice(*bounds[stage])]
    mine = 0
    for name, p in dense.named_parameters():
        owner = "embedding" if "_embedding" in name else name
        if any(owner.startswith(unit) for unit in units):
            parts = tp if CUT.search(name) else 1
            assert p.size % parts == 0
            mine += p.size // parts
    return mine


def counted(comm: Any, mesh: tuple[int, int, int], steps: int) -> tuple[Any, ...]:
    s = build(comm, mesh)
    before = s.mesh.traffic()
    trained(s, steps, 1)
    assert s.layout.size == sum(segment.size for segment in s.layout.segments), "no padding at these sizes"
    given = [p for group in s.optimizer.groups for p in group["params"]]  # of the whole model, as it was built
    assert sum(p.data.size for p in given) == s.layout.size, "other stages' parameters are let go"
    return s.bounds, s.mesh.coordinates, s.metrics, s.memory(), before


UNPADDED = [
    m for n in (2, 4, 8) for m in factorisations(n) if m[1] <= 2 and m[2] <= 4
]  # parts of whole cache lines


@pytest.mark.parametrize("mesh", UNPADDED, ids=str)
def test_traffic_and_memory_are_of_this_ranks_part(mesh: tuple[int, int, int]) -> None:
    """3.4.3: along dp 2 (N−1)/N (d_cut / T + d_whole) a step; and no more parameters are held."""
    (dp, tp, pp), steps = mesh, 3
    for bounds, at, metrics, memory, before in spawned(counted, dp * tp * pp, "virtual", mesh, steps):
        d = elements(bounds, at.pp, tp)
        assert metrics["bytes_sent"] == steps * 2 * (dp - 1) * d * 8 / dp
        assert memory["parameters"] == memory["gradients"] == 8 * d
        assert memory["optimizer"] == 2 * 8 * d
        few = 500 * steps if dp > 1 else 0  # numbers of samples
        assert 0 <= metrics["dp_bytes_sent"] - before["dp"] - metrics["bytes_sent"] <= few
        assert (metrics["tp_bytes_sent"] > before["tp"]) == (tp > 1)
        assert (metrics["pp_bytes_sent"] > before["pp"]) == (pp > 1)
    assert elements([(0, 5)], 0, 1) == nn.Layout(gpt()).size


@pytest.mark.parametrize("mesh", [(2, 1, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1), (1, 2, 2)], ids=str)
def test_and_in_shared_memory(mesh: tuple[int, int, int]) -> None:
    """Along dp one w in two buffers serves all; alone a rank has one."""
    (dp, tp, pp), steps = mesh, 2
    sent: dict[tuple[int, int], float] = {}
    for bounds, at, metrics, memory, *_ in spawned(counted, dp * tp * pp, "process", mesh, steps):
        d = elements(bounds, at.pp, tp)
        copies = 1 if dp == 1 else 2 * (at.dp == 0)
        assert memory["parameters"] == 8 * d * copies
        assert memory["optimizer"] == 2 * 8 * d * copies
        assert memory["gradients"] == 8 * d
        sent[at.pp, at.tp] = sent.get((at.pp, at.tp), 0) + metrics["bytes_sent"]
        assert sent[at.pp, at.tp] <= steps * 2 * (dp - 1) * d * 8
        if at.dp == dp - 1:
            assert sent[at.pp, at.tp] == steps * 2 * (dp - 1) * d * 8


def bytes_along_tp(comm: Any, backward: bool) -> int:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), seed=1)
    s = parallel.HybridParallel(
        model, optim.SGD(model.parameters(), lr=0.1), parallel.Mesh(comm, tp=comm.world_size)
    )
    x = np.ones((5, 8), np.float32)
    s.predict(x)
    before = s.mesh.traffic()["tp"]
    if backward:
        s.model(nn.Parameter(x)).sum().backward()
    else:
        s.predict(x)
    return s.mesh.traffic()["tp"] - before


def test_a_pair_of_layers_costs_an_all_reduce_each_way() -> None:
    assert spawned(bytes_along_tp, 2, "virtual", False) == [5 * 8 * 4] * 2
    assert spawned(bytes_along_tp, 2, "virtual", True) == [2 * 5 * 8 * 4] * 2
