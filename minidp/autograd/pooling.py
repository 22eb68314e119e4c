"""Pooling: one number in place of each window."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from minidp.autograd.function import Function, nbytes_of
from minidp.autograd.images import Pair, Windows, chwn, nchw, windows
from minidp.backend import Array


class Pool2d(Function):
    """What both kinds share: the way from a gradient of windows to one of pixels."""

    fresh = True

    def spread(self, over: Windows, grads: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        """Give the pixels at each place of the window what `grads` yields for it, row by row; (n, c, h, w)."""
        image = (self.xp.empty if over.cover else self.xp.zeros)((shape[1], *over.padded, shape[0]), dtype=dtype)
        for pixels, grad in zip(over.taps(image), grads):
            if over.apart:
                pixels[...] = grad
            else:
                pixels += grad
        return nchw(over.crop(image))

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        pixels = float(inputs[0].size)
        return pixels, 3 * pixels * self.needs[0]

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        image, y = nbytes_of(inputs[0]), out.nbytes
        return 3 * image, (5 * image + y) * self.needs[0]


class MaxPool2d(Pool2d):
    """The largest pixel of each window. If several are, the first of them gets the gradient, as in PyTorch."""

    def forward(self, x: Array, kernel_size: Pair, stride: Pair, padding: Pair) -> Array:
        x = floating(x)
        over = windows("max_pool2d", x, kernel_size, stride, padding)
        xp, record = self.xp, self.needs[0]
        image = over.pad(chwn(x), xp, fill=-math.inf) if any(over.padding) else chwn(x)
        first, *others = over.taps(image)
        y = first.copy()
        # Which place in its window is the largest: a byte a window, from which backward needs no pixel again.
        places = math.prod(over.kernel)
        winner = xp.zeros(y.shape if record else 0, dtype="uint8" if places <= 256 else "int32")
        for place, tap in enumerate(others, 1):
            if record:
                larger = (tap > y).astype(winner.dtype)
                larger *= place
                xp.maximum(winner, larger, out=winner)
            xp.maximum(y, tap, out=y)
        self.saved = over, winner, x.shape
        return nchw(y)

    def backward(self, grad: Array) -> Any:
        over, winner, shape = self.saved
        grad = self.xp.ascontiguousarray(chwn(grad))
        shares = (grad * (winner == place) for place in range(math.prod(over.kernel)))
        return self.spread(over, shares, shape, grad.dtype)


class AvgPool2d(Pool2d):
    """The mean of each window; pixels of the padding count as 0, as in PyTorch."""

    def forward(self, x: Array, kernel_size: Pair, stride: Pair, padding: Pair) -> Array:
        x = floating(x)
        over = windows("avg_pool2d", x, kernel_size, stride, padding)
        image = over.pad(chwn(x), self.xp) if any(over.padding) else chwn(x)
        first, *others = over.taps(image)
        y = first.copy().astype("float32" if x.dtype.itemsize < 4 else x.dtype, copy=False)  # half can't hold sums
        for tap in others:
            y += tap
        self.saved = over, x.shape
        return nchw(self.mean(y, over).astype(x.dtype, copy=False))

    def mean(self, total: Array, over: Windows) -> Array:
        """Σ / number of pixels; exact where pixels are exact: Python's 0 / 9 would be a float."""
        pixels = math.prod(over.kernel)
        return total * Fraction(1, pixels) if total.dtype.kind == "O" else total / pixels

    def backward(self, grad: Array) -> Any:
        over, shape = self.saved
        share = self.mean(chwn(grad), over)
        return self.spread(over, (share for _ in range(math.prod(over.kernel))), shape, grad.dtype)


def floating(x: Array) -> Array:
    """Pixels that are whole numbers, such as bytes, become float32: sums of bytes overflow, and have no −∞."""
    return x if x.dtype.kind in "fO" else x.astype("float32")
