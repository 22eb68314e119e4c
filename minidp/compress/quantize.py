"""Quantisation: a number becomes a whole number of steps; its levels and the size of a step travel.

    level = round(g / step)     to nearest, or at random up or down so that the mean is g     g' = level · step

What differs between the three here is how long a step is, and over how many elements: the largest magnitude of a
block over 127 (int8), the 2-norm of a bucket over s (QSGD), the largest magnitude of all (TernGrad).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

import numpy as np

from minidp.backend import Array, array_module
from minidp.compress.bits import like, pack, unpack_signed, whole
from minidp.compress.compressor import Compressor, Payload, Route, checked, in_words, narrowed

CHUNK = 2**18  # elements: best of 2^15 to 2^18; smaller is more Python than work
FRACTION_BITS = 23  # of a random number: as many as float32 has
TINY = 1e-30  # of float32 steps: 2^-23 of a smaller one is no number to divide by


class Quantizer(Compressor):
    """Whole multiples, −levels … levels, of a step a block.

    Args:
        levels: s, 1 to 127: the most steps that a number can have.
        block: elements that share a step; None: all of an array.
        stochastic: round up with the probability of the fraction, unbiased; else to nearest, ties to even.

    Wire: a step a block (float32, or float64 for such arrays), then 2s + 1 levels in ⌈log₂(2s + 1)⌉ bits each, bit
    plane by bit plane. Owners sum parts, and quantise the sums once more. Fractions are fine where steps are
    rational.
    """

    route: ClassVar[Route] = "owners"
    looks = False  # what is not finite has no finite step

    def __init__(self, levels: int, block: int | None, stochastic: bool, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(seed=seed, rank=rank)
        if isinstance(levels, bool) or not isinstance(levels, int | np.integer) or not 1 <= levels <= 127:
            raise ValueError(f"levels={levels!r}: give a whole number from 1 to 127, for at most 8 bits a number")
        if block is not None and (not isinstance(block, int | np.integer) or block < 1):
            raise ValueError(f"block={block!r}: give the number of elements that share a step, or None for all")
        self.levels, self.block, self.stochastic = int(levels), block, stochastic
        self.bits = math.ceil(math.log2(2 * self.levels + 1))
        self.shrinks = False  # for error feedback
        self.bytes_per_element = 45.0 if stochastic else 15.0

    @abstractmethod
    def _steps(self, rows: Array) -> Array:
        """Of each row of a 2-d array the length of a step; 0 where all is 0."""

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        xp = array_module(flat)
        kind = np.result_type(np.float32, flat.dtype)  # of steps: objects stay objects
        block = self.block or max(1, flat.size)
        random = self._random(key, call) if self.stochastic else None
        steps, levels = xp.zeros(-(-flat.size // block), kind), xp.empty(flat.size, np.int8)
        with short_buffers(block), np.errstate(invalid="ignore"):
            for at, (source, target) in in_rows(block, flat, levels):
                rows = source.astype(kind, copy=False)
                step = self._steps(rows)
                # A row of zeros has no step. Any does, if it is not 0.
                divisor = xp.where(step == 0, like(np.ones(1, kind), step), step)[:, None]
                target[...] = nearest(rows, divisor) if random is None else at_random(rows, divisor, random)
                steps[at] = self._shrunk(rows, step, divisor) if self.shrinks else step
        if not kind.hasobject and not bool(xp.isfinite(steps).all()):
            checked(flat, key)
            raise ValueError(f"{key} is so long that its norm is beyond {kind}: {self.spec} can't quantise it")
        return steps, pack(levels.view(np.uint8), self.bits)

    def _decode(self, payload: Payload) -> Array:
        steps, packed = payload.arrays
        size, block = payload.size, self.block or max(1, payload.size)
        levels = unpack_signed(packed, self.bits, size)
        out = array_module(packed).empty(size, steps.dtype)
        with short_buffers(block):
            for at, (source, target) in in_rows(block, levels, out):
                target[...] = source
                target *= steps[at][:, None]
        return narrowed(out, payload.dtype)

    @staticmethod
    def _shrunk(rows: Array, step: Array, divisor: Array) -> Array:
        """The steps times β = ‖g‖² / E‖g'‖², with which β g' comes nearest to g in the mean."""
        xp = array_module(rows)
        y = rows / divisor
        fraction = y - whole(y, math.floor, "floor")
        squares, variance = (y * y).sum(axis=1), (fraction * (1 - fraction)).sum(axis=1)
        total = squares + variance
        return step * (squares / xp.where(total == 0, like(np.ones(1, total.dtype), total), total))


class Int8(Quantizer):
    """``"int8"``, or ``"int8:stochastic"``: 255 levels, a step of max|block| / 127.

    |error| ≤ step / 2 to nearest (the default), < step and unbiased at random. Wire: 8 bits a number and a step a
    block of 2048. Source: Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", ICLR 2016 (which has
    other levels).
    """

    def __init__(
        self, stochastic: bool = False, block: int | None = 2048, *, seed: int = 0, rank: int = 0
    ) -> None:
        super().__init__(127, block, stochastic, seed=seed, rank=rank)

    def _steps(self, rows: Array) -> Array:
        return shares(largest(rows), 127)

    @property
    def spec(self) -> str:
        return "int8:stochastic" if self.stochastic else "int8"


class QSGD(Quantizer):
    """``"qsgd:S"``: S levels, a step of ‖bucket‖₂ / S, at random: unbiased.

    Variance of a bucket v of d elements: (‖v‖²/S²) Σ f(1 − f), f the fractions of S|v_i|/‖v‖: at most
    min(d/S², √d/S) ‖v‖². So smaller buckets are more exact. Wire: ``"qsgd:4"``: 9 levels, 4 bits a number, and a
    step a bucket of 512, as in the paper's experiments. Source: Alistarh et al., "QSGD", NIPS 2017, section 3.1
    and 5.
    """

    def __init__(self, levels: int = 4, block: int | None = 512, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(levels, block, True, seed=seed, rank=rank)

    def _steps(self, rows: Array) -> Array:
        if rows.dtype.hasobject:
            raise TypeError("QSGD takes square roots, which Python objects (Fractions) do not have")
        # A single number is as long as its row: to rounding, or twice that.
        with np.errstate(over="ignore"):
            return shares(norms(rows) * rows.dtype.type(1 + 2**-21), self.levels)

    @property
    def spec(self) -> str:
        return f"qsgd:{self.levels}"

    def for_error_feedback(self) -> Compressor:
        return shrunk(QSGD(self.levels, self.block, seed=self.seed, rank=self.rank))


class TernGrad(Quantizer):
    """``"terngrad"``: −1, 0, 1 times s = max|g|, at random: unbiased, variance s|g_i| − g_i².

    With ``"terngrad:C"`` g is first clipped to ± C σ, σ its standard deviation (but not below its mean, so that
    equal numbers are not clipped to 0): less variance, and biased. Wire: 2 bits a number, one step an array.
    Source: Wen et al., "TernGrad", NIPS 2017, sections 3.1 and 3.3 (there C is 2.5).
    """

    def __init__(self, clip: float | None = None, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(1, None, True, seed=seed, rank=rank)
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"clip={clip!r}: give a positive number of standard deviations, such as 2.5")
        self.clip = clip

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        if self.clip is not None and flat.size:
            xp, wide = array_module(flat), checked(flat, key).astype(np.float64)
            most = float(xp.abs(wide).max()) or 1.0
            wide /= most  # so that no square overflows
            bound = most * min(1.0, max(self.clip * float(wide.std()), abs(float(wide.mean()))))
            flat = xp.clip(flat, -bound, bound)
        return super()._encode(flat, key, call)

    def _steps(self, rows: Array) -> Array:
        return largest(rows)

    @property
    def spec(self) -> str:
        return "terngrad" if self.clip is None else f"terngrad:{in_words(self.clip)}"

    def for_error_feedback(self) -> Compressor:
        return shrunk(TernGrad(self.clip, seed=self.seed, rank=self.rank))


def shrunk(quantizer: Quantizer) -> Quantizer:
    quantizer.shrinks = True
    return quantizer


# --- parts ------------------------------------------------------------------------------------------------------


def in_rows(block: int, *arrays: Array) -> Iterator[tuple[slice, list[Array]]]:
    """Flat arrays of one size, as rows of ``block`` elements, some rows at a time, a short one at last.

    Yields which rows, and of each array a 2-d view of them: few enough that what is in work fits the cache.
    """
    size, few = arrays[0].size, max(1, CHUNK // block)
    full = size // block
    for lo in range(0, full, few):
        hi = min(lo + few, full)
        yield slice(lo, hi), [array[lo * block : hi * block].reshape(hi - lo, block) for array in arrays]
    if size > full * block:
        yield slice(full, full + 1), [array[full * block :].reshape(1, -1) for array in arrays]


@contextmanager
def short_buffers(block: int) -> Iterator[None]:
    """NumPy's buffers no longer than a row: an operation between rows and a column runs at half the speed
    otherwise (36 instead of 18 GB/s for rows of 2048, NumPy 2.4)."""
    before = np.setbufsize(max(16, min(8192, block // 16 * 16)))
    try:
        yield
    finally:
        np.setbufsize(before)


def largest(rows: Array) -> Array:
    """max|row|."""
    return array_module(rows).maximum(rows.max(axis=1), -rows.min(axis=1))


def norms(rows: Array) -> Array:
    """‖row‖₂, also where squares overflow or vanish."""
    xp = array_module(rows)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        found = xp.sqrt((rows[:, None, :] @ rows[:, :, None]).reshape(-1))  # BLAS: thrice the speed of a sum
    if bool((found < 1e-15).any()) or not bool(xp.isfinite(found).all()):
        most = largest(rows)
        scale = xp.where(most == 0, like(np.ones(1, most.dtype), most), most)
        with np.errstate(over="ignore"):
            found = scale * xp.sqrt(xp.square(rows / scale[:, None]).sum(axis=1))
    return found


def shares(lengths: Array, levels: int) -> Array:
    """lengths / levels, rounded up: so that nothing of that length has more levels."""
    xp, steps = array_module(lengths), lengths / levels
    if steps.dtype.hasobject:
        return steps
    with np.errstate(over="ignore"):
        products = steps * levels
        up, down = (xp.nextafter(steps, xp.full_like(steps, to)) for to in (np.inf, 0.0))
    # All levels of a step must be numbers, too.
    return xp.where(products < lengths, up, xp.where(xp.isinf(products) & xp.isfinite(steps), down, steps))


def nearest(rows: Array, divisor: Array) -> Array:
    """round(rows / divisor), ties to even."""
    y = rows / divisor
    return whole(y, round, "rint") if y.dtype.hasobject else array_module(y).rint(y, out=y)


def at_random(rows: Array, divisor: Array, random: np.random.BitGenerator) -> Array:
    """⌊rows / divisor + u⌋ with u uniform in [0, 1): the mean is rows / divisor, to 2⁻²⁴.

    In whole numbers of 2⁻²³: fewer passes, and the same on each kind of array.
    """
    raw = random.random_raw(-(-rows.size // 2)).view(np.uint32)[: rows.size]
    raw >>= 32 - FRACTION_BITS
    u = like(raw.view(np.int32), rows).reshape(rows.shape)
    if rows.dtype.hasobject:
        return (whole(rows * 2**FRACTION_BITS / divisor, round, "rint") + u) >> FRACTION_BITS
    if rows.dtype.itemsize > 4 or bool((divisor < TINY).any()):
        y = rows.astype(np.float64) / divisor * 2**FRACTION_BITS
    else:
        y = rows / (divisor * 0.5**FRACTION_BITS)  # a pass less
    fixed = array_module(y).rint(y, out=y).astype(np.int32)
    fixed += u
    fixed >>= FRACTION_BITS
    return fixed
