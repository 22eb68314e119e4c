"""Convolution: patches side by side as a matrix, times the weights as a matrix ("im2col"), piece by piece.

The matrix of all patches is kernel² times the image. It is never whole: a piece that fits the cache is copied,
multiplied, and overwritten by the next. Backward copies again, which is cheaper than keeping it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from minidp.autograd.function import Function, nbytes_of
from minidp.autograd.images import Pair, Windows, chwn, nchw, windows
from minidp.backend import Array, matmul

# Bytes of patches in a piece. A second-level cache holds it with what it is multiplied with: of 64 KB … 8 MB,
# 512 KB was best for 16 → 32 channels forward and backward (Zen 4, 1 MB).
PIECE_BYTES = 2**19
# OpenBLAS multiplies small matrices (m·n·k below this) without packing them first, 2.5 times as fast where the
# sums are as short as those of one channel.
UNPACKED = 1_000_000
SHORT_SUM = 64


class Conv2d(Function):
    """y[n, o] = b[o] + Σ_{c,i,j} W[o, c, i, j] · x[n, c, · + i, · + j]: what neural networks call convolution.

    x (n, c, h, w), W (o, c, kernel, kernel), b (o,) or none → (n, o, h', w'). Dumoulin & Visin 2016 have pictures.
    """

    fresh = True
    moves = True

    def forward(
        self, x: Array, weight: Array, bias: Array | None = None, stride: Pair = 1, padding: Pair = 0
    ) -> Array:
        if weight.ndim != 4 or (x.ndim == 4 and x.shape[1] != weight.shape[1]):
            raise ValueError(
                f"conv2d: images of shape {x.shape} (n, channels, height, width) for a weight of shape "
                f"{weight.shape} (out, channels, rows, columns)"
            )
        if 0 in weight.shape:
            raise ValueError(f"conv2d: a weight of shape {weight.shape} has no elements")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(
                f"conv2d: a bias of shape {bias.shape} for a weight of shape {weight.shape}: give (out,)"
            )
        xp = self.xp
        over = windows("conv2d", x, weight.shape[2:], stride, padding)
        image = over.pad(chwn(x), xp, dtype=weight.dtype)
        self.saved = over, image, weight
        w = weight.reshape(len(weight), -1)
        if bias is not None:
            # The weight of a pixel that always is 1: so the product adds it, and sums its gradient.
            w, kernel = xp.empty((len(w), w.shape[1] + 1), dtype=w.dtype), w
            w[:, :-1], w[:, -1] = kernel, bias
        y = xp.empty((len(weight), *over.out, x.shape[0]), dtype=weight.dtype)
        for columns, patches, _, _ in self.pieces(over, image, w.shape[1], y):
            matmul(w, patches, out=columns)
        return nchw(y)

    def backward(self, grad: Array) -> Any:
        """∂W = ∂y · patchesᵀ; ∂patches = Wᵀ · ∂y, each added where its pixel came from."""
        over, image, weight = self.saved
        xp, needs = self.xp, self.needs
        grad = xp.ascontiguousarray(chwn(grad))
        w = weight.reshape(len(weight), -1)
        transposed = xp.ascontiguousarray(w.T)
        pixels, with_bias = len(transposed), len(needs) == 3
        grad_image = xp.zeros(image.shape, dtype=image.dtype) if needs[0] else None
        grad_w = xp.zeros((pixels + with_bias, len(w)), dtype=w.dtype)  # this way round it is faster by a third
        for columns, patches, images, tile in self.pieces(over, image, len(grad_w), grad):
            grad_w += matmul(patches, columns.T, gradient=1)
            if grad_image is not None:
                matmul(transposed, columns, out=patches[:pixels], gradient=1)  # the patches have been used
                self.add_back(over, grad_image, images, tile)
        grads = [
            None if grad_image is None else nchw(over.crop(grad_image)),
            self.stored(1, grad_w[:pixels].T.reshape(weight.shape)) if needs[1] else None,
        ]
        if with_bias:
            grads.append(self.stored(2, grad_w[-1]) if needs[2] else None)
        return tuple(grads)

    def pieces(
        self, over: Windows, image: Array, size: int, y: Array
    ) -> Iterator[tuple[Array, Array, Array, tuple[int, ...]]]:
        """In turn: columns of `y` as a matrix, the patches that belong to them as a matrix, as images, and where.

        A patch has `size` rows: with a bias one of ones. Where: top, bottom, left, right.
        """
        rows, columns = over.out
        n = image.shape[3]
        most = PIECE_BYTES // image.dtype.itemsize // size
        if size <= SHORT_SUM:
            most = min(most, UNPACKED // (size * len(y)))
        whole, matrix = over.patches(image, self.xp), y.reshape(len(y), -1)
        pixels = math.prod(whole.shape[:3])
        for top, bottom, left, right in tiles(rows, columns, max(1, most // max(n, 1))):
            first, count = (top * columns + left) * n, (bottom - top) * (right - left) * n
            patches = self.xp.empty((size, count), dtype=image.dtype)
            patches[pixels:] = 1
            images = patches[:pixels].reshape(*whole.shape[:3], bottom - top, right - left, n)
            images[...] = whole[:, :, :, top:bottom, left:right]
            yield matrix[:, first : first + count], patches, images, (top, bottom, left, right)

    def add_back(self, over: Windows, grad_image: Array, images: Array, tile: tuple[int, ...]) -> None:
        """Add the gradients of patches to the pixels that they show."""
        top, bottom, left, right = tile
        (down, along), (rows, columns) = over.stride, over.kernel
        for i in range(rows):
            for j in range(columns):
                pixels = grad_image[
                    :,
                    top * down + i : (bottom - 1) * down + i + 1 : down,
                    left * along + j : (right - 1) * along + j + 1 : along,
                ]
                pixels += images[:, i, j]

    def stored(self, k: int, grad: Array) -> Array:
        """A gradient where it belongs: in the slot of parameter `k`, if there is one to be written."""
        slot = self.grad_out(k)
        if slot is None:
            return grad.copy()
        slot[...] = grad
        return slot

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        product = 2.0 * out.size * math.prod(inputs[1].shape[1:])
        bias = float(out.size) * (len(inputs) == 3)
        return product + bias, product * sum(self.needs[:2]) + bias * sum(self.needs[2:])

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        image, y = nbytes_of(inputs[0]), out.nbytes
        patches = math.prod(inputs[1].shape[1:]) * (y // max(1, inputs[1].shape[0]))
        weight = nbytes_of(inputs[1])
        forward = 2 * image + 2 * patches + y + weight  # padded; patches written and read
        backward = image + 2 * patches + y + weight
        if self.needs[0]:
            backward += image + 4 * patches  # written, read, and added to pixels that are read and written
        return forward, backward


def tiles(rows: int, columns: int, most: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a grid into (top, bottom, left, right) of at most `most` places: whole rows, or parts of one.

    The parts follow each other in memory, and are of nearly equal size.
    """
    down = -(-rows // max(1, most // columns))
    across = -(-columns // min(most, columns))
    for i in range(down):
        for j in range(across):
            yield i * rows // down, (i + 1) * rows // down, j * columns // across, (j + 1) * columns // across
