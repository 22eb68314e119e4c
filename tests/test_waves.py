"""Large groups: schedules as waves, values made at one place, times as vectors: each equals what it stands for."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend
from minidp.comm import AVG, MAX, MIN, SUM, meeting, schedules, values, waves
from minidp.comm.meeting import Meeting, Transport
from minidp.comm.movement import Group, Movement, by_waves, port_order, traffic
from minidp.comm.reduction import finish, fold
from minidp.comm.schedules import ALL_REDUCE, bytes_sent, chunk_bounds
from minidp.comm.transfers import simulate
from minidp.comm.venue import Venue
from minidp.sim import Cluster, FatTree
from minidp.sim.network import Network

ROOTED = ("broadcast", "gather", "scatter", "direct_reduce")
NAMES = (*ALL_REDUCE, *ROOTED, "all_gather", "all_to_all", "direct_reduce_scatter")
REDUCES = (*ALL_REDUCE, "direct_reduce", "direct_reduce_scatter")
SEVERAL = ("direct", "direct_reduce_scatter", "scatter")  # of these a rank sends several messages in a step


def roots(name: str, p: int) -> range:
    return range(p) if name in ROOTED else range(1)


# --- waves are the schedule ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_waves_are_the_entries_of_the_schedule_in_port_order(name: str) -> None:
    for p in range(1, 18):
        for root in roots(name, p):
            schedule = schedules.get(name, p, root)
            assert waves.chunks(name, p) == schedule.chunks
            found = []
            for step, of_step in enumerate(waves.waves(name, p, root)):
                for pattern, start, stop, reduce in of_step:
                    src = pattern.src.tolist()
                    assert len(set(src)) == len(src), "at most one message a rank in a wave"
                    op = "reduce" if reduce else "copy"
                    columns = (src, pattern.dst.tolist(), start.tolist(), stop.tolist())
                    found += [(step, *message, op) for message in zip(*columns)]
            assert found == sorted(schedule.messages, key=lambda m: port_order(m, p)), (p, root)


@pytest.mark.parametrize("name", NAMES)
def test_traffic_is_that_of_the_schedule(name: str) -> None:
    for p in (1, 2, 3, 5, 8, 9):
        for n in (0, 1, p * p, 1000 * p * p, 1009):
            for root in roots(name, p):
                schedule = schedules.get(name, p, root)
                bounds = chunk_bounds(n, schedule.chunks)
                counted = traffic(Movement(name, root, n, 4), p)
                received, messages = [0] * p, [0] * p
                for t in schedule.transfers:
                    received[t.dst] += 4 * (bounds[t.chunk][1] - bounds[t.chunk][0])
                for m in schedule.messages:
                    messages[m.src] += 1
                assert counted == (bytes_sent(schedule, n, 4), received, messages)


# --- values -------------------------------------------------------------------------------------------------


def lengths(name: str, p: int) -> list[int]:
    """In these all chunks are of one size; an all-reduce takes any length."""
    if name in ALL_REDUCE or name in ("broadcast", "direct_reduce"):
        return sorted({0, 1, p - 1, p, p + 1, 1000, 1024 * p + 1})
    return [0, p * p, 120 * p * p]


def random_arrays(p: int, n: int, dtype: str) -> list[np.ndarray]:
    """Of many orders of magnitude: the order of a sum shows in its bits."""
    generator = np.random.default_rng((p, n))
    numbers = generator.standard_normal((p, n)) * 10.0 ** generator.integers(-2, 3, (p, n))
    return list(numbers.astype(dtype))


def written(name: str, p: int, rank: int, n: int, root: int) -> list[tuple[int, int]]:
    """Which slices of its array are a rank's to look at afterwards; the rest is scratch."""
    bounds = chunk_bounds(n, waves.chunks(name, p))
    if name in ("gather", "direct_reduce"):
        return [(0, n)] if rank == root else []
    if name in ("scatter", "direct_reduce_scatter"):
        return [bounds[rank]]
    if name == "all_to_all":
        return [bounds[src * p + rank] for src in range(p)]
    return [(0, n)]


def by_the_entries(name: str, p: int, root: int, arrays: list[np.ndarray], op: Any) -> list[np.ndarray]:
    """The schedule executed step by step, contributions folded in order of rank (`execute` in one process)."""
    schedule = schedules.get(name, p, root)
    state, bounds = [x.copy() for x in arrays], chunk_bounds(len(arrays[0]), schedule.chunks)
    for transfers in schedule.rounds:
        before = [x.copy() for x in state]
        arriving: dict[tuple[int, int], list[int]] = {}
        for t in transfers:
            lo, hi = bounds[t.chunk]
            if t.op == "copy":
                state[t.dst][lo:hi] = before[t.src][lo:hi]
            else:
                arriving.setdefault((t.dst, t.chunk), [t.dst]).append(t.src)
        for (dst, chunk), terms in arriving.items():
            lo, hi = bounds[chunk]
            divide = name == "direct"  # halves that arrive all at once are divided before they are rounded
            fold([before[src][lo:hi] for src in sorted(terms)], op, state[dst][lo:hi], divide=divide)
    for x in state:
        if name in ALL_REDUCE and name != "direct":
            finish(x, op, p)
    return state


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_the_schedule_to_the_bit(name: str, dtype: str) -> None:
    for p in range(1, 10):
        for n in lengths(name, p):
            arrays = random_arrays(p, n, dtype)
            for op in (SUM, MAX, MIN, *[AVG] * (name in ALL_REDUCE)) if name in REDUCES else (None,):
                for root in {0, p - 1} if name in ROOTED else {0}:
                    got = [x.copy() for x in arrays]
                    with np.errstate(all="ignore"):
                        values.combine(name, root, got, op)
                        want = by_the_entries(name, p, root, arrays, op)
                    if dtype == "float32" and op is not AVG:
                        ufunc = op.ufunc if op else np.add
                        simulated = simulate(schedules.get(name, p, root), arrays, ufunc)
                        assert all(a.tobytes() == b.tobytes() for a, b in zip(simulated, want))
                    for rank in range(p):
                        for lo, hi in written(name, p, rank, n, root):
                            assert got[rank][lo:hi].tobytes() == want[rank][lo:hi].tobytes(), (
                                p,
                                n,
                                op,
                                root,
                                rank,
                            )


# --- times --------------------------------------------------------------------------------------------------

CLUSTERS: dict[str, Callable[[int], Cluster]] = {
    "switch": lambda p: Cluster(p, latency_s=1.7e-6, bandwidth_bytes_per_s=1.1e9, reduce_bytes_per_s=3.3e9),
    "three a node": lambda p: Cluster(-(-p // 3), ranks_per_node=3, local_bandwidth_bytes_per_s=7e9),
    "fat tree": lambda p: Cluster(-(-p // 4) * 4, topology=FatTree(4, 2.5), reduce_bytes_per_s=3.3e9),
    "fat tree, two a node": lambda p: Cluster(-(-p // 8) * 4, ranks_per_node=2, topology=FatTree(2, 1.5)),
    "ring": lambda p: Cluster(max(p, 2), topology="ring"),
}
HOPPING = tuple(name for name in NAMES if name not in ("ring", "all_gather", "scatter"))  # beyond a neighbour


def both_ways(cluster: Cluster, p: int, movement: Movement, free: list[float]) -> list[tuple[float, list[float]]]:
    """(end, when each link is free) of a movement that begins at 1 s, message by message and by waves."""
    results = []
    for waved in (False, True):
        venue = Venue(cluster, cluster.nodes * cluster.ranks_per_node)
        group = Group(venue, range(p), "world")
        links = venue.network.free
        links[:] = [time_s for _, time_s in zip(links, free)]
        ends: list[float] = []
        if waved:
            vector = np.array(links)
            ends.append(by_waves(group, vector, movement, 1.0))
            links[:] = vector.tolist()
        else:
            met = Meeting(group, 1)
            met._finish = ends.append  # type: ignore[method-assign]
            venue.loop.at(1.0, Transport(met, group.rounds(movement)).go_on)
            venue.loop.run()
        (end,) = ends
        results.append((end, list(links)))
    return results


def promised(wiring: str) -> list[str]:
    """Not where messages hop, and not where ranks share links and send several messages in a step."""
    left_out = {"switch": (), "ring": HOPPING}.get(wiring, SEVERAL)
    return [name for name in NAMES if name not in left_out]


@pytest.mark.parametrize(("wiring", "name"), [(wiring, name) for wiring in CLUSTERS for name in promised(wiring)])
def test_times_as_vectors_are_those_of_messages(name: str, wiring: str) -> None:
    for p in (1, 2, 3, 4, 5, 8, 11, 16, 33, 64):
        if name in ("all_to_all", *SEVERAL) and p > 16:
            continue
        for n in (0, p * p, p * p * 50) if p < 64 else (0, p * p):
            idle = [0.0] * 1000
            for root in {0, 1, p - 1} & set(roots(name, p)):
                one, other = both_ways(CLUSTERS[wiring](p), p, Movement(name, root, n, 4), idle)
                assert one == other, (p, n, root)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SEVERAL])
def test_times_are_equal_also_behind_busy_links(name: str) -> None:
    generator = random.Random(1)
    for p in (2, 3, 5, 8, 12, 32):
        busy = [1 + generator.choice([-1, 1]) * generator.random() * 1e-4 for _ in range(1000)]
        for n in (0, p * p * 50):
            one, other = both_ways(
                CLUSTERS["switch"](p), p, Movement(name, p - 1 if name in ROOTED else 0, n, 4), busy
            )
            assert one == other, (p, n)
            assert one[0] > 1


@pytest.mark.parametrize("wiring", [wiring for wiring in CLUSTERS if wiring != "ring"])
def test_travel_is_leave_then_arrive(wiring: str) -> None:
    """Leave for each in turn, then arrive in order of (start, index): random messages, random busy links."""
    generator = np.random.default_rng(5)
    for trial in range(60):
        p = int(generator.integers(2, 17))
        cluster = CLUSTERS[wiring](p)
        network = Network(cluster, p)
        count = int(generator.integers(1, 30))
        src = generator.integers(0, p, count)
        dst = (src + generator.integers(1, p, count)) % p if p > 1 else src
        nbytes = generator.integers(0, 3, count) * generator.integers(0, 10**5, count)
        free = np.round(generator.random(len(network.free)) * 1e-4, 6) * (trial % 2)
        network.free[:] = free.tolist()
        now = 5e-5
        paths = [network.path(int(s), int(d)) for s, d in zip(src, dst)]
        left = [network.leave(path, int(n), now) for path, n in zip(paths, nbytes)]
        want = [0.0] * count
        for i in sorted(range(count), key=lambda i: (left[i][0], i)):
            want[i] = network.arrive(paths[i], int(nbytes[i]), *left[i])
        got = Network.travel(free, network.route(src, dst), nbytes, now)
        assert got.tolist() == want
        assert free.tolist() == network.free


def everything(comm: Any, algorithms: list[str | None], groups: bool) -> tuple[list[float], bytes, int]:
    """A whole run: late ranks, all kinds of collectives, groups, works on streams."""
    p, rng = comm.world_size, np.random.default_rng(comm.rank)
    clocks, data = [], b""
    half = comm.split(comm.rank % 2)
    for k, algorithm in enumerate(algorithms):
        backend.count(float(rng.integers(0, 1000)))
        x = rng.standard_normal(37 + 100 * k).astype(np.float32)
        work = comm.all_reduce(x, algorithm=algorithm, async_op=True)
        backend.count(500.0)
        work.wait()
        clocks.append(comm.now())
        if groups:
            half.all_reduce(x, algorithm=algorithm)
        out = np.empty((p, 3), np.float32)
        comm.all_gather(out, x[:3])
        comm.broadcast(x, k % p)
        comm.barrier()
        clocks.append(comm.now())
        data += x.tobytes() + out.tobytes()
    return clocks, data, comm.traffic.bytes_sent


@pytest.mark.parametrize("wiring", ["switch", "fat tree"])
@pytest.mark.parametrize("p", [2, 6, 16])
def test_a_whole_run_is_the_same_on_both_paths(p: int, wiring: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = wiring == "switch"  # else groups meet in the links that they share
    algorithms = [*ALL_REDUCE, None] if flat else [name for name in ALL_REDUCE if name not in SEVERAL]
    results = []
    for events_up_to in (1000, 0):
        monkeypatch.setattr(meeting, "EVENTS_UP_TO", events_up_to)
        cluster = CLUSTERS[wiring](p)
        results.append(minidp.spawn(everything, p, algorithms, flat, world="virtual", cluster=cluster))
    assert results[0] == results[1]


def sums(comm: Any) -> tuple[float, float, float]:
    x = np.full(5, float(comm.rank))
    comm.all_reduce(x)
    comm.barrier()
    return x[0], x[-1], comm.now()


def test_more_ranks_than_events() -> None:
    p = meeting.EVENTS_UP_TO + 3
    results = minidp.spawn(sums, p, world="virtual")
    assert results == [results[0]] * p
    assert results[0][:2] == (p * (p - 1) / 2,) * 2
