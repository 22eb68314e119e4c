"""How values of several ranks become one: the operations, and their sums in order of rank."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

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


def fold(parts: Sequence[Array], op: ReduceOp, out: Array) -> None:
    """``out`` = parts[0] ∘ parts[1] ∘ …, left to right, half precision in float32. AVG's division is apart.

    ``out`` may be parts[0] or parts[1], no later one.
    """
    ufunc = op.ufunc
    if len(parts) == 1:
        if out is not parts[0]:
            out[...] = parts[0]
    elif is_half(out.dtype) and ufunc is np.add:
        total = parts[0].astype(np.float32)
        for part in parts[1:]:
            np.add(total, part, out=total)
        out[...] = total
    else:
        ufunc(parts[0], parts[1], out=out)
        for part in parts[2:]:
            ufunc(out, part, out=out)


def finish(x: Array, op: ReduceOp, world_size: int) -> None:
    """The division of an average, after the sum."""
    if op.value == "avg":
        np.divide(x, world_size, out=x)


def check_average(dtype: np.dtype[Any], op: ReduceOp) -> None:
    """Averages of whole numbers are refused: the division would silently round."""
    if op.value == "avg" and dtype.kind in "biu":
        raise TypeError(f"AVG of {dtype}: an average of integers would be rounded; use SUM and divide, or floats")
