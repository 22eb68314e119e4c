"""What the contestants do: the same job for each, as NumPy arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from minidp import nn

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
class Exchange:
    """Push a gradient of ``nbytes`` bytes of float32 to a parameter server, which moves w by SGD, and pull w."""

    nbytes: int

    @property
    def name(self) -> str:
        return f"push + pull, {human_bytes(self.nbytes)}"

    def gradient(self) -> Array:
        return np.random.default_rng(0).random(self.nbytes // 4, dtype=np.float32) - np.float32(0.5)


class Training(ABC):
    """A step of SGD on a model: forward, cross-entropy, backward, update; float32. ``batch`` samples a worker."""

    batch: int

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the model, and its batch."""

    @abstractmethod
    def state(self) -> dict[str, Array]:
        """The initial weights, the same for every contestant: names and shapes as in PyTorch."""

    @abstractmethod
    def batch_of(self, rank: int) -> tuple[Array, Array]:
        """The fixed batch of a rank: inputs, and int64 targets."""


@dataclass(frozen=True)
class MLP(Training):
    """Layers with ReLUs between them.

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
        rng = np.random.default_rng(0)
        state: dict[str, Array] = {}
        for k, (inputs, outputs) in enumerate(pairwise(self.widths)):
            bound = inputs**-0.5
            state[f"{2 * k}.weight"] = rng.uniform(-bound, bound, (outputs, inputs)).astype(np.float32)
            state[f"{2 * k}.bias"] = rng.uniform(-bound, bound, outputs).astype(np.float32)
        return state

    def batch_of(self, rank: int) -> tuple[Array, Array]:
        rng = np.random.default_rng(1 + rank)
        x = rng.random((self.batch, self.widths[0]), dtype=np.float32)
        return x, rng.integers(0, self.widths[-1], self.batch)


@dataclass(frozen=True)
class CNN(Training):
    """``nn.cnn``: 3×3 convolutions, ReLU, 2×2 maxima, and a linear layer, on square grey images.

    Args:
        channels: of the convolutions' results.
        side: pixels of an image's side.
        batch: images a worker.
    """

    channels: tuple[int, ...]
    side: int
    batch: int
    classes: ClassVar[int] = 10

    @property
    def name(self) -> str:
        return f"CNN {'-'.join(map(str, (1, *self.channels)))} on {self.side}×{self.side}, batch {self.batch}"

    def state(self) -> dict[str, Array]:
        return nn.cnn((1, self.side, self.side), self.channels, self.classes).state_dict()

    def batch_of(self, rank: int) -> tuple[Array, Array]:
        rng = np.random.default_rng(1 + rank)
        x = rng.random((self.batch, 1, self.side, self.side), dtype=np.float32)
        return x, rng.integers(0, self.classes, self.batch)


@dataclass(frozen=True)
class Transformer(Training):
    """``nn.GPT`` on characters.

    Args:
        vocab_size, context, embed_dim, num_heads, num_layers: see there.
        batch: sequences of ``context`` tokens a worker.
    """

    vocab_size: int
    context: int
    embed_dim: int
    num_heads: int
    num_layers: int
    batch: int

    @property
    def name(self) -> str:
        width = f"{self.num_layers} × d={self.embed_dim}, {self.num_heads} heads"
        return f"Transformer {width}, T={self.context}, batch {self.batch}"

    def model(self) -> nn.GPT:
        return nn.GPT(self.vocab_size, self.context, self.embed_dim, self.num_heads, self.num_layers)

    def state(self) -> dict[str, Array]:
        return self.model().state_dict()

    def batch_of(self, rank: int) -> tuple[Array, Array]:
        rng = np.random.default_rng(1 + rank)
        tokens = rng.integers(0, self.vocab_size, (self.batch, self.context + 1))
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


Job = AllReduce | Exchange | Training

LARGE, SMALL, TINY = (
    MLP((784, 512, 512, 10), 128),
    MLP((784, 512, 512, 10), 32),
    MLP((64, 128, 10), 32),
)
IMAGES = CNN((16, 32), 28, 64)
TEXT = Transformer(65, 64, 128, 4, 2, 16)
MLPS = (LARGE, SMALL, TINY)
MODELS = (*MLPS, IMAGES, TEXT)


def human_bytes(nbytes: int) -> str:
    """``4 KB``, ``16 MB``: powers of 1024."""
    for unit, size in (("MB", 2**20), ("KB", 2**10)):
        if nbytes >= size:
            return f"{nbytes / size:.4g} {unit}"
    return f"{nbytes} B"
