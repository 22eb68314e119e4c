"""Scaled dot-product attention as one operation (Vaswani et al. 2017, section 3.2.1).

S = Q Kᵀ / √d        how much each place asks of each other       (..., t, s)
P = softmax(S)       shares that add up to 1 along s; with `causal` none of what comes later
Y = P V              (..., t, d)

∂V = Pᵀ ∂Y           ∂P = ∂Y Vᵀ           ∂S = P · (∂P − Σ_s ∂P · P)           ∂Q = ∂S K / √d       ∂K = ∂Sᵀ Q / √d
"""

from __future__ import annotations

import math
from typing import Any

from minidp.autograd.function import Function
from minidp.backend import Array, matmul


def attend(q: Array, k: Array, v: Array, causal: bool, xp: Any) -> tuple[Array, Array]:
    """(Y, P) for Q (..., t, d), K and V (..., s, d)."""
    p = matmul(q * (1 / math.sqrt(q.shape[-1])), k.swapaxes(-1, -2))
    if causal:
        p += later(p, xp)
    if p.shape[-1]:
        p -= p.max(axis=-1, keepdims=True)
    xp.exp(p, out=p)
    p /= p @ xp.ones((p.shape[-1], 1), dtype=p.dtype)  # Σ: a product is a fifth of the time of sum()
    return matmul(p, v), p


def later(scores: Array, xp: Any) -> Array:
    """−∞ for every place that comes later than the one that asks, else 0: (t, s) for scores (..., t, s)."""
    t, s = scores.shape[-2:]
    number = scores.dtype.type
    return xp.where(xp.arange(s) > xp.arange(t).reshape(t, 1), number(-math.inf), number(0))


def attend_backward(grad: Array, q: Array, k: Array, v: Array, p: Array, y: Array) -> tuple[Array, Array, Array]:
    """(∂Q, ∂K, ∂V) from ∂Y; Σ_s ∂P · P is taken as Σ_d ∂Y · Y, which is the same and shorter."""
    grad_v = matmul(p.swapaxes(-1, -2), grad, gradient=1)
    grad_s = matmul(grad, v.swapaxes(-1, -2), gradient=0)
    grad_s -= (grad * y).sum(axis=-1, keepdims=True)
    grad_s *= p
    grad_s *= 1 / math.sqrt(q.shape[-1])
    grad_k = matmul(grad_s.swapaxes(-1, -2), q, gradient=0)
    return matmul(grad_s, k, gradient=0), grad_k, grad_v


def check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    """ValueError unless they are (..., t, d), (..., s, d), (..., s, d) with d of 1 or more."""
    if len(q) < 2 or q[:-2] != k[:-2] or q[-1] != k[-1] or k != v or k[-1] == 0:
        raise ValueError(
            f"attention: queries of shape {q}, keys {k}, values {v}: they must agree in all but the length of "
            "queries, (..., t, d), (..., s, d), (..., s, d), and d may not be 0"
        )


class Attention(Function):
    """Q (..., t, d), K (..., s, d), V (..., s, d) → (..., t, d)."""

    fresh = True
    attend = staticmethod(attend)
    attend_backward = staticmethod(attend_backward)

    def forward(self, q: Array, k: Array, v: Array, causal: bool = False) -> Array:
        check_shapes(q.shape, k.shape, v.shape)
        y, p = self.attend(q, k, v, causal, self.xp)
        self.saved = q, k, v, p, y
        return y

    def backward(self, grad: Array) -> Any:
        return self.attend_backward(grad, *self.saved)

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        product = 2.0 * out.size * inputs[1].shape[-2]
        return 2 * product, 4 * product

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        shares = out.nbytes // max(1, out.shape[-1]) * inputs[1].shape[-2]
        return 10 * shares + 5 * out.nbytes, 9 * shares + 10 * out.nbytes


class SelfAttention(Attention):
    """The same for Q, K and V that one product has made, in `heads` groups of features: (b, t, 3·e) → (b, t, e).

    Heads are views, not copies, and backward writes the three gradients into one array.
    """

    def forward(self, packed: Array, heads: int, causal: bool = False) -> Array:  # type: ignore[override]
        q, k, v = self.split(packed, heads)
        y, p = self.attend(q, k, v, causal, self.xp)
        self.saved = q, k, v, p, y
        b, h, t, d = y.shape
        return y.transpose(0, 2, 1, 3).reshape(b, t, h * d)

    def backward(self, grad: Array) -> Any:
        q, *_ = self.saved
        b, h, t, d = q.shape
        grad = grad.reshape(b, t, h, d).transpose(0, 2, 1, 3)
        out = self.xp.empty((b, t, 3 * h * d), dtype=grad.dtype)
        for view, g in zip(self.split(out, h), self.attend_backward(grad, *self.saved)):
            view[...] = g
        return out

    def split(self, packed: Array, heads: int) -> list[Array]:
        """The views (b, heads, t, d) of the three parts."""
        b, t, width = packed.shape
        parts = packed.reshape(b, t, 3, heads, width // (3 * heads)).transpose(2, 0, 3, 1, 4)
        return [parts[0], parts[1], parts[2]]

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        product = 2.0 * out.size * out.shape[1]
        return 2 * product, 4 * product

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        shares = self.saved[3].nbytes
        return 10 * shares + 6 * out.nbytes, 9 * shares + 13 * out.nbytes
