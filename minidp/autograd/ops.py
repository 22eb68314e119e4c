"""The operations behind the tensor's operators: each one's forward, and below it its backward.

They work on arrays of any module through ``self.xp``, and on ``dtype=object`` arrays of exact Fractions
wherever the mathematics is rational (no float constant is ever multiplied in).
"""

from __future__ import annotations

import math
from typing import Any

from minidp.autograd.function import Function, nbytes_of
from minidp.backend import Array, matmul, sums

# ── elementwise, two inputs ─────────────────────────────────────────────────────────────────────────────


class Add(Function):
    def forward(self, a: Array, b: Array) -> Array:
        return a + b

    def backward(self, grad: Array) -> Any:
        return (
            self.fit(0, grad) if self.needs[0] else None,
            self.fit(1, grad) if self.needs[1] else None,
        )

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        forward = out.nbytes + nbytes_of(inputs[0]) + nbytes_of(inputs[1])
        return forward, _handed_on(out, inputs, self.needs)


class Sub(Function):
    def forward(self, a: Array, b: Array) -> Array:
        return a - b

    def backward(self, grad: Array) -> Any:
        return (
            self.fit(0, grad) if self.needs[0] else None,
            self.fit(1, -grad) if self.needs[1] else None,
        )

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        forward = out.nbytes + nbytes_of(inputs[0]) + nbytes_of(inputs[1])
        return forward, _handed_on(out, inputs, self.needs) + 2 * out.nbytes * self.needs[1]  # −grad


def _handed_on(grad: Array, inputs: tuple[Any, ...], needs: list[bool]) -> int:
    """Bytes that move when `grad` becomes the inputs' gradients as it is: none, unless broadcasting is undone."""
    whole, moved = grad.nbytes, 0
    for x, needed in zip(inputs, needs):
        if needed and (size := nbytes_of(x)) != whole:
            moved += whole + size
    return moved


class Mul(Function):
    fresh = True

    def forward(self, a: Array, b: Array) -> Array:
        self.saved = a, b
        return a * b

    def backward(self, grad: Array) -> Any:
        a, b = self.saved
        return (
            self.fit(0, grad * b) if self.needs[0] else None,
            self.fit(1, grad * a) if self.needs[1] else None,
        )


class Div(Function):
    fresh = True

    def forward(self, a: Array, b: Array) -> Array:
        self.saved = a, b
        return a / b

    def backward(self, grad: Array) -> Any:
        a, b = self.saved
        return (
            self.fit(0, grad / b) if self.needs[0] else None,
            self.fit(1, -grad * a / (b * b)) if self.needs[1] else None,
        )


# ── elementwise, one input ──────────────────────────────────────────────────────────────────────────────


class Neg(Function):
    fresh = True

    def forward(self, a: Array) -> Array:
        return -a

    def backward(self, grad: Array) -> Any:
        return -grad


class Pow(Function):
    """a ** exponent, for a constant exponent."""

    fresh = True

    def forward(self, a: Array, exponent: float) -> Array:
        self.saved = a, exponent
        return a**exponent

    def backward(self, grad: Array) -> Any:
        a, n = self.saved
        return grad * (n * a ** (n - 1)) if n != 0 else grad * 0  # 0 · 0⁻¹ is no number


class Exp(Function):
    fresh = True

    def forward(self, a: Array) -> Array:
        self.saved = y = self.xp.exp(a)
        return y

    def backward(self, grad: Array) -> Any:
        return grad * self.saved


class Log(Function):
    fresh = True

    def forward(self, a: Array) -> Array:
        self.saved = a
        return self.xp.log(a)

    def backward(self, grad: Array) -> Any:
        return grad / self.saved


class Sqrt(Function):
    fresh = True

    def forward(self, a: Array) -> Array:
        self.saved = y = self.xp.sqrt(a)
        return y

    def backward(self, grad: Array) -> Any:
        return grad / (2 * self.saved)


# ── products of matrices ────────────────────────────────────────────────────────────────────────────────


class MatMul(Function):
    """a @ b by NumPy's rules: (..., n, k) @ (..., k, m) → (..., n, m); a vector stands for a row or column."""

    fresh = True

    def forward(self, a: Array, b: Array) -> Array:
        self.saved = a, b
        return matmul(a, b)

    def backward(self, grad: Array) -> Any:
        a, b = self.saved
        A = a[None, :] if a.ndim == 1 else a  # (..., n, k)
        B = b[:, None] if b.ndim == 1 else b  # (..., k, m)
        G = grad[..., None] if b.ndim == 1 else grad
        G = G[..., None, :] if a.ndim == 1 else G  # (..., n, m)
        grad_a = grad_b = None
        if self.needs[0]:
            grad_a = matmul(G, B.swapaxes(-1, -2), gradient=0)
            grad_a = self.fit(0, grad_a[..., 0, :] if a.ndim == 1 else grad_a)
        if self.needs[1]:
            grad_b = matmul(A.swapaxes(-1, -2), G, gradient=1)
            grad_b = self.fit(1, grad_b[..., 0] if b.ndim == 1 else grad_b)
        return grad_a, grad_b

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        k = inputs[0].shape[-1]
        return 2.0 * out.size * k, 2.0 * out.size * k * sum(self.needs)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        product = out.nbytes + nbytes_of(inputs[0]) + nbytes_of(inputs[1])  # of each: two are read, one written
        return product, product * sum(self.needs)


# ── reductions ──────────────────────────────────────────────────────────────────────────────────────────


def _kept(shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The shape that a reduction of `shape` over `axis` has with keepdims=True."""
    axes = range(len(shape)) if axis is None else (axis,) if isinstance(axis, int) else axis
    reduced = {a % len(shape) for a in axes} if shape else set()
    return tuple(1 if i in reduced else n for i, n in enumerate(shape))


class Sum(Function):
    def forward(self, a: Array, axis: Any = None, keepdims: bool = False) -> Array:
        self.saved = a.shape, axis
        return a.sum(axis=axis, keepdims=keepdims)

    def backward(self, grad: Array) -> Any:
        shape, axis = self.saved
        return self.xp.broadcast_to(grad.reshape(_kept(shape, axis)), shape)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return out.nbytes + nbytes_of(inputs[0]), 0  # backward makes a view


class Mean(Function):
    def forward(self, a: Array, axis: Any = None, keepdims: bool = False) -> Array:
        self.saved = a.shape, axis
        if a.size == 0:
            return a.sum(axis=axis, keepdims=keepdims)  # a mean of nothing is 0, without a warning
        return a.mean(axis=axis, keepdims=keepdims)

    def backward(self, grad: Array) -> Any:
        shape, axis = self.saved
        kept = _kept(shape, axis)
        count = math.prod(n for n, k in zip(shape, kept) if k == 1)
        return self.xp.broadcast_to(grad.reshape(kept) / max(count, 1), shape)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return out.nbytes + nbytes_of(inputs[0]), 2 * out.nbytes  # divided before it is broadcast


class Max(Function):
    fresh = True

    def forward(self, a: Array, axis: Any = None, keepdims: bool = False) -> Array:
        largest = a.max(axis=axis, keepdims=True)
        self.saved = a == largest, axis
        return largest if keepdims else largest.reshape(a.max(axis=axis).shape)

    def backward(self, grad: Array) -> Any:
        mask, axis = self.saved
        ties = mask.sum(axis=axis, keepdims=True)
        return mask * (grad.reshape(ties.shape) / ties).astype(grad.dtype)


# ── shapes ──────────────────────────────────────────────────────────────────────────────────────────────


class Reshape(Function):
    def forward(self, a: Array, shape: Any) -> Array:
        self.saved = a.shape
        return a.reshape(shape)

    def backward(self, grad: Array) -> Any:
        return grad.reshape(self.saved)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0, 0  # a view; a copy, where the array is not contiguous, is rare and not counted


class Flatten(Function):
    """Merge the axes from `start_dim` on: (n, c, h, w) → (n, c·h·w) for start_dim=1; n may be 0."""

    def forward(self, a: Array, start_dim: int = 1) -> Array:
        self.saved = a.shape
        return a.reshape(*a.shape[:start_dim], math.prod(a.shape[start_dim:]))

    def backward(self, grad: Array) -> Any:
        return grad.reshape(self.saved)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0, 0  # a view


class Transpose(Function):
    def forward(self, a: Array, axes: tuple[int, ...] | None = None) -> Array:
        self.saved = axes
        return a.transpose(axes)

    def backward(self, grad: Array) -> Any:
        axes = self.saved
        if axes is None:
            return grad.transpose()
        inverse = [0] * len(axes)
        for i, axis in enumerate(axes):
            inverse[axis] = i
        return grad.transpose(inverse)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0, 0  # a view


class GetItem(Function):
    fresh = True

    def forward(self, a: Array, index: Any) -> Array:
        self.saved = a.shape, index
        return a[index]

    def backward(self, grad: Array) -> Any:
        shape, index = self.saved
        out = self.xp.zeros(shape, dtype=grad.dtype)
        parts = index if type(index) is tuple else (index,)
        if all(i is None or i is ... or isinstance(i, slice | int) for i in parts):
            out[index] = grad  # each element is picked at most once: 20 times as fast
        elif not self.add_sorted(out, index, grad):
            self.xp.add.at(out, index, grad)  # adds where an index occurs twice; out[index] += grad would not
        return out

    def add_sorted(self, out: Array, index: Any, grad: Array) -> bool:
        """The same on a GPU, where add.at adds in another order every time; False where no kernel does it."""
        if sums.KERNELS.on(self.xp, out.dtype) is None:
            return False
        return sums.add_at(out, self.xp.arange(out.size).reshape(out.shape)[index], grad)

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 2 * out.nbytes, nbytes_of(inputs[0]) + 3 * out.nbytes  # what is picked; zeros, then added to
