"""The virtual clock on ideal links: elapsed times are those of the formulas, exactly.

Latency, seconds a byte and seconds a reduced byte are powers of two in most tests: then no sum of them is rounded,
and times are compared with ``==``. The formulas are written here once more, in fractions, from laws.md.
"""

from __future__ import annotations

import pickle
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend, trace
from minidp.comm import costs, schedules
from minidp.comm.schedules import ALL_REDUCE, chunk_bounds
from minidp.sim import Cluster

A, B, G = 2.0**-10, 2.0**-20, 2.0**-22
IDEAL: dict[str, Any] = {"latency_s": A, "bandwidth_bytes_per_s": 1 / B, "reduce_bytes_per_s": 1 / G}
ROUNDED: dict[str, Any] = {"latency_s": 5e-6, "bandwidth_bytes_per_s": 1.25e9, "reduce_bytes_per_s": 7e9}
NO_ADDING: dict[str, Any] = {"latency_s": A, "bandwidth_bytes_per_s": 1 / B}


def run(fn: Any, world_size: int, *args: Any, cluster: Cluster | None = None, **options: Any) -> list[Any]:
    cluster = cluster or Cluster(nodes=world_size, **options)
    return minidp.spawn(fn, world_size, *args, world="virtual", cluster=cluster)


def all_equal(values: list[Any]) -> Any:
    assert all(value == values[0] for value in values), values
    return values[0]


def power_and_log(p: int) -> tuple[int, int]:
    """p' = 2^⌊log₂ p⌋ and its logarithm."""
    return 2 ** (p.bit_length() - 1), p.bit_length() - 1


def formula(name: str, p: int, n: int, itemsize: int, a: Any, b: Any, g: Any) -> Fraction:
    """laws.md, for n elements; where p (or p') does not divide n, with the longest chunk of each step."""
    a, b, g, nbytes = Fraction(a), Fraction(b), Fraction(g), Fraction(n * itemsize)
    whole = a + nbytes * b
    inner, log = power_and_log(p)
    fold = 2 * whole + nbytes * g if inner < p else Fraction(0)
    if name == "ring":
        longest = -(-n // p) * itemsize
        return (p - 1) * (2 * a + 2 * longest * b + longest * g)
    if name == "binomial_tree":
        steps = (p - 1).bit_length()
        return steps * (2 * whole + nbytes * g)
    if name == "recursive_doubling":
        return log * (whole + nbytes * g) + fold
    if name == "halving_doubling":
        first = [hi for _, hi in chunk_bounds(n, inner)]  # the first d chunks are the longest block of d
        blocks = [first[2**k - 1] * itemsize for k in range(log)]
        return sum((2 * a + 2 * size * b + size * g for size in blocks), Fraction(0)) + fold
    assert name == "direct"
    return a + (p - 1) * nbytes * (b + g) if p > 1 else Fraction(0)


def gammas(options: dict[str, Any]) -> tuple[float, float, float]:
    cluster = Cluster(nodes=1, **options)
    return cluster.latency_s, cluster.seconds_per_byte, cluster.reduce_seconds_per_byte


def sizes(p: int) -> list[int]:
    near = [n + k for n in (1024, 4096, 16384) for k in (-1, 1)]  # 4-byte elements: around where algorithms cross
    return sorted({0, 1, p - 1, p, p + 1, 2 * p + 1, *near, 100_003, 840 * 128})


# --- all-reduce ---------------------------------------------------------------------------------------------


def times_of_all_reduce(comm: Any, lengths: list[int]) -> dict[tuple[str | None, int], float]:
    took = {}
    for n in lengths:
        for name in (*ALL_REDUCE, None):
            x, start = np.ones(n, np.float32), comm.now()
            comm.all_reduce(x, algorithm=name)
            took[name, n] = comm.now() - start
    return took


@pytest.mark.parametrize("options", [IDEAL, NO_ADDING, ROUNDED], ids=["ideal", "no γ", "rounded"])
@pytest.mark.parametrize("p", range(1, 10))
def test_all_reduce_takes_what_the_formula_says(p: int, options: dict[str, Any]) -> None:
    a, b, g = gammas(options)
    took = all_equal(run(times_of_all_reduce, p, sizes(p), **options))
    for n in sizes(p):
        for name in ALL_REDUCE:
            want, read_off = (
                formula(name, p, n, 4, a, b, g),
                costs.cost(schedules.all_reduce(name, p), n * 4, a, b, g, 4),
            )
            if options is ROUNDED:
                assert took[name, n] == pytest.approx(float(want), rel=1e-12, abs=0), (name, n)
                assert read_off == pytest.approx(float(want), rel=1e-12, abs=0), (name, n)
            else:
                assert took[name, n] == want == read_off, (name, n)
            if n % (p * power_and_log(p)[0]) == 0:
                assert costs.ALL_REDUCE[name](p, n * 4, a, b, g) == pytest.approx(float(want), rel=1e-14, abs=0)
        fastest = costs.fastest(p, n * 4, a, b, g)
        assert took[None, n] == pytest.approx(took[fastest, n], rel=1e-11, abs=0)
        if n % (p * power_and_log(p)[0]) == 0:
            assert took[None, n] <= min(took[name, n] for name in ALL_REDUCE) * (1 + 1e-11)


def crossings(comm: Any, unit: int, top: int) -> dict[tuple[str, str], int]:
    """For each pair of algorithms the largest k ≤ top at which that is faster which is faster at k = 1."""

    def took(name: str, k: int) -> float:
        start = comm.now()
        comm.all_reduce(np.zeros(k * unit, np.uint8), algorithm=name)
        return float(comm.now() - start)

    found = {}
    for one, other in combinations(ALL_REDUCE, 2):
        first = np.sign(took(one, 1) - took(other, 1))
        lo, hi = 1, top
        if first and np.sign(took(one, top) - took(other, top)) == -first:
            while hi - lo > 1:
                middle = (lo + hi) // 2
                if np.sign(took(one, middle) - took(other, middle)) == first:
                    lo = middle
                else:
                    hi = middle
            found[one, other] = lo
    return found


@pytest.mark.parametrize("p", [2, 3, 4, 6, 7, 8])
def test_algorithms_cross_where_the_formulas_do(p: int) -> None:
    unit, top = p * power_and_log(p)[0], 4000
    measured = all_equal(run(crossings, p, unit, top, **IDEAL))
    wanted = {}
    for one, other in combinations(ALL_REDUCE, 2):
        # t(k) = fixed + k · slope, for k units: they cross at k = −Δfixed / Δslope.
        (f0, s0), (f1, s1) = (
            (formula(name, p, 0, 1, A, B, G), formula(name, p, unit, 1, A, B, G) - formula(name, p, 0, 1, A, B, G))
            for name in (one, other)
        )
        if s0 != s1 and 1 < (k := -(f0 - f1) / (s0 - s1)) < top:
            wanted[one, other] = int(k) if k.denominator > 1 else int(k) - 1
    assert measured == wanted
    assert p < 3 or wanted, "else nothing would be tested"
    for one, other in wanted:  # the closed formulas of costs.py cross in the same unit
        k, t = wanted[one, other], {}
        for name in (one, other):
            t[name] = [costs.ALL_REDUCE[name](p, m * unit, A, B, G) for m in (k, k + 2)]
        assert (t[one][0] < t[other][0]) != (t[one][1] < t[other][1])


# --- the others ---------------------------------------------------------------------------------------------


def times_of_the_others(comm: Any, m: int) -> dict[str, float]:
    p, root = comm.world_size, comm.world_size - 1
    mine, all_of_them = np.ones(m, np.float32), np.ones((p, m), np.float32)
    calls = {
        "broadcast": lambda: comm.broadcast(mine, root),
        "reduce": lambda: comm.reduce(mine, root),
        "gather": lambda: comm.gather(mine, root),
        "scatter": lambda: comm.scatter(all_of_them if comm.rank == root else None, root),
        "all_gather": lambda: comm.all_gather(all_of_them, mine),
        "reduce_scatter": lambda: comm.reduce_scatter(mine, all_of_them),
        "all_to_all": lambda: comm.all_to_all(np.empty_like(all_of_them), all_of_them),
        "barrier": comm.barrier,
        "all_gather_int": lambda: comm.all_gather_int(comm.rank),
        "all_gather_object": lambda: comm.all_gather_object(b"x" * m),
        "split": lambda: comm.split(0),
        "allocate": lambda: comm.allocate(m),
    }
    took = {}
    for name, call in calls.items():
        start = comm.now()
        call()
        took[name] = comm.now() - start
    return took


@pytest.mark.parametrize("options", [IDEAL, ROUNDED], ids=["ideal", "rounded"])
@pytest.mark.parametrize("p", range(1, 10))
def test_one_way_collectives(p: int, options: dict[str, Any]) -> None:
    a, b, g = map(Fraction, gammas(options))
    levels, others, hello = (p - 1).bit_length(), p - 1, a if p > 1 else Fraction(0)
    for m in (0, 1, 3, 1000, 65537):
        n = m * 4
        told = len(pickle.dumps(((m,), np.dtype(np.float32))))  # a scatter broadcasts its shape and dtype first
        said = len(pickle.dumps(b"x" * m))
        want = {
            "broadcast": levels * (a + n * b),
            "reduce": hello + others * n * (b + g),
            "gather": hello + others * n * b,
            "scatter": hello + levels * (a + told * b) + hello + others * n * b,
            "all_gather": others * (a + n * b),
            "reduce_scatter": hello + others * n * (b + g),
            "all_to_all": others * (a + n * b),
            "all_gather_object": hello + others * (a + said * b),
            **dict.fromkeys(("barrier", "all_gather_int", "split", "allocate"), hello),
        }
        took = all_equal(run(times_of_the_others, p, m, **options))
        if options is IDEAL:
            assert took == want
        else:
            assert took == pytest.approx({name: float(t) for name, t in want.items()}, rel=1e-12, abs=1e-18)


# --- when collectives begin and end -------------------------------------------------------------------------


def late(comm: Any, work: list[list[int]]) -> list[float]:
    """Rank r computes ``work[k][r]`` FLOPs before the k-th collective, without looking at the clock."""
    ends = []
    for k, flops in enumerate(work):
        backend.count(flops[comm.rank])
        if k % 3 == 0:
            comm.barrier()
        elif k % 3 == 1:
            comm.all_reduce(np.ones(96, np.float32), algorithm="ring")
        else:
            comm.broadcast(np.ones(100, np.float32), k % comm.world_size)
        ends.append(comm.now())
    return ends


@pytest.mark.parametrize("p", [1, 2, 3, 4, 7])
def test_a_collective_begins_with_the_slowest_rank_and_ends_for_all_at_once(p: int) -> None:
    work = np.random.default_rng(p).integers(0, 1000, (9, p)).tolist()
    straggler = {p - 1: 4.0}
    ends = all_equal(run(late, p, work, flops=2.0**12, stragglers=straggler, **IDEAL))
    clock = Fraction(0)
    for k, flops in enumerate(work):
        arrivals = [Fraction(f, 2**12) * (4 if rank in straggler else 1) for rank, f in enumerate(flops)]
        ring, tree = formula("ring", p, 96, 4, A, B, G), (p - 1).bit_length() * (Fraction(A) + 400 * Fraction(B))
        clock += max(arrivals) + (Fraction(A) * (p > 1), ring, tree)[k % 3]
        assert ends[k] == clock


def buckets(comm: Any, work: list[list[int]], lengths: list[int]) -> tuple[Any, list[float], float]:
    """Compute, launch, compute, launch …: what went on on the stream, and where the waits end."""
    recorder = trace.Recorder(comm.rank, comm.now)
    with trace.recording(recorder):
        works = []
        for flops, n in zip(work[comm.rank], lengths):
            backend.count(flops)
            works.append(comm.all_reduce(np.ones(n, np.float32), algorithm="direct", async_op=True))
        launched, waited = comm.now(), []
        for each in works:
            each.wait()
            waited.append(comm.now())
    stream = [(e.start_s, e.end_s) for e in recorder.events if e.category == "communication"]
    assert all(e.args == {"stream": "world"} for e in recorder.events if e.category == "communication")
    return stream, waited, launched


@pytest.mark.parametrize("seed", range(6))
def test_overlap_each_bucket_ends_after_the_one_before_and_after_the_last_call(seed: int) -> None:
    """finish_k = max(finish_{k−1}, ready_k) + comm_k."""
    generator = np.random.default_rng(seed)
    p, count = int(generator.integers(2, 6)), 8
    work = generator.integers(0, 5000, (p, count)) * generator.integers(0, 2, (p, count))
    lengths = generator.integers(0, 2000, count).tolist()
    results = run(buckets, p, work.tolist(), lengths, flops=2.0**18, **IDEAL)
    ready = np.cumsum(work, axis=1).max(axis=0)
    want, finish = [], Fraction(0)
    for k, n in enumerate(lengths):
        start = max(finish, Fraction(int(ready[k]), 2**18))
        finish = start + formula("direct", p, n, 4, A, B, G)
        want.append((start, finish))
    assert all_equal([stream for stream, _, _ in results]) == want
    for rank, (_, waited, launched) in enumerate(results):
        assert launched == Fraction(int(work[rank].sum()), 2**18), "launching takes no time"
        assert waited == [max(launched, end) for _, end in want]


def two_groups(comm: Any) -> list[float]:
    a, b = comm.duplicate("a"), comm.duplicate("b")
    half = comm.split(comm.rank % 2)
    ends, start = [], comm.now()
    for n in (0, 1024):  # whole arrays of n bytes: with n = 0 there are latencies alone, which overlap
        works = [g.all_reduce(np.ones(n, np.uint8), algorithm="direct", async_op=True) for g in (a, b)]
        for each in works:
            each.wait()
        ends.append(comm.now() - start)
        start = comm.now()
    half.all_reduce(np.ones(1024, np.uint8), algorithm="direct")
    return [*ends, comm.now() - start]


def test_two_communicators_go_on_side_by_side_and_share_the_ports() -> None:
    empty, full, halves = all_equal(run(two_groups, 4, **NO_ADDING))
    assert empty == A
    assert full == A + 2 * 3 * 1024 * B
    assert halves == A + 1024 * B, "groups of other ranks meet nobody"
