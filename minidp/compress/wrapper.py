"""A compressor around another one: what both error feedback and pruning have in common."""

from __future__ import annotations

from collections.abc import Sequence

from minidp.backend import Array
from minidp.compress.compressor import Compressor, Payload, Route


class Wrapper(Compressor):
    """Does something before and after what ``inner`` does, and travels as that does."""

    def __init__(self, inner: Compressor) -> None:
        super().__init__(seed=inner.seed, rank=inner.rank)
        self.inner = inner
        self.votes = inner.votes
        self.route: Route = inner.route  # type: ignore[misc]
        self.steady = inner.steady  # type: ignore[misc]

    def decompress(self, payload: Payload) -> Array:
        return self.inner.decompress(payload)

    def combine(self, payloads: Sequence[Payload]) -> Array:
        return self.inner.combine(payloads)

    def needs_shape(self, shape: tuple[int, ...]) -> bool:
        return self.inner.needs_shape(shape)

    def belong_to(self, rank: int) -> None:
        super().belong_to(rank)
        self.inner.belong_to(rank)

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        raise NotImplementedError("done by the compressor inside")

    def _decode(self, payload: Payload) -> Array:
        raise NotImplementedError("done by the compressor inside")
