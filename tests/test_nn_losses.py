"""Losses and layers: values, batches of nothing, wrong labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp import nn
from minidp.autograd import Tensor
from minidp.nn import functional as F
from minidp.nn.normal import normal_tail


def layers():
    return [nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.GELU(), nn.GELU("tanh"), nn.Dropout(0.5), nn.Flatten(),
            nn.Identity()]  # fmt: skip


@pytest.mark.parametrize("layer", layers(), ids=repr)
def test_every_layer_accepts_a_batch_of_nothing(layer):
    x = Tensor(np.zeros((0, 4), np.float32), requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 4)
    (y * 1).sum().backward()
    assert x.grad.shape == (0, 4)
    assert all((p.grad.numpy() == 0).all() for p in layer.parameters())


@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
@pytest.mark.parametrize("gradient", [None, 0])
def test_loss_of_no_samples_is_zero_with_zero_gradient(loss, gradient):
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 3))
    x = np.zeros((0, 2, 3), np.float32)
    y = np.zeros(0, np.int64) if loss == "cross_entropy" else np.zeros((0, 3))
    value = getattr(F, loss)(model(x), y)
    value.backward(gradient)
    assert value.item() == 0
    assert value.dtype == np.float32
    assert all(np.array_equal(p.grad, np.zeros(p.shape)) for p in model.parameters())


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1), st.floats(0, 200))
def test_cross_entropy_is_minus_log_of_the_softmax_of_the_label(n, classes, seed, scale):
    rng = np.random.default_rng(seed)
    z, y = rng.standard_normal((n, classes)) * scale, rng.integers(0, classes, n)
    logits = Tensor(z.copy(), requires_grad=True)
    loss = F.cross_entropy(logits, y)
    expected = -np.mean(
        [z[i, y[i]] - math.fsum([m := z[i].max(), math.log(math.fsum(np.exp(z[i] - m)))]) for i in range(n)]
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert np.allclose(F.log_softmax(Tensor(z)).numpy()[range(n), y].mean(), -expected, rtol=1e-12, atol=1e-12)
    loss.backward()
    gradient = F.softmax(Tensor(z)).numpy() - np.eye(classes)[y]
    assert np.allclose(logits.grad, gradient / n, rtol=1e-12, atol=1e-14)
    assert np.array_equal(logits.data, z)


def test_softmax_neither_overflows_nor_divides_by_zero():
    z = Tensor(np.array([[1e30, 0.0, -1e30], [-1e30, -1e30, -1e30]], np.float32), requires_grad=True)
    assert np.array_equal(F.softmax(z), np.array([[1, 0, 0], [1 / 3] * 3], np.float32))
    loss = F.cross_entropy(z, np.array([1, 2]))
    loss.backward()
    assert loss.item() == pytest.approx(5e29)
    assert np.isfinite(z.grad.numpy()).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.int64, np.uint64])
def test_labels_of_any_integer_dtype(dtype):
    z = np.arange(6.0).reshape(2, 3)
    y = np.array([2, 0])
    assert F.cross_entropy(z, y.astype(dtype)).item() == F.cross_entropy(z, y).item()
    assert F.cross_entropy(z, Tensor(y)).item() == F.cross_entropy(z, [2, 0]).item()


@pytest.mark.parametrize(
    ("labels", "error", "match"),
    [
        ([0, 3, 1], ValueError, r"label 3 of sample 1 is outside 0 … 2 \(3 classes"),
        ([0, 1, -1], ValueError, "label -1 of sample 2 is outside 0 … 2"),
        ([0.0, 1.0, 2.0], TypeError, r"integers in 0 … 2, not float64"),
        ([True, False, True], TypeError, "not bool"),
        ([0, 1], ValueError, r"labels of shape \(3,\), not \(2,\)"),
        ([[0], [1], [2]], ValueError, r"not \(3, 1\)"),
        (np.eye(3, dtype=int), ValueError, "one-hot"),
    ],
)
def test_wrong_labels_are_told(labels, error, match):
    with pytest.raises(error, match=match):
        F.cross_entropy(np.zeros((3, 3), np.float32), np.asarray(labels))


def test_wrong_shapes_are_told():
    with pytest.raises(ValueError, match=r"\(n, \.\.\., classes\), not \(3,\)"):
        F.cross_entropy(np.zeros(3), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"\(4, 1\) and target of shape \(4,\) would be broadcast"):
        F.mse_loss(np.zeros((4, 1)), np.zeros(4))
    with pytest.raises(ValueError, match=r"input of shape \(2, 3\) for a weight of shape \(5, 4\)"):
        nn.Linear(4, 5)(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="features must be positive"):
        nn.Linear(0, 3)
    with pytest.raises(ValueError, match="sigmoid"):
        nn.GELU("sigmoid")


def test_mse_loss_is_the_mean_over_all_elements():
    a, b = np.arange(6.0).reshape(2, 3), np.ones((2, 3), np.float32)
    x = Tensor(a, requires_grad=True)
    loss = F.mse_loss(x, b)
    assert loss.item() == ((a - 1) ** 2).sum() / 6
    loss.backward(6)
    assert np.array_equal(x.grad, 2 * (a - 1))


@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 2e-15), (np.float32, 3e-7)])
def test_tail_of_the_normal_distribution_against_the_standard_library(dtype, bound):
    a = np.concatenate([np.linspace(0, 14, 20001), [1e-30, 40, 1e10, np.inf]]).astype(dtype)
    with np.errstate(under="ignore"):
        tail, density = normal_tail(a, np)
    assert tail.dtype == density.dtype == dtype
    exact = np.array([math.erfc(v / math.sqrt(2)) / 2 for v in a.astype(float)])
    assert np.abs(tail - exact).max() < bound
    far = (a > 1) & (a < 5)
    assert (np.abs(tail - exact)[far] / exact[far]).max() < 10 * bound  # small errors where the tail is small
    assert np.abs(density - np.exp(-(a.astype(float) ** 2) / 2) / math.sqrt(2 * math.pi)).max() < bound
    assert np.array_equal(tail[-3:], [0, 0, 0])


def test_gelu_of_large_and_tiny_values():
    x = np.array([0.0, -0.0, 1e-30, -1e-30, 20, -20, -5], np.float64)
    assert np.allclose(F.gelu(x), [0, 0, 5e-31, -5e-31, 20, 0, -5 * math.erfc(5 / math.sqrt(2)) / 2], rtol=1e-13)


def test_gelu_by_its_tanh_formula():
    x = np.linspace(-4, 4, 9)
    by_hand = [v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    assert np.allclose(F.gelu(x, "tanh"), by_hand, rtol=1e-13)
    assert np.abs(F.gelu(x, "tanh").numpy() - F.gelu(x).numpy()).max() < 5e-4


def test_relu_of_special_values():
    x = Tensor(np.array([-np.inf, -1.0, -0.0, 0.0, 2.0, np.inf, np.nan], np.float32), requires_grad=True)
    y = F.relu(x)
    assert np.array_equal(y, [0, 0, 0, 0, 2, np.inf, np.nan], equal_nan=True)
    y.backward(np.ones(7, np.float32))
    assert np.array_equal(x.grad.numpy()[:6], [0, 0, 0, 0, 1, 1])


@pytest.mark.parametrize("shape", [(3, 40), (3, 7), (40, 3), (128, 512)])
def test_linear_is_the_same_product_whichever_way_it_is_multiplied(shape):
    """Both branches of the small-batch product, on integers: exactly."""
    n, fan_in = shape
    rng = np.random.default_rng(0)
    x, w, b = (rng.integers(-3, 4, s).astype(np.float32) for s in [(n, fan_in), (9 + n, fan_in), (9 + n,)])
    y = F.linear(x, w, b)
    assert y.data.flags.c_contiguous
    assert np.array_equal(y, np.einsum("ni,oi->no", x.astype(int), w.astype(int)) + b)
