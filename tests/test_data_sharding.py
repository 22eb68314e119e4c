"""D = D_1 ∪ … ∪ D_N (article 3.2.1): disjoint, covering, about equal, the same on all workers."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp import data
from minidp.data import sharding

checked = settings(derandomize=True, deadline=None)
sizes = st.integers(0, 3000)
counts = st.integers(1, 40)


@checked
@given(sizes, counts)
def test_halving_covers_disjointly_with_sizes_within_one(n, count):
    blocks = [sharding.block(n, index, count) for index in range(count)]
    assert blocks[0][0] == 0
    assert blocks[-1][1] == n
    assert all(left[1] == right[0] for left, right in pairwise(blocks))
    shares = sharding.halve(n, count)
    assert shares == [stop - start for start, stop in blocks]
    assert len(shares) == count
    assert sum(shares) == n
    assert max(shares) - min(shares) <= 1


def test_halving_exhaustively_for_small_numbers():
    for n in range(70):
        for count in range(1, 35):
            shares = sharding.halve(n, count)
            assert sum(shares) == n
            assert max(shares) - min(shares) <= 1
            grown = sharding.halve(n + 1, count)
            assert all(after >= before for before, after in zip(shares, grown))


@checked
@given(sizes, st.integers(0, 4), st.integers(0, 4))
def test_cutting_finer_refines(n, log_count, log_finer):
    """A worker's block, cut again, is what the finer cut gives directly: micro-shards do not depend on N."""
    count, finer = 2**log_count, 2**log_finer
    direct = [sharding.block(n, index, count * finer) for index in range(count * finer)]
    nested = []
    for index in range(count):
        start, stop = sharding.block(n, index, count)
        for part in range(finer):
            lo, hi = sharding.block(stop - start, part, finer)
            nested.append((start + lo, start + hi))
    assert nested == direct


def test_it_is_the_left_half_that_gets_more():
    assert sharding.halve(5, 2) == [3, 2]
    assert sharding.halve(10, 4) == [3, 2, 3, 2]
    assert sharding.halve(2, 3) == [1, 1, 0]
    assert sharding.halve(7, 5) == [2, 2, 1, 1, 1]  # three workers on the left, two on the right
    assert sharding.halve(1, 4) == [1, 0, 0, 0]


@checked
@given(sizes, st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(any))
def test_proportional_is_within_one_of_the_quota(n, weights):
    shares = sharding.proportional(n, weights)
    assert sum(shares) == n
    for share, weight in zip(shares, weights):
        quota = n * Fraction(weight) / sum(map(Fraction, weights))
        assert abs(share - quota) < 1
        assert share == 0 or weight > 0


def test_proportional_examples():
    assert sharding.proportional(100, [1, 3]) == [25, 75]
    assert sharding.proportional(10, [1, 1, 1]) == [4, 3, 3]  # equal remainders: the first wins
    assert sharding.proportional(7, [0.1, 0.2, 0.4]) == [1, 2, 4]
    assert sharding.cut(10, 3, [1, 1, 1]) == [(0, 4), (4, 7), (7, 10)]
    assert sharding.cut(10, 2) == [(0, 5), (5, 10)]


@checked
@given(st.integers(1, 500), st.integers(0, 2**40), st.integers(0, 1000))
def test_epoch_order_is_a_permutation_that_seed_and_epoch_decide(n, seed, epoch):
    order = sharding.epoch_order(n, True, seed, epoch)
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(order, sharding.epoch_order(n, True, seed, epoch))
    np.testing.assert_array_equal(sharding.epoch_order(n, False, seed, epoch), np.arange(n))
    assert order.dtype == np.intp
    if n > 50:  # 1 in 50! that two of these are equal
        for other in ((seed, epoch + 1), (seed + 1, epoch)):
            assert (sharding.epoch_order(n, True, *other) != order).any()


@checked
@given(st.integers(1, 300), counts, st.booleans(), st.integers(0, 99))
def test_dataset_cut_is_a_partition(n, count, shuffle, seed):
    parts = [sharding.dataset_cut(n, index, count, shuffle, seed) for index in range(count)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    if not shuffle:
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(n))


def test_a_random_cut_is_random():
    sequential = sharding.dataset_cut(1000, 0, 4, False, 0)
    one, other = (sharding.dataset_cut(1000, 0, 4, True, seed) for seed in (0, 1))
    assert set(one) != set(sequential)
    assert set(one) != set(other)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "1 entries for 2 shards"),
        ([1.0, -1.0], "not negative"),
        ([1.0, float("nan")], "finite"),
        ([1.0, float("inf")], "finite"),
        ([0.0, 0.0], "all 0"),
    ],
)
def test_bad_weights(weights, message):
    with pytest.raises(ValueError, match=message):
        data.DataLoader([1, 2, 3], batch_size=1, shard=(0, 2), weights=weights)


@checked
@given(
    st.integers(0, 200),
    st.integers(1, 20),
    st.one_of(st.none(), st.lists(st.floats(0.1, 10), min_size=20, max_size=20)),
)
def test_a_share_is_the_workers_block_of_the_cut(n, count, weights):
    weights = None if weights is None else weights[:count]
    shares = [sharding.share(n, index, count, weights) for index in range(count)]
    assert shares == data.cut(n, count, weights)
