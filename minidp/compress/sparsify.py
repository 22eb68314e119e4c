"""Pruning of gradients: only some numbers travel, and where they belong."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np

from minidp import backend
from minidp.backend import Array, array_module, to_numpy
from minidp.compress.bits import like, pack_positions, unpack_positions
from minidp.compress.compressor import Compressor, Payload, Route, in_words, narrowed

CHUNK = 2**17  # elements: what is in work fits the cache


def checked_density(density: Any) -> float:
    """TypeError, ValueError unless it is the part of the numbers that is kept."""
    try:
        number = float(density)
    except (TypeError, ValueError):
        raise TypeError(f"density={density!r}: give a number, the part that is kept") from None
    if not 0 < number <= 1:
        raise ValueError(f"density={density!r}: give the part that is kept, above 0, at most 1 (0.01 is 1 %)")
    return number


def kept(density: float, size: int) -> int:
    """k of so many elements: the density's part, rounded up, so at least one if there is any."""
    return min(size, max(1, math.ceil(density * size - 1e-9)))


class Sparse(Compressor):
    """What keeps k = ⌈density · d⌉ of d numbers: values, and a way to know where they belong."""

    def __init__(self, density: float, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(seed=seed, rank=rank)
        self.density = checked_density(density)

    @abstractmethod
    def _where(self, payload: Payload) -> Array:
        """Positions of the payload's values, ascending: int64, shape (k,)."""

    def _values(self, payload: Payload) -> Array:
        """What they stand for."""
        return payload.arrays[0]

    def _decode(self, payload: Payload) -> Array:
        flat = array_module(payload.arrays[0]).zeros(payload.size, payload.dtype)
        flat[self._where(payload)] = self._values(payload)
        return flat

    def add(self, total: Array, payload: Payload) -> Array:
        total.reshape(-1)[self._where(payload)] += self._values(payload)  # contiguous: this is a view
        return self._counted(total, payload)

    def subtract(self, array: Array, payload: Payload) -> Array:
        array.reshape(-1)[self._where(payload)] -= self._values(payload)
        return self._counted(array, payload)

    @staticmethod
    def _counted(array: Array, payload: Payload) -> Array:
        backend.count(float(payload.arrays[0].size), 3.0 * payload.nbytes)
        return array


class TopK(Sparse):
    """``"topk:DENSITY"``: the k = ⌈density · d⌉ numbers of the largest magnitude; of equal ones the first.

    What is kept is exact, the rest is 0: ‖x − C(x)‖² ≤ (1 − k/d) ‖x‖². Much is lost, so it wants ``+ef``.

    Wire: k numbers, and where they are in one byte each and one for every 255 elements (see `bits`). Each rank has
    other positions, so payloads can't be summed; they are gathered: what a rank sends grows with N. With
    ``"topk:DENSITY:owners"`` it does not: owners of parts keep k of the sum. Source: Aji and Heafield, "Sparse
    Communication for Distributed Gradient Descent", EMNLP 2017; for owners Li and Hoefler, "Near-Optimal Sparse
    Allreduce" (Ok-Topk), PPoPP 2022.
    """

    bytes_per_element = 20.0

    def __init__(self, density: float, owners: bool = False, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(density, seed=seed, rank=rank)
        self.route: Route = "owners" if owners else "gather"  # type: ignore[misc]

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        where = largest_positions(flat, kept(self.density, flat.size))
        return flat[where], pack_positions(where, flat.size)

    def _where(self, payload: Payload) -> Array:
        values, positions = payload.arrays
        return unpack_positions(positions, values.size, payload.size)

    @property
    def spec(self) -> str:
        return f"topk:{in_words(self.density)}" + ":owners" * (self.route == "owners")


def largest_positions(flat: Array, k: int) -> Array:
    """Where the k numbers of the largest magnitude are, ascending; of equal ones the first. int64.

    Equal to `largest_positions_simply`, without sorting: the k-th is looked for among the few that may be it.
    """
    xp, d = array_module(flat), flat.size
    if not 0 < k < d or flat.dtype.hasobject:
        return largest_positions_simply(flat, k)
    some = _likely(flat, k)
    magnitudes = xp.abs(flat if some is None else flat[some])
    kth = xp.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    keep = magnitudes > kth
    keep[xp.flatnonzero(magnitudes == kth)[: k - int(xp.count_nonzero(keep))]] = True
    return xp.flatnonzero(keep) if some is None else some[keep]


def _likely(flat: Array, k: int) -> Array | None:
    """Positions of at least k numbers, all that are as large as the smallest of them; None: all positions.

    A sample tells about how large they must be, and one pass finds the few that are.
    """
    xp, d = array_module(flat), flat.size
    if k > d // 16 or d < 4096:
        return None
    sample = xp.abs(flat[:: max(1, d // 16384)])
    # Lower than the k-th largest is likely to be: by four deviations of how many of the sample are larger.
    expected = k / d * sample.size
    rank = min(sample.size, math.ceil(expected + 4 * math.sqrt(expected) + 4))
    threshold = xp.partition(sample, sample.size - rank)[sample.size - rank]
    some = xp.concatenate(
        [xp.flatnonzero(xp.abs(flat[lo : lo + CHUNK]) >= threshold) + lo for lo in range(0, d, CHUNK)]
    )
    return some if some.size >= k else None  # else the sample was no picture of the whole


def largest_positions_simply(flat: Array, k: int) -> Array:
    """The same, in the words of the definition: sort by magnitude, the first of equal ones first; take k."""
    xp = array_module(flat)
    order = xp.argsort(-xp.abs(flat), kind="stable")
    return xp.sort(order[:k])


class RandomK(Sparse):
    """``"randomk:DENSITY"``: k = ⌈density · d⌉ numbers at random positions, times d/k: unbiased.

    All ranks choose the same ones in a call, by seed, key and call, so payloads are summed. With error feedback
    the factor d/k is left out. Wire: k numbers, and seed and call in 12 bytes, which tell receivers where they
    belong. Source: Stich et al., "Sparsified SGD with Memory", NeurIPS 2018.
    """

    route: ClassVar[Route] = "sum"
    bytes_per_element = 13.0

    def __init__(self, density: float, scaled: bool = True, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(density, seed=seed, rank=rank)
        self.scaled = scaled
        self._last: tuple[tuple[int, str, int, int], np.ndarray] | None = None  # drawn once, asked for thrice

    def _positions(self, seed: int, key: str, call: int, size: int) -> np.ndarray:
        if self._last is None or self._last[0] != (seed, key, call, size):
            random = backend.generator(seed, "compress", "positions", key, call)  # not by rank
            chosen = np.sort(random.choice(size, kept(self.density, size), replace=False, shuffle=False))
            self._last = (seed, key, call, size), chosen
        return self._last[1]

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        where = like(self._positions(self.seed, key, call, flat.size), flat)
        head = [self.seed & 0xFFFFFFFF, self.seed >> 32, call]
        return flat[where], like(np.array(head, np.uint32), flat)

    def _where(self, payload: Payload) -> Array:
        values, head = payload.arrays
        low, high, call = to_numpy(head).tolist()
        return like(self._positions(low | high << 32, payload.key, call, payload.size), values)

    def _values(self, payload: Payload) -> Array:
        values = payload.arrays[0]
        if not self.scaled:
            return values
        wide = values.dtype if values.dtype.hasobject else np.float64
        return narrowed(values.astype(wide) * payload.size / max(1, values.size), payload.dtype)

    @property
    def spec(self) -> str:
        return f"randomk:{in_words(self.density)}"

    def for_error_feedback(self) -> Compressor:
        return RandomK(self.density, scaled=False, seed=self.seed, rank=self.rank)
