"""What the contestants do: the same job for each, made from NumPy arrays alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LEARNING_RATE = 0.01


@dataclass(frozen=True)
class AllReduce:
    """Sum ``nbytes`` bytes of float32 over the ranks, in place. The array is all zeros: sums stay finite."""

    nbytes: int

    @property
    def name(self) -> str:
        return human_bytes(self.nbytes)


@dataclass(frozen=True)
class Training:
    """One step of SGD on an MLP with ReLUs: forward, cross-entropy, backward, update; float32.

    Args:
        widths: of the layers, inputs first, classes last.
        batch: rows a worker.
    """

    widths: tuple[int, ...]
    batch: int

    @property
    def name(self) -> str:
        return f"MLP {'-'.join(map(str, self.widths))}, batch {self.batch}"

    def state(self) -> dict[str, Array]:
        """The initial weights, the same for every contestant: names and shapes (out, in) as in PyTorch."""
        rng = np.random.default_rng(0)
        state: dict[str, Array] = {}
        for k, (inputs, outputs) in enumerate(zip(self.widths, self.widths[1:])):
            bound = inputs**-0.5
            state[f"{2 * k}.weight"] = rng.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
            state[f"{2 * k}.bias"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
        return state

    def batch_of(self, rank: int) -> tuple[Array, Array]:
        """The fixed batch of a rank: x (batch, widths[0]) float32 in [0, 1), y (batch,) int64."""
        rng = np.random.default_rng(1 + rank)
        x = rng.random((self.batch, self.widths[0]), dtype=np.float32)
        return x, rng.integers(0, self.widths[-1], self.batch)


Job = AllReduce | Training

LARGE, SMALL, TINY = (
    Training((784, 512, 512, 10), 128),
    Training((784, 512, 512, 10), 32),
    Training((64, 128, 10), 32),
)
MODELS = (LARGE, SMALL, TINY)


def human_bytes(nbytes: int) -> str:
    """``4 KB``, ``16 MB``: powers of 1024."""
    for unit, size in (("MB", 2**20), ("KB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:g} {unit}"
    return f"{nbytes} B"
