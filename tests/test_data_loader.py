"""The loader: every sample once an epoch, and the same steps and orders on every worker."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp import data

checked = settings(derandomize=True, deadline=None)
lengths = st.integers(1, 200)
counts = st.integers(1, 12)
global_sizes = st.integers(1, 70)
partitions = st.sampled_from(["batch", "dataset"])


def epoch(n, index, count, epoch=0, start_step=0, **options):
    """The samples (numbers) of one worker, step by step."""
    loader = data.DataLoader(data.ArrayDataset(np.arange(n)), shard=(index, count), **options)
    steps = [x.tolist() for (x,) in loader.epoch(epoch, start_step)]
    assert len(steps) == len(loader) - start_step
    return steps


def together(steps):
    return sorted(sample for batch in steps for sample in batch)


def workers(n, count, **options):
    return [epoch(n, index, count, **options) for index in range(count)]


@checked
@given(lengths, counts, global_sizes, partitions, st.booleans(), st.integers(0, 3))
def test_each_epoch_visits_every_sample_exactly_once(n, count, size, partition, shuffle, e):
    shards = workers(n, count, global_batch_size=size, partition=partition, shuffle=shuffle, epoch=e)
    assert len({len(steps) for steps in shards}) == 1
    assert together(batch for steps in shards for batch in steps) == list(range(n))
    for step, batches in enumerate(zip(*shards)):
        assert sum(map(len, batches)) == min(size, n - step * size)
        assert max(map(len, batches)) - min(map(len, batches)) <= (1 if partition == "batch" else 2)


@checked
@given(lengths, counts, st.integers(1, 20), partitions)
def test_batch_size_is_per_shard(n, count, size, partition):
    shards = workers(n, count, batch_size=size, partition=partition)
    assert all(len(batch) == size for steps in shards for batch in steps[:-1])
    assert all(len(steps) == -(-n // (size * count)) for steps in shards)


@checked
@given(lengths, global_sizes, st.booleans(), st.integers(0, 3))
def test_a_step_has_the_same_samples_for_every_number_of_workers(n, size, shuffle, e):
    options = {"global_batch_size": size, "shuffle": shuffle, "seed": 3, "epoch": e}
    whole = epoch(n, 0, 1, **options)
    for count in (2, 3, 4, 8):
        shards = workers(n, count, **options)
        for step, batch in enumerate(whole):
            assert [sample for steps in shards for sample in steps[step]] == batch  # consecutive blocks
    four, eight = workers(n, 4, **options), workers(n, 8, **options)
    for i, steps in enumerate(four):
        for step, batch in enumerate(steps):
            assert eight[2 * i][step] + eight[2 * i + 1][step] == batch


@checked
@given(lengths, counts, global_sizes, partitions, st.booleans(), st.data())
def test_start_step_resumes_exactly(n, count, size, partition, shuffle, choose):
    options = {"global_batch_size": size, "partition": partition, "shuffle": shuffle, "epoch": 2}
    index = choose.draw(st.integers(0, count - 1))
    whole = epoch(n, index, count, **options)
    start = choose.draw(st.integers(0, len(whole)))
    assert epoch(n, index, count, start_step=start, **options) == whole[start:]


@pytest.mark.parametrize("partition", ["batch", "dataset"])
def test_each_epoch_has_another_order_that_can_be_repeated(partition):
    options = {"batch_size": 8, "shuffle": True, "partition": partition}
    first, second = (epoch(100, 1, 3, epoch=e, **options) for e in (0, 1))
    assert first != second
    assert first == epoch(100, 1, 3, epoch=0, **options)
    assert first != epoch(100, 1, 3, epoch=0, seed=1, **options)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("weights", [None, (1.0, 2.0, 0.5)])
def test_a_worker_stays_with_its_part_of_the_dataset(shuffle, weights):
    options = {"global_batch_size": 10, "shuffle": shuffle, "partition": "dataset", "weights": weights}
    for index in range(3):
        parts = [together(epoch(100, index, 3, epoch=e, **options)) for e in range(3)]
        assert parts[0] == parts[1] == parts[2]
        if not shuffle:
            assert parts[0] == list(range(parts[0][0], parts[0][0] + len(parts[0])))
    across = [together(epoch(100, 0, 3, epoch=e, global_batch_size=10, shuffle=True)) for e in (0, 1)]
    assert across[0] != across[1]  # what partition="batch" does


@checked
@given(lengths, global_sizes, partitions, st.lists(st.floats(0, 100), min_size=1, max_size=8).filter(any))
def test_weights_share_in_proportion(n, size, partition, weights):
    count = len(weights)
    shards = workers(n, count, global_batch_size=size, partition=partition, weights=weights)
    assert together(batch for steps in shards for batch in steps) == list(range(n))
    assert len({len(steps) for steps in shards}) == 1
    for weight, steps in zip(weights, shards):
        share = weight / sum(weights)
        own = sum(map(len, steps))
        if partition == "dataset":
            assert abs(own - n * share) <= 1 + 1e-9
        for step, batch in enumerate(steps):
            taken = min(size, n - step * size)
            fair = taken * share if partition == "batch" else taken * own / n
            assert abs(len(batch) - fair) <= 1 + 1e-9


def test_weights_four_to_one():
    slow, fast = workers(100, 2, batch_size=10, weights=[1, 4])
    assert [len(batch) for batch in slow] == [4] * 5
    assert [len(batch) for batch in fast] == [16] * 5


@pytest.mark.parametrize("partition", ["batch", "dataset"])
def test_fewer_samples_than_workers(partition):
    shards = workers(2, 5, batch_size=4, partition=partition)
    assert sorted(len(steps[0]) for steps in shards) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("partition", ["batch", "dataset"])
def test_a_worker_without_samples_gets_empty_arrays_of_the_right_kind(partition):
    x, y = np.ones((3, 4, 5), np.float32), np.arange(3)
    pairs = [(row, label) for row, label in zip(x, y.tolist())]
    for dataset in (data.ArrayDataset(x, y), pairs):
        loader = data.DataLoader(dataset, global_batch_size=3, shard=(7, 8), partition=partition)
        ((xs, ys),) = loader.epoch(0)
        assert xs.shape == (0, 4, 5)
        assert xs.dtype == np.float32
        assert ys.shape == (0,)
        assert ys.dtype == np.int64


def test_the_global_generator_is_left_alone():
    before = np.random.get_state()[1].copy()
    workers(50, 3, batch_size=4, shuffle=True, partition="dataset")
    data.load_digits()
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_orders_stay_the_same_from_release_to_release():
    """A resumed run needs this. If NumPy changes a stream (NEP 19 allows it), this says so."""
    assert epoch(10, 0, 1, batch_size=5, shuffle=True) == [[0, 1, 7, 9, 8], [3, 4, 6, 5, 2]]
    assert epoch(10, 0, 2, batch_size=5, shuffle=True, partition="dataset") == [[7, 2, 6, 1, 8]]


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of batch_size .* not neither"),
        ({"batch_size": 1, "global_batch_size": 1}, "exactly one of batch_size .* not both"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"global_batch_size": -2}, "global_batch_size must be at least 1, not -2"),
        ({"batch_size": 1, "partition": "bacth"}, "unknown partition 'bacth'; valid: batch, dataset"),
        ({"batch_size": 1, "shard": (2, 2)}, "shard index 2 is out of range for 2 shards: valid are 0 to 1"),
        ({"batch_size": 1, "shard": (-1, 2)}, "shard index must be at least 0"),
        ({"batch_size": 1, "shard": (0, 0)}, "shard count must be at least 1"),
        ({"batch_size": 1, "seed": -1}, "seed must be at least 0"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        data.DataLoader([1, 2, 3], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1.5}, "batch_size must be an integer, not 1.5"),
        ({"batch_size": 1, "shard": 3}, r"shard must be a pair \(index, count\)"),
    ],
)
def test_bad_types(options, message):
    with pytest.raises(TypeError, match=message):
        data.DataLoader([1, 2, 3], **options)


def test_bad_datasets():
    with pytest.raises(ValueError, match="the dataset is empty"):
        data.DataLoader([], batch_size=1)
    with pytest.raises(TypeError, match="needs __len__ and __getitem__, which generator lacks"):
        data.DataLoader((x for x in [1]), batch_size=1)


def test_bad_epochs():
    loader = data.DataLoader([1, 2, 3], batch_size=2)
    with pytest.raises(TypeError, match="epoch"):
        loader.epoch()
    with pytest.raises(ValueError, match="epoch must be at least 0, not -1"):  # at once, not at the first batch
        loader.epoch(-1)
    with pytest.raises(ValueError, match="start_step 3 lies behind the epoch's end: it has 2 steps"):
        loader.epoch(0, start_step=3)
    with pytest.raises(ValueError, match="start_step must be at least 0"):
        loader.epoch(0, start_step=-1)
    assert list(loader.epoch(0, start_step=2)) == []  # saved after the last step
    with pytest.raises(TypeError, match=r"iterate over loader.epoch\(e\)"):
        iter(loader)


def test_repr():
    loader = data.DataLoader(range(100), batch_size=8, shard=(1, 4), shuffle=True)
    assert repr(loader) == (
        "DataLoader(100 samples, global_batch_size=32, 4 steps an epoch, shard 1 of 4, partition='batch', "
        "shuffle=True)"
    )
