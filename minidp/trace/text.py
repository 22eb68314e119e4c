"""A timeline as text: what each rank did when, for terminals, logs and tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from minidp.trace.lanes import (
    NOTHING,
    Segment,
    Timeline,
    categories,
    overlapped_s,
    seconds,
    time_unit,
    timeline,
)
from minidp.trace.recorder import Event

_GLYPHS = {"compute": "█", "wait": "·", "communication": "▒", "data": "="}
_MORE_GLYPHS = "+ox#*%@&"  # for other categories, then "?"
_LINE = 80  # of a usual terminal: the shares then stand closer
_TICKS = 1000  # a cell: times are rounded to them, so that rounding errors of clocks never fill a cell


def as_text(events: Iterable[Event], width: int = 72, max_ranks: int = 64) -> str:
    """A lane for each rank, `width` cells from the first event's start to the last one's end; then the shares.

    Args:
        events: of any ranks, in any order; their clocks must share an origin.
        width: cells of a lane; a rank's label and two borders come in addition.
        max_ranks: the lowest ranks are shown, and the number of those left out is told.

    A cell shows the category that took most of its time (of equal ones, the first in the legend), and is blank
    only if nothing was recorded in it: a short event between gaps is seen. Where spans nest, the innermost counts.
    Events on a stream (``args["stream"]``) have a lane of their own below their rank's.

    Shares are of the whole time shown. A rank's own ones, with what is "unrecorded", add up to 100 %. "stream" is
    counted apart, and "overlapped" is the part of it that goes on while the rank computes.

    The text depends on the events alone. Their order matters only between spans of the same start and end.
    """
    if width < 1:
        raise ValueError(f"width={width}: a lane needs at least one cell")
    line = timeline(events, max_ranks)
    if not line.lanes:
        return NOTHING
    more = iter(_MORE_GLYPHS)
    glyphs = {c: _GLYPHS.get(c) or next(more, "?") for c in line.categories}
    rows = []
    for lane in line.lanes:
        rows.append((f"rank {lane.rank}", lane.own))
        if lane.stream:
            rows.append(("  stream", lane.stream))
    margin = max(len(label) for label, _ in rows)
    parts = [
        f"{'':{margin}}  0 {_duration(line.duration_s):>{max(width - 2, 0)}}",
        *(f"{label:{margin}} │{_cells(segments, line, width, glyphs)}│" for label, segments in rows),
        "",
        "   ".join([*(f"{glyph} {category}" for category, glyph in glyphs.items()), "blank: nothing recorded"]),
        "",
        *_shares(line),
    ]
    if line.left_out:
        parts += ["", f"{line.left_out} more rank{'s' * (line.left_out > 1)} not shown (max_ranks={max_ranks})"]
    return "\n".join(parts)


def _cells(segments: Sequence[Segment], line: Timeline, width: int, glyphs: dict[str, str]) -> str:
    spent: list[Counter[str]] = [Counter() for _ in range(width)]  # ticks by category
    for s in segments:
        lo, hi = (round((t - line.start_s) / line.duration_s * width * _TICKS) for t in (s.start_s, s.end_s))
        while lo < hi:
            cell = lo // _TICKS
            end = min(hi, (cell + 1) * _TICKS)
            spent[cell][s.event.category] += end - lo
            lo = end
    return "".join(glyphs[max(glyphs, key=cell.__getitem__)] if cell else " " for cell in spent)


def _shares(line: Timeline) -> list[str]:
    """A table with a row for each rank, and how to read its last columns."""

    def percent(duration_s: float) -> str:
        return f"{100 * duration_s / line.duration_s:.1f}"

    own = [seconds(lane.own) for lane in line.lanes]
    columns = [
        [f"% of {_duration(line.duration_s)}", *(f"rank {lane.rank}" for lane in line.lanes)],
        *([c, *(percent(s.get(c, 0.0)) for s in own)] for c in categories(s for x in line.lanes for s in x.own)),
    ]
    rest = [percent(max(0.0, line.duration_s - sum(s.values()))) for s in own]
    if any(number != "0.0" for number in rest):
        columns.append(["unrecorded", *rest])
    notes = []
    if any(lane.stream for lane in line.lanes):
        stream = [sum(seconds(lane.stream).values()) for lane in line.lanes]
        columns.append(["stream", *map(percent, stream)])
        columns.append(["overlapped", *(percent(overlapped_s(lane)) for lane in line.lanes)])
        notes = ["", "stream: what ran beside the rank itself; overlapped: the part of that during compute"]
    widths = [max(map(len, column)) for column in columns]
    gap = "   " if sum(widths) + 3 * (len(widths) - 1) <= _LINE else "  "
    rows = (
        gap.join([f"{label:{widths[0]}}", *(f"{x:>{w}}" for x, w in zip(cells, widths[1:]))])
        for label, *cells in zip(*columns)
    )
    return [*rows, *notes]


def _duration(duration_s: float) -> str:
    unit_s, unit = time_unit(duration_s)
    number = duration_s / unit_s
    return f"{number:.0f} {unit}" if number >= 1000 else f"{number:.4g} {unit}"
