"""Fewer bits a number, as the processor knows them: float16 and bfloat16; and no compression at all."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from minidp.backend import Array, array_module
from minidp.compress.compressor import Compressor, Payload, Route, narrowed

CHUNK = 2**17  # elements: what is in work fits the cache, and Python's part of the time is small


class Identity(Compressor):
    """``"none"``: what goes in comes out. To compare with, and to prune without compressing.

    Wire: the numbers. Summed. No error.
    """

    route: ClassVar[Route] = "sum"
    bytes_per_element = 8.0

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        return (flat.copy(),)

    def _decode(self, payload: Payload) -> Array:
        return payload.arrays[0].copy()

    @property
    def spec(self) -> str:
        return "none"


class Float16(Compressor):
    """``"fp16"``: 11 bits of precision, magnitudes 6e-8 to 65504; to nearest, ties to even.

    Wire: float16. Summed: in float32, the sum is rounded to float16 again. |error| ≤ 2⁻¹¹ |x|, or 3e-8 where |x|
    is below 6e-5. ValueError for what is larger than 65504: `BFloat16` has float32's range.
    """

    route: ClassVar[Route] = "sum"
    bytes_per_element = 140.0  # NumPy's cast is slow

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        xp = array_module(flat)
        with np.errstate(over="ignore"):
            half = flat.astype(np.float16)
        if not bool(xp.isfinite(half).all()):
            raise ValueError(
                f'{key} holds {float(xp.abs(flat).max()):g}, beyond float16\'s 65504: give compress="bf16"'
            )
        return (half,)

    def _decode(self, payload: Payload) -> Array:
        return payload.arrays[0].astype(payload.dtype)

    @property
    def spec(self) -> str:
        return "fp16"


class BFloat16(Compressor):
    """``"bf16"``: float32's upper half: its range, 8 bits of precision; to nearest, ties to even.

    Wire: uint16. The owners of parts sum in float32. |error| ≤ 2⁻⁸ |x| each time. With ``"bf16:truncate"`` the
    lower half is cut off, in one pass: |error| < 2⁻⁷ |x|, always towards zero.
    """

    route: ClassVar[Route] = "owners"

    def __init__(self, truncate: bool = False, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(seed=seed, rank=rank)
        self.truncate = truncate
        self.bytes_per_element = 8.0 if truncate else 16.0

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        xp = array_module(flat)
        with np.errstate(over="ignore"):
            single = flat.astype(np.float32, copy=False)
        if flat.dtype.itemsize > 4 and not bool(xp.isfinite(single).all()):
            raise ValueError(f"{key} holds {float(xp.abs(flat).max()):g}, beyond float32's 3.4e38")
        u = single.view(np.uint32)
        if self.truncate:
            return (u.view(np.uint16)[1::2].copy(),)
        out, work = xp.empty(u.size, np.uint16), xp.empty(min(CHUNK, u.size), np.uint32)
        for lo in range(0, u.size, CHUNK):
            part = u[lo : lo + CHUNK]
            t = work[: part.size]
            xp.right_shift(part, 16, out=t)
            xp.bitwise_and(t, 1, out=t)
            xp.add(t, 0x7FFF, out=t)  # one less than half, and one more where the kept part is odd
            xp.add(t, part, out=t)
            xp.right_shift(t, 16, out=t)
            rounded = out[lo : lo + CHUNK]
            rounded[...] = t
            if int(rounded.max()) >= 0xFF80 or int(rounded.view(np.int16).max()) >= 0x7F80:
                rounded[(rounded & 0x7FFF) >= 0x7F80] -= 1  # not up to infinity: the largest number is nearer
        return (out,)

    def _decode(self, payload: Payload) -> Array:
        (upper,) = payload.arrays
        xp = array_module(upper)
        halves = xp.zeros(2 * upper.size, np.uint16)
        halves[1::2] = upper
        return narrowed(halves.view(np.float32), payload.dtype)

    @property
    def spec(self) -> str:
        return "bf16:truncate" if self.truncate else "bf16"
