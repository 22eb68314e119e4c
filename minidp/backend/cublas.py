"""NVIDIA's matrix products, called directly where CuPy's ``matmul`` would copy transposed factors (all batched
products) or can't be asked for fewer bits.

cuBLAS counts columns first: what it takes for C = A B in our order is Cᵀ = Bᵀ Aᵀ in its own, where each of our
arrays already is the transpose. So factors change places, and "transposed" means what is not contiguous here.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minidp.backend.arrays import Array
from minidp.backend.kernels import Kernels

if TYPE_CHECKING:
    from minidp.backend.products import Precision

KERNELS = Kernels(Path(__file__).with_name("cublas.cu"), "to_bfloat16")

# Numbers of CUDA's library_types.h and cublas_api.h.
TYPES = {"float32": 0, "float64": 1, "float16": 2, "uint16": 14}  # bfloat16 has no name in NumPy: it is in uint16
FLOAT32, TF32, FLOAT64 = 68, 77, 70  # how it computes
BEST = -1  # of its algorithms
NORMAL, TRANSPOSED = 0, 1


class Factor(NamedTuple):
    """A matrix, or a batch of them, as cuBLAS is told of it: ``array`` is contiguous, and read ``transposed`` or
    not."""

    array: Array
    transposed: bool

    @property
    def stride(self) -> int:
        """Elements from one matrix of the batch to the next; 0 if there is one for all."""
        return 0 if self.array.ndim == 2 else math.prod(self.array.shape[-2:])


def factor(x: Array, xp: Any) -> Factor:
    """`x` (..., rows, columns); a copy only if neither it nor its transpose is contiguous."""
    if not x.flags.c_contiguous:
        turned = x.swapaxes(-1, -2)
        if turned.flags.c_contiguous:
            return Factor(turned, True)
        x = xp.ascontiguousarray(x)
    return Factor(x, False)


def takes(a: Array, b: Array) -> bool:
    """Whether `product` can multiply them."""
    return a.dtype == b.dtype and a.dtype in (np.float32, np.float64) and min(a.ndim, b.ndim) > 1


def product(
    a: Array, b: Array, out: Array | None, precision: Precision | None, gradient: int | None, xp: Any
) -> Array:
    """a @ b of float32 or float64 arrays of two or more axes; see ``products.matmul``."""
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    m, k = a.shape[-2:]
    n = b.shape[-1]
    if b.shape[-2] != k:
        raise ValueError(f"matmul: {a.shape} and {b.shape} do not fit: {k} columns, {b.shape[-2]} rows")
    shape = (*batch, m, n)
    if not math.prod(shape) * k:
        return xp.matmul(a, b, out=out)
    if out is None or out.shape != shape or out.dtype != a.dtype or not out.flags.c_contiguous:
        c = xp.empty(shape, a.dtype)
    else:
        c = out
    pair = [factor(_spread(x, batch, xp), xp) for x in (a, b)]
    compute = FLOAT64 if a.dtype == np.float64 else FLOAT32
    alpha = 1.0
    if precision is not None:
        scale = 1.0 if gradient is None else precision.gradient_scale
        alpha = 1 / scale
        if precision.factors == "tf32":
            compute, alpha = TF32, 1.0  # of float32's range: nothing to scale
        else:
            scales = [scale if i == gradient else 1.0 for i in (0, 1)]
            pair = [f._replace(array=_fewer(f.array, precision.factors, s, xp)) for f, s in zip(pair, scales)]
    _gemm(pair[0], pair[1], c, alpha, compute, xp)
    if out is not None and c is not out:
        out[...] = c
        return out
    return c


def _spread(x: Array, batch: tuple[int, ...], xp: Any) -> Array:
    """`x` for a batch of that shape: one matrix for all, or one each."""
    return x if x.ndim == 2 or x.shape[:-2] == batch else xp.broadcast_to(x, (*batch, *x.shape[-2:]))


def _fewer(x: Array, factors: str, scale: float, xp: Any) -> Array:
    """Contiguous float32 `x`, times `scale`, in half as many bytes."""
    if factors == "float16":
        return (x if scale == 1 else x * scale).astype(np.float16)
    kernels = KERNELS.on(xp, x.dtype)
    assert kernels is not None  # of CuPy, for float32
    half: Array = xp.empty(x.shape, np.uint16)
    kernels.each("to_bfloat16", x.size, x, half, float(scale))
    return half


def _gemm(a: Factor, b: Factor, c: Array, alpha: float, compute: int, xp: Any) -> None:
    """c = alpha · a b."""
    from cupy_backends.cuda.libs import cublas

    m, n = c.shape[-2:]
    k = a.array.shape[-2 if a.transposed else -1]
    batch = math.prod(c.shape[:-2])
    number = np.float64 if compute == FLOAT64 else np.float32
    one, zero = np.array(alpha, number), np.array(0, number)  # on the host, and read before the call returns
    kind = TYPES[a.array.dtype.name]
    cublas.gemmStridedBatchedEx(
        xp.cuda.device.get_cublas_handle(),
        TRANSPOSED if b.transposed else NORMAL, TRANSPOSED if a.transposed else NORMAL, n, m, k,
        one.ctypes.data,
        b.array.data.ptr, kind, b.array.shape[-1], b.stride,
        a.array.data.ptr, kind, a.array.shape[-1], a.stride,
        zero.ctypes.data,
        c.data.ptr, TYPES[c.dtype.name], n, m * n,
        batch, compute, BEST,
    )  # fmt: skip
