"""Norms of the whole gradient that do not depend on how it is cut over ranks.

Squares are summed in pieces of at most 1024 elements, fixed by the layout; the pieces' sums are then added in
layout order. Every N gives the same bits, because every sum has the same terms in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from minidp.backend import sums

Flat = npt.NDArray[Any]


def add_squares(squares: Flat, pieces: Sequence[tuple[int, int]], flat: Flat, lo: int, hi: int) -> None:
    """Store Σ g² of each piece between ``lo`` and ``hi`` of the flat gradient; float64, shape (pieces,)."""
    inside = [(i, start) for i, (start, _) in enumerate(pieces) if lo <= start < hi]
    if inside:
        starts = [start - lo for _, start in inside]
        squares[[i for i, _ in inside]] = np.add.reduceat(np.square(flat[lo:hi], dtype=np.float64), starts)


def clip_scale(squares: Flat, clip_norm: float) -> float:
    """min(1, clip_norm / ‖∇L‖), as in PyTorch's clip_grad_norm_ with its 1e-6 in the denominator."""
    norm = float(np.sqrt(squares.sum()))
    return min(1.0, clip_norm / (norm + 1e-6))


class Norm:
    """Both, for arrays of the host.

    Args:
        pieces: of the whole layout.
        slices: those elements that this rank adds up the squares of.
    """

    def __init__(self, pieces: Sequence[tuple[int, int]], slices: Sequence[tuple[int, int]]) -> None:
        self._pieces, self._slices = pieces, slices

    def squares(self, flat: Flat) -> Flat:
        """Σ g² of my pieces of the flat gradient, 0 for others; float64, shape (pieces,)."""
        squares = np.zeros(len(self._pieces))
        for lo, hi in self._slices:
            add_squares(squares, self._pieces, flat, lo, hi)
        return squares

    def clip_scale(self, squares: Flat, clip_norm: float, dtype: np.dtype[Any]) -> Any:
        """By which the gradient, of that dtype, is to be multiplied."""
        return clip_scale(squares, clip_norm)


class DeviceNorm(Norm):
    """The same on a device, without waiting for it."""

    def __init__(self, pieces: Sequence[tuple[int, int]], slices: Sequence[tuple[int, int]], xp: Any) -> None:
        mine = [i for i, (start, _) in enumerate(pieces) if any(lo <= start < hi for lo, hi in slices)]
        starts, stops = np.array(pieces, np.int64).reshape(-1, 2).T.copy()
        self._xp, self._count = xp, len(pieces)
        self._places, self._all_starts = xp.asarray(np.array(mine, np.int64)), xp.asarray(starts)
        self._starts, self._stops = xp.asarray(starts[mine]), xp.asarray(stops[mine])

    def squares(self, flat: Flat) -> Flat:
        squares: Flat = self._xp.zeros(self._count, np.float64)
        if not sums.of_squares(flat, self._starts, self._stops, self._places, squares):
            everybody = self._xp.add.reduceat(self._xp.square(flat, dtype=np.float64), self._all_starts)
            squares[self._places] = everybody[self._places]
        return squares

    def clip_scale(self, squares: Flat, clip_norm: float, dtype: np.dtype[Any]) -> Any:
        """An array of 0 dimensions."""
        norm = self._xp.sqrt(squares.sum())
        # Of NaN it is 1, as on the host: a step that is taken back must leave no NaN in the padding, which nobody
        # writes again.
        scale: Flat = self._xp.fmin(clip_norm / (norm + 1e-6), 1.0).astype(dtype)
        return scale


def norm_on(xp: Any, pieces: Sequence[tuple[int, int]], slices: Sequence[tuple[int, int]]) -> Norm:
    """Of arrays of that module."""
    return Norm(pieces, slices) if xp is np else DeviceNorm(pieces, slices, xp)
