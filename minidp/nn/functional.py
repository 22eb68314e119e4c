"""The operations of neural networks as functions of tensors or raw arrays; usually imported as F.

Shapes: n samples, C classes, ... any leading axes. Every function accepts n = 0. float32 in, float32 out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from minidp.autograd import Tensor
from minidp.autograd import conv as _conv
from minidp.autograd import ops as _ops
from minidp.autograd import pooling as _pooling
from minidp.autograd.images import Pair, check_padding, check_window
from minidp.backend import array_module
from minidp.nn import activations as _act
from minidp.nn import attention as _att
from minidp.nn import losses as _losses
from minidp.nn import normalization as _norm

__all__ = [
    "avg_pool2d",
    "conv2d",
    "cross_entropy",
    "dropout",
    "embedding",
    "flatten",
    "gelu",
    "layer_norm",
    "linear",
    "log_softmax",
    "max_pool2d",
    "mse_loss",
    "relu",
    "scaled_dot_product_attention",
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


def conv2d(x: Any, weight: Any, bias: Any = None, stride: Pair = 1, padding: Pair = 0) -> Tensor:
    """Slide `weight` over images: x (n, c, h, w), weight (out, c, rows, columns), bias (out,) → (n, out, h', w').

    h' = ⌊(h + 2 padding − rows) / stride⌋ + 1; stride and padding are numbers or pairs (rows, columns). In the
    weight's dtype. ValueError for a window that is larger than the padded images, or other numbers of channels.
    """
    check_window("conv2d", 1, stride, padding)
    inputs = (x, weight) if bias is None else (x, weight, bias)
    return _conv.Conv2d.apply(*inputs, stride=stride, padding=padding)


def max_pool2d(x: Any, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """The largest value of each window of (n, c, h, w); windows lie side by side unless `stride` is given."""
    return _pool2d(_pooling.MaxPool2d, "max_pool2d", x, kernel_size, stride, padding)


def avg_pool2d(x: Any, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """The mean of each window of (n, c, h, w), padding counted as 0; side by side unless `stride` is given."""
    return _pool2d(_pooling.AvgPool2d, "avg_pool2d", x, kernel_size, stride, padding)


def _pool2d(
    operation: type[_pooling.Pool2d], name: str, x: Any, kernel_size: Pair, stride: Pair | None, padding: Pair
) -> Tensor:
    stride = kernel_size if stride is None else stride
    check_window(name, kernel_size, stride, padding)
    check_padding(name, kernel_size, padding)
    return operation.apply(x, kernel_size=kernel_size, stride=stride, padding=padding)


def embedding(tokens: Any, weight: Any) -> Tensor:
    """Rows of `weight` (num_embeddings, dim) for integer `tokens` (...) → (..., dim).

    Raises TypeError if the tokens are no integers, IndexError if one is outside 0 … num_embeddings − 1. Tokens
    that lie on a device are not looked at, which would wait for it: the row of a wrong one is NaN.
    """
    return _act.Embedding.apply(weight, tokens.data if isinstance(tokens, Tensor) else tokens)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float = 1e-5) -> Tensor:
    """(x − μ) / √(σ² + eps) · weight + bias, μ and σ² over the last axes of x, as many as `weight` has."""
    return _norm.LayerNorm.apply(x, weight, bias, eps=eps)


def scaled_dot_product_attention(
    query: Any, key: Any, value: Any, causal: bool = False, dropout: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """softmax(Q Kᵀ / √d) V: query (..., t, d), key and value (..., s, d) → (..., t, d).

    With `causal`, place t sees 0 … t only. `dropout`, a function such as a Dropout layer, changes the shares
    softmax(…): then the operation is made of its parts.
    """
    if dropout is None or not key.shape[-2]:  # of no shares there is nothing to drop
        return _att.Attention.apply(query, key, value, causal=causal)
    query, key, value = (x if isinstance(x, Tensor) else Tensor(x) for x in (query, key, value))
    _att.check_shapes(query.shape, key.shape, value.shape)
    axes = (*range(key.ndim - 2), key.ndim - 1, key.ndim - 2)
    scores = (query * (1 / math.sqrt(query.shape[-1]))) @ key.transpose(*axes)
    if causal:
        scores = scores + _att.later(scores.data, array_module(scores.data))
    mixed: Tensor = dropout(softmax(scores)) @ value
    return mixed


def softmax(x: Any, axis: int = -1) -> Tensor:
    """exp(x_i) / Σ exp(x_j) along `axis`."""
    return _act.Softmax.apply(x, axis=axis)


def log_softmax(x: Any, axis: int = -1) -> Tensor:
    """log(softmax(x)) along `axis`, without overflow."""
    return _act.LogSoftmax.apply(x, axis=axis)


def cross_entropy(logits: Any, labels: Any) -> Tensor:
    """Mean over all labels of −log softmax(logits)[label]: logits (n, ..., C), integer labels (n, ...) → scalar.

    Classes come last, also where there are axes between, as for text (n, t, C). (PyTorch wants them second.)
    Raises TypeError if the labels are no integers, ValueError if one is outside 0 … C−1 or the shape is not that
    of the logits without classes. Over n = 0 samples the loss is 0 and its gradient zero. Labels that lie on a
    device are not looked at, which would wait for it: with a wrong one the loss is NaN.
    """
    return _losses.CrossEntropy.apply(logits, labels)


def mse_loss(prediction: Any, target: Any) -> Tensor:
    """Mean over all elements of (prediction − target)²: two arrays of one shape → scalar; 0 over none."""
    return _losses.MSELoss.apply(prediction, target)
