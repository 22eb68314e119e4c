"""How values of several ranks become one: the operations, and their sums in order of rank."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from minidp.backend import array_module, sums

Array = npt.NDArray[Any]


class ReduceOp(Enum):
    """How values of several ranks become one. AVG is the sum over ranks divided by their number."""

    SUM = "sum"
    AVG = "avg"
    MAX = "max"
    MIN = "min"

    @cached_property
    def ufunc(self) -> np.ufunc:
        """How two values become one (AVG divides afterwards)."""
        return {"sum": np.add, "avg": np.add, "max": np.maximum, "min": np.minimum}[self.value]

    __hash__ = object.__hash__  # members are singletons; Enum's own hash is Python code on every lookup


SUM, AVG, MAX, MIN = ReduceOp.SUM, ReduceOp.AVG, ReduceOp.MAX, ReduceOp.MIN


def is_half(dtype: np.dtype[Any]) -> bool:
    """float16 or bfloat16: sums of them are made in float32."""
    return dtype.itemsize == 2 and dtype.name in ("float16", "bfloat16")


def sum_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """In which numbers of this dtype are summed and divided: wide enough."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def fold(parts: Sequence[Array], op: ReduceOp, out: Array, divide: bool = False) -> None:
    """``out`` = parts[0] ∘ parts[1] ∘ …, left to right; half precision is added in float32.

    With ``divide`` and AVG the sum is divided by the number of parts (half precision before it is rounded back).
    ``out`` may be parts[0] or parts[1], no later one.
    """
    average, ufunc, xp = divide and op is AVG, op.ufunc, np
    if type(out) is not np.ndarray:
        xp = array_module(out)
        if ufunc is np.add and sums.in_order(parts, out, len(parts) if average else 1):
            return
        ufunc = getattr(xp, ufunc.__name__)
    if is_half(out.dtype) and op.ufunc is np.add:
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            ufunc(total, part, out=total)
        out[...] = total / len(parts) if average else total
        return
    if len(parts) == 1:
        out[...] = parts[0]
    else:
        ufunc(parts[0], parts[1], out=out)
        for part in parts[2:]:
            ufunc(out, part, out=out)
    if average:
        xp.divide(out, len(parts), out=out)


def finish(x: Array, op: ReduceOp, world_size: int) -> None:
    """The division of an average, after a sum of several steps."""
    if op is AVG:
        np.divide(x, world_size, out=x)


def check_op(op: Any, dtype: np.dtype[Any]) -> None:
    """Refuse what is no ReduceOp, and averages of whole numbers: the division would silently round."""
    if not isinstance(op, ReduceOp):
        raise TypeError(f"op={op!r}: give one of ReduceOp.{', ReduceOp.'.join(ReduceOp.__members__)}")
    if op is AVG and dtype.kind in "biu":
        raise TypeError(f"AVG of {dtype}: an average of integers would be rounded; use SUM and divide, or floats")


def check_array(x: Any, writes: bool) -> Array:
    """``x``; refuse what is no array (a NumPy scalar looks like one, but nothing can be written to it)."""
    if not isinstance(x, np.ndarray) or isinstance(x, np.matrix):
        raise TypeError(f"an array is needed, not {type(x).__name__}: make one by np.asarray(x) and keep it")
    if writes and not x.flags.writeable:
        raise ValueError(f"the result can't be written to a read-only array ({x.dtype} {x.shape}): give a copy")
    return x
