"""Exact arithmetic: on arrays of Fractions the rational part of the engine is equal to the formulas, with ==."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp import nn, optim
from minidp.autograd import Tensor
from minidp.nn import functional as F

checked = settings(derandomize=True, deadline=None, max_examples=40)
fractions = st.fractions(min_value=-3, max_value=3, max_denominator=7)


def exact(*shape, draw=None, seed=0):
    rng = np.random.default_rng(seed)
    out = np.empty(shape, dtype=object)
    for i in np.ndindex(shape):
        out[i] = draw(fractions) if draw else Fraction(int(rng.integers(-9, 10)), int(rng.integers(1, 8)))
    return out


def all_exact(array):
    return array.dtype == object and all(isinstance(v, Fraction | int) for v in array.ravel())


def by_hand(x, w, b, v, y):
    """Loss and gradients of mean((relu(x wᵀ + b) vᵀ − y)²), element by element with Python's own sums."""
    n, h, o = len(x), len(w), len(v)
    z = [[sum(w[j][k] * x[i][k] for k in range(x.shape[1])) + b[j] for j in range(h)] for i in range(n)]
    a = [[max(z[i][j], Fraction(0)) for j in range(h)] for i in range(n)]
    e = [[sum(v[c][j] * a[i][j] for j in range(h)) - y[i][c] for c in range(o)] for i in range(n)]
    count = max(n * o, 1)
    loss = sum((e[i][c] ** 2 for i in range(n) for c in range(o)), Fraction(0)) / count
    ge = [[2 * e[i][c] / Fraction(count) for c in range(o)] for i in range(n)]
    gz = [[sum(ge[i][c] * v[c][j] for c in range(o)) * (z[i][j] > 0) for j in range(h)] for i in range(n)]
    gw = [[sum(gz[i][j] * x[i][k] for i in range(n)) for k in range(x.shape[1])] for j in range(h)]
    gb = [sum(gz[i][j] for i in range(n)) for j in range(h)]
    gv = [[sum(ge[i][c] * a[i][j] for i in range(n)) for j in range(h)] for c in range(o)]
    return loss, gw, gb, gv


@checked
@given(st.data(), st.integers(0, 4), st.integers(1, 8), st.integers(1, 4))
def test_linear_relu_mse_equal_the_sums_by_hand(data, n, features, hidden):
    draw = data.draw
    x, y = exact(n, features, draw=draw), exact(n, 2, draw=draw)
    w, b, v = exact(hidden, features, draw=draw), exact(hidden, draw=draw), exact(2, hidden, draw=draw)
    tensors = W, B, V = [Tensor(t, requires_grad=True) for t in (w, b, v)]
    loss = F.mse_loss(F.linear(F.relu(F.linear(x, W, B)), V), y)
    loss.backward()
    expected_loss, *expected = by_hand(x, w, b, v, y)
    assert loss.item() == expected_loss
    for tensor, grad in zip(tensors, expected):
        assert all_exact(tensor.grad.data)
        assert tensor.grad.numpy().tolist() == grad


@pytest.mark.parametrize("n", [1, 7])
def test_small_and_large_batches_take_both_products(n):
    """Linear multiplies small batches the other way round: the same exact result."""
    x, w, b = exact(n, 8), exact(9, 8, seed=1), exact(9, seed=2)
    expected = [[sum(x[i] * w[j]) + b[j] for j in range(9)] for i in range(n)]
    assert F.linear(x, Tensor(w), Tensor(b)).numpy().tolist() == expected


@checked
@given(st.data())
def test_operators_sum_and_mean(data):
    a = exact(2, 3, draw=data.draw)
    b = exact(3, draw=data.draw)
    b[b == 0] = Fraction(1, 3)
    A, B = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    out = ((A + B) * 3 - A / B + 2 / B - B * Fraction(1, 7) - (1 - A) * (-A) + A**2).mean()
    out.backward()
    value = [[(p + q) * 3 - p / q + 2 / q - q / 7 + (1 - p) * p + p**2 for p, q in zip(row, b)] for row in a]
    assert out.item() == sum(map(sum, value)) / 6
    assert A.grad.numpy().tolist() == [[(3 - 1 / q + 1 - 2 * p + 2 * p) / 6 for p, q in zip(row, b)] for row in a]
    for j, q in enumerate(b):
        expected = sum((3 + p / q**2 - 2 / q**2 - Fraction(1, 7)) / 6 for p in a[:, j])
        assert B.grad.numpy()[j] == expected
    total = A.sum(axis=0)
    assert all_exact(total.data)
    assert total.numpy().tolist() == [sum(a[:, j]) for j in range(3)]


def test_scalars():
    a, b = (Tensor(np.array(Fraction(v), dtype=object), requires_grad=True) for v in (3, 5))
    (a * b / 2 - a).backward()
    assert (a.grad.item(), b.grad.item()) == (Fraction(3, 2), Fraction(3, 2))
    (-(a**2)).backward()
    assert a.grad.item() == Fraction(3, 2) - 6


def test_gradient_n_gives_the_sum_over_samples():
    """backward(gradient=n) of a mean over n is exactly the sum: what the gradient slab holds, n_i g_i."""
    x, y = exact(3, 2), exact(3, 1, seed=1)
    whole = nn.Sequential(nn.Linear(2, 1)).astype(object)
    F.mse_loss(whole(x), y).backward(3)
    total = whole[0].weight.grad.numpy()
    parts = 0
    for i in range(3):
        whole[0].weight.grad = None
        F.mse_loss(whole(x[i : i + 1]), y[i : i + 1]).backward(1)
        parts = parts + whole[0].weight.grad.numpy()
    assert (total == parts).all()


@checked
@given(st.data(), st.sampled_from([0, Fraction(9, 10)]), st.booleans(), st.sampled_from([0, Fraction(1, 8)]))
def test_sgd_equals_its_formulas(data, momentum, nesterov, decay):
    lr = Fraction(1, 3)
    nesterov = nesterov and momentum != 0
    p = nn.Parameter(exact(4, draw=data.draw))
    optimizer = optim.SGD([p], lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    w, m = list(p.data), [Fraction(0)] * 4
    for _ in range(3):
        g = exact(4, draw=data.draw)
        p.grad = g
        optimizer.step()
        for i in range(4):
            d = g[i] + decay * w[i]
            m[i] = momentum * m[i] + d
            w[i] -= lr * (d + momentum * m[i] if nesterov else m[i])
        assert p.data.tolist() == w


def test_exact_models_come_from_astype():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    before = model.state_dict()
    model.astype(object)
    assert all(all_exact(p.data) for p in model.parameters())
    assert all_exact(model(exact(4, 2)).data)
    model.astype("float32")
    assert all(np.array_equal(before[name], array) for name, array in model.state_dict().items())
