"""One bit a number: the sign of the gradient, and what most ranks say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from minidp.backend import Array, array_module
from minidp.compress.bits import like
from minidp.compress.compressor import Compressor, Payload, Route, narrowed

# Of each byte the eight signs that it stands for, the first in the highest bit.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_SIGNS = np.where(_BITS, -1, 1).astype(np.int8)
# The same as one number of 64 bits, and all bits of those that are not 0: eight are looked up at once.
_EIGHT_SIGNS = _SIGNS.view(np.uint64).reshape(-1)
_EIGHT_KEPT = np.where(_BITS, 0, -1).astype(np.int8).view(np.uint64).reshape(-1)


class Sign(Compressor):
    """``"sign"``: −1, 0 or 1; of all ranks what most say, 0 where as many say the opposite (majority vote).

    sign(0) is 0, so that a parameter without a gradient never moves. The step is η whatever the gradient's length:
    take a smaller η than for others. It may walk uphill for ever: where the gradient is 4 with probability ¼ and
    −1 with ¾ it goes by the more frequent one. With ``"sign+ef"`` it does not: then signs are times mean|g|, and
    ranks' are added.

    Wire: a bit a number, and as many once more if any number is 0. Owners count the votes; a vote is a sign again,
    so nothing is lost by that. Source: Bernstein et al., "signSGD", ICML 2018; for ``scaled`` Karimireddy et al.,
    "Error Feedback Fixes SignSGD", ICML 2019.
    """

    route: ClassVar[Route] = "owners"
    steady: ClassVar[bool] = False
    bytes_per_element = 10.0

    def __init__(self, scaled: bool = False, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(seed=seed, rank=rank)
        self.scaled = scaled
        self.votes = not scaled

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        xp = array_module(flat)
        zero = flat == 0
        zeros = xp.packbits(zero) if bool(zero.any()) else xp.empty(0, np.uint8)
        signs = xp.packbits(flat < 0)
        if not self.scaled:
            return signs, zeros
        kind = np.result_type(np.float32, flat.dtype)
        total = xp.abs(flat).reshape(1, -1).sum(axis=1, dtype=kind if kind.hasobject else np.float64)
        return (total / max(1, flat.size)).astype(kind), signs, zeros

    def _decode(self, payload: Payload) -> Array:
        *scale, signs, zeros = payload.arrays
        size, kind = payload.size, payload.dtype
        wide = scale[0].dtype if scale else kind
        if zeros.size:
            eights = like(_EIGHT_SIGNS, signs).take(signs) & like(_EIGHT_KEPT, signs).take(zeros)
            flat = eights.view(np.int8)[:size].astype(wide)
            return narrowed(flat * scale[0] if scale else flat, kind)
        table = like(_SIGNS, signs).astype(wide)
        if scale:
            table = table * scale[0]
        return narrowed(table.take(signs, axis=0).reshape(-1)[:size], kind)

    def combine(self, payloads: Sequence[Payload]) -> Array:
        total = super().combine(payloads)
        return array_module(total).sign(total, out=total) if self.votes else total

    @property
    def spec(self) -> str:
        return "sign"

    def for_error_feedback(self) -> Compressor:
        return Sign(scaled=True, seed=self.seed, rank=self.rank)
