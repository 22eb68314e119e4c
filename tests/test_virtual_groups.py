"""Mail, groups and contexts of virtual ranks: who gets which message, and that no state leaks."""

from __future__ import annotations

import tracemalloc
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend
from minidp.comm import ANY, costs
from minidp.comm.movement import Group, Movement, by_waves
from minidp.comm.venue import Venue
from minidp.sim import Cluster


def run(fn: Any, world_size: int, *args: Any, **options: Any) -> list[Any]:
    return minidp.spawn(fn, world_size, *args, world="virtual", **options)


# --- messages from anybody ----------------------------------------------------------------------------------


def from_anybody(comm: Any, delays: list[int], listens_late: bool) -> list[tuple[int, float]]:
    if comm.rank:
        backend.count(float(delays[comm.rank - 1]))
        comm.send(np.zeros(64, np.uint8), 0)
        return []
    if listens_late:
        backend.count(1000.0)
    return [(comm.recv(np.zeros(64, np.uint8), ANY), comm.now()) for _ in delays]


@pytest.mark.parametrize("listens_late", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_receive_from_anybody_takes_the_earliest_arrival(seed: int, listens_late: bool) -> None:
    delays = np.random.default_rng(seed).permutation(40)[:9].tolist()
    cluster = Cluster(10, flops=1.0, latency_s=0.5, bandwidth_bytes_per_s=1024.0)
    got = run(from_anybody, 10, delays, listens_late, cluster=cluster)[0]
    order = sorted(range(9), key=delays.__getitem__)
    assert [src for src, _ in got] == [rank + 1 for rank in order]
    for k, (_, when) in enumerate(got):
        assert when == (1000.0 if listens_late else delays[order[k]] + 0.5 + 64 / 1024)


def near_and_far(comm: Any, listens_at: float) -> list[int]:
    """A long message from another node leaves first, and arrives after a later one from next door."""
    if comm.rank == 0:
        backend.count(listens_at)
        return [comm.recv(np.zeros(64, np.uint8), ANY) for _ in range(2)]
    if comm.rank < 3:
        backend.count(1.0 if comm.rank == 1 else 0.0)
        comm.send(np.zeros(64, np.uint8), 0)
    return []


@pytest.mark.parametrize("listens_at", [0.0, 0.5, 2.0, 9.0])
def test_what_leaves_later_may_arrive_earlier(listens_at: float) -> None:
    cluster = Cluster(2, ranks_per_node=2, flops=1.0, latency_s=1.0, bandwidth_bytes_per_s=16.0)
    assert run(near_and_far, 4, listens_at, cluster=cluster)[0] == [1, 2]


def mixed(comm: Any) -> list[int]:
    """A receive from anybody comes first if it was posted first, also where a later one waits for one rank."""
    x, y = np.zeros(1), np.zeros(1)
    if comm.rank:
        backend.count(float(4 - comm.rank))
        comm.send(np.array([comm.rank]) * 1.0, 0)
        comm.send(np.array([comm.rank]) * 10.0, 0)
        return []
    anybody, one = comm.recv(x, ANY, async_op=True), comm.recv(y, 3, async_op=True)
    assert one.wait() == 3
    assert anybody.wait() == 3, "rank 3 sends first, and its first message is whoever asked first gets"
    return [int(x[0]), int(y[0])]


def test_messages_match_in_the_order_in_which_receives_were_posted() -> None:
    assert run(mixed, 4, cluster=Cluster(4, flops=1.0))[0] == [3, 30]


# --- groups and contexts ------------------------------------------------------------------------------------


def groups(comm: Any) -> tuple[Any, ...]:
    p, r = comm.world_size, comm.rank
    rows, reverse = comm.split(r // 3, key=-r), comm.split(0 if r % 2 else None)
    assert (reverse is None) == (r % 2 == 0)
    x = np.array([Fraction(r)], object)
    rows.all_reduce(x)
    inner = rows.split(rows.rank % 2)
    seen = inner.all_gather_object(r)
    y = np.zeros(1)
    rows.send(np.array([float(r)]), (rows.rank + 1) % rows.world_size)
    comm.send(np.array([100.0 + r]), (r + 1) % p)
    src = rows.recv(y, ANY)  # the mail of each group is its own
    z = np.zeros(1)
    comm.recv(z, ANY)
    return rows.rank, rows.world_size, x[0], seen, src, int(y[0]), int(z[0])


def test_groups_have_ranks_mail_and_order_of_their_own() -> None:
    for r, (rank, size, total, seen, src, y, z) in enumerate(run(groups, 8)):
        members = sorted((i for i in range(8) if i // 3 == r // 3), reverse=True)
        assert (rank, size, total) == (members.index(r), len(members), sum(members))
        assert seen == [i for k, i in enumerate(members) if k % 2 == rank % 2]
        assert src == (rank - 1) % size
        assert y == members[src]
        assert z == 100 + (r - 1) % 8


def contexts(comm: Any) -> tuple[bool, float, bool, float]:
    """Every rank meets the others inside its own contexts."""
    w = minidp.tensor(np.ones(3), requires_grad=True)

    def loss() -> Any:
        comm.barrier()
        y = (w * w).sum()
        comm.barrier()
        return y

    with backend.meter() as meter, np.errstate(divide="raise" if comm.rank == 1 else "ignore"):
        if comm.rank % 2:
            with minidp.no_grad():
                y = loss()
        else:
            y = loss()
        comm.barrier()
        for _ in range(comm.rank):
            backend.count(flops=1.0)
            comm.barrier() if comm.rank < 0 else None
        comm.barrier()
        try:
            np.ones(1) / np.zeros(1)
            raised = False
        except FloatingPointError:
            raised = True
    if y.requires_grad:
        y.backward()
    return y.requires_grad, float(0 if w.grad is None else np.asarray(w.grad).sum()), raised, meter.operations


def test_contexts_do_not_leak_between_ranks() -> None:
    results = run(contexts, 4)
    base = results[0][3]
    assert results == [(r % 2 == 0, 0.0 if r % 2 else 6.0, r == 1, base + r) for r in range(4)]
    with backend.meter() as outside:
        run(contexts, 4)
    assert outside.operations > 4 * base, "who measures the spawn measures all ranks"
    assert minidp.tensor(np.ones(1), requires_grad=True).requires_grad


def lends(comm: Any) -> str:
    """Ranks hand each other their communicators: objects travel by pickle, which refuses."""
    try:
        comm.all_gather_object(comm)
    except TypeError as error:
        return str(error)
    return "nothing"


def test_communicators_do_not_travel() -> None:
    assert all(said.startswith("a communicator can't be pickled") for said in run(lends, 2))


def moves_pieces(comm: Any) -> None:
    p, r = comm.world_size, comm.rank
    x = np.full(1000, float(r))
    everybody = comm.gather(x, 3)
    assert everybody is None or (everybody[:, 0] == np.arange(p)).all()
    assert (comm.scatter(everybody, 3) == r).all()
    row = np.full((p, 10), r)
    column = np.empty_like(row)
    comm.all_to_all(column, row)
    assert (column[:, 0] == np.arange(p)).all()


def test_a_rank_holds_only_the_pieces_that_it_sends_or_receives() -> None:
    """100 ranks have 0.8 MB of x together; with the whole on each it would be 80 MB."""
    run(moves_pieces, 4)  # what is made once only
    tracemalloc.start()
    try:
        run(moves_pieces, 100)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()


# --- which algorithm an all-reduce takes ---------------------------------------------------------------------


def all_reduce_times(comm: Any, nbytes: int, algorithms: list[str | None]) -> list[float]:
    times = []
    for algorithm in algorithms:
        x = np.zeros(nbytes, np.uint8)
        comm.barrier()
        start = comm.now()
        comm.all_reduce(x, algorithm=algorithm)
        comm.barrier()
        times.append(comm.now() - start)
    return times


@pytest.mark.parametrize(("nodes", "ranks_per_node"), [(2, 4), (4, 2), (3, 3), (8, 1), (1, 8)])
@pytest.mark.parametrize("nbytes", [64, 20_000, 2_000_000])
def test_none_of_the_algorithms_is_faster_than_the_default(nodes: int, ranks_per_node: int, nbytes: int) -> None:
    cluster = Cluster(
        nodes, ranks_per_node=ranks_per_node, latency_s=5e-6, local_latency_s=1e-6, bandwidth_bytes_per_s=1e9
    )
    algorithms = [None, *costs.ALL_REDUCE]
    default, *named = run(all_reduce_times, nodes * ranks_per_node, nbytes, algorithms, cluster=cluster)[0]
    assert default == pytest.approx(min(named), rel=1e-9)


@pytest.mark.parametrize("nbytes", [64, 10**6, 16 * 10**6])
@pytest.mark.parametrize("ranks", [256, 264, 512])
def test_many_ranks_that_share_ports_take_the_fastest_too(ranks: int, nbytes: int) -> None:
    cluster = Cluster(ranks // 8, ranks_per_node=8, latency_s=5e-6, bandwidth_bytes_per_s=2.5e10)
    group = Group(Venue(cluster, ranks), range(ranks), "many")
    free = np.zeros(len(group.venue.network.free))
    times = {
        name: by_waves(group, free.copy(), Movement(name, 0, nbytes, 1), 0.0)
        for name in ("ring", "binomial_tree", "recursive_doubling", "halving_doubling")
    }
    chosen = group.fastest(nbytes)
    assert chosen == "direct" if nbytes == 64 else times[chosen] == min(times.values())
