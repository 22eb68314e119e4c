"""The operations of layers: forward and backward on arrays. `functional` gives them their public names."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minidp.autograd.function import Function, nbytes_of, rows
from minidp.backend import Array, asarray, find_module, generator, matmul
from minidp.nn.normal import normal_tail


class Linear(Function):
    """y = x Wᵀ + b as one node: x (..., in), W (out, in), b (out,) → y (..., out).

    Fused because the bias then is added in place and its gradient needs no broadcasting undone.
    """

    fresh = True
    moves = True

    def forward(self, x: Array, weight: Array, bias: Array | None = None) -> Array:
        if x.shape[-1:] != weight.shape[1:]:
            raise ValueError(f"linear: input of shape {x.shape} for a weight of shape {weight.shape} (out, in)")
        if x.dtype != weight.dtype:  # float64 batches do not turn a float32 model into float64
            x = x.astype(weight.dtype)
        self.saved = x, weight
        y = self.product(rows(x), weight, bias)
        return y if x.ndim == 2 else y.reshape(*x.shape[:-1], len(weight))

    def product(self, x: Array, weight: Array, bias: Array | None) -> Array:
        """x Wᵀ + b for x (n, in), in C order."""
        n, fan_in = x.shape
        if bias is not None and 4 * n <= fan_in and n <= len(weight):
            # BLAS packs the operand that is transposed. For small batches packing W costs more than the
            # product: (W xᵀ)ᵀ packs x instead, and adding b turns the result round. OpenBLAS on Zen 4,
            # W (512, 784): 445 → 311 µs for n = 32, 1207 → 1160 for 128; for n = 512 it would lose 15 %.
            y = self.xp.empty((n, len(weight)), dtype=x.dtype)
            return self.xp.add(matmul(weight, x.T).T, bias, out=y)
        y = matmul(x, weight.T)
        if bias is not None:
            y += bias
        return y

    def backward(self, grad: Array) -> Any:
        x, weight = self.saved
        needs = self.needs
        shape = x.shape
        if grad.ndim != 2:  # one product, not one for each leading index
            grad, x = rows(grad), rows(x)
        grad_x = matmul(grad, weight, gradient=0).reshape(shape) if needs[0] else None
        grad_w = matmul(grad.T, x, out=self.grad_out(1), gradient=0) if needs[1] else None
        if len(needs) == 2:
            return grad_x, grad_w
        return grad_x, grad_w, self.sum_of_rows(grad, self.grad_out(2)) if needs[2] else None

    def sum_of_rows(self, grad: Array, out: Array | None) -> Array:
        return grad.sum(axis=0, out=out)

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        product = 2.0 * out.size * inputs[0].shape[-1]
        bias = float(out.size) * (len(inputs) == 3)
        return product + bias, product * sum(self.needs[:2]) + bias * sum(self.needs[2:])

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        y = out.nbytes
        product = y + nbytes_of(inputs[0]) + nbytes_of(inputs[1])  # of each: two are read, one written
        if len(inputs) == 2:
            return product, product * sum(self.needs)
        bias = nbytes_of(inputs[2])
        return product + 2 * y + bias, product * sum(self.needs[:2]) + (y + bias) * self.needs[2]


def zero_row(x: Array, xp: Any) -> Array:
    """A row of zeros to compare `x` with: maximum(x, 0) takes NumPy twice as long as maximum(x, row)."""
    return xp.zeros(x.shape[-1:], dtype=x.dtype)


class ReLU(Function):
    """max(x, 0); the derivative at 0 is 0."""

    fresh = True

    def forward(self, x: Array) -> Array:
        self.saved = y = self.xp.maximum(x, zero_row(x, self.xp))
        return y

    def backward(self, grad: Array) -> Any:
        return grad * (self.saved > 0)


class Tanh(Function):
    fresh = True

    def forward(self, x: Array) -> Array:
        self.saved = y = self.xp.tanh(x)
        return y

    def backward(self, grad: Array) -> Any:
        return grad * (1 - self.saved * self.saved)


class GELU(Function):
    """x·Φ(x) with Φ the normal distribution function (Hendrycks & Gimpel 2016), or its tanh approximation.

    One node, because derivative and value share their costly parts: forward keeps dy/dx.
    """

    fresh = True

    def forward(self, x: Array, approximate: str = "none") -> Array:
        dtype = x.dtype
        if dtype.itemsize < 4:
            x = x.astype("float32")
        y, slope = self.exact(x) if approximate == "none" else self.tanh(x)
        self.saved = slope.astype(dtype, copy=False)
        return y.astype(dtype, copy=False)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 60 * out.nbytes, 3 * out.nbytes  # 26 to 30 steps forward, most of them one read and one write

    def exact(self, x: Array) -> tuple[Array, Array]:
        """x·Φ(x) = max(x, 0) − |x|·tail(|x|), and its derivative Φ(x) + x·φ(x), which is ½ + an odd function."""
        a = self.xp.abs(x)
        tail, density = normal_tail(a, self.xp)
        slope = density
        slope *= a
        slope -= tail
        slope += 0.5
        slope = self.xp.copysign(slope, x)
        slope += 0.5
        a *= tail
        return self.xp.maximum(x, zero_row(x, self.xp)) - a, slope

    def tanh(self, x: Array) -> tuple[Array, Array]:
        """Φ(x) ≈ (1 + tanh u) / 2 with u = √(2/π) (x + 0.044715 x³), u' = √(2/π) (1 + 3 · 0.044715 x²)."""
        root = math.sqrt(2 / math.pi)
        square = x * x
        u = square * (0.044715 * root)
        u += root
        u *= x
        t = self.xp.tanh(u)
        square *= 3 * 0.044715 * root
        square += root  # u'
        cdf = t * 0.5
        cdf += 0.5
        y = x * cdf
        slope = 1 - t  # Φ + ½ x (1 − t²) u' = Φ + y (1 − t) u'
        slope *= y
        slope *= square
        slope += cdf
        return y, slope

    def backward(self, grad: Array) -> Any:
        return grad * self.saved


class Embedding(Function):
    """Rows of a table: weight (v, d), integer tokens (...) → (..., d).

    A token that no row has is an error where the host sees it. Tokens that lie on a device already it could see
    only by waiting for the device: there such a token's row is NaN, and its gradient goes to row 0.
    """

    fresh = True

    def forward(self, weight: Array, tokens: Array) -> Array:
        xp = self.xp
        tokens = check_tokens(weight.shape, tokens, xp)
        self.saved = tokens, weight.shape
        if xp is np:
            return weight.take(tokens, axis=0)
        wrong = tokens.view("uint64") >= len(weight)
        tokens = xp.where(wrong, 0, tokens)
        self.saved = tokens, weight.shape
        return xp.where(wrong[..., None], weight.dtype.type(math.nan), weight.take(tokens, axis=0))

    def backward(self, grad: Array) -> Any:
        """Each row's gradient is the sum of those of the places that hold its token."""
        tokens, shape = self.saved
        out = self.grad_out(0)
        if out is None:
            out = self.xp.empty(shape, dtype=grad.dtype)
        out[...] = 0
        # Sorted by token, the places of each lie side by side: a seventh of the time of add.at, and sums in one
        # order in every run, which atomic additions of a device would not have.
        flat = tokens.ravel()
        order = flat.argsort(kind="stable")
        flat = flat[order]
        first = self.xp.ones(len(flat), dtype=bool)
        first[1:] = flat[1:] != flat[:-1]
        starts = self.xp.flatnonzero(first)
        if len(starts):
            out[flat[starts]] = self.xp.add.reduceat(rows(grad)[order], starts, axis=0)
        return out, None

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0.0, float(out.size)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 2 * out.nbytes, 2 * out.nbytes + nbytes_of(inputs[0])


def check_tokens(shape: tuple[int, ...], tokens: Any, xp: Any) -> Array:
    """Return `tokens` as int64 beside a weight of that shape; an error if they are wrong and the host sees it."""
    count = shape[0]
    tokens = given = asarray(tokens, xp if find_module(tokens) is xp else np)
    if tokens.dtype.kind not in "iu" and tokens.size:  # of an empty list the dtype says nothing
        raise TypeError(f"embedding: tokens must be integers in 0 … {count - 1}, not {tokens.dtype}")
    tokens = tokens.astype("int64", copy=False)
    if type(tokens) is not np.ndarray:
        return tokens
    wrong = tokens.view("uint64") >= count  # a negative token, seen as unsigned, is larger than any
    if wrong.any():
        where = int(wrong.argmax())
        raise IndexError(
            f"embedding: token {given.ravel()[where]} at place {where} is outside "
            f"0 … {count - 1}, the rows of a weight of shape {tuple(shape)}"
        )
    return tokens if xp is np else asarray(tokens, xp)


class Dropout(Function):
    """x · mask / (1 − p), each element kept with chance 1 − p by the generator at (seed, *key)."""

    fresh = True

    def forward(self, x: Array, p: float, seed: int, key: tuple[int | str, ...]) -> Array:
        if p == 1:
            self.saved = self.xp.zeros_like(x)
        else:  # drawn on the host, so that every device drops the same elements
            keep = generator(seed, *key).random(x.shape, dtype="float32") >= p
            self.saved = asarray(keep, self.xp, x.dtype) * (1 / (1 - p))
        return x * self.saved

    def backward(self, grad: Array) -> Any:
        return grad * self.saved

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 8 * out.nbytes, 3 * out.nbytes  # draw, compare, cast, scale, multiply


class Softmax(Function):
    """exp(x_i) / Σ_j exp(x_j) along an axis, shifted by the largest x so that nothing overflows."""

    fresh = True

    def forward(self, x: Array, axis: int = -1) -> Array:
        y = self.xp.exp(x - x.max(axis=axis, keepdims=True))
        y /= y.sum(axis=axis, keepdims=True)
        self.saved = y, axis
        return y

    def backward(self, grad: Array) -> Any:
        y, axis = self.saved
        return y * (grad - (grad * y).sum(axis=axis, keepdims=True))

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 8 * out.nbytes, 9 * out.nbytes  # max, subtract, exp, sum, divide; multiply, sum, subtract, multiply


class LogSoftmax(Function):
    """x_i − log Σ_j exp(x_j) along an axis."""

    fresh = True

    def forward(self, x: Array, axis: int = -1) -> Array:
        y = x - x.max(axis=axis, keepdims=True)
        y -= self.xp.log(self.xp.exp(y).sum(axis=axis, keepdims=True))
        self.saved = y, axis
        return y

    def backward(self, grad: Array) -> Any:
        y, axis = self.saved
        return grad - self.xp.exp(y) * grad.sum(axis=axis, keepdims=True)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 8 * out.nbytes, 8 * out.nbytes  # max, subtract, exp, sum, subtract; exp, sum, multiply, subtract
