"""Means and variances of batches, as rows that travel: (count, μ, σ²) of c channels is 1 + 2c numbers, float64."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from minidp.backend import Array, array_module, to_numpy

Rows = npt.NDArray[np.float64]


def as_row(count: int, mean: Array, var: Array) -> Rows:
    """One batch as a row (1 + 2c,) on the host. Waits for a device: one move."""
    return filled_row(count, to_numpy(joined(mean, var)))


def joined(mean: Array, var: Array) -> Array:
    """(μ, σ²), shape (2c,), where they lie."""
    return array_module(mean).concatenate([mean, var])


def filled_row(count: int, moments: np.ndarray) -> Rows:
    """A row of what `joined` has made, on the host."""
    return np.concatenate([[count], moments], dtype=np.float64)


def combine(rows: Rows) -> tuple[int, Rows, Rows]:
    """(B, μ, σ²) of k batches together, from their rows (k, 1 + 2c): int, (c,), (c,).

    μ = Σ b_i μ_i / B and σ² = Σ b_i (σ_i² + (μ_i − μ)²) / B, summed in order of i (Chan et al. 1983). Not
    E[x²] − μ², which cancels. Zeros if all batches are empty.
    """
    c = rows.shape[1] // 2
    counts, means, variances = rows[:, :1], rows[:, 1 : 1 + c], rows[:, 1 + c :]
    weights = counts / max(1, counts.sum())
    mean = (weights * means).sum(axis=0)
    var = (weights * (variances + (means - mean) ** 2)).sum(axis=0)
    return int(counts.sum()), mean, var
