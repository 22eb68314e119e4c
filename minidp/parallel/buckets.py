"""Buckets: runs of neighbouring parameters whose gradients leave together, in a fixed order.

Backward fills gradients from the last layer to the first, so buckets are numbered from the end of the layout:
bucket 0 is complete first. They are launched in index order on every rank, whatever order the gradients came in
(Li et al., "PyTorch Distributed", VLDB 2020, section 3.2.3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from minidp.nn import Layout

PIECE = 1024  # elements: slices begin where a piece begins, and norms are summed piece by piece


@dataclass(frozen=True)
class Bucket:
    """Elements lo … hi of the flat gradient, whole segments."""

    index: int
    lo: int
    hi: int


def make_buckets(layout: Layout, cap_mb: float) -> list[Bucket]:
    """Cut the layout into buckets of at most ``cap_mb`` MB (2^20 bytes), at least one parameter each.

    ``cap_mb=0`` gives a bucket for each parameter.
    """
    if cap_mb < 0:
        raise ValueError(f"bucket_cap_mb={cap_mb}: give 0 (a bucket a parameter) or more")
    cap = cap_mb * 2**20 / layout.itemsize
    starts = [segment.offset for segment in layout.segments]
    ends = [*starts[1:], layout.size] if starts else []
    runs: list[tuple[int, int]] = []
    for lo, hi in zip(reversed(starts), reversed(ends)):
        if runs and runs[-1][1] - lo <= cap:
            runs[-1] = (lo, runs[-1][1])
        else:
            runs.append((lo, hi))
    return [Bucket(index, lo, hi) for index, (lo, hi) in enumerate(runs)]


def pieces(layout: Layout, lo: int, hi: int) -> list[tuple[int, int]]:
    """The pieces of at most 1024 elements between ``lo`` and ``hi``, cut from the start of each segment.

    They depend on the layout alone, not on the number of ranks or buckets: whatever is summed piece by piece
    gives the same bits for any N.
    """
    starts = [segment.offset for segment in layout.segments if lo <= segment.offset < hi]
    cuts: list[tuple[int, int]] = []
    for start, stop in zip(starts, [*starts[1:], hi]):
        cuts += [(at, min(at + PIECE, stop)) for at in range(start, stop, PIECE)]
    return cuts


def slices(layout: Layout, bucket: Bucket, count: int) -> list[tuple[int, int]]:
    """Cut a bucket into ``count`` contiguous slices of whole pieces, about equal; some may be empty."""
    cuts = [lo for lo, _ in pieces(layout, bucket.lo, bucket.hi)] + [bucket.hi]
    ideal = [bucket.lo + (bucket.hi - bucket.lo) * i / count for i in range(count + 1)]
    edges = [min(cuts, key=lambda cut, at=at: abs(cut - at)) for at in ideal]  # type: ignore[misc]
    return list(pairwise(edges))


def runs(
    layout: Layout, groups: Sequence[int], parts: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """(lo, hi, group) of ``parts``, neighbours of one parameter group joined; ``groups`` has one a segment."""
    segments = layout.segments
    ends = [*(segment.offset for segment in segments[1:]), layout.size]
    for lo, hi in parts:
        run: tuple[int, int, int] | None = None
        for segment, end, group in zip(segments, ends, groups):
            start, stop = max(lo, segment.offset), min(hi, end)
            if start >= stop:
                continue
            if run is not None and run[2] == group:
                run = (run[0], stop, group)
                continue
            if run is not None:
                yield run
            run = (start, stop, group)
        if run is not None:
            yield run
