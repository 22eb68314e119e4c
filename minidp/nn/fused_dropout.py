"""Dropout on a GPU: the masks that the host would draw, drawn there; see `fused`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minidp.backend import Array, Kernels, generator
from minidp.nn.activations import Dropout
from minidp.nn.fused import Fused, contiguous

KERNELS = Kernels(Path(__file__).with_suffix(".cu"), "dropout")

THREADS = 256
PAIRS = 16  # of draws, of a thread at the least: finding its place in the stream costs it as much as about 50
MOST_BLOCKS = 4 * 132


class FusedDropout(Fused, Dropout):
    """Only the generator's state goes to the device, 32 bytes as arguments of the kernel, and no mask is kept."""

    library = KERNELS

    def launch(self, x: Array, p: float, seed: int, key: tuple[int | str, ...]) -> Array:
        state = generator(seed, *key).bit_generator.state["state"]
        words = (signed(state[name] >> shift) for name in ("state", "inc") for shift in (64, 0))
        self.saved = float(p), 0.0 if p == 1 else 1 / (1 - p), *words
        return self.masked(x)

    def launch_backward(self, grad: Array) -> Any:
        return self.masked(grad)

    def masked(self, x: Array) -> Array:
        assert self.kernels is not None
        x = contiguous(x, x.dtype, self.xp)
        out = self.xp.empty(x.shape, dtype=x.dtype)
        blocks = min(MOST_BLOCKS, -(-x.size // (2 * PAIRS * THREADS)))
        self.kernels.blocks("dropout", blocks, THREADS, x.size, x, out, *self.saved)
        return out


def signed(word: int) -> int:
    """The low 64 bits of `word`, as the integer that a kernel's argument can be."""
    word &= 2**64 - 1
    return word - 2**64 if word >= 2**63 else word


Dropout.fused = FusedDropout
