"""Datasets: arrays, lists, PyTorch's; and the digits that travel with the package."""

from __future__ import annotations

from fractions import Fraction
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from minidp import data
from minidp.data import digits


def batches(dataset, **options):
    loader = data.DataLoader(dataset, global_batch_size=10, shard=(1, 2), shuffle=True, **options)
    return list(loader.epoch(3))


def assert_same(one, other):
    assert len(one) == len(other)
    for fields, others in zip(one, other):
        assert len(fields) == len(others)
        for a, b in zip(fields, others):
            assert type(a) is type(b) is np.ndarray
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    return generator.standard_normal((47, 3, 2)).astype(np.float32), generator.integers(0, 10, 47)


@pytest.mark.parametrize("partition", ["batch", "dataset"])
def test_anything_with_length_and_items_is_a_dataset(arrays, partition):
    x, y = arrays

    class Pairs:
        def __len__(self):
            return len(x)

        def __getitem__(self, index):
            return x[index], int(y[index])

    reference = batches(data.ArrayDataset(x, y), partition=partition)
    assert_same(batches(list(zip(x, y)), partition=partition), reference)
    assert_same(batches(Pairs(), partition=partition), reference)
    assert_same(
        batches([(row.tolist(), label) for row, label in zip(x, y.tolist())], partition=partition), reference
    )


def test_pytorch_datasets(arrays):
    torch = pytest.importorskip("torch")
    x, y = arrays
    dataset = torch.utils.data.TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    assert_same(batches(dataset), batches(data.ArrayDataset(x, y)))


def test_an_array_is_a_dataset_of_one_field(arrays):
    """Its own .take flattens: it must not be mistaken for ours."""
    x, _ = arrays
    assert_same(batches(x), batches(data.ArrayDataset(x)))


def test_array_dataset(arrays):
    x, y = arrays
    dataset = data.ArrayDataset(x, y)
    assert isinstance(dataset, data.Dataset)
    assert len(dataset) == 47
    assert dataset.arrays[0] is x  # kept, not copied
    np.testing.assert_array_equal(dataset[5][0], x[5])
    taken = dataset.take(np.array([3, 1]))
    np.testing.assert_array_equal(taken[0], x[[3, 1]])
    assert all(field.flags["C_CONTIGUOUS"] and field.flags["OWNDATA"] for field in taken)
    taken[0][:] = 0  # a batch is the caller's own
    assert x[3].any()
    assert repr(dataset) == "ArrayDataset(47 samples: float32 (47, 3, 2), int64 (47,))"


def test_transposed_arrays_give_contiguous_batches():
    x = np.arange(12.0).reshape(3, 4).T
    (batch,) = data.ArrayDataset(x).take(np.array([2, 0]))
    assert batch.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(batch, x[[2, 0]])


def test_dtypes():
    floats, integers, booleans = data.collate([(1.5, 2, True), (2, 3, False)])
    assert (floats.dtype, integers.dtype, booleans.dtype) == (np.float32, np.int64, np.bool_)
    assert data.collate([np.float64(1), np.float64(2)])[0].dtype == np.float64
    assert data.collate([np.uint8(1)])[0].dtype == np.uint8
    assert data.collate([(np.ones(2),)])[0].dtype == np.float64
    lists = data.ArrayDataset([[1.0, 2.0]], [3])
    assert [a.dtype for a in lists.arrays] == [np.float32, np.int64]
    assert data.ArrayDataset(np.ones(3)).arrays[0].dtype == np.float64
    assert data.ArrayDataset([np.ones(3), np.ones(3)]).arrays[0].dtype == np.float64


def test_exact_numbers_are_numbers():
    thirds = np.array([Fraction(1, 3), Fraction(2, 3)], dtype=object)
    (batch,) = data.ArrayDataset(thirds).take(np.array([1]))
    assert batch[0] == Fraction(2, 3)
    (stacked,) = data.collate([(Fraction(1, 3),), (Fraction(2, 3),)])
    assert stacked.tolist() == [Fraction(1, 3), Fraction(2, 3)]


def test_errors():
    with pytest.raises(ValueError, match=r"one length .*\(3,\), \(4,\)"):
        data.ArrayDataset(np.ones(3), np.ones(4))
    with pytest.raises(ValueError, match="at least one array"):
        data.ArrayDataset()
    with pytest.raises(ValueError, match="one length"):
        data.ArrayDataset(np.float32(3))
    with pytest.raises(ValueError, match="array 0 is no array"):
        data.ArrayDataset([[1], [1, 2]])
    with pytest.raises(TypeError, match="field 0 is a dict: a sample must be a tuple of fields"):
        data.collate([{"x": 1}])
    with pytest.raises(TypeError, match="field 1 must hold numbers, found str"):
        data.collate([(1, "cat")])
    with pytest.raises(ValueError, match=r"different numbers of fields: \[1, 2\]"):
        data.collate([(1, 2), (1,)])
    with pytest.raises(ValueError, match=r"field 0 has different shapes in one batch, \[\(2,\), \(3,\)\]"):
        data.collate([np.ones(2), np.ones(3)])


# --- the digits ---------------------------------------------------------------------------------------------


def test_load_digits():
    train, test = data.load_digits()
    for part, n in ((train, 1437), (test, 360)):
        x, y = part.arrays
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((n, 64), np.float32, (n,), np.int64)
        assert (x.min(), x.max()) == (0.0, 1.0)
        np.testing.assert_array_equal(np.unique(x * 16), np.arange(17))
        share = np.bincount(y, minlength=10) / n
        np.testing.assert_allclose(share, 0.1, atol=0.005)  # stratified


def test_the_split_is_the_one_that_the_code_describes():
    train, test = data.load_digits()
    labels = np.empty(1797, np.uint8)
    mask = np.zeros(1797, bool)
    with np.load(digits.PATH) as stored:
        labels[:], mask[:] = stored["labels"], stored["in_test"]
    np.testing.assert_array_equal(digits.stratified_split(labels, digits.TEST_SAMPLES), mask)
    np.testing.assert_array_equal(labels[mask], test.arrays[1])
    np.testing.assert_array_equal(labels[~mask], train.arrays[1])


def test_the_digits_are_scikit_learns(tmp_path):
    pytest.importorskip("sklearn")
    bunch = import_module("sklearn.datasets").load_digits()
    made_now = str(tmp_path / "digits.npz")
    digits.export(made_now)
    with np.load(made_now) as made, np.load(digits.PATH) as stored:
        assert made.files == stored.files == ["images", "labels", "in_test"]
        for name in stored.files:
            np.testing.assert_array_equal(made[name], stored[name])
        np.testing.assert_array_equal(stored["images"], bunch.data)


def test_source_and_licence_travel_with_the_digits():
    text = Path(digits.PATH).with_name("digits.LICENSE.txt").read_text(encoding="utf-8")
    assert "Alpaydin" in text
    assert "CC BY 4.0" in text
