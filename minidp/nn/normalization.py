"""Normalisation as operations: over the features of each sample (layer), or over the samples (batch)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

from minidp.autograd.function import Function, nbytes_of
from minidp.backend import Array, asarray


class LayerNorm(Function):
    """y = x̂ · w + b with x̂ = (x − μ) / √(σ² + ε), μ and σ² of each sample (Ba, Kiros & Hinton 2016).

    x (..., *shape), w and b of `shape` → y like x. One node: written out in operations it has ten, whose arrays
    are all as large as x.
    """

    fresh = True
    moves = True

    def forward(self, x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
        if x.shape[x.ndim - weight.ndim :] != weight.shape:
            raise ValueError(f"layer_norm: input of shape {x.shape} must end in the shape {weight.shape}")
        size = weight.size
        flat = x.reshape(math.prod(x.shape[: x.ndim - weight.ndim]), size)
        wide = "float32" if weight.dtype.itemsize < 4 else weight.dtype  # half precision can't hold sums
        flat = flat.astype(wide, copy=False)
        mean = self.xp.full((size, 1), 1 / size, dtype=wide)
        normal = flat - flat @ mean  # a product with a vector is summed by BLAS: a fifth of the time of mean()
        scale = (normal * normal) @ mean
        scale += eps
        self.xp.sqrt(scale, out=scale)
        self.xp.reciprocal(scale, out=scale)
        normal *= scale
        self.saved = normal, scale, mean, weight, x.shape
        y = normal * weight.reshape(size)
        y += bias.reshape(size)
        return y.reshape(x.shape).astype(weight.dtype, copy=False)

    def backward(self, grad: Array) -> Any:
        """∂x = (∂x̂ − mean(∂x̂) − x̂ · mean(∂x̂ · x̂)) / √(σ² + ε), with ∂x̂ = ∂y · w."""
        normal, scale, mean, weight, shape = self.saved
        flat = grad.reshape(normal.shape).astype(normal.dtype, copy=False)
        grad_x = grad_w = grad_b = None
        product = flat * normal
        if self.needs[1]:
            grad_w = product.sum(axis=0).reshape(weight.shape)
        if self.needs[2]:
            grad_b = flat.sum(axis=0).reshape(weight.shape)
        if self.needs[0]:
            w = weight.reshape(len(mean))
            product *= w
            grad_x = flat * w
            slope = product @ mean
            grad_x -= grad_x @ mean
            grad_x -= self.xp.multiply(normal, slope, out=product)
            grad_x *= scale
            grad_x = grad_x.reshape(shape)
        return grad_x, grad_w, grad_b

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 9.0 * out.size, 11.0 * out.size

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 14 * out.nbytes, 20 * out.nbytes


class Pool(Protocol):
    """Others who normalise their samples together with these: see `parallel.SyncBatchNorm`."""

    def moments(self, count: int, mean: Array, var: Array) -> tuple[int, Array, Array]:
        """(samples, μ, σ²) of all together from those of each; shapes (c,)."""

    def total(self, *sums: Array) -> tuple[Array, ...]:
        """The sums of all together; shapes (c,)."""


Moments = tuple[int, Array, Array]
"""(count, μ, σ²) of a batch, σ² biased; shapes (c,)."""


class BatchNorm(Function):
    """y = x̂ · w + b with x̂ = (x − μ) / √(σ² + ε), μ and σ² of each channel (Ioffe & Szegedy 2015).

    x (n, c, ...), w and b (c,) → y like x. μ and σ² (biased) are of the n samples and all places in them, of
    those of `pool` too if there is one, or given as `moments` (then constants). `record` is told the moments of
    these samples alone and those of all together, from which running statistics are made.
    """

    fresh = True
    moves = True

    def forward(
        self,
        x: Array,
        weight: Array,
        bias: Array,
        eps: float = 1e-5,
        moments: tuple[Array, Array] | None = None,
        pool: Pool | None = None,
        record: Callable[[Moments, Moments], None] | None = None,
    ) -> Array:
        wide = "float32" if weight.dtype.itemsize < 4 else weight.dtype
        x = x.astype(wide, copy=False)
        axes, shape = (0, *range(2, x.ndim)), (-1, *(1,) * (x.ndim - 2))  # of all but channels; (c, 1, 1)
        if moments is None:
            count = x.size // max(1, x.shape[1])
            mean = x.sum(axis=axes)
            mean /= max(1, count)
            normal = x - mean.reshape(shape)
            var = (normal * normal).sum(axis=axes)
            var /= max(1, count)
            own = count, mean, var
            if pool is not None:
                count, mean, var = pool.moments(count, mean, var)
                normal += (own[1] - mean).reshape(shape)
            if record is not None:
                record(own, (count, mean, var))
        else:
            count, (mean, var) = 0, (asarray(moment, self.xp) for moment in moments)
            normal = x - mean.reshape(shape)
        scale = 1 / self.xp.sqrt(var + eps).astype(wide, copy=False)
        normal *= scale.reshape(shape)
        self.saved = normal, scale, weight, count, pool, axes, shape
        y = normal * weight.reshape(shape)
        y += bias.reshape(shape)
        return y.astype(weight.dtype, copy=False)

    def backward(self, grad: Array) -> Any:
        """∂x = w / √(σ² + ε) · (∂y − Σ∂y / B − x̂ · Σ(∂y · x̂) / B); with constant μ and σ² the first term alone."""
        normal, scale, weight, count, pool, axes, shape = self.saved
        grad = grad.astype(normal.dtype, copy=False)
        product = grad * normal
        along, across = grad.sum(axis=axes), product.sum(axis=axes)
        grad_w = across.astype(weight.dtype, copy=False) if self.needs[1] else None
        grad_b = along.astype(weight.dtype, copy=False) if self.needs[2] else None
        if not self.needs[0]:
            return None, grad_w, grad_b
        if count:
            if pool is not None:
                along, across = pool.total(along, across)
            grad_x = grad - (along / count).reshape(shape)
            grad_x -= self.xp.multiply(normal, (across / count).reshape(shape), out=product)
            grad_x *= (scale * weight).reshape(shape)
        else:
            grad_x = grad * (scale * weight).reshape(shape)
        return grad_x, grad_w, grad_b

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 9.0 * out.size, 9.0 * out.size

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 14 * out.nbytes, 14 * nbytes_of(inputs[0])
