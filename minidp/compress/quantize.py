"""Quantisation: a number becomes a whole number of steps; its levels and the size of a step travel.

    level = round(g / step)     to nearest, or at random up or down so that the mean is g     g' = level · step

What differs between the three here is how long a step is, and over how many elements: the largest magnitude of a
block over 127 (int8), the 2-norm of a bucket over s (QSGD), the largest magnitude of all (TernGrad).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np

from minidp.backend import Array, array_module
from minidp.compress.bits import like, pack, unpack, whole
from minidp.compress.compressor import Compressor, Payload, Route

CHUNK = 2**17  # elements: what is in work fits the cache, and Python's part of the time is small
FRACTION_BITS = 23  # of a random number: as many as float32 has
TINY = 1e-30  # float32: below it a reciprocal times 2^23 overflows


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
    bytes_per_element = 30.0

    def __init__(
        self, levels: int, block: int | None, stochastic: bool, *, seed: int = 0, rank: int = 0
    ) -> None:
        super().__init__(seed=seed, rank=rank)
        if isinstance(levels, bool) or not isinstance(levels, int | np.integer) or not 1 <= levels <= 127:
            raise ValueError(f"levels={levels!r}: give a whole number from 1 to 127, for at most 8 bits a number")
        if block is not None and (not isinstance(block, int | np.integer) or block < 1):
            raise ValueError(f"block={block!r}: give the number of elements that share a step, or None for all")
        self.levels, self.block, self.stochastic = int(levels), block, stochastic
        self.bits = math.ceil(math.log2(2 * self.levels + 1))
        self.shrinks = False  # for error feedback

    @abstractmethod
    def _steps(self, rows: Array) -> Array:
        """Of each row of a 2-d array the length of a step; 0 where all is 0."""

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        xp = array_module(flat)
        kind = np.result_type(np.float32, flat.dtype)  # of steps: objects stay objects
        block = self.block or max(1, flat.size)
        random = self._random(key, call) if self.stochastic else None
        steps, codes = xp.zeros(-(-flat.size // block), kind), xp.empty(flat.size, np.int8)
        for at, source, target in zip(*in_rows(block, flat, codes)):
            rows = source.astype(kind, copy=False)
            step = self._steps(rows)
            # A row of zeros has no step. Any does, if it is not 0.
            divisor = xp.where(step == 0, like(np.ones(1, kind), step), step)[:, None]
            levels = nearest(rows, divisor) if random is None else at_random(rows, divisor, random)
            target[...] = xp.clip(levels, -self.levels, self.levels)  # rounding may have led one beyond
            steps[at] = self._shrunk(rows, step, divisor) if self.shrinks else step
        codes += np.int8(self.levels)
        return steps, pack(codes.view(np.uint8), self.bits)

    def _decode(self, payload: Payload) -> Array:
        steps, packed = payload.arrays
        xp, size = array_module(packed), payload.size
        # Modulo 256: codes above 127 come out right, too.
        levels = unpack(packed, self.bits, size).view(np.int8) - np.int8(self.levels)
        out = xp.empty(size, steps.dtype)
        for at, source, target in zip(*in_rows(self.block or max(1, size), levels, out)):
            target[...] = source
            target *= steps[at][:, None]
        return out.astype(payload.dtype, copy=False)

    @staticmethod
    def _shrunk(rows: Array, step: Array, divisor: Array) -> Array:
        """The steps times β = ‖g‖² / E‖g'‖², with which β g' comes nearest to g in the mean."""
        xp = array_module(rows)
        y = rows / divisor
        fraction = y - whole(y, math.floor, "floor")
        squares, variance = (y * y).sum(axis=1), (fraction * (1 - fraction)).sum(axis=1)
        total = squares + variance
        return step * squares / xp.where(total == 0, like(np.ones(1, total.dtype), total), total)


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
        xp, most = array_module(rows), largest(rows)
        steps = most / 127
        if rows.dtype.hasobject:
            return steps
        return xp.where(steps * 127 < most, xp.nextafter(steps, xp.full_like(steps, np.inf)), steps)

    @property
    def spec(self) -> str:
        return "int8:stochastic" if self.stochastic else "int8"


class QSGD(Quantizer):
    """``"qsgd:S"``: S levels, a step of ‖bucket‖₂ / S, at random: unbiased.

    Variance of a bucket v of d elements: (‖v‖²/S²) Σ f(1 − f), f the fractions of S|v_i|/‖v‖: at most
    min(d/S², √d/S) ‖v‖². So smaller buckets are more exact. Wire: ``"qsgd:4"``: 9 levels, 4 bits a number, and a step a
    bucket of 512, as in the paper's experiments. Source: Alistarh et al., "QSGD", NIPS 2017, section 3.1 and 5.
    """

    def __init__(self, levels: int = 4, block: int | None = 512, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(levels, block, True, seed=seed, rank=rank)

    def _steps(self, rows: Array) -> Array:
        if rows.dtype.hasobject:
            raise TypeError("QSGD takes square roots, which Python objects (Fractions) do not have")
        return norms(rows) / np.asarray(self.levels, rows.dtype)

    @property
    def spec(self) -> str:
        return f"qsgd:{self.levels}"

    def for_error_feedback(self) -> Compressor:
        return shrunk(QSGD(self.levels, self.block, seed=self.seed, rank=self.rank))


class TernGrad(Quantizer):
    """``"terngrad"``: −1, 0, 1 times s = max|g|, at random: unbiased, variance s|g_i| − g_i².

    With ``"terngrad:C"`` g is first clipped to ± C σ, σ its standard deviation: less variance, and biased. Wire: 2 bits a
    number, one step an array. Source: Wen et al., "TernGrad", NIPS 2017, sections 3.1 and 3.3 (there C is 2.5).
    """

    def __init__(self, clip: float | None = None, *, seed: int = 0, rank: int = 0) -> None:
        super().__init__(1, None, True, seed=seed, rank=rank)
        if clip is not None and not 0 < clip < math.inf:
            raise ValueError(f"clip={clip!r}: give a positive number of standard deviations, such as 2.5")
        self.clip = clip

    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        if self.clip is not None and flat.size:
            xp, bound = array_module(flat), self.clip * flat.std()
            flat = xp.clip(flat, -bound, bound)
        return super()._encode(flat, key, call)

    def _steps(self, rows: Array) -> Array:
        return largest(rows)

    @property
    def spec(self) -> str:
        return "terngrad" if self.clip is None else f"terngrad:{self.clip:g}"

    def for_error_feedback(self) -> Compressor:
        return shrunk(TernGrad(self.clip, seed=self.seed, rank=self.rank))


def shrunk(quantizer: Quantizer) -> Quantizer:
    quantizer.shrinks = True
    return quantizer


# --- parts ------------------------------------------------------------------------------------------------------


def in_rows(block: int, *arrays: Array) -> tuple[list[slice], *tuple[list[Array], ...]]:
    """Views of flat arrays of one size as rows of ``block`` elements, some rows at a time, a short one at last.

    Returns which rows, then for each array its views: 2-d, what is in work fits the cache.
    """
    size, few = arrays[0].size, max(1, CHUNK // block)
    full = size // block
    edges = [(lo, min(lo + few, full)) for lo in range(0, full, few)]
    which = [slice(lo, hi) for lo, hi in edges]
    views = [[a[lo * block : hi * block].reshape(hi - lo, block) for lo, hi in edges] for a in arrays]
    if size > full * block:
        which.append(slice(full, full + 1))
        for of_array, array in zip(views, arrays):
            of_array.append(array[full * block :].reshape(1, -1))
    return which, *views


def largest(rows: Array) -> Array:
    """max|row|."""
    return array_module(rows).maximum(rows.max(axis=1), -rows.min(axis=1))


def norms(rows: Array) -> Array:
    """‖row‖₂, also where squares overflow or vanish."""
    xp = array_module(rows)
    with np.errstate(over="ignore", under="ignore"):
        found = xp.sqrt((rows * rows).sum(axis=1))
    most = largest(rows)
    if bool(((found < 1e-15) & (most > 0)).any()) or not bool(xp.isfinite(found).all()):
        scale = xp.where(most == 0, like(np.ones(1, most.dtype), most), most)
        found = scale * xp.sqrt(((rows / scale[:, None]) ** 2).sum(axis=1))
    return found


def nearest(rows: Array, divisor: Array) -> Array:
    """round(rows / divisor), ties to even."""
    return whole(rows / divisor, round, "rint")


def at_random(rows: Array, divisor: Array, random: np.random.Generator) -> Array:
    """⌊rows / divisor + u⌋ with u uniform in [0, 1): the mean is rows / divisor, to 2⁻²⁴.

    In whole numbers of 2⁻²³: fewer passes, and the same on each kind of array.
    """
    xp = array_module(rows)
    raw = random.bit_generator.random_raw(-(-rows.size // 2)).view(np.uint32)[: rows.size]
    u = like((raw >> (32 - FRACTION_BITS)).astype(np.int32).reshape(rows.shape), rows)
    if not rows.dtype.hasobject and bool((divisor < TINY).any()):
        rows, divisor = rows.astype(np.float64), divisor.astype(np.float64)
    y = rows * (2**FRACTION_BITS / divisor)
    fixed = whole(y, round, "rint")
    if not rows.dtype.hasobject:
        fixed = fixed.astype(np.int32)
    return xp.right_shift(fixed + u, FRACTION_BITS)
