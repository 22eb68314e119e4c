"""PyTorch as referee: every layer and loss, forward and backward, and a whole training."""

from __future__ import annotations

import numpy as np
import pytest

from minidp import nn, optim
from minidp.autograd import Tensor
from minidp.nn import functional as F

torch = pytest.importorskip("torch")
TF = torch.nn.functional

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 5)) * 3
LABELS = RNG.integers(0, 5, 6)
TARGET = RNG.standard_normal((6, 5))
W, B = RNG.standard_normal((4, 5)), RNG.standard_normal(4)
IMAGES = RNG.standard_normal((2, 3, 4, 5))


def ce(x):
    return TF.cross_entropy(x, torch.tensor(LABELS))


def arithmetic(a, b):
    return (a - 2 * b) / (b * b + 1) - a**3


def swap(x):
    return x.transpose(1, 0, 3, 2).reshape(3, 40)


LINES = [
    ("linear", F.linear, TF.linear, [X, W, B]),
    ("linear without bias", F.linear, TF.linear, [X, W]),
    ("linear of a small batch", F.linear, TF.linear, [X[:1], W, B]),
    ("linear of a sequence", F.linear, TF.linear, [IMAGES, W, B]),
    ("linear of a vector", F.linear, TF.linear, [X[0], W, B]),
    ("relu", F.relu, TF.relu, [X]),
    ("tanh", F.tanh, torch.tanh, [X]),
    ("gelu", F.gelu, TF.gelu, [X]),
    ("gelu tanh", lambda x: F.gelu(x, "tanh"), lambda x: TF.gelu(x, approximate="tanh"), [X]),
    ("softmax", F.softmax, lambda x: TF.softmax(x, -1), [X]),
    ("softmax axis 0", lambda x: F.softmax(x, axis=0), lambda x: TF.softmax(x, 0), [X]),
    ("log_softmax", F.log_softmax, lambda x: TF.log_softmax(x, -1), [X]),
    ("cross_entropy", lambda x: F.cross_entropy(x, LABELS), ce, [X]),
    ("mse_loss", F.mse_loss, TF.mse_loss, [X, TARGET]),
    ("flatten", F.flatten, lambda x: torch.flatten(x, 1), [IMAGES]),
    ("flatten 2", lambda x: F.flatten(x, 2), lambda x: torch.flatten(x, 2), [IMAGES]),
    ("arithmetic", arithmetic, arithmetic, [X, X[0]]),
    ("matmul", lambda a, b: a @ b, lambda a, b: a @ b, [IMAGES, W.T]),
    ("exp log sqrt", lambda x: (x.exp().sqrt() + 1).log(), lambda x: (x.exp().sqrt() + 1).log(), [X]),
    ("reductions", lambda x: x.mean(axis=1) - x.sum(axis=1), lambda x: x.mean(1) - x.sum(1), [X]),
    ("max", lambda x: x.max(axis=1), lambda x: x.max(1).values, [X]),
    ("index", lambda x: x[1:, LABELS[:5]], lambda x: x[1:, LABELS[:5]], [X]),
    ("shapes", swap, lambda x: x.permute(1, 0, 3, 2).reshape(3, 40), [IMAGES]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)], ids=["float64", "float32"]
)
@pytest.mark.parametrize(("ours", "theirs", "inputs"), [pytest.param(*line[1:], id=line[0]) for line in LINES])
def test_values_and_gradients(ours, theirs, inputs, dtype, tolerance):
    a = [Tensor(x.astype(dtype), requires_grad=True) for x in inputs]
    b = [torch.tensor(x.astype(dtype), requires_grad=True) for x in inputs]
    out, expected = ours(*a), theirs(*b)
    assert out.shape == tuple(expected.shape)
    assert out.dtype == dtype
    assert np.allclose(out, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    gradient = np.random.default_rng(1).standard_normal(out.shape).astype(dtype)
    out.backward(gradient)
    expected.backward(torch.tensor(gradient))
    for x, y in zip(a, b):
        assert np.allclose(x.grad, y.grad.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", ["SGD", "Adam", "AdamW"])
def test_twenty_steps_of_an_mlp(rule):
    """The same model, data and optimizer: weights agree to rounding, float64."""
    ours = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5)).astype(
        "float64"
    )
    layers = [
        torch.nn.Linear(5, 16),
        torch.nn.ReLU(),
        torch.nn.Linear(16, 16),
        torch.nn.GELU(),
        torch.nn.Linear(16, 5),
    ]
    theirs = torch.nn.Sequential(*layers).double()
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})
    hyper = {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3} if rule == "SGD" else {}
    optimizer = getattr(optim, rule)(ours.parameters(), lr=0.01, **hyper)
    reference = getattr(torch.optim, rule)(theirs.parameters(), lr=0.01, **hyper)
    losses = []
    for step in range(20):
        rng = np.random.default_rng(step)
        x, y = rng.standard_normal((8, 5)), rng.integers(0, 5, 8)
        optimizer.zero_grad()
        loss = F.cross_entropy(ours(x), y)
        loss.backward()
        optimizer.step()
        reference.zero_grad(set_to_none=True)
        expected = TF.cross_entropy(theirs(torch.tensor(x)), torch.tensor(y))
        expected.backward()
        reference.step()
        losses.append((loss.item(), expected.item()))
    assert np.allclose(*zip(*losses), rtol=1e-10)
    for name, value in theirs.state_dict().items():
        difference = np.abs(ours.state_dict()[name] - value.numpy()).max()
        assert difference <= 1e-9 * np.abs(value.numpy()).max(), name


def test_initial_values_have_the_same_distribution():
    """Bounds and variance of Linear's weight and bias: ours from a seed, theirs from a global generator."""
    ours, theirs = nn.Linear(400, 300), torch.nn.Linear(400, 300)
    for a, b in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        a, b = a.numpy(), b.detach().numpy()
        assert abs(np.abs(a).max() / np.abs(b).max() - 1) < 0.02
        assert abs(a.var() / b.var() - 1) < 0.2


def test_names_are_pytorchs():
    ours = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3, bias=False)))
    theirs = torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False))
    )
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items()
    }
