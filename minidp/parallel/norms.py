"""Norms of the whole gradient that do not depend on how it is cut over ranks.

Squares are summed in pieces of at most 1024 elements, fixed by the layout; the pieces' sums are then added in
layout order. Every N gives the same bits, because every sum has the same terms in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
