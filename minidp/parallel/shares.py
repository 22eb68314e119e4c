"""Shares: of each bucket one slice is a rank's own. Where they are, what is kept of them, how they travel.

Slices begin where a piece of the norm begins (``buckets.slices``), so that a norm has the same bits for any number
of ranks; therefore they differ in length, and travel in rows that are padded to the longest of their bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from minidp.backend import to_numpy
from minidp.comm import Communicator
from minidp.comm.reduction import sum_dtype
from minidp.comm.work import Work
from minidp.nn import Layout
from minidp.optim import Optimizer
from minidp.parallel.blocks import BLOCK_BYTES
from minidp.parallel.buckets import Bucket, pieces, runs, slices
from minidp.parallel.norms import norm_on
from minidp.parallel.slabs import Flat, private


class Shares:
    """Every rank's slices of all buckets.

    An array of a rank's own share holds its slices one after the other, in the order of the layout, which is that
    of the pieces of the norm; buckets are numbered the other way.

    Attributes:
        of: for each bucket its (lo, hi) of each rank.
        mine: for each bucket this rank's.
        starts: for each bucket, where this rank's slice begins in an array of its share.
        size: elements of this rank's share.
    """

    def __init__(self, layout: Layout, buckets: Sequence[Bucket], rank: int, count: int) -> None:
        self.layout, self.rank, self.count = layout, rank, count
        self.of = [slices(layout, bucket, count) for bucket in buckets]
        self.mine = [everybodys[rank] for everybodys in self.of]
        ends = list(accumulate((hi - lo for lo, hi in reversed(self.mine)), initial=0))
        self.starts, self.size = ends[-2::-1], ends[-1]

    def width(self, k: int) -> int:
        """The longest slice of bucket ``k``."""
        return max(hi - lo for lo, hi in self.of[k])

    def views(self, flat: Flat) -> list[Flat]:
        """For each bucket this rank's slice, in an array of its share."""
        return [flat[at : at + hi - lo] for at, (lo, hi) in zip(self.starts, self.mine)]

    def take(self, whole: Flat, share: Flat) -> None:
        """Copy this rank's slices of ``whole``, which has all elements, to ``share``."""
        for (lo, hi), view in zip(self.mine, self.views(share)):
            view[...] = whole[lo:hi]

    def gathered(self, comm: Communicator, share: Flat) -> np.ndarray | None:
        """All elements, in an array of the host, on rank 0, of everybody's share; else None. Collective."""
        whole = np.zeros(self.layout.size, share.dtype) if self.rank == 0 else None
        for k, mine in enumerate(self.views(share)):
            part = np.zeros(self.width(k), share.dtype)
            part[: len(mine)] = to_numpy(mine)
            rows = comm.gather(part, 0)
            if rows is not None and whole is not None:
                for row, (lo, hi) in zip(rows, self.of[k]):
                    whole[lo:hi] = row[: hi - lo]
        return whole


class ShareNorm:
    """The squares of a gradient of which each rank has its share.

    Args:
        whole: whether that lies at its place in an array of all elements; else it is an array of the share.
    """

    def __init__(self, shares: Shares, xp: Any, whole: bool) -> None:
        layout = shares.layout
        everybodys = pieces(layout, 0, layout.size)
        self._xp, self._count, self._places = xp, len(everybodys), None
        if whole:
            self._norm = norm_on(xp, everybodys, shares.mine)
        else:
            moves = [(lo, hi, at - lo) for at, (lo, hi) in zip(shares.starts, shares.mine) if lo < hi]
            mine, place = [], []
            for i, (start, stop) in enumerate(everybodys):
                for lo, hi, by in moves:
                    if lo <= start < hi:
                        mine.append((start + by, stop + by))
                        place.append(i)
            self._norm = norm_on(
                xp, mine, [(at, at + hi - lo) for at, (lo, hi) in zip(shares.starts, shares.mine)]
            )
            self._places = xp.asarray(np.array(place, np.int64))
        self.clip_scale = self._norm.clip_scale

    def squares(self, flat: Flat) -> Flat:
        """Σ g² of this rank's pieces, 0 for others: float64, one for each piece of the layout."""
        if self._places is None:
            return self._norm.squares(flat)
        squares: Flat = self._xp.zeros(self._count, np.float64)
        if len(flat):
            squares[self._places] = self._norm.squares(flat)
        return squares


class Stretch(NamedTuple):
    """A piece of a rank's share within one parameter group: views made once, used every step."""

    group: int
    w: Flat
    gradient: Flat
    state: dict[str, Flat]
    work: Flat  # for a gradient of the dtype of w, where that of ``gradient`` is wider
    scratch: tuple[Flat, ...]


class Rows:
    """In what one bucket travels: a row for each rank's slice, and one for what comes back. One buffer for all
    buckets, gradients and parameters alike; the update borrows it for its work arrays.

    Args:
        comm: whose traffic is that of buckets alone.
        scratch: work arrays that the update needs.
    """

    def __init__(self, shares: Shares, comm: Communicator, dtype: np.dtype[Any], scratch: int) -> None:
        self.shares, self._comm, self._dtype = shares, comm, dtype
        widths = [shares.width(k) for k in range(len(shares.of))]
        wide, self._widest, count = sum_dtype(dtype), max(widths, default=0), shares.count
        self._flat = private(max(count + 1, scratch + 1) * self._widest, wide, comm.device)
        self.nbytes: int = self._flat.nbytes
        self._narrow = self._flat.view(dtype)
        self._sums = [_split(self._flat, count, width) for width in widths]
        self._parameters = [_split(self._narrow, count, width) for width in widths]
        self._filling: list[Flat] = []

    def clear(self, k: int) -> None:
        """Bucket ``k`` is to be filled: padding travels as zeros."""
        flat, _ = self._sums[k]
        flat[...] = 0
        self._filling = list(flat.reshape(self.shares.count, -1))

    def fill(self, k: int, lo: int, values: Flat) -> None:
        """Put ``values``, which begin at element ``lo`` of the layout, into bucket ``k``."""
        hi = lo + values.size
        for row, (start, stop) in zip(self._filling, self.shares.of[k]):
            first, last = max(lo, start), min(hi, stop)
            if first < last:
                row[first - start : last - start] = values[first - lo : last - lo]

    def filled(self, k: int) -> Flat:
        """All rows of bucket ``k``, flat, as they will travel."""
        return self._sums[k][0]

    def element(self, k: int, at: int) -> int:
        """Which element of the layout lies at ``filled(k)[at]``."""
        row, column = divmod(at, self.shares.width(k))
        return self.shares.of[k][row][0] + column

    def reduce(self, k: int) -> Work:
        """Begin the reduce-scatter of bucket ``k``; then ``summed(k)``. Collective."""
        rows, part = self._sums[k]
        work = self._comm.reduce_scatter(part, rows, async_op=True)
        assert work is not None
        return work

    def summed(self, k: int) -> Flat:
        """What has come back: the sum of my slice of bucket ``k``."""
        lo, hi = self.shares.mine[k]
        return self._sums[k][1][: hi - lo]

    def gather(self, k: int, w: Flat) -> None:
        """Give everybody my slice of bucket ``k`` of ``w``, and put theirs into it. Collective."""
        rows, part = self._parameters[k]
        lo, hi = self.shares.mine[k]
        part[: hi - lo] = w[lo:hi]
        part[hi - lo :] = 0
        self._comm.all_gather(rows, part)
        for rank, (row, (lo, hi)) in enumerate(zip(rows.reshape(self.shares.count, -1), self.shares.of[k])):
            if rank != self.shares.rank:
                w[lo:hi] = row[: hi - lo]

    def stretches(
        self, optimizer: Optimizer, w: Flat, gradients: list[Flat], state: dict[str, Flat]
    ) -> list[Stretch]:
        """This rank's share, cut to stretches that stay in the cache; on a device as long as may be.

        Args:
            gradients: for each bucket my slice of the summed gradient.
            state: arrays of the share.
        """
        shares, layout = self.shares, self.shares.layout
        longest = BLOCK_BYTES // self._dtype.itemsize if self._comm.device.on_host else max(1, self._widest)
        length = min(longest, self._widest)
        work, *scratch = (self._narrow[i * length : (i + 1) * length] for i in range(optimizer.scratch + 1))
        groups = [optimizer.group_of(segment.parameter) for segment in layout.segments]
        states = {slot: shares.views(flat) for slot, flat in state.items()}
        stretches = []
        for k, (lo, hi) in enumerate(shares.mine):
            for start, stop, group in runs(layout, groups, [(lo, hi)]):
                for first in range(start, stop, length):
                    n = min(length, stop - first)
                    at = slice(first - lo, first - lo + n)
                    own = {slot: views[k][at] for slot, views in states.items()}
                    spare = tuple(array[:n] for array in scratch)
                    stretches.append(Stretch(group, w[first : first + n], gradients[k][at], own, work[:n], spare))
        return stretches


def _split(flat: Flat, count: int, width: int) -> tuple[Flat, Flat]:
    """(``count`` rows, flat; one row more)"""
    return flat[: count * width], flat[count * width : (count + 1) * width]
