"""Sums over ranks on a device, in one pass over all parts, where kernels run; see ``sums.cu``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minidp.backend.arrays import Array, array_module
from minidp.backend.kernels import THREADS, Kernels

KERNELS = Kernels(Path(__file__).with_name("sums.cu"), "sum_in_order", "look", "sum_runs", "sum_squares")
AT_ONCE = 8  # parts of one pass


def in_order(parts: Sequence[Array], out: Array, divisor: float = 1) -> bool:
    """out = (parts[0] + parts[1] + …) / divisor, first to last; False, and nothing done, where no kernel does it.

    All are contiguous arrays of one shape and of float32 or float64; ``out`` may be any of the first eight parts.
    Bits as by adding one after the other. Cost: each part is read once, ``out`` written.
    """
    kernels = KERNELS.on(array_module(out), out.dtype)
    if kernels is None or any(part.dtype != out.dtype for part in parts):
        return False
    todo = list(parts)
    while todo:
        now, todo = todo[:AT_ONCE], todo[AT_ONCE:]
        kernels.each("sum_in_order", out.size, out, len(now), 1.0 if todo else float(divisor), *_eight(now))
        if todo:
            todo.insert(0, out)
    return True


def look(summed: Array, parts: Sequence[Array], first: int, offset: int, found: Array) -> bool:
    """See whether a sum is finite, and if not, whose part is not; False, and nothing done, where no kernel does.

    Args:
        summed: shape (n,).
        parts: of which it is the sum, of rank ``first`` and of those that follow.
        offset: the number of its first element.
        found: int64, shape (1,): becomes the smallest *code* (``sums.cu``) of an element that is not finite,
            unless a smaller number is there.
    """
    kernels = KERNELS.on(array_module(summed), summed.dtype)
    if kernels is None or any(part.dtype != summed.dtype for part in parts):
        return False
    for at in range(0, len(parts), AT_ONCE):
        now = parts[at : at + AT_ONCE]
        kernels.each("look", summed.size, summed, offset, found, first + at, len(now), *_eight(now))
    return True


def of_squares(x: Array, starts: Array, stops: Array, places: Array, squares: Array) -> bool:
    """squares[places[k]] = Σ x² of elements starts[k] … stops[k] − 1, in float64; False where no kernel does."""
    kernels = KERNELS.on(array_module(x), x.dtype)
    if kernels is not None:
        kernels.blocks("sum_squares", starts.size, THREADS, x, starts, stops, places, squares)
    return kernels is not None


def add_at(out: Array, places: Array, values: Array) -> bool:
    """out.ravel()[places] += values, also where a place occurs twice, in order of the values; ``out`` is zeros.

    Without atomic additions: places are sorted, and runs of equal ones summed. False where no kernel does it.
    """
    xp = array_module(out)
    kernels = KERNELS.on(xp, out.dtype)
    if kernels is not None and places.size:
        places, values = places.reshape(-1), xp.ascontiguousarray(values).reshape(-1)
        order = xp.argsort(places, kind="stable")
        kernels.each("sum_runs", places.size, places[order], order, values, out)
    return kernels is not None


def _eight(parts: Sequence[Array]) -> list[Array]:
    """As many pointers as a kernel takes; what is not there is not read."""
    return [*parts, *[parts[0]] * (AT_ONCE - len(parts))]
