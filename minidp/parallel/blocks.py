"""Blocks: the pieces in which a rank sums gradients and updates w, each while it is in the cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minidp.backend import array_module, item, sums
from minidp.comm.reduction import sum_dtype
from minidp.nn import Layout
from minidp.optim import Optimizer
from minidp.parallel.buckets import runs
from minidp.parallel.slabs import Flat, Slabs

BLOCK_BYTES = 512 * 1024  # best of 32 KB to 4 MB: larger spills from L2, smaller is more Python than work
# A device has threads for all of it at once: there a block is all of a rank's slice that is of one group.


class Block(NamedTuple):
    """A piece of this rank's slice, within one parameter group: views made once, used every step."""

    lo: int
    hi: int
    group: int
    parts: list[Flat]  # every rank's gradients
    params: tuple[Flat, Flat]
    state: tuple[dict[str, Flat], dict[str, Flat]]
    mean: Flat  # work array: the sum, then the mean
    upper: tuple[Flat, ...]  # work arrays: sums of the tree of micro-shards above this rank's
    scratch: tuple[Flat, ...]


class Trouble(NamedTuple):
    """The first element whose sum is not finite, and the first rank that brought it (-1: only the sum is not)."""

    element: int
    rank: int
    value: float


def cut_blocks(
    layout: Layout,
    optimizer: Optimizer,
    slabs: Slabs,
    slices: list[tuple[int, int]],
    parts: list[Flat],
    upper: int,
) -> list[Block]:
    """A rank's ``slices`` of all buckets, in launch order, cut to blocks of one parameter group each.

    Args:
        parts: the gradients to be summed, every rank's.
        upper: work arrays needed besides ``mean``.
    """
    dtype, xp = np.dtype(layout.dtype), array_module(parts[0])
    length = BLOCK_BYTES // dtype.itemsize if xp is np else max(1, layout.size)
    work = xp.empty(length, sum_dtype(dtype))
    in_place = len(parts) == 1 and work.dtype == parts[0].dtype  # then the sum itself becomes the mean
    scratch = tuple(xp.empty(length, dtype) for _ in range(optimizer.scratch))
    levels = tuple(xp.empty(length, dtype) for _ in range(upper))
    blocks = []
    groups = [optimizer.group_of(segment.parameter) for segment in layout.segments]
    for start, stop, group in runs(layout, groups, slices):
        for lo in range(start, stop, length):
            hi = min(lo + length, stop)
            blocks.append(
                Block(
                    lo=lo,
                    hi=hi,
                    group=group,
                    parts=[part[lo:hi] for part in parts],
                    params=(slabs.params[0][lo:hi], slabs.params[1][lo:hi]),
                    state=tuple({k: v[i][lo:hi] for k, v in slabs.state.items()} for i in (0, 1)),  # type: ignore[arg-type]
                    mean=parts[0][lo:hi] if in_place else work[: hi - lo],
                    upper=tuple(array[: hi - lo] for array in levels),
                    scratch=tuple(array[: hi - lo] for array in scratch),
                )
            )
    return blocks


def sum_in_order(parts: Sequence[Flat], out: Flat) -> Flat:
    """Σ of ``parts``, first to last: in ``out``, and of its dtype; of one part perhaps that itself."""
    if len(parts) == 1:
        return parts[0] if parts[0].dtype == out.dtype else parts[0].astype(out.dtype)
    xp = array_module(out)
    if xp is np or not sums.in_order(parts, out):
        xp.add(parts[0], parts[1], out=out, dtype=out.dtype)
        for part in parts[2:]:
            xp.add(out, part, out=out)
    return out


def exact_scale(total: Any, dtype: np.dtype[Any]) -> float:
    """1/total where multiplying by it has the bits of dividing: for powers of two, far from the smallest numbers.

    Else 1: then it must be divided by. Fractions are always divided: a float among them would make them floats.
    """
    exact = type(total) is int and total & (total - 1) == 0 and dtype.itemsize >= 4 and not dtype.hasobject
    return 1 / total if exact else 1


def divided(summed: Flat, total: Any, out: Flat, dtype: np.dtype[Any]) -> Flat:
    """summed / total, in ``dtype``; ``out`` may be overwritten."""
    mean = summed if total == 1 else array_module(summed).divide(summed, total, out=out)
    return mean if mean.dtype == dtype else mean.astype(dtype)


def share_of_mean(gradient: Flat, total: Any, out: Flat) -> Flat:
    """gradient / total in ``out``; halves are divided in float32, where totals are exact."""
    array_module(out).divide(gradient, total, out=out, dtype=sum_dtype(out.dtype))
    return out


def looks_finite(flat: Flat) -> bool:
    """A look at all elements: their dot product with themselves, which is the cheapest. It may overflow where none
    is infinite, so that only True can be relied on. Waits for a device."""
    xp = array_module(flat)
    return math.isfinite(np.dot(flat, flat) if xp is np else item(xp.dot(flat, flat)))


def first_not_finite(flat: Flat) -> int:
    """The first element that is NaN or infinite; −1 if none is. Waits for a device."""
    if looks_finite(flat):
        return -1
    bad = ~array_module(flat).isfinite(flat)
    return int(item(bad.argmax())) if item(bad.any()) else -1


def find_trouble(block: Block, summed: Flat) -> list[Trouble]:
    """What is not finite in the sum of a block. Waits for a device."""
    if looks_finite(summed):
        return []
    bad = ~array_module(summed).isfinite(summed)
    if not item(bad.any()):
        return []
    first = int(item(bad.argmax()))
    values = [float(item(part[first])) for part in (*block.parts, summed)]
    at = next(i for i, value in enumerate(values) if not math.isfinite(value))
    return [Trouble(block.lo + first, at if at < len(block.parts) else -1, values[at])]
