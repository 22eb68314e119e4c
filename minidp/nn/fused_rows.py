"""On a GPU: what is taken together along a row, each way in one kernel, a block of threads a row; see `fused`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from minidp.autograd.function import rows
from minidp.backend import Array, Kernels, array_module, matmul
from minidp.nn.activations import LogSoftmax, Softmax
from minidp.nn.attention import Attention, SelfAttention, attend, attend_backward
from minidp.nn.fused import Fused, contiguous
from minidp.nn.fused_linear import column_sums
from minidp.nn.losses import CrossEntropy, check_labels
from minidp.nn.normalization import LayerNorm

KERNELS = Kernels(
    Path(__file__).with_suffix(".cu"),
    *("layer_norm", "layer_norm_backward", "softmax", "softmax_backward", "log_softmax", "log_softmax_backward"),
    *("cross_entropy", "cross_entropy_backward", "mean"),
)
MOST_THREADS = 512


def threads(size: int) -> int:
    """How many take a row of that size: one for each four elements, in whole warps; a short row is one warp's."""
    return min(MOST_THREADS, 32 * max(1, -(-size // 128)))


class FusedLayerNorm(Fused, LayerNorm):
    library = KERNELS

    def suits(self, x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Any:
        fits = x.size and x.shape[x.ndim - weight.ndim :] == weight.shape == bias.shape
        return weight.dtype if fits else None

    def launch(self, x: Array, weight: Array, bias: Array, eps: float = 1e-5) -> Array:
        assert self.kernels is not None
        xp, dtype, size = self.xp, weight.dtype, weight.size
        x, weight, bias = (contiguous(array, dtype, xp) for array in (x, weight, bias))
        n = x.size // size
        normal, y = (xp.empty(x.shape, dtype=dtype) for _ in range(2))
        scale = xp.empty(n, dtype=dtype)
        self.kernels.blocks("layer_norm", n, threads(size), size, x, weight, bias, float(eps), normal, scale, y)
        self.saved = normal, scale, weight
        return y

    def launch_backward(self, grad: Array) -> Any:
        assert self.kernels is not None
        xp, (normal, scale, weight) = self.xp, self.saved
        dtype, size, n = weight.dtype, weight.size, len(scale)
        grad = contiguous(grad, dtype, xp)
        grad_x = grad_w = grad_b = None
        if self.needs[0]:
            grad_x = xp.empty(grad.shape, dtype=dtype)
            self.kernels.blocks("layer_norm_backward", n, threads(size), size, grad, weight, normal, scale, grad_x)
        if self.needs[1] or self.needs[2]:
            grad_w, grad_b = (
                self.room(k, dtype) if self.needs[k] else xp.empty(weight.shape, dtype=dtype) for k in (1, 2)
            )
            column_sums(grad.reshape(n, size), normal.reshape(n, size), grad_w, grad_b, xp)
        return grad_x, grad_w, grad_b


class AlongRows(Fused):
    """Softmax and its logarithm: along the last axis; others are left to the plain operation."""

    library = KERNELS

    def suits(self, x: Array, axis: int = -1) -> Any:
        return x.dtype if x.ndim and x.size and axis in (-1, x.ndim - 1) else None


class FusedSoftmax(AlongRows, Softmax):
    def launch(self, x: Array, axis: int = -1) -> Array:
        x = contiguous(x, x.dtype, self.xp)
        self.saved = y = self.xp.empty(x.shape, dtype=x.dtype)
        softmax(self.kernels, x, y, 1.0, 0)
        return y

    def launch_backward(self, grad: Array) -> Any:
        y = self.saved
        out = self.xp.empty(y.shape, dtype=y.dtype)
        softmax_backward(self.kernels, y, contiguous(grad, y.dtype, self.xp), out, 1.0)
        return out


def softmax(kernels: Any, x: Array, y: Array, factor: float, places: int) -> None:
    """y = softmax(x · factor) along rows; with `places`, row i sees the elements 0 … i mod places alone."""
    size = x.shape[-1]
    kernels.blocks("softmax", x.size // size, threads(size), size, x, y, factor, places)


def softmax_backward(kernels: Any, y: Array, grad: Array, out: Array, factor: float) -> None:
    size = y.shape[-1]
    kernels.blocks("softmax_backward", y.size // size, threads(size), size, y, grad, out, factor)


class FusedLogSoftmax(AlongRows, LogSoftmax):
    def launch(self, x: Array, axis: int = -1) -> Array:
        assert self.kernels is not None
        x = contiguous(x, x.dtype, self.xp)
        self.saved = y = self.xp.empty(x.shape, dtype=x.dtype)
        size = x.shape[-1]
        self.kernels.blocks("log_softmax", x.size // size, threads(size), size, x, y)
        return y

    def launch_backward(self, grad: Array) -> Any:
        assert self.kernels is not None
        y = self.saved
        grad, out, size = contiguous(grad, y.dtype, self.xp), self.xp.empty(y.shape, dtype=y.dtype), y.shape[-1]
        self.kernels.blocks("log_softmax_backward", y.size // size, threads(size), size, y, grad, out)
        return out


def fused_attend(q: Array, k: Array, v: Array, causal: bool, xp: Any) -> tuple[Array, Array]:
    """As `attend`; scale, mask and softmax of the scores are one kernel, in place."""
    kernels = KERNELS.on(xp, q.dtype)
    if kernels is None or k.dtype != q.dtype or not (q.size and k.size):
        return attend(q, k, v, causal, xp)
    p = contiguous(matmul(q, k.swapaxes(-1, -2)), q.dtype, xp)
    softmax(kernels, p, p, 1 / math.sqrt(q.shape[-1]), q.shape[-2] if causal else 0)
    return matmul(p, v), p


def fused_attend_backward(
    grad: Array, q: Array, k: Array, v: Array, p: Array, y: Array
) -> tuple[Array, Array, Array]:
    """As `attend_backward`; the gradient of the scores is one kernel, in place."""
    xp = array_module(p)
    kernels = KERNELS.on(xp, p.dtype)
    if kernels is None or not p.size:
        return attend_backward(grad, q, k, v, p, y)
    grad_v = matmul(p.swapaxes(-1, -2), grad, gradient=1)
    grad_s = contiguous(matmul(grad, v.swapaxes(-1, -2), gradient=0), p.dtype, xp)
    softmax_backward(kernels, p, grad_s, grad_s, 1 / math.sqrt(q.shape[-1]))
    grad_k = matmul(grad_s.swapaxes(-1, -2), q, gradient=0)
    return matmul(grad_s, k, gradient=0), grad_k, grad_v


class FusedAttention(Attention):
    attend = staticmethod(fused_attend)
    attend_backward = staticmethod(fused_attend_backward)


class FusedSelfAttention(SelfAttention):
    attend = staticmethod(fused_attend)
    attend_backward = staticmethod(fused_attend_backward)


class FusedCrossEntropy(Fused, CrossEntropy):
    """The loss stays where it is made, and the host waits for nothing."""

    library = KERNELS

    def suits(self, logits: Array, labels: Array) -> Any:
        return logits.dtype if logits.size and logits.ndim > 1 else None

    def launch(self, logits: Array, labels: Array) -> Array:
        assert self.kernels is not None
        xp, shape, dtype = self.xp, logits.shape, logits.dtype
        labels = contiguous(check_labels(logits, labels, xp), "int64", xp)
        logits = contiguous(rows(logits), dtype, xp)
        n, classes = logits.shape
        p, losses, loss = (xp.empty(size, dtype=dtype) for size in (logits.shape, n, ()))
        self.kernels.blocks("cross_entropy", n, threads(classes), classes, logits, labels, p, losses)
        self.kernels.blocks("mean", 1, MOST_THREADS, n, losses, loss)
        self.saved = p, labels, shape
        return loss

    def launch_backward(self, grad: Array) -> Any:
        assert self.kernels is not None
        p, labels, shape = self.saved
        n, classes = p.shape
        grad = contiguous(grad, p.dtype, self.xp)
        self.kernels.blocks("cross_entropy_backward", n, threads(classes), classes, p, labels, grad)
        return p.reshape(shape), None


LayerNorm.fused = FusedLayerNorm
Softmax.fused, LogSoftmax.fused = FusedSoftmax, FusedLogSoftmax
Attention.fused, SelfAttention.fused = FusedAttention, FusedSelfAttention
CrossEntropy.fused = FusedCrossEntropy
