"""A mesh of ranks: who sits where, whom each axis joins, and in what order."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.comm import comm_self
from minidp.parallel import Mesh
from tests.meshes import factorisations
from tests.told import told
from tests.training import spawned


def neighbours(comm: Any) -> list[tuple[Any, ...]]:
    """Of every mesh of these ranks: where this rank sits, and whom each of its communicators joins, in order."""
    found = []
    for dp, tp, pp in factorisations(comm.world_size):
        mesh = Mesh(comm, dp=dp, tp=tp, pp=pp)
        members = []
        for group in (mesh.world, mesh.data, mesh.tensor, mesh.pipeline, mesh.replica):
            everybody = np.empty((group.world_size, 1), np.int64)
            group.all_gather(everybody, np.array([comm.rank]))
            assert everybody[group.rank, 0] == comm.rank
            members.append(everybody[:, 0].tolist())
        found.append((mesh.coordinates, mesh.shard, repr(mesh), *members))
    return found


def check(ranks: int, world: str) -> None:
    results = spawned(neighbours, ranks, world)
    for number, (dp, tp, pp) in enumerate(factorisations(ranks)):
        # The contract, written down once more: tp neighbours are adjacent, then pp, then dp.
        places = [(d, p, t) for d in range(dp) for p in range(pp) for t in range(tp)]
        at = [results[rank][number] for rank in range(ranks)]
        assert [tuple(found[0]) for found in at] == places
        for rank, (d, p, t) in enumerate(places):
            _, shard, text, everybody, data, tensor, pipeline, replica = at[rank]
            assert shard == (d, dp)
            assert text == f"Mesh(dp={dp}, tp={tp}, pp={pp})"
            assert everybody == list(range(ranks))
            assert data == [places.index((i, p, t)) for i in range(dp)]
            assert tensor == [places.index((d, p, i)) for i in range(tp)]
            assert pipeline == [places.index((d, i, t)) for i in range(pp)]
            assert replica == [places.index((d, i, j)) for i in range(pp) for j in range(tp)]
            assert tensor == list(range(tensor[0], tensor[0] + tp)), "those who talk most sit closest"
            assert replica == list(range(replica[0], replica[0] + tp * pp)), "one copy of the model: one node"


@pytest.mark.parametrize("ranks", range(1, 9))
def test_everybody_has_the_right_neighbours_in_the_right_order(ranks: int) -> None:
    check(ranks, "virtual")


@pytest.mark.parametrize("ranks", [2, 4])
def test_and_in_processes(ranks: int) -> None:
    check(ranks, "process")


def bijection(comm: Any) -> None:
    for dp, tp, pp in factorisations(comm.world_size):
        mesh = Mesh(comm, dp=dp, tp=tp, pp=pp)
        seen = [mesh.coordinates_of(rank) for rank in range(comm.world_size)]
        assert len(set(seen)) == comm.world_size
        assert [mesh.rank_of(**place._asdict()) for place in seen] == list(range(comm.world_size))
        assert mesh.coordinates == seen[comm.rank]
        assert mesh.rank_of(*mesh.coordinates) == comm.rank
        for axis, size in (("dp", dp), ("tp", tp), ("pp", pp)):
            for index in (-1, size):
                said = told(lambda: mesh.rank_of(**{axis: index}))  # noqa: B023
                assert said == f"ValueError: {axis}={index}: this mesh has {axis} 0 to {size - 1}"


@pytest.mark.parametrize("ranks", range(1, 9))
def test_ranks_and_coordinates_are_two_names_of_the_same(ranks: int) -> None:
    spawned(bijection, ranks, "virtual")


def refused(comm: Any) -> list[str]:
    sizes: list[dict[str, Any]] = [
        {"dp": 2, "tp": 2},
        {"dp": 3},
        {"dp": 2, "tp": 3, "pp": 5},
        {"tp": 0},
        {"dp": 2.0},
        {"pp": True},
        {"dp": -6, "tp": -1},
        {},
    ]
    return [told(lambda: Mesh(comm, **size)) for size in sizes]  # noqa: B023


@pytest.mark.parametrize("world", ["virtual", "process"])
def test_what_does_not_fit_is_refused_with_what_would(world: str) -> None:
    results = spawned(refused, 6, "virtual") if world == "virtual" else spawned(refused, 2, world)
    assert all(said == results[0] for said in results)
    if world == "virtual":
        two, three, none, zero, half, true, negative, one = results[0]
        assert two == (
            "ValueError: Mesh: dp=2 × tp=2 × pp=1 = 4 ranks, but the communicator has 6: dp=3 or tp=3 would fit; "
            "or start 4 ranks"
        )
        assert three.endswith("has 6: dp=6 or tp=2 or pp=2 would fit; or start 3 ranks")
        assert none.endswith("= 30 ranks, but the communicator has 6: pp=1 would fit; or start 30 ranks")
        assert zero == "ValueError: Mesh: tp=0: give a whole number of at least 1"
        assert half == "ValueError: Mesh: dp=2.0: give a whole number of at least 1"
        assert true == "ValueError: Mesh: pp=True: give a whole number of at least 1"
        assert negative == "ValueError: Mesh: dp=-6: give a whole number of at least 1"
        assert one.endswith("dp=6 or tp=6 or pp=6 would fit; or start 1 ranks")


def test_each_proposal_would_fit() -> None:
    def proposals(comm: Any) -> None:
        n = comm.world_size
        for dp, tp, pp in product(range(1, 5), repeat=3):
            if dp * tp * pp == n:
                continue
            said = told(lambda: Mesh(comm, dp=dp, tp=tp, pp=pp))  # noqa: B023
            offered = said.partition(f"has {n}: ")[2].partition(" would fit")[0]
            if "divisor" in said:
                assert ", ".join(str(i) for i in range(1, n + 1) if n % i == 0) in said
                continue
            for offer in offered.split(" or "):
                axis, _, size = offer.partition("=")
                mesh = Mesh(comm, **({"dp": dp, "tp": tp, "pp": pp} | {axis: int(size)}))
                assert mesh.dp * mesh.tp * mesh.pp == n

    for ranks in (1, 4, 6):
        spawned(proposals, ranks, "virtual")


def traffic(comm: Any) -> list[dict[str, int]]:
    mesh = Mesh(comm, dp=2, tp=2, pp=2)
    after = [mesh.traffic()]
    for group in (mesh.data, mesh.tensor, mesh.pipeline):
        group.all_reduce(np.ones(100 * (1 + len(after))))
        after.append(mesh.traffic())
    mesh.data.duplicate("a strategy's").all_reduce(np.ones(10))
    comm.all_reduce(np.ones(1000))  # the user's: along no axis
    return [*after, mesh.traffic()]


def test_bytes_are_counted_along_the_axis_that_they_go() -> None:
    """An all-reduce of n bytes by two ranks is n bytes from each."""
    for start, data, tensor, pipeline, end in spawned(traffic, 8, "virtual"):
        assert start == {"dp": 0, "tp": 0, "pp": 0}
        assert data == {"dp": 1600, "tp": 0, "pp": 0}
        assert tensor == {"dp": 1600, "tp": 2400, "pp": 0}
        assert pipeline == {"dp": 1600, "tp": 2400, "pp": 3200}
        assert end == {"dp": 1680, "tp": 2400, "pp": 3200}


def interleaved(comm: Any) -> bool:
    """The user's collectives don't meet those of the mesh, whatever the order on a rank."""
    mesh = Mesh(comm, dp=comm.world_size)
    groups = (comm, mesh.data) if comm.rank % 2 else (mesh.data, comm)
    for work in [group.all_reduce(np.full(3, float(comm.rank)), async_op=True) for group in groups]:
        work.wait()
    return True


def test_a_mesh_has_communicators_of_its_own() -> None:
    assert all(spawned(interleaved, 4, "virtual"))
    alone = Mesh(comm_self())
    assert (alone.coordinates, alone.shard, alone.traffic()) == ((0, 0, 0), (0, 1), {"dp": 0, "tp": 0, "pp": 0})
    assert minidp.parallel.Mesh is Mesh
