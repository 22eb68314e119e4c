"""The operations of neural networks as functions of tensors or raw arrays; usually imported as F.

Shapes: n samples, C classes, ... any leading axes. Every function accepts n = 0. float32 in, float32 out.
"""

from __future__ import annotations

from typing import Any

from minidp.autograd import Tensor
from minidp.autograd import ops as _ops
from minidp.nn import activations as _act
from minidp.nn import losses as _losses

__all__ = [
    "cross_entropy",
    "dropout",
    "flatten",
    "gelu",
    "linear",
    "log_softmax",
    "mse_loss",
    "relu",
    "softmax",
    "tanh",
]


def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """x Wᵀ + b: x (..., in), weight (out, in), bias (out,) or None → (..., out), in the weight's dtype."""
    if bias is None:
        return _act.Linear.apply(x, weight)
    return _act.Linear.apply(x, weight, bias)


def relu(x: Any) -> Tensor:
    """max(x, 0), elementwise."""
    return _act.ReLU.apply(x)


def tanh(x: Any) -> Tensor:
    """tanh(x), elementwise."""
    return _act.Tanh.apply(x)


def gelu(x: Any, approximate: str = "none") -> Tensor:
    """x · Φ(x), elementwise, or with ``approximate="tanh"`` the approximation that GPT-2 uses."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f'gelu: approximate must be "none" or "tanh", not {approximate!r}')
    return _act.GELU.apply(x, approximate=approximate)


def dropout(x: Any, p: float, key: tuple[int | str, ...], seed: int = 0) -> Tensor:
    """Zero each element with chance `p` and scale the others by 1/(1−p); the same mask for the same key.

    A pure function: `key` says which mask, for example (layer name, update index). `nn.Dropout` makes its own.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p is a probability, not {p}")
    return _act.Dropout.apply(x, p=p, seed=seed, key=key)


def flatten(x: Any, start_dim: int = 1) -> Tensor:
    """Merge the axes from `start_dim` on: (n, 1, 28, 28) → (n, 784)."""
    return _ops.Flatten.apply(x, start_dim=start_dim)


def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x_i) / Σ exp(x_j) along `axis`."""
    return _act.Softmax.apply(x, axis=axis)


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """log(softmax(x)) along `axis`, without overflow."""
    return _act.LogSoftmax.apply(x, axis=axis)


def cross_entropy(logits: Any, labels: Any) -> Tensor:
    """Mean over n of −log softmax(logits)[label]: logits (n, C), integer labels (n,) → scalar.

    Raises TypeError if the labels are no integers, ValueError if one is outside 0 … C−1 or the shape is not
    (n,). Over n = 0 samples the loss is 0 and its gradient zero.
    """
    return _losses.CrossEntropy.apply(logits, labels)


def mse_loss(prediction: Any, target: Any) -> Tensor:
    """Mean over all elements of (prediction − target)²: two arrays of one shape → scalar; 0 over none."""
    return _losses.MSELoss.apply(prediction, target)
