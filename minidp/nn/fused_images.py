"""Convolution and pooling on a GPU: images (c, h, w, n), each way a few passes over them; see `fused`.

A convolution is one kernel that lays out the patches, one product, and one kernel that adds the bias. Back: two
products, and one kernel in which each pixel adds up what the patches that show it have for it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from minidp.autograd.conv import Conv2d
from minidp.autograd.images import Pair, Windows, chwn, nchw, windows
from minidp.autograd.pooling import AvgPool2d, MaxPool2d, floating
from minidp.backend import Array, Kernels, matmul
from minidp.backend.kernels import MOST_BLOCKS, THREADS, Launcher
from minidp.nn import fused_batch_norm
from minidp.nn.fused import Fused, contiguous
from minidp.nn.fused_batch_norm import Lying, channel_sums

KERNELS = Kernels(
    Path(__file__).with_suffix(".cu"),
    *("patches", "pixels", "put_with_bias"),
    *("max_pool", "max_pool_backward", "max_pool_wide", "max_pool_wide_backward", "avg_pool", "avg_pool_backward"),
)

# Bytes of patches at once. A GPU is busy with far fewer; what is left of its memory belongs to the model.
PIECE_BYTES = 2**27
# Patches up to this size are kept for backward, instead of being made again: a pass saved for some memory.
KEPT_BYTES = 2**26
AT_ONCE = 4  # channels of a thread


def per_channel(kernels: Launcher, name: str, elements: int, channels: int, *args: Any) -> None:
    """Run a kernel whose threads take elements of a channel; as many channels apart as keep a GPU busy."""
    across = min(-(-elements // THREADS), MOST_BLOCKS)
    fours = -(-channels // AT_ONCE)
    kernels.blocks(name, (across, min(fours, -(-MOST_BLOCKS // across))), THREADS, *args)


def numbers(over: Windows, channels: int, n: int) -> tuple[int, ...]:
    """What kernels are told of windows: ``WINDOWS`` of the .cu file."""
    return (channels, *over.size, n, *over.kernel, *over.stride, *over.padding, *over.out)


class FusedConv2d(Fused, Conv2d):
    """No padded images; patches are one matrix (channels · rows · columns, places · n), or pieces of it."""

    library = KERNELS

    def suits(self, x: Array, weight: Array, bias: Array | None = None, **options: Any) -> Any:
        fits = x.ndim == weight.ndim == 4 and x.shape[1] == weight.shape[1] and x.size and weight.size
        return weight.dtype if fits and (bias is None or bias.shape == weight.shape[:1]) else None

    def launch(
        self, x: Array, weight: Array, bias: Array | None = None, stride: Pair = 1, padding: Pair = 0
    ) -> Array:
        assert self.kernels is not None
        xp, dtype, outputs = self.xp, weight.dtype, len(weight)
        over = windows("conv2d", x, weight.shape[2:], stride, padding)
        image = contiguous(chwn(x), dtype, xp)
        w = contiguous(weight, dtype, xp).reshape(outputs, -1)
        y = xp.empty((outputs, *over.out, image.shape[3]), dtype=dtype)
        matrix = y.reshape(outputs, -1)
        size, row = matrix.shape[1], matrix.shape[1] // over.out[0]
        cut = pieces(over, row * w.shape[1] * dtype.itemsize)
        for first, stop in cut:
            patches = self.patches(over, image, first, stop)
            at, count = first * row, (stop - first) * row
            part = matmul(w, patches, out=matrix if count == size else None)
            if bias is not None:
                args = count, size, at, outputs, part, contiguous(bias, dtype, xp), y
                per_channel(self.kernels, "put_with_bias", count, outputs, *args)
            elif count < size:
                matrix[:, at : at + count] = part
        kept = patches if self.needs[1] and len(cut) == 1 and patches.nbytes <= KEPT_BYTES else None
        self.saved = over, image.shape, image if self.needs[1] and kept is None else None, kept, w, cut
        return nchw(y)

    def launch_backward(self, grad: Array) -> Any:
        """∂W = ∂y · patchesᵀ, straight into its slot; ∂patches = Wᵀ · ∂y, over the patches that were used."""
        over, shape, image, kept, w, cut = self.saved
        xp, needs, dtype = self.xp, self.needs, w.dtype
        matrix = contiguous(chwn(grad), dtype, xp).reshape(len(w), -1)
        row = matrix.shape[1] // over.out[0]
        grad_w = self.room(1, dtype) if needs[1] else None
        grad_x = (xp.empty if len(cut) == 1 else xp.zeros)(shape, dtype=dtype) if needs[0] else None
        for first, stop in cut:
            columns = contiguous(matrix[:, first * row : stop * row], dtype, xp)
            patches = kept
            if grad_w is not None:
                if patches is None:
                    patches = self.patches(over, image, first, stop)
                if first == 0:
                    matmul(columns, patches.T, out=grad_w.reshape(w.shape), gradient=0)
                else:
                    grad_w += matmul(columns, patches.T, gradient=0).reshape(grad_w.shape)
            if grad_x is not None and pointwise(over):
                matmul(w.T, columns, out=grad_x.reshape(w.shape[1], -1), gradient=1)
            elif grad_x is not None:
                if patches is None:
                    patches = xp.empty((w.shape[1], columns.shape[1]), dtype=dtype)
                matmul(w.T, columns, out=patches, gradient=1)
                self.add_up(over, patches, grad_x, first, stop, more=len(cut) > 1)
        grads = [None if grad_x is None else nchw(grad_x), grad_w]
        if len(needs) == 3:
            grads.append(self.grad_bias(matrix) if needs[2] else None)
        return tuple(grads)

    def patches(self, over: Windows, image: Array, first: int, stop: int) -> Array:
        """Those of rows first … stop − 1 of places, as a matrix; the image itself if they are that."""
        assert self.kernels is not None
        channels, *_, n = image.shape
        if pointwise(over):
            return image.reshape(channels, -1)
        count = (stop - first) * over.out[1] * n
        out = self.xp.empty((channels * math.prod(over.kernel), count), dtype=image.dtype)
        args = first, count, *numbers(over, channels, n), image, out
        per_channel(self.kernels, "patches", count, channels, *args)
        return out

    def add_up(self, over: Windows, patches: Array, grad_x: Array, first: int, stop: int, more: bool) -> None:
        """Write into pixels, or add if there is `more`, what patches of rows first … stop − 1 have for them."""
        assert self.kernels is not None
        channels, height, width, n = grad_x.shape
        top, bottom = 0, height
        if more:  # only rows that they can show
            top = max(0, first * over.stride[0] - over.padding[0])
            bottom = min(height, (stop - 1) * over.stride[0] + over.kernel[0] - over.padding[0])
        count = (bottom - top) * width * n
        if count > 0:
            args = first, stop, top, count, int(more), *numbers(over, channels, n), patches, grad_x
            per_channel(self.kernels, "pixels", count, channels, *args)

    def grad_bias(self, matrix: Array) -> Array:
        kernels = fused_batch_norm.KERNELS.on(self.xp, matrix.dtype)
        assert kernels is not None
        out = self.room(2, matrix.dtype)
        channel_sums(kernels, "channel_sum", Lying(1, *matrix.shape), (matrix,), (out,), self.xp)
        return out


def pointwise(over: Windows) -> bool:
    """Whether each window is one pixel, and each pixel a window."""
    return over.kernel == over.stride == (1, 1) and over.padding == (0, 0)


def pieces(over: Windows, row_bytes: int) -> list[tuple[int, int]]:
    """Cut the rows of places into (first, stop) whose patches fit `PIECE_BYTES`, of a row at the least."""
    rows = over.out[0]
    count = 1 if pointwise(over) else -(-rows // max(1, PIECE_BYTES // row_bytes))
    return [(i * rows // count, (i + 1) * rows // count) for i in range(count)]


class FusedPool2d(Fused):
    """What both kinds share."""

    library = KERNELS

    def suits(self, x: Array, **options: Any) -> Any:
        if x.ndim != 4 or not x.size:
            return None
        return x.dtype if x.dtype.kind == "f" else np.dtype("float32")  # as `floating` says

    def to_windows(self, kernel: str, over: Windows, x: Array, *more: Any) -> Array:
        """Run a kernel that makes a number of each window."""
        assert self.kernels is not None
        image = contiguous(chwn(x), x.dtype, self.xp)
        channels, *_, n = image.shape
        y = self.xp.empty((channels, *over.out, n), dtype=x.dtype)
        args = *numbers(over, channels, n), image, y, *more
        per_channel(self.kernels, kernel, y.size // channels, channels, *args)
        return nchw(y)

    def to_pixels(self, kernel: str, over: Windows, dtype: Any, grad: Array, *more: Any) -> Array:
        """Run a kernel in which each pixel adds up what is its own of the gradients of windows."""
        assert self.kernels is not None
        grad = contiguous(chwn(grad), dtype, self.xp)
        channels, *_, n = grad.shape
        out = self.xp.empty((channels, *over.size, n), dtype=dtype)
        args = *numbers(over, channels, n), grad, *more, out
        per_channel(self.kernels, kernel, out.size // channels, channels, *args)
        return nchw(out)


class FusedMaxPool2d(FusedPool2d, MaxPool2d):
    def launch(self, x: Array, kernel_size: Pair, stride: Pair, padding: Pair) -> Array:
        x, record = floating(x), self.needs[0]
        over = windows("max_pool2d", x, kernel_size, stride, padding)
        wide = "" if math.prod(over.kernel) <= 256 else "_wide"
        shape = (x.shape[1], *over.out, x.shape[0]) if record else (0,)
        winner = self.xp.empty(shape, dtype="int32" if wide else "uint8")
        self.saved = f"max_pool{wide}_backward", over, x.dtype, winner
        return self.to_windows(f"max_pool{wide}", over, x, winner, int(record))

    def launch_backward(self, grad: Array) -> Any:
        kernel, over, dtype, winner = self.saved
        return self.to_pixels(kernel, over, dtype, grad, winner)


class FusedAvgPool2d(FusedPool2d, AvgPool2d):
    def launch(self, x: Array, kernel_size: Pair, stride: Pair, padding: Pair) -> Array:
        x = floating(x)
        over = windows("avg_pool2d", x, kernel_size, stride, padding)
        self.saved = over, x.dtype
        return self.to_windows("avg_pool", over, x)

    def launch_backward(self, grad: Array) -> Any:
        return self.to_pixels("avg_pool_backward", *self.saved, grad)


Conv2d.fused, MaxPool2d.fused, AvgPool2d.fused = FusedConv2d, FusedMaxPool2d, FusedAvgPool2d
