"""PowerSGD: a gradient matrix as the product of two narrow ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from minidp import backend
from minidp.backend import Array, array_module, to_numpy
from minidp.compress.bits import like
from minidp.compress.compressor import Compressor, Payload, Reducer, Route, State, checked, chosen


class PowerSGD(Compressor):
    """``"powersgd:R"``: M (n × m) as P Qᵀ with R columns each: one step of the power method a call.

        P = M Q                 summed over ranks, then orthonormalised
        Q = Mᵀ P                summed over ranks;  M' = P Qᵀ

    Q is the same on all ranks: drawn once by seed and key, and from then on the last call's (a warm start, with
    which a gradient that hardly changes is approximated ever better). Exact where M has rank ≤ R.

    Arrays of more than two dimensions are matrices of shape (first, rest). Vectors, and matrices that would not
    become smaller, travel as they are. Wire: (n + m) R numbers, in two rounds. Summed. Not for parameter servers:
    the sum of P is needed before Q is known. Source: Vogels et al., "PowerSGD", NeurIPS 2019, algorithm 1.

    ``compress`` alone is that of one rank.
    """

    route: ClassVar[Route] = "sum"
    bytes_per_element = 16.0

    def __init__(self, approximation_rank: int, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(seed=seed, rank=rank)
        r = approximation_rank
        if isinstance(r, bool) or not isinstance(r, int | np.integer) or r < 1:
            raise ValueError(f"approximation_rank={r!r}: give a whole number of columns, 1 or more")
        self.approximation_rank = int(r)
        self._q: dict[str, Array] = {}

    def exchanged(self, array: Array, key: str, reducer: Reducer) -> tuple[Array, Payload | None]:
        total, own = self._summed(array, key, reducer)
        return self.decompress(total), own

    def compress(self, array: Array, key: str) -> Payload:
        return self._summed(array, key, Alone())[1]

    def _summed(self, array: Array, key: str, reducer: Reducer) -> tuple[Payload, Payload]:
        """The payload of all ranks' sum, and this rank's part of it."""
        flat = checked(array, key)
        xp = array_module(flat)

        def payload(*arrays: Array) -> Payload:
            return Payload(tuple(each.reshape(-1) for each in arrays), array.shape, np.dtype(array.dtype), key)

        self._calls[key] += 1
        if not self.needs_shape(array.shape):
            return payload(reducer.sum(flat.copy())), payload(flat.copy())
        m = _matrix(flat, array.shape)
        p = orthonormal(reducer.sum(m @ self._start(m, key)))
        own = m.T @ p
        q = reducer.sum(own.copy())
        most = xp.abs(q).max()
        if 0 < float(most) < np.inf:  # from zeros no power method ever finds anything again
            self._q[key] = q / most  # as long as the gradient is, M Q would be its square: too small, or too large
        backend.count(4.0 * m.size * self.approximation_rank, self.bytes_per_element * m.nbytes / 4)
        return payload(p, q), payload(p, own)

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        raise NotImplementedError("a matrix is needed, not a flat array")

    def _decode(self, payload: Payload) -> Array:
        if len(payload.arrays) == 1:
            return payload.arrays[0].astype(payload.dtype)  # a copy
        p, q = (each.reshape(-1, self.approximation_rank) for each in payload.arrays)
        return (p @ q.T).astype(payload.dtype, copy=False).reshape(-1)

    def needs_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether the narrow matrices are smaller than the one."""
        size = math.prod(shape)
        if len(shape) < 2 or size == 0:
            return False
        return (shape[0] + size // shape[0]) * self.approximation_rank < size

    def _start(self, m: Array, key: str) -> Array:
        """Q of the last call, or one by chance that all ranks have."""
        q = self._q.get(key)
        if q is None:
            random = backend.generator(self.seed, "compress", "q", key)
            q = random.standard_normal((m.shape[1], self.approximation_rank)).astype(m.dtype)
        return like(q, m)

    def state_dict(self) -> State:
        return super().state_dict() | {f"q/{key}": to_numpy(q).copy() for key, q in self._q.items()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        starts = chosen(state, "q")
        super().load_state_dict({name: value for name, value in state.items() if name not in starts})
        self._q = {name.removeprefix("q/"): value.copy() for name, value in starts.items()}

    @property
    def spec(self) -> str:
        return f"powersgd:{self.approximation_rank}"


class Alone:
    """The `Reducer` of a rank by itself."""

    rank, world_size = 0, 1

    def sum(self, array: Array) -> Array:
        return array

    def gather(self, payload: Payload) -> list[Payload]:
        return [payload]

    def scatter(self, payloads: Sequence[Payload]) -> list[Payload]:
        return list(payloads)


def _matrix(flat: Array, shape: tuple[int, ...]) -> Array:
    if flat.dtype.hasobject:
        raise TypeError("PowerSGD takes square roots, which Python objects (Fractions) do not have")
    return flat.astype(np.result_type(np.float32, flat.dtype), copy=False).reshape(shape[0], -1)


def orthonormal(p: Array) -> Array:
    """Columns that span what those of ``p`` do, and more where they are dependent."""
    q: Array = array_module(p).linalg.qr(p)[0]
    return q
