"""PyTorch as referee: every layer and loss, forward and backward, and a whole training."""

from __future__ import annotations

import numpy as np
import pytest

from minidp import nn, optim
from minidp.autograd import Tensor
from minidp.nn import functional as F
from minidp.nn.normalization import BatchNorm

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # of arrays this small; two threads that wait for each other take 400 times as long
TF = torch.nn.functional

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 5)) * 3
LABELS = RNG.integers(0, 5, 6)
TARGET = RNG.standard_normal((6, 5))
W, B = RNG.standard_normal((4, 5)), RNG.standard_normal(4)
IMAGES = RNG.standard_normal((2, 3, 4, 5))
PICTURES = RNG.standard_normal((2, 3, 9, 8))
KERNEL, KERNEL_1, KERNEL_ALL = (RNG.standard_normal((4, 3, *size)) for size in ((3, 2), (1, 1), (9, 8)))
LOGITS, CLASSES = RNG.standard_normal((2, 3, 5)) * 3, RNG.integers(0, 5, (2, 3))
TOKENS = RNG.integers(0, 6, (2, 5))
QUERY, OTHERS = RNG.standard_normal((2, 2, 4, 3)) * 2, RNG.standard_normal((2, 2, 2, 6, 3)) * 2
NORM = RNG.standard_normal((2, 3))
MOMENTS = RNG.standard_normal(3), RNG.random(3) + 0.1


def ce(x):
    return TF.cross_entropy(x, torch.tensor(LABELS))


def ce_of_text(x):
    return TF.cross_entropy(x.movedim(-1, 1), torch.tensor(CLASSES))  # PyTorch wants the classes second


def convolution(**options):
    return (lambda *a: F.conv2d(*a, **options)), (lambda *a: TF.conv2d(*a, **options))


def pools(kind, *window):
    return (lambda x: getattr(F, kind)(x, *window)), (lambda x: getattr(TF, kind)(x, *window))


def attention(**options):
    theirs = {"is_causal": options.get("causal", False)}
    return (
        lambda *a: F.scaled_dot_product_attention(*a, **options),
        lambda *a: TF.scaled_dot_product_attention(*a, **theirs),
    )


def embed(tokens):
    return (lambda w: F.embedding(tokens, w)), (lambda w: TF.embedding(torch.tensor(tokens), w))


def their_layer_norm(x, w, b):
    return TF.layer_norm(x, w.shape, w, b)


def given_moments(x, w, b):
    return BatchNorm.apply(x, w, b, moments=tuple(m.astype(x.dtype) for m in MOMENTS))


def their_given_moments(x, w, b):
    return TF.batch_norm(x, *(torch.tensor(m).to(x) for m in MOMENTS), w, b)


def their_batch_norm(x, w, b):
    return TF.batch_norm(x, None, None, w, b, training=True)


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
    ("cross_entropy of text", lambda x: F.cross_entropy(x, CLASSES), ce_of_text, [LOGITS]),
    ("conv2d", F.conv2d, TF.conv2d, [PICTURES, KERNEL, B]),
    ("conv2d without bias", *convolution(), [PICTURES, KERNEL]),
    ("conv2d strides", *convolution(stride=(2, 1)), [PICTURES, KERNEL, B]),
    ("conv2d padding", *convolution(padding=(1, 2)), [PICTURES, KERNEL, B]),
    ("conv2d both", *convolution(stride=(2, 3), padding=(2, 1)), [PICTURES, KERNEL]),
    ("conv2d 1x1", *convolution(), [PICTURES, KERNEL_1, B]),
    ("conv2d 1x1 strides", *convolution(stride=(2, 3)), [PICTURES, KERNEL_1, B]),
    ("conv2d of all", *convolution(), [PICTURES, KERNEL_ALL, B]),
    ("conv2d of one image", *convolution(padding=1), [PICTURES[:1], KERNEL, B]),
    ("max_pool2d", *pools("max_pool2d", 2), [PICTURES]),
    ("max_pool2d overlapping", *pools("max_pool2d", (3, 2), 1), [PICTURES]),
    ("max_pool2d padding", *pools("max_pool2d", 3, 2, 1), [PICTURES]),
    ("max_pool2d of ties", *pools("max_pool2d", 3, 1, 1), [np.round(PICTURES)]),
    ("max_pool2d gaps", *pools("max_pool2d", 2, 3), [PICTURES]),
    ("avg_pool2d", *pools("avg_pool2d", 2), [PICTURES]),
    ("avg_pool2d overlapping", *pools("avg_pool2d", (3, 2), 1), [PICTURES]),
    ("avg_pool2d padding", *pools("avg_pool2d", 3, 2, 1), [PICTURES]),
    ("avg_pool2d gaps", *pools("avg_pool2d", 2, 3), [PICTURES]),
    ("layer_norm", F.layer_norm, their_layer_norm, [X, *TARGET[:2]]),
    ("layer_norm two axes", F.layer_norm, their_layer_norm, [IMAGES, *IMAGES[0, :2]]),
    ("batch norm", BatchNorm.apply, their_batch_norm, [X[:, :3], *NORM]),
    ("batch norm of images", BatchNorm.apply, their_batch_norm, [PICTURES, *NORM]),
    ("batch norm moments", given_moments, their_given_moments, [PICTURES, *NORM]),
    ("embedding", *embed(TOKENS), [X]),
    ("attention", *attention(), [QUERY, *OTHERS]),
    ("attention causal", *attention(causal=True), [QUERY, *OTHERS]),
    ("attention of equal lengths", *attention(causal=True), [*OTHERS, OTHERS[0]]),
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
