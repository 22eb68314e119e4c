"""The linear layer on a GPU, and sums over rows that have the same bits in every run; see `fused`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minidp.autograd.function import rows
from minidp.backend import Array, Kernels, matmul
from minidp.nn.activations import Linear
from minidp.nn.fused import contiguous

KERNELS = Kernels(Path(__file__).with_suffix(".cu"), "add_bias", "column_sum", "column_sums")

WARP, THREADS = 32, 256
ROWS = 64  # of a piece, at the least: eight of each warp
BLOCKS = 512  # as many as keep a large GPU's 132 processors busy, about four each


def cut(n: int, columns: int) -> tuple[int, int]:
    """The grid for n rows: (blocks side by side, pieces of the rows); by the shape alone, and so the bits are."""
    across = -(-columns // WARP)
    return across, max(1, min(n // ROWS, BLOCKS // max(1, across)))


def column_sum(x: Array, out: Array, xp: Any) -> Array:
    """out = Σ of the rows of x (n, c), both contiguous and of one type that has kernels; returns `out`, (c,)."""
    kernels = KERNELS.on(xp, x.dtype)
    assert kernels is not None
    n, columns = x.shape
    across, pieces = cut(n, columns)
    if pieces > 1:
        parts = xp.empty((pieces, columns), dtype=x.dtype)
        kernels.blocks("column_sum", (across, pieces), THREADS, n, columns, x, parts)
        n, x = pieces, parts
    kernels.blocks("column_sum", (across, 1), THREADS, n, columns, x, out)
    return out


def column_sums(x: Array, y: Array, products: Array, out: Array, xp: Any) -> None:
    """products = Σ of the rows of x·y, out = Σ of those of x, likewise; each array is read once."""
    kernels = KERNELS.on(xp, x.dtype)
    assert kernels is not None
    n, columns = x.shape
    across, pieces = cut(n, columns)
    if pieces == 1:
        kernels.blocks("column_sums", (across, 1), THREADS, n, columns, x, y, products, out)
        return
    parts = [xp.empty((pieces, columns), dtype=x.dtype) for _ in range(2)]
    kernels.blocks("column_sums", (across, pieces), THREADS, n, columns, x, y, *parts)
    for part, total in zip(parts, (products, out)):
        kernels.blocks("column_sum", (across, 1), THREADS, pieces, columns, part, total)


class FusedLinear(Linear):
    """Products are the array library's. The order of packing that `Linear` chooses for BLAS is no matter here."""

    def product(self, x: Array, weight: Array, bias: Array | None) -> Array:
        kernels = KERNELS.on(self.xp, weight.dtype)
        if kernels is None or bias is None or bias.shape != weight.shape[:1]:
            return super().product(x, weight, bias)
        y = self.xp.empty((len(x), len(weight)), dtype=weight.dtype)
        matmul(x, weight.T, out=y)
        kernels.each("add_bias", y.size, y, contiguous(bias, y.dtype, self.xp), len(weight))
        return y

    def sum_of_rows(self, grad: Array, out: Array | None) -> Array:
        if KERNELS.on(self.xp, grad.dtype) is None or (out is not None and out.dtype != grad.dtype):
            return super().sum_of_rows(grad, out)
        if out is None:
            out = self.xp.empty(grad.shape[1:], dtype=grad.dtype)
        return column_sum(contiguous(rows(grad), grad.dtype, self.xp), out, self.xp)


Linear.fused = FusedLinear
