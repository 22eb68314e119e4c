"""Collective algorithms as data: every entry is there for a reason, and none is missing."""

from __future__ import annotations

import itertools
from math import ceil, log2

import numpy as np
import pytest

from minidp.comm import costs, schedules
from minidp.comm.schedules import ALL_REDUCE, Schedule, Transfer, bytes_sent, chunk_bounds, simulate

WORLD_SIZES = range(1, 10)
LARGE = 1009  # a prime: no world size divides it


def lengths(p):
    return sorted({0, 1, p - 1, p, p + 1, LARGE, 12 * p})


def inputs(p, n, seed=0):
    """One array a rank of whole numbers from 1 to 1000: sums are exact, and nothing is 0."""
    generator = np.random.default_rng((seed, p, n))
    return [generator.integers(1, 1001, n) for _ in range(p)]


def power_of_two(p):
    return 2 ** int(log2(p))


# --- all-reduce ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", WORLD_SIZES)
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_every_rank_ends_with_the_sum(name, p):
    for n in lengths(p):
        arrays = inputs(p, n)
        kept = [a.copy() for a in arrays]
        results = simulate(ALL_REDUCE[name](p), arrays)
        for result in results:
            np.testing.assert_array_equal(result, np.sum(kept, axis=0))
        for array, before in zip(arrays, kept):
            np.testing.assert_array_equal(array, before)


@pytest.mark.parametrize("p", WORLD_SIZES)
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_other_operations(name, p):
    arrays = inputs(p, 37)
    for result in simulate(ALL_REDUCE[name](p), arrays, reduce=np.maximum):
        np.testing.assert_array_equal(result, np.max(arrays, axis=0))


@pytest.mark.parametrize("p", WORLD_SIZES)
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_all_ranks_hold_the_same_bits(name, p):
    arrays = list(np.random.default_rng(p).standard_normal((p, 101)).astype(np.float32))
    first, *others = simulate(ALL_REDUCE[name](p), arrays)
    for other in others:
        assert other.tobytes() == first.tobytes()


@pytest.mark.parametrize("p", WORLD_SIZES)
def test_direct_adds_in_order_of_rank(p):
    arrays = list(np.random.default_rng(p).standard_normal((p, 101)).astype(np.float32))
    in_order = arrays[0].copy()
    for array in arrays[1:]:
        in_order = in_order + array
    for result in simulate(schedules.direct(p), arrays):
        assert result.tobytes() == in_order.tobytes()
    reduced = simulate(schedules.direct_reduce(p, p - 1), arrays)
    assert reduced[p - 1].tobytes() == in_order.tobytes()
    scattered = simulate(schedules.direct_reduce_scatter(p), arrays)
    for rank, (lo, hi) in enumerate(chunk_bounds(101, p)):
        assert scattered[rank][lo:hi].tobytes() == in_order[lo:hi].tobytes()


def test_the_order_of_a_sum_is_visible_in_floats():
    """Else the test above would prove nothing: 1e8 + 1 − 1e8 depends on the order in float32."""
    a, b, c = (np.array([v], np.float32) for v in (1e8, 1.0, -1e8))
    assert simulate(schedules.direct(3), [a, b, c])[1] == 0.0
    assert simulate(schedules.direct(3), [a, c, b])[1] == 1.0


# --- steps and bytes: the closed forms ----------------------------------------------------------------------


@pytest.mark.parametrize("p", WORLD_SIZES)
def test_ring_steps_and_bytes(p):
    schedule = schedules.ring(p)
    assert schedule.steps == 2 * (p - 1)
    n, itemsize = 12 * p, 4
    assert bytes_sent(schedule, n, itemsize) == [2 * (p - 1) * n // p * itemsize] * p
    sizes = [hi - lo for lo, hi in chunk_bounds(LARGE, p)]
    for rank, sent in enumerate(bytes_sent(schedule, LARGE)):  # all chunks but one of its own, twice
        assert sent == 2 * LARGE - sizes[rank] - sizes[(rank + 1) % p]


@pytest.mark.parametrize("name", ALL_REDUCE)
def test_one_rank_sends_nothing(name):
    schedule = ALL_REDUCE[name](1)
    assert schedule.steps == 0
    assert schedule.transfers == ()
    assert bytes_sent(schedule, LARGE, 8) == [0]


@pytest.mark.parametrize("p", WORLD_SIZES)
def test_steps_and_bytes_of_the_others(p):
    n, q = 12 * p * power_of_two(p), power_of_two(p)
    folded = 2 if q < p else 0

    tree = schedules.binomial_tree(p)
    assert tree.steps == 2 * ceil(log2(p))
    assert sum(bytes_sent(tree, n)) == 2 * (p - 1) * n
    assert bytes_sent(tree, n)[0] == ceil(log2(p)) * n

    for name, inside, steps in (
        ("recursive_doubling", int(log2(q)) * n, int(log2(q))),
        ("halving_doubling", 2 * (q - 1) * n // q, 2 * int(log2(q))),
    ):
        schedule = ALL_REDUCE[name](p)
        assert schedule.steps == steps + folded
        extra = p - q  # as many ranks hand in their array, and as many hand back the sum
        assert bytes_sent(schedule, n) == [inside + n] * extra + [inside] * (q - extra) + [n] * extra

    assert schedules.direct(p).steps == (p > 1)
    assert bytes_sent(schedules.direct(p), n) == [(p - 1) * n] * p


@pytest.mark.parametrize("p", WORLD_SIZES)
@pytest.mark.parametrize("name", ALL_REDUCE)
@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (3.0, 0.5, 0.25)]
)
def test_the_formulas_are_what_the_entries_cost(name, p, alpha, beta, gamma):
    n = 12 * p * power_of_two(p)
    formula = costs.ALL_REDUCE[name](p, n, alpha, beta, gamma)
    assert costs.cost(ALL_REDUCE[name](p), n, alpha, beta, gamma) == pytest.approx(formula, rel=1e-12)


@pytest.mark.parametrize("p", WORLD_SIZES[1:])
def test_ring_costs_the_longest_chunk_of_each_step(p):
    longest = ceil(LARGE / p) * 4
    expected = 2 * (p - 1) * (3.0 + longest * 0.5) + (p - 1) * longest * 0.25
    assert costs.cost(schedules.ring(p), LARGE * 4, 3.0, 0.5, 0.25, itemsize=4) == pytest.approx(expected)


def test_the_fastest_depends_on_the_size():
    at = {"alpha": 5e-6, "beta": 8e-10, "gamma": 1e-10}
    assert costs.fastest(8, 4, **at) == "direct"
    assert costs.fastest(8, 2**26, **at) == "halving_doubling"
    assert costs.fastest(9, 2**30, **at) == "ring"
    assert costs.fastest(1, 2**20, **at) == "ring"  # nothing to send: all cost 0


# --- the other collectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("p", WORLD_SIZES)
def test_rooted_collectives(p):
    for root, n in itertools.product(range(p), lengths(p)):
        arrays = inputs(p, n)
        for result in simulate(schedules.broadcast(p, root), arrays):
            np.testing.assert_array_equal(result, arrays[root])
        for reduce in (schedules.reduce, schedules.direct_reduce):
            np.testing.assert_array_equal(simulate(reduce(p, root), arrays)[root], np.sum(arrays, axis=0))
        gathered = simulate(schedules.gather(p, root), arrays)[root]
        scattered = simulate(schedules.scatter(p, root), arrays)
        for rank, (lo, hi) in enumerate(chunk_bounds(n, p)):
            np.testing.assert_array_equal(gathered[lo:hi], arrays[rank][lo:hi])
            np.testing.assert_array_equal(scattered[rank][lo:hi], arrays[root][lo:hi])


@pytest.mark.parametrize("p", WORLD_SIZES)
def test_collectives_without_a_root(p):
    for n in lengths(p):
        arrays, bounds = inputs(p, n), chunk_bounds(n, p)
        for reduce_scatter in (schedules.reduce_scatter, schedules.direct_reduce_scatter):
            for rank, result in enumerate(simulate(reduce_scatter(p), arrays)):
                chunk = slice(*bounds[rank])
                np.testing.assert_array_equal(result[chunk], np.sum(arrays, axis=0)[chunk])
        whole = np.concatenate([arrays[rank][slice(*bounds[rank])] for rank in range(p)])
        for result in simulate(schedules.all_gather(p), arrays):
            np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize("p", WORLD_SIZES)
def test_all_to_all_transposes(p):
    matrices = [np.full((p, p, 3), -1) for _ in range(p)]
    for rank, matrix in enumerate(matrices):
        matrix[rank] = 100 * rank + np.arange(p)[:, None]
    results = simulate(schedules.all_to_all(p), [m.reshape(-1) for m in matrices])
    for rank, result in enumerate(results):
        column = result.reshape(p, p, 3)[:, rank]
        np.testing.assert_array_equal(column, np.repeat(100 * np.arange(p)[:, None] + rank, 3, axis=1))
    assert schedules.all_to_all(p).steps == p - 1


@pytest.mark.parametrize("p", WORLD_SIZES)
def test_steps_of_the_others(p):
    assert schedules.broadcast(p).steps == schedules.reduce(p).steps == ceil(log2(p))
    assert schedules.reduce_scatter(p).steps == schedules.all_gather(p).steps == p - 1
    for one_step in (
        schedules.gather,
        schedules.scatter,
        schedules.direct_reduce,
        schedules.direct_reduce_scatter,
    ):
        assert one_step(p).steps == (p > 1)
    n = 12 * p
    for ring_half in (schedules.reduce_scatter, schedules.all_gather, schedules.direct_reduce_scatter):
        assert bytes_sent(ring_half(p), n, 4) == [(p - 1) * n // p * 4] * p


# --- how a schedule is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("p", WORLD_SIZES)
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_messages_are_the_transfers_joined(name, p):
    schedule = ALL_REDUCE[name](p)
    apart = [Transfer(m.step, m.src, m.dst, c, m.op) for m in schedule.messages for c in range(m.start, m.stop)]
    assert sorted(apart) == sorted(schedule.transfers)
    pairs = [(m.step, m.src, m.dst) for m in schedule.messages]
    assert len(pairs) == len(set(pairs))  # neighbouring chunks only: one message a pair and step
    sent = [m for rank in range(p) for sends, _ in schedule.messages_of(rank) for m in sends]
    received = [m for rank in range(p) for _, receives in schedule.messages_of(rank) for m in receives]
    assert sorted(sent) == sorted(received) == sorted(schedule.messages)
    assert all(len(schedule.messages_of(rank)) == schedule.steps for rank in range(p))


@pytest.mark.parametrize("chunks", WORLD_SIZES)
def test_chunk_bounds(chunks):
    for n in lengths(chunks):
        bounds = chunk_bounds(n, chunks)
        sizes = [hi - lo for lo, hi in bounds]
        assert [i for lo, hi in bounds for i in range(lo, hi)] == list(range(n))
        assert len(sizes) == chunks
        assert sizes == sorted(sizes, reverse=True)
        assert max(sizes) - min(sizes) <= 1


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown all-reduce algorithm 'rnig'; valid: ring, binomial_tree"):
        schedules.all_reduce("rnig", 4)
    for build in (*ALL_REDUCE.values(), schedules.broadcast, schedules.gather, schedules.all_to_all):
        with pytest.raises(ValueError, match="world_size must be at least 1, not 0"):
            build(0)
    with pytest.raises(ValueError, match="rank 4 is not one of the 4 ranks 0 to 3"):
        schedules.broadcast(4, 4)
    with pytest.raises(ValueError, match="arrays of one length"):
        simulate(schedules.ring(2), [np.zeros(3), np.zeros(4)])
    with pytest.raises(ValueError, match="cannot cut"):
        chunk_bounds(-1, 2)
    with pytest.raises(ValueError, match="without a gap"):
        Schedule("late", 2, 1, (Transfer(1, 0, 1, 0, "copy"),))
    with pytest.raises(ValueError, match="write the same chunk in the same step"):
        Schedule("twice", 3, 1, (Transfer(0, 0, 2, 0, "copy"), Transfer(0, 1, 2, 0, "reduce")))
    with pytest.raises(ValueError, match="world_size must be at least 1"):
        Schedule("nobody", 0, 1, ())
