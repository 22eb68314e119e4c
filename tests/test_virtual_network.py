"""Ports, links and nodes of the virtual world: who waits for whom, and for how long. Exact: powers of two."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend
from minidp.comm import ANY
from minidp.comm.schedules import ALL_REDUCE
from minidp.sim import Cluster, FatTree, Ring, Switch
from minidp.sim.network import Network

A, B, N = 2.0**-10, 2.0**-20, 1024  # latency, seconds a byte, bytes of a message
T = N * B


def cluster(nodes: int, **options: Any) -> Cluster:
    return Cluster(nodes, **{"latency_s": A, "bandwidth_bytes_per_s": 1 / B, "flops": 1.0, **options})


def run(fn: Any, world_size: int, *args: Any, **options: Any) -> list[Any]:
    nodes = options.pop("nodes", world_size)
    return minidp.spawn(fn, world_size, *args, world="virtual", cluster=cluster(nodes, **options))


def message(n: int = N) -> np.ndarray:
    return np.zeros(n, np.uint8)


def exchange(comm: Any, pairs: list[tuple[int, int]], nbytes: int = N) -> tuple[list[float], list[float]]:
    """Everybody sends what ``pairs`` say, in that order, then receives: when sends are done, when receives are."""
    works = [
        comm.send(message(nbytes), dst, i, async_op=True) for i, (src, dst) in enumerate(pairs) if src == comm.rank
    ]
    came, left = [], []
    for i, (src, dst) in enumerate(pairs):
        if dst == comm.rank:
            comm.recv(message(nbytes), src, i)
            came.append(comm.now())
    for work in works:
        work.wait()
        left.append(comm.now())
    return left, came


def arrivals(world_size: int, pairs: list[tuple[int, int]], **options: Any) -> list[float]:
    """The last arrival at each rank that receives something."""
    return [came[-1] for _, came in run(exchange, world_size, pairs, **options) if came]


# --- one port a node ----------------------------------------------------------------------------------------


def incast(comm: Any, blocking: bool) -> list[float]:
    times = []
    if comm.rank == 0:
        for _ in range(comm.world_size - 1):
            comm.recv(message(), ANY)
            times.append(comm.now())
    elif blocking:
        comm.send(message(), 0)
        times.append(comm.now())
    else:
        comm.send(message(), 0, async_op=True).wait()
        times.append(comm.now())
    return times


@pytest.mark.parametrize("blocking", [True, False])
@pytest.mark.parametrize("senders", [1, 2, 3, 8])
def test_incast_is_serialised_at_the_receivers_port(senders: int, blocking: bool) -> None:
    server, *workers = run(incast, senders + 1, blocking)
    assert server == [A + k * T for k in range(1, senders + 1)]
    assert workers == [[T]] * senders, "each has a port of its own, and has sent when its last byte has left"


def outcast(comm: Any) -> list[float]:
    if comm.rank:
        comm.recv(message(), 0)
        return [comm.now()]
    return [comm.send(message(), dst) or comm.now() for dst in range(1, comm.world_size)]


def test_a_server_that_answers_all_is_serialised_at_its_own_port() -> None:
    server, *workers = run(outcast, 5)
    assert server == [k * T for k in range(1, 5)]
    assert workers == [[A + k * T] for k in range(1, 5)]


def test_ports_are_full_duplex_and_messages_to_oneself_are_free() -> None:
    assert arrivals(2, [(0, 1), (1, 0)]) == [A + T] * 2
    assert arrivals(4, [(r, (r + 1) % 4) for r in range(4)]) == [A + T] * 4
    assert arrivals(1, [(0, 0)]) == [0.0]


def test_an_empty_message_takes_a_latency() -> None:
    assert [came for _, came in run(exchange, 2, [(0, 1), (0, 1)], 0)] == [[], [A, A]]


def late_send(comm: Any) -> float:
    """Rank 1 computes until t = 1, rank 2 sends at 0.5: in the order of time, whoever runs first."""
    if comm.rank == 0:
        order = [comm.recv(message(), ANY) for _ in range(2)]
        assert order == [2, 1]
    else:
        backend.count(1.0 / comm.rank)
        comm.send(message(), 0)
    return comm.now()


def test_messages_queue_up_in_the_order_of_time() -> None:
    assert run(late_send, 3) == [1 + A + T, 1 + T, 0.5 + T]


# --- several ranks on a node --------------------------------------------------------------------------------


def test_ranks_of_a_node_share_its_port() -> None:
    two = {"nodes": 2, "ranks_per_node": 2}
    assert arrivals(4, [(0, 2), (1, 3)], **two) == [A + T, A + 2 * T]
    assert arrivals(4, [(0, 2), (2, 0)], **two) == [A + T] * 2
    assert arrivals(6, [(0, 4), (2, 5)], nodes=3, ranks_per_node=2) == [A + T, A + 2 * T], (
        "the receiver's port, too"
    )


def test_local_messages_do_not_use_the_port() -> None:
    local = {"nodes": 2, "ranks_per_node": 2, "local_latency_s": A / 8, "local_bandwidth_bytes_per_s": 4 / B}
    assert arrivals(4, [(0, 1), (0, 2)], **local) == [A / 8 + T / 4, A + T]
    assert arrivals(4, [(0, 1), (1, 0), (2, 3), (3, 2)], **local) == [A / 8 + T / 4] * 4
    slow = {**local, "local_bandwidth_bytes_per_s": 1 / (8 * B)}
    assert arrivals(4, [(0, 1), (0, 2)], **slow) == [A / 8 + 8 * T, A + T]
    by_memory = {"nodes": 1, "ranks_per_node": 2, "memory_bytes_per_s": 2 / B}
    assert arrivals(2, [(0, 1)], **by_memory) == [T / 2]
    assert arrivals(2, [(0, 1)], nodes=1, ranks_per_node=2) == [0.0]


def locality(comm: Any, algorithm: str = "ring") -> tuple[int, float]:
    start = comm.now()
    comm.all_reduce(message(), algorithm=algorithm)
    return comm.local_rank, comm.now() - start


def test_a_ring_over_two_ranks_a_node_is_as_fast_as_one_rank_a_node() -> None:
    """Each port passes one message a step, though two ranks live behind it; local lanes are free here."""
    assert run(locality, 8, nodes=4, ranks_per_node=2) == [(r % 2, 14 * (A + T / 8)) for r in range(8)]


def inside_a_node(comm: Any) -> list[float]:
    node = comm.split(comm.rank // 2)
    took = []
    for call in (
        node.barrier,
        comm.barrier,
        lambda: node.all_reduce(message()),
        lambda: node.broadcast(message()),
    ):
        start = comm.now()
        call()
        took.append(comm.now() - start)
    return took


def test_groups_inside_a_node_do_not_leave_it() -> None:
    local = {"nodes": 2, "ranks_per_node": 2, "local_latency_s": A / 8, "local_bandwidth_bytes_per_s": 4 / B}
    assert run(inside_a_node, 4, **local) == [[A / 8, A, A / 8 + T / 4, A / 8 + T / 4]] * 4


# --- topologies ---------------------------------------------------------------------------------------------


def across(leaf: int, groups: int = 2) -> list[tuple[int, int]]:
    nodes = leaf * groups
    return [(r, (r + leaf) % nodes) for r in range(nodes)]


@pytest.mark.parametrize("oversubscription", [1, 1.5, 2, 3, 4, 8])
@pytest.mark.parametrize("leaf", [1, 2, 4])
def test_a_fat_tree_is_slower_by_its_oversubscription_between_groups(leaf: int, oversubscription: float) -> None:
    tree = FatTree(leaf, oversubscription)
    for groups in (2, 3):
        last = max(arrivals(leaf * groups, across(leaf, groups), topology=tree))
        assert last == pytest.approx(A + oversubscription * T, rel=1e-14)
    if leaf > 1:
        inside = [(r, r // leaf * leaf + (r + 1) % leaf) for r in range(2 * leaf)]
        assert arrivals(2 * leaf, inside, topology=tree) == [A + T] * 2 * leaf


def test_a_fat_tree_without_oversubscription_is_as_good_as_a_flat_switch() -> None:
    for pairs in (across(4), [(0, 5)], [(r, 7 - r) for r in range(8)], [(1, 4), (2, 4)], [(0, 4), (0, 5), (1, 6)]):
        assert arrivals(8, pairs, topology=FatTree(4)) == arrivals(8, pairs, topology=Switch())
    assert arrivals(16, across(8), topology="fat_tree") == [A + T] * 16
    for algorithm in ALL_REDUCE:
        assert run(locality, 12, algorithm, topology=FatTree(4)) == run(locality, 12, algorithm)


def test_who_is_alone_is_not_slowed_down_by_oversubscription() -> None:
    """A group's way out has leaf / oversubscription ports' bandwidth: enough for one, unless it is less than 1."""
    assert arrivals(8, [(0, 4)], topology=FatTree(4, 4)) == [A + T]
    assert arrivals(8, [(0, 4)], topology=FatTree(4, 8)) == [A + 2 * T]


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_on_a_ring_messages_hop_the_shorter_way(nodes: int) -> None:
    for src in range(nodes):
        for dst in range(nodes):
            if src != dst:
                hops = min((dst - src) % nodes, (src - dst) % nodes)
                assert arrivals(nodes, [(src, dst)], topology="ring") == [hops * A + T], "cut through, not stored"


def test_a_ring_is_made_for_ring_all_reduce() -> None:
    for p in (2, 4, 8):
        times = {name: max(t for _, t in run(locality, p, topology=name)) for name in ("ring", "switch")}
        assert times["ring"] == times["switch"] == 2 * (p - 1) * (A + T / p)
    assert arrivals(4, [(0, 1), (0, 3)], topology=Ring()) == [A + T] * 2, "both ways round are links of their own"


def test_every_path_begins_and_ends_where_it_should() -> None:
    for topology in (Switch(), Ring(), FatTree(2, 3), FatTree(3, 1)):
        network = Network(cluster(6, topology=topology, ranks_per_node=2), 12)
        for src in range(12):
            for dst in range(12):
                path = network.path(src, dst)
                assert bool(path) == (src != dst)
                assert all(0 <= hop.link < len(network.free) for hop in path)
                assert len({hop.link for hop in path}) == len(path)


# --- computing ----------------------------------------------------------------------------------------------


def stretches(comm: Any, count: int) -> list[float]:
    """Each stretch is one second of computing, then a wait for a message that leaves later."""
    times, x = [], np.zeros(0)
    for k in range(count):
        start = comm.now()
        backend.count(0.5)
        backend.count(0.5)
        times.append(comm.now() - start)
        comm.send(x, (comm.rank + 1) % comm.world_size, k)
        comm.recv(x, (comm.rank - 1) % comm.world_size, k)
        comm.barrier()
    return times


def test_jitter_is_seeded_of_mean_one_and_of_the_given_spread() -> None:
    first = run(stretches, 4, 500, jitter=0.25, seed=3)
    assert first == run(stretches, 4, 500, jitter=0.25, seed=3)
    assert first != run(stretches, 4, 500, jitter=0.25, seed=4)
    assert len({tuple(times) for times in first}) == 4, "each rank has a stream of its own"
    factors = np.array(first).reshape(-1)
    sigma = math.sqrt(math.exp(0.25**2) - 1)
    assert abs(factors.mean() - 1) < 5 * sigma / math.sqrt(len(factors))
    assert abs(np.log(factors).std() - 0.25) < 5 * 0.25 / math.sqrt(2 * len(factors))
    more = np.array(run(stretches, 8, 20, jitter=0.25, seed=3))[:4]
    assert more == pytest.approx(np.array(first)[:, :20], rel=1e-12), "whoever else is there"


def test_a_stretch_has_one_factor_and_no_jitter_has_none() -> None:
    assert run(stretches, 3, 5) == [[1.0] * 5] * 3
    slow = run(stretches, 4, 5, stragglers={1: 4.0, 3: 0.5})
    assert slow == [[1.0] * 5, [4.0] * 5, [1.0] * 5, [0.5] * 5]
    pairs = run(stretches, 4, 5, nodes=2, ranks_per_node=2, stragglers={1: 4.0})
    assert pairs == [[1.0] * 5] * 2 + [[4.0] * 5] * 2, "a straggler is a node"


def metered(comm: Any) -> float:
    with backend.meter():  # the rank's own measuring does not hide anything
        for _ in range(3):
            backend.count(flops=8, nbytes=32)
    return comm.now()


def test_computing_costs_overhead_flops_and_memory() -> None:
    assert run(metered, 2, flops=4.0, op_overhead_s=0.5, memory_bytes_per_s=16.0) == [3 * (0.5 + 2 + 2)] * 2
    assert run(metered, 1, flops=4.0) == [6.0]


def test_a_cluster_is_a_value() -> None:
    one = cluster(4, stragglers={np.int64(3): 2}, latency_s=np.float32(0.5), topology="ring")
    assert one == replace(one) == pickle.loads(pickle.dumps(one))
    assert one.topology == Ring()
    assert type(one.latency_s) is float, "a float32 would spread to every clock"
    factors = {3: 2.0}
    other = cluster(4, stragglers=factors)
    factors[0] = 7.0
    assert other.stragglers == {3: 2.0}
    with pytest.raises(AttributeError):
        one.nodes = 3  # type: ignore[misc]
    assert [one.slowness(r) for r in range(4)] == [1, 1, 1, 2]
    assert one.compute_s(np.array([0, 0]), np.array([2.0, 4.0]), rank=3).tolist() == [4.0, 8.0]


# --- receives from anybody ------------------------------------------------------------------------------------

_COUNT = 30  # messages of each sender


def mail(comm: Any, sources: list[int]) -> list[tuple[int, int]]:
    """Everybody sends messages of odd sizes to rank 0, which takes them from ``sources``: (sender, its n-th)."""
    p = comm.world_size
    if comm.rank:
        sizes = np.random.default_rng(comm.rank).integers(1, 40, _COUNT)
        for n, size in enumerate(sizes):
            comm.send(np.full(40, n), 0, tag=1)
            comm.send(np.zeros(size), (comm.rank + 1) % (p - 1) + 1, tag=2)  # so that it leaves later
        return []
    backend.count(1e6)  # until all is there
    x = np.zeros(40, int)
    return [(comm.recv(x, src, tag=1), int(x[0])) for src in sources]


def test_receives_from_anybody_take_what_arrived_first_of_what_is_left() -> None:
    everything = run(mail, 5, [ANY] * 4 * _COUNT)[0]
    assert sorted(everything) == [(src, n) for src in range(1, 5) for n in range(_COUNT)]
    assert [src for src, _ in everything] != sorted(src for src, _ in everything), "they arrive in turns"
    rng = np.random.default_rng(0)
    left, sources = everything.copy(), []
    while left:
        takes_any = rng.random() < 0.5
        src = ANY if takes_any else left[rng.integers(len(left))][0]
        sources.append(src)
        left.remove(left[0] if takes_any else next(m for m in left if m[0] == src))
    left = everything.copy()
    for src, message in zip(sources, run(mail, 5, sources)[0]):
        assert message == (left[0] if src == ANY else next(m for m in left if m[0] == src))
        left.remove(message)


def each_tag_once(comm: Any) -> int:
    x = np.zeros(1)
    for tag in range(5000):
        comm.send(x, 1 - comm.rank, tag)
        comm.recv(x, 1 - comm.rank, tag)
    return len(comm._post._boxes)


def test_tags_that_are_used_once_leave_nothing() -> None:
    assert max(run(each_tag_once, 2)) <= 1024


def behind_a_busy_port(comm: Any) -> list[int]:
    """Empty messages take no time, and queue up nevertheless."""
    if comm.rank == 0:
        works = [comm.send(message(), 1, async_op=True)]
        backend.count(A / 2)
        works.append(comm.send(message(0), 1, async_op=True))
        works[0].wait()  # this clock is now when the port is free, which is when the second one leaves
        comm.send(message(3), 1)
        works[1].wait()
        return []
    return [comm.recv(message(n), 0) for n in (N, 0, 3)]  # each of its size: in order


def test_an_empty_message_is_not_overtaken() -> None:
    assert run(behind_a_busy_port, 2)[1] == [0, 0, 0]


def takes_one_from_anybody(comm: Any, count: int) -> tuple[int, int]:
    """Afterwards all receives name their sender."""
    x, y = message(1000), message(0)
    if comm.rank == 0:
        comm.send(x, 1)
        for _ in range(count):
            comm.send(x, 1)
            comm.send(y, 1, tag=1)
        return 0, 0
    comm.recv(x, ANY)
    for _ in range(count):
        comm.recv(y, 0, tag=1)
        comm.recv(x, 0)
    box = comm._post._boxes[1, 0]
    return len(box.arrivals or ()), box.sent - box.taken


def test_letters_that_were_taken_are_forgotten() -> None:
    kept, waiting = run(takes_one_from_anybody, 2, 1000)[1]
    assert kept <= 70
    assert waiting == 0


def caused_by_the_other(comm: Any) -> list[float]:
    """Rank 0 sends 12 after rank 1 has sent 11, and no time passes: both arrive at once."""
    x, token = np.zeros(1), np.zeros(1)
    if comm.rank == 0:
        comm.send(np.array([10.0]), 2)
        comm.recv(token, 1, tag=5)
        comm.send(np.array([12.0]), 2)
        comm.send(token, 2, tag=7)
    elif comm.rank == 1:
        comm.recv(token, 2, tag=6)
        comm.send(np.array([11.0]), 2)
        comm.send(token, 0, tag=5)
    else:
        comm.recv(x, 0)
        comm.send(token, 1, tag=6)
        comm.recv(token, 0, tag=7)
        return [(comm.recv(x, ANY), float(x[0]))[1] for _ in range(2)]
    return []


def test_of_two_that_arrive_at_once_the_first_one_sent_is_the_first() -> None:
    assert run(caused_by_the_other, 3, latency_s=0.0, bandwidth_bytes_per_s=1e300)[2] == [11.0, 12.0]


def all_from_anybody(comm: Any) -> int:
    if comm.rank:
        comm.send(np.ones(1), 0)
        return 0
    works = [comm.recv(np.zeros(1), ANY, async_op=True) for _ in range(comm.world_size - 1)]
    assert sorted(work.wait() for work in works) == list(range(1, comm.world_size))
    events: int = comm._venue.loop.events
    return events


def test_many_posted_receives_from_anybody_take_an_event_each() -> None:
    assert run(all_from_anybody, 201)[0] < 10 * 201
