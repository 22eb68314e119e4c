"""What a tensor is to its user: operators, conversions, copies."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import minidp
from minidp import nn
from minidp.autograd import Tensor


def leaf(*values):
    return Tensor(np.array(values, dtype=np.float64), requires_grad=True)


def test_operators_take_arrays_and_numbers_on_both_sides():
    x = Tensor(np.array([1.0, 2.0], dtype=np.float32))
    array = np.array([3.0, 5.0], dtype=np.float32)
    for left, right, expected in [
        (x, array, [4, 7]), (array, x, [4, 7]), (x, 1, [2, 3]), (1, x, [2, 3]), (1.5, x, [2.5, 3.5]),
        (np.float32(1), x, [2, 3]), (np.array(1, np.float32), x, [2, 3]),
    ]:  # fmt: skip
        total = left + right
        assert type(total) is Tensor
        assert total.dtype == np.float32
        assert np.array_equal(total, expected)
    assert np.array_equal(array - x, [2, 3])
    assert np.array_equal(1 - x, [0, -1])
    assert np.array_equal(array / x, [3, 2.5])
    assert np.array_equal(2 / x, [2, 1])
    assert np.array_equal(array * x, [3, 10])
    assert (array @ x).item() == 13
    assert np.array_equal(np.eye(2, dtype=np.float32) @ x, x)
    assert np.array_equal(-x, [-1, -2])
    assert np.array_equal(x**2, [1, 4])


def test_tensor_looks_like_an_array():
    x = minidp.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    assert (x.shape, x.ndim, x.size, len(x), x.is_leaf) == ((2, 3), 2, 6, 2, True)
    assert x.dtype == np.float32
    assert [row.shape for row in x] == [(3,), (3,)]
    assert np.asarray(x) is not None
    assert np.allclose(x, x.numpy())
    assert x.numpy() is x.data
    assert repr(x[0].detach()) == "tensor([1., 2., 3.], dtype=float32)"
    assert "requires_grad=True" in repr(x)
    total = x.sum()
    assert (float(total), int(total), bool(total), total.item()) == (21.0, 21, True, 21.0)
    assert f"{total:.2f}" == "21.00"
    assert f"{total}" == str(total)
    with pytest.raises(TypeError):
        len(total)
    with pytest.raises(ValueError, match="size"):
        bool(x)
    assert not x.detach().requires_grad
    assert x.detach().data is x.data


def test_grad_is_a_tensor_that_numpy_accepts():
    x = leaf(1.0, 2.0)
    assert x.grad is None
    (x * x).sum().backward()
    assert isinstance(x.grad, Tensor)
    assert not x.grad.requires_grad
    assert np.allclose(x.grad, [2, 4])
    np.testing.assert_allclose(x.grad, [2, 4])
    assert np.array_equal(np.abs(x.grad), [2, 4])
    assert isinstance(x.grad.numpy(), np.ndarray)


def test_tensor_copies_and_chooses_dtypes_like_pytorch():
    assert minidp.tensor([1.0, 2]).dtype == np.float32
    assert minidp.tensor(3.0).shape == ()
    assert minidp.tensor([1, 2]).dtype == np.int64
    assert minidp.tensor([True]).dtype == np.bool_
    array = np.ones(3)
    x = minidp.tensor(array)
    assert x.dtype == np.float64
    array[...] = 5
    assert np.array_equal(x, [1, 1, 1])
    assert np.array_equal(minidp.tensor(x).data, x.data)
    assert minidp.tensor(x).data is not x.data
    assert minidp.tensor(np.float64(2)).dtype == np.float64
    assert Tensor(array).data is array


def test_pickles_and_deep_copies_hold_data_alone():
    x = leaf(1.0, 2.0)
    y = x * 2
    y.sum().backward()
    for again in (pickle.loads(pickle.dumps(x)), copy.deepcopy(x)):
        assert np.array_equal(again, x)
        assert again.requires_grad
        assert again.grad is None
        assert again.data is not x.data
    assert pickle.loads(pickle.dumps(y)).grad_fn is None
    a = nn.Parameter([1.0])
    b, c = copy.deepcopy([a, a])
    assert b is c
    assert type(b) is nn.Parameter


def test_tensors_of_pytorch_are_copied_with_their_dtype():
    torch = pytest.importorskip("torch")
    theirs = torch.ones(3, dtype=torch.float64)
    ours = minidp.tensor(theirs)
    theirs += 1
    assert ours.dtype == np.float64
    assert np.array_equal(ours, [1, 1, 1])
