"""``compress``, among ranks: what one of N sends and computes when a gradient is added up, without the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from minidp.compress import Payload, get
from minidp.compress.compressor import ALIGN


class Peers:
    """A `Reducer` of made-up ranks, whose network takes no time: what an exchange takes is what one rank computes.

    The others' gradients are this one's, shifted, and their sums are this one's; all is made once and kept.

    Args:
        spec: of the compressor that all use.
        world_size: with this rank, which is rank 0.
        gradient: of this rank; its size is a multiple of 64 · world_size, so that all own equally much.

    ``sent`` counts the bytes that this rank would send, with 8 bytes a number where sizes are told before each
    exchange. Additions inside an all-reduce are the network's.
    """

    rank = 0

    def __init__(self, spec: str, world_size: int, gradient: np.ndarray) -> None:
        self.world_size, self.sent = world_size, 0.0
        self._spec, self._gradient = spec, gradient
        self._steady = get(spec).steady
        self._part = gradient.size // world_size
        assert self._part % ALIGN == 0
        self._kept: dict[str, list[Payload]] = {}

    def sum(self, array: Any) -> Any:
        self.sent += ring_bytes(array.nbytes, self.world_size)
        return array

    def gather(self, payload: Payload) -> list[Payload]:
        self.sent += (self.world_size - 1) * self._bytes(payload)
        if payload.size == self._gradient.size:
            return [payload, *self._of_peers(payload, self._made)]
        return [payload, *self._of_peers(payload, lambda like, rank: _copy(like))]

    def scatter(self, payloads: Sequence[Payload]) -> list[Payload]:
        self.sent += sum(self._bytes(payload) for payload in payloads[1:])
        return [payloads[0], *self._of_peers(payloads[0], self._made)]

    def _bytes(self, payload: Payload) -> int:
        return payload.nbytes + (0 if self._steady else 8 * (1 + len(payload.arrays)))

    def _of_peers(self, like: Payload, make: Callable[[Payload, int], Payload]) -> list[Payload]:
        if like.key not in self._kept:
            self._kept[like.key] = [make(like, rank) for rank in range(1, self.world_size)]
        return self._kept[like.key]

    def _made(self, like: Payload, rank: int) -> Payload:
        """What another rank makes of as much of its gradient, from the beginning."""
        theirs = np.roll(self._gradient.reshape(-1), rank * self._part + 1)[: like.size]
        return get(self._spec, rank=rank).compress(theirs.reshape(like.shape), like.key)


def _copy(payload: Payload) -> Payload:
    return replace(payload, arrays=tuple(array.copy() for array in payload.arrays))


def sent_bytes(spec: str, x: np.ndarray, ranks: int) -> float:
    """Of one rank, in one exchange."""
    peers = Peers(spec, ranks, x)
    get(spec).exchange(x, "w", peers)
    return peers.sent


def ring_bytes(nbytes: float, ranks: int) -> float:
    """What a rank sends in a ring all-reduce, as one of float32: 2(N−1)/N of the array."""
    return 2 * (ranks - 1) / ranks * nbytes
