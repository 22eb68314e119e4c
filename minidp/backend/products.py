"""Matrix products, and in which numbers their factors are.

Weights, gradients and sums stay in float32. But matrix units take factors of fewer bits many times faster, and
training mostly stands it (Micikevicius et al., "Mixed Precision Training", ICLR 2018; Kalamkar et al., "A Study of
BFLOAT16", 2019)::

    with minidp.backend.matmul_precision("bfloat16"):
        for x, y in loader.epoch(0):
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()

float32 factors are rounded, multiplied exactly, and added up in float32. On the host, and on devices without such
units, the same is computed from rounded factors: slower, not faster, but one can see what it does to a training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from minidp.backend import cublas
from minidp.backend.arrays import Array, array_module


class Precision(NamedTuple):
    """``factors``: what float32 factors are rounded to. ``gradient_scale``: by what a gradient is multiplied
    before, and the product divided after it."""

    factors: str
    gradient_scale: float


BITS = {"tf32": 10, "bfloat16": 7, "float16": 10}  # of the fraction; a number of float32 has 23
_precision: ContextVar[Precision | None] = ContextVar("minidp_matmul_precision", default=None)
current_precision = _precision.get


@contextmanager
def matmul_precision(factors: str, gradient_scale: float = 1.0) -> Iterator[None]:
    """Within the block, round the factors of float32 matrix products; other dtypes are left alone.

    Args:
        factors: ``"float32"`` (no rounding), ``"tf32"`` (float32's range, 11 bits of precision, to nearest),
            ``"bfloat16"`` (8 bits) or ``"float16"`` (11 bits, magnitudes 6e-8 to 65504).
        gradient_scale: a power of two. Gradients are often below float16's smallest number: *loss scaling*
            multiplies them, here each where it is rounded, and divides the product in float32. So the gradients
            that others see are never scaled. What becomes infinite by it ``check_finite`` finds: give less.
    """
    if factors not in ("float32", *BITS):
        raise ValueError(f"unknown precision {factors!r} of factors; valid: 'float32', {str([*BITS])[1:-1]}")
    if not gradient_scale > 0 or math.frexp(gradient_scale)[0] != 0.5:
        raise ValueError(f"gradient_scale={gradient_scale}: give a power of two, so that scaling rounds nothing")
    token = _precision.set(None if factors == "float32" else Precision(factors, float(gradient_scale)))
    try:
        yield
    finally:
        _precision.reset(token)


def matmul(a: Array, b: Array, out: Array | None = None, gradient: int | None = None) -> Array:
    """a @ b, in ``out`` if given, in the precision of `matmul_precision`.

    Leading axes are batches, as in NumPy. ``gradient``: which factor is one, 0 or 1, if any.
    """
    precision = _precision.get()
    if precision is None and type(a) is np.ndarray:
        return a @ b if out is None else np.matmul(a, b, out=out)
    xp = array_module(a)
    if precision is not None and a.dtype != np.float32:
        precision = None
    if xp is not np and xp.__name__ == "cupy" and cublas.takes(a, b) and (precision is not None or a.ndim > 2):
        return cublas.product(a, b, out, precision, gradient, xp)
    if precision is None:
        return a @ b if out is None else xp.matmul(a, b, out=out)
    factors = [a, b]
    scale = precision.gradient_scale
    if gradient is not None and scale != 1:
        factors[gradient] = factors[gradient] * scale
    c = xp.matmul(rounded(factors[0], precision.factors), rounded(factors[1], precision.factors), out=out)
    if gradient is not None and scale != 1:
        c *= 1 / scale
    return c


def rounded(x: Array, to: str) -> Array:
    """float32 `x` with as few bits as numbers of that name have; NaN stays NaN."""
    xp = array_module(x)
    if to == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    drop = 23 - BITS[to]
    u = xp.ascontiguousarray(x).view(np.uint32)
    half = np.uint32((1 << (drop - 1)) - 1)
    odd = xp.bitwise_and(xp.right_shift(u, np.uint32(drop)), np.uint32(1))  # ties go to even
    kept = xp.bitwise_and(u + half + odd, np.uint32(0xFFFFFFFF ^ ((1 << drop) - 1)))
    return xp.where(xp.isfinite(x), kept.view(np.float32), x)
