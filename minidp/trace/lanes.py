"""Timelines: the events of each rank cut into lanes, in which one thing happens at a time."""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from minidp.trace.recorder import Event

CATEGORIES = ("compute", "wait", "communication", "data")  # the field's usual ones, in order of their legend
NOTHING = "Nothing to show: no event that took any time was recorded."


class Segment(NamedTuple):
    """A stretch of time in which `event` is the innermost one."""

    start_s: float
    end_s: float
    event: Event

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Lane(NamedTuple):
    """What a rank did itself, and what went on beside that on its streams."""

    rank: int
    own: list[Segment]
    stream: list[Segment]


class Timeline(NamedTuple):
    """Lanes in order of rank. The time, and the number of ranks `left_out`, are those of all events."""

    start_s: float
    end_s: float
    lanes: list[Lane]
    left_out: int

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def categories(self) -> list[str]:
        """All that are seen, in order of their legend."""
        return categories(s for lane in self.lanes for s in (*lane.own, *lane.stream))


def innermost(events: Iterable[Event], waits_last: bool = False) -> list[Segment]:
    """Cut spans that nest or overlap into segments, each of which belongs to the innermost span there.

    That is the one that started last; of those, the shorter; of equal ones, the first in `events`, since
    recorders put a nested span before its parent. Segments are disjoint, in order of time, and cover exactly
    what the spans cover. Spans without a duration have none. Cost: O(n log n).

    ``waits_last``: a wait has only the time in which nothing else goes on. For spans of several streams, which do
    not nest: one that waits must not hide another one's message.
    """
    # Of spans that are open at the same time, the innermost comes first.
    ordered = sorted((e for e in events if e.end_s > e.start_s), key=lambda e: (-e.start_s, e.end_s))
    segments: list[Segment] = []
    # A heap of (later, position): the innermost span is on top, and below it, ended ones may lie.
    open_: list[tuple[bool, int]] = []
    for position in reversed(range(len(ordered))):
        heappush(open_, (waits_last and ordered[position].category == "wait", position))
        now = ordered[position].start_s
        next_s = ordered[position - 1].start_s if position else inf
        while open_ and now < next_s:
            event = ordered[open_[0][1]]
            if event.end_s <= now:
                heappop(open_)
            else:
                end_s = min(event.end_s, next_s)
                if segments and segments[-1].event is event and segments[-1].end_s == now:
                    now = segments.pop().start_s  # it goes on: what has begun meanwhile waits
                segments.append(Segment(now, end_s, event))
                now = end_s
    return segments


def timeline(events: Iterable[Event], max_ranks: int) -> Timeline:
    """The lanes of the first `max_ranks` ranks. Events that took no time can't be seen, and are left aside.

    An event whose ``args["stream"]`` is a name ran beside what the rank did itself, such as a bucket of gradients
    that is reduced while backward goes on. All streams of a rank share one lane.
    """
    if max_ranks < 1:
        raise ValueError(f"max_ranks={max_ranks}: at least one rank must be shown")
    seen = [e for e in events if e.end_s > e.start_s]
    by_rank: dict[int, list[Event]] = {}
    for event in seen:
        by_rank.setdefault(event.rank, []).append(event)
    lanes = []
    for rank in sorted(by_rank)[:max_ranks]:
        own = [e for e in by_rank[rank] if e.args.get("stream") is None]
        beside = [e for e in by_rank[rank] if e.args.get("stream") is not None]
        lanes.append(Lane(rank, innermost(own), innermost(beside, waits_last=True)))
    start_s, end_s = min((e.start_s for e in seen), default=0.0), max((e.end_s for e in seen), default=0.0)
    return Timeline(start_s, end_s, lanes, len(by_rank) - len(lanes))


def categories(segments: Iterable[Segment]) -> list[str]:
    """Those that occur, the usual ones first, the others in alphabetical order."""
    found = {s.event.category for s in segments}
    return [c for c in CATEGORIES if c in found] + sorted(found - set(CATEGORIES))


def seconds(segments: Iterable[Segment]) -> dict[str, float]:
    """category → time in seconds."""
    total: dict[str, float] = {}
    for s in segments:
        total[s.event.category] = total.get(s.event.category, 0.0) + s.duration_s
    return total


def overlapped_s(lane: Lane) -> float:
    """Seconds in which something goes on on a stream while the rank itself computes: what overlap hides."""
    compute = [s for s in lane.own if s.event.category == "compute"]
    total, i, j = 0.0, 0, 0
    while i < len(compute) and j < len(lane.stream):
        a, b = compute[i], lane.stream[j]
        total += max(0.0, min(a.end_s, b.end_s) - max(a.start_s, b.start_s))
        if a.end_s < b.end_s:
            i += 1
        else:
            j += 1
    return total


def time_unit(duration_s: float, digits: int = 4) -> tuple[float, str]:
    """(seconds, name) of the unit in which a duration is best told in so many digits: s, ms, µs or ns."""
    for unit_s, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if duration_s >= (1 - 0.5 * 10.0**-digits) * unit_s:  # what is less does not round up to 1
            return unit_s, name
    return 1e-9, "ns"
