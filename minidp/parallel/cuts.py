"""How a parameter is cut over the ranks of a tensor-parallel group, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minidp.backend import Array, array_module
from minidp.data.sharding import cut
from minidp.nn import Parameter


@dataclass(frozen=True)
class Cut:
    """One part of a parameter of shape ``whole``: part ``index`` of ``count`` along ``axis``.

    With ``blocks`` > 1 the axis holds that many matrices, one below the other, each cut by itself: queries, keys
    and values. Parts differ in length by at most one a block (`data.sharding.cut`).
    """

    whole: tuple[int, ...]
    axis: int
    index: int
    count: int
    blocks: int = 1

    def bounds(self, index: int | None = None) -> list[tuple[int, int]]:
        """(lo, hi) along the axis, one a block, of this part or of another."""
        size = self.whole[self.axis] // self.blocks
        lo, hi = cut(size, self.count)[self.index if index is None else index]
        return [(block * size + lo, block * size + hi) for block in range(self.blocks)]

    def shape(self, index: int | None = None) -> tuple[int, ...]:
        """Of this part, or of another."""
        length = sum(hi - lo for lo, hi in self.bounds(index))
        return (*self.whole[: self.axis], length, *self.whole[self.axis + 1 :])

    def part(self, whole: Array) -> Array:
        """This part of the whole, a copy of its own."""
        pieces = [whole[self._at(lo, hi)] for lo, hi in self.bounds()]
        part: Array = array_module(whole).concatenate(pieces, axis=self.axis)
        return part

    def join(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """The whole, of all parts in order."""
        whole = np.empty(self.whole, parts[0].dtype)
        for index, part in enumerate(parts):
            at = 0
            for lo, hi in self.bounds(index):
                whole[self._at(lo, hi)] = part[self._at(at, at + hi - lo)]
                at += hi - lo
        return whole

    def apply(self, parameter: Parameter) -> None:
        """Let a parameter hold its part only; one that is tied may have been cut already, in the same way."""
        if parameter.shape == self.whole:
            parameter.data = self.part(parameter.data)
            parameter.grad = None
        elif parameter.shape != self.shape():
            raise ValueError(
                f"a parameter of shape {self.whole} has been cut to {parameter.shape}, and another layer that it "
                f"is tied to would cut it to {self.shape()}: untie them, or take tp=1"
            )

    def _at(self, lo: int, hi: int) -> tuple[slice, ...]:
        return (*[slice(None)] * self.axis, slice(lo, hi))
