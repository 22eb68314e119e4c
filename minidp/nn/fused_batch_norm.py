"""Batch normalisation on a GPU, and sums over all but the channels, in whatever order arrays lie; see `fused`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minidp.backend import Array, Kernels, asarray
from minidp.backend.kernels import Launcher
from minidp.nn.fused import Fused, axes_in_memory, contiguous, turned, turned_back
from minidp.nn.normalization import BatchNorm, Moments, Pool

KERNELS = Kernels(
    Path(__file__).with_suffix(".cu"),
    *("channel_sum", "channel_squares", "normalize", "channel_slopes", "normalize_backward", "rescale"),
)
THREADS = 256
EACH = 8  # elements of a thread, at the least
BLOCKS = 1024  # as many as keep a large GPU's 132 processors busy: each runs eight at once


class Lying(NamedTuple):
    """How an array lies in memory: its channels, as many things as stand before them, as many as stand after."""

    outer: int
    channels: int
    inner: int

    @property
    def wide(self) -> int:
        """How many channels a block takes side by side."""
        return 1 if self.inner >= 32 else min(32, 1 << (self.channels - 1).bit_length())

    @property
    def grid(self) -> tuple[int, int]:
        """(blocks side by side, pieces of each channel); by the shape alone, and so the bits of sums are."""
        across = -(-self.channels // self.wide)
        least = EACH * THREADS // self.wide
        return across, max(1, min(self.outer * self.inner // least, BLOCKS // across))


def channel_sums(
    kernels: Launcher, name: str, lying: Lying, args: Sequence[Any], outs: Sequence[Array], xp: Any, count: int = 1
) -> None:
    """outs = the sums that a kernel makes of each channel, over `count`; shapes (c,).

    If there are pieces, their sums are added up by a second round.
    """
    (across, pieces), wide = lying.grid, lying.wide
    if pieces == 1:
        kernels.blocks(name, (across, 1), THREADS, *lying, wide, float(count), *args, *outs)
        return
    parts = [xp.empty((pieces, lying.channels), dtype=out.dtype) for out in outs]
    kernels.blocks(name, (across, pieces), THREADS, *lying, wide, 1.0, *args, *parts)
    rows = Lying(pieces, lying.channels, 1)
    grid = rows.grid[0], 1
    for part, out in zip(parts, outs):
        kernels.blocks("channel_sum", grid, THREADS, *rows, rows.wide, float(count), part, out)


class FusedBatchNorm(Fused, BatchNorm):
    """Three passes over x in training, one in evaluation; two passes back. x̂ is not kept, but made again of x."""

    library = KERNELS

    def suits(
        self, x: Array, weight: Array, bias: Array, *, moments: tuple[Array, Array] | None = None, **options: Any
    ) -> Any:
        shapes = [array.shape for array in (weight, bias, *(moments or ()))]
        fits = x.size and all(shape == x.shape[1:2] for shape in shapes)
        return weight.dtype if fits else None

    def launch(
        self,
        x: Array,
        weight: Array,
        bias: Array,
        eps: float = 1e-5,
        moments: tuple[Array, Array] | None = None,
        pool: Pool | None = None,
        record: Callable[[Moments, Moments], None] | None = None,
    ) -> Array:
        assert self.kernels is not None
        xp, dtype, eps = self.xp, weight.dtype, float(eps)
        axes = axes_in_memory(x)
        x = contiguous(turned(x, axes), dtype, xp)
        place = 1 if axes is None else axes.index(1)
        lying = Lying(math.prod(x.shape[:place]), x.shape[place], math.prod(x.shape[place + 1 :]))
        if moments is None:
            count = lying.outer * lying.inner
            mean, var = (xp.empty(lying.channels, dtype=dtype) for _ in range(2))
            channel_sums(self.kernels, "channel_sum", lying, (x,), (mean,), xp, count)
            channel_sums(self.kernels, "channel_squares", lying, (x, mean), (var,), xp, count)
            own = count, mean, var
            if pool is not None:
                count, mean, var = pool.moments(count, mean, var)
            if record is not None:
                record(own, (count, mean, var))
        else:
            count, (mean, var) = 0, (asarray(moment, xp) for moment in moments)
            if True in self.needs:  # they are the layer's own, and may have changed when backward comes
                mean, var = mean.copy(), var.copy()
        mean, var, weight, bias = (contiguous(array, dtype, xp) for array in (mean, var, weight, bias))
        y = xp.empty(x.shape, dtype=dtype)
        self.walk("normalize", lying, x, mean, var, eps, weight, bias, y)
        self.saved = x, mean, var, eps, weight, count, pool, axes, lying
        return turned_back(y, axes)

    def launch_backward(self, grad: Array) -> Any:
        assert self.kernels is not None
        x, mean, var, eps, weight, count, pool, axes, lying = self.saved
        xp, needs, dtype = self.xp, self.needs, weight.dtype
        grad = contiguous(turned(grad, axes), dtype, xp)
        across, along = (
            self.room(k, dtype) if needs[k] else xp.empty(lying.channels, dtype=dtype) for k in (1, 2)
        )
        if needs[1] or needs[2] or count:
            args = grad, x, mean, var, eps
            channel_sums(self.kernels, "channel_slopes", lying, args, (along, across), xp)
        grad_x = None
        if needs[0]:
            out = xp.empty(x.shape, dtype=dtype)
            if count:
                sums = (along, across) if pool is None else pool.total(along, across)
                sums = tuple(contiguous(array, dtype, xp) for array in sums)
                self.walk("normalize_backward", lying, grad, x, mean, var, eps, weight, *sums, int(count), out)
            else:
                self.walk("rescale", lying, grad, mean, var, eps, weight, out)
            grad_x = turned_back(out, axes)
        return grad_x, across if needs[1] else None, along if needs[2] else None

    def walk(self, name: str, lying: Lying, *args: Any) -> None:
        assert self.kernels is not None
        self.kernels.blocks(name, lying.grid, THREADS, *lying, lying.wide, *args)


BatchNorm.fused = FusedBatchNorm
