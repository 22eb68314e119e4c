"""A timeline as a picture: what each rank did when, drawn with matplotlib."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from minidp.trace.lanes import NOTHING, Segment, Timeline, time_unit, timeline
from minidp.trace.page import annotate, can_draw, readable, save
from minidp.trace.recorder import Event

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# (bar, its text). Okabe and Ito's palette, whose colours stay apart for colour-blind readers; waiting is grey.
_COLOURS = {
    "compute": ("#0072B2", "white"),
    "wait": ("#D3D3D3", "#333333"),
    "communication": ("#E69F00", "black"),
    "data": ("#009E73", "white"),
}
_MORE_COLOURS = (("#CC79A7", "black"), ("#56B4E9", "black"), ("#F0E442", "black"))
_OTHER_COLOUR = ("#555555", "white")
_WIDTH, _LEFT, _RIGHT, _BOTTOM, _LEGEND, _TITLE = 10.0, 0.85, 0.3, 0.52, 0.36, 0.3  # inches
_POINTS = 72  # an inch
_TOP = -0.4  # of a lane's bars, from the middle of it


class _Bar(NamedTuple):
    start: float  # in units of the axis, as is `length`
    length: float
    top: float  # in lanes, downwards
    height: float
    event: Event


def plot_timeline(
    events: Iterable[Event],
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
    max_ranks: int = 64,
) -> Figure:
    """Draw a lane for each rank, and save the picture if `path` is given.

    Args:
        events: of any ranks, in any order; their clocks must share an origin. The first one starts at 0.
        path: a file whose suffix says the format (.png, .svg, .pdf, or .html: a page, on which one can point at a
            bar to read what it is); an existing one is overwritten.
        title: stands above the picture.
        max_ranks: the lowest ranks are shown, and the number of those left out is told.

    Of nested spans the innermost is seen. Events on a stream (``args["stream"]``) are thin bars in the lower part
    of their rank's lane. Names stand inside the bars that they fit into.

    Returns: the figure. It belongs to no window and to no pyplot state, and needs no display.

    Raises: ImportError without matplotlib.
    """
    can_draw("plot_timeline needs")
    from matplotlib.figure import Figure

    title = readable(title or "")
    line = timeline(
        (each._replace(name=readable(each.name), category=readable(each.category)) for each in events), max_ranks
    )
    lanes = max(1, len(line.lanes))
    lane_in = min(0.5, max(0.16, 4 / lanes))  # 8 ranks at full size; of 25 and more, the picture grows instead
    height = lanes * lane_in + _BOTTOM + _LEGEND + (_TITLE if title else 0)
    figure = Figure(figsize=(_WIDTH, height))
    left, right = _LEFT / _WIDTH, 1 - _RIGHT / _WIDTH
    axes = figure.add_axes((left, _BOTTOM / height, right - left, lanes * lane_in / height))
    if title:
        y = 1 - 0.12 / height
        figure.text(left, y, title, size=12, weight="bold", va="top", parse_math=False)
    if line.lanes:
        _frame(axes, line, lane_in * _POINTS)
        _draw(axes, line, lane_in * _POINTS)
    else:
        axes.set_axis_off()
        axes.text(0, 1, NOTHING, size=9, va="top", transform=axes.transAxes)
    thin = "thin bars: what ran on a stream, beside the rank itself" if _has_streams(line) else ""
    more = f"{line.left_out} more rank{'s' * (line.left_out > 1)} not shown" if line.left_out else ""
    for x, side, note in ((left, "left", thin), (right, "right", more)):
        if note:
            figure.text(x, 0.12 / height, note, size=8, color="#555555", ha=side)
    if path is not None:
        save(figure, path, title, "Timeline: a lane for each rank, and in it what it did when", dpi=150)
    return figure


def _own_height(line: Timeline) -> float:
    return 0.52 if _has_streams(line) else 0.8


def _has_streams(line: Timeline) -> bool:
    return any(lane.stream for lane in line.lanes)


def _frame(axes: Axes, line: Timeline, lane_pt: float) -> None:
    unit_s, unit = time_unit(line.duration_s)
    axes.set_xlim(0, line.duration_s / unit_s)
    axes.set_xlabel(f"time [{unit}]", size=9)
    axes.set_ylim(len(line.lanes) - 0.5, -0.5)  # rank 0 on top
    middle = _TOP + _own_height(line) / 2
    axes.set_yticks(
        [i + middle for i in range(len(line.lanes))],
        [f"rank {lane.rank}" for lane in line.lanes],
        size=min(9, 0.75 * lane_pt),
    )
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=9, color="#999999")
    axes.grid(axis="x", color="#E8E8E8", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")


def _draw(axes: Axes, line: Timeline, lane_pt: float) -> None:
    """All bars of a colour are one collection: thousands of them are drawn at once."""
    from matplotlib.collections import PolyCollection

    _, end = axes.get_xlim()
    point = end / ((_WIDTH - _LEFT - _RIGHT) * _POINTS)  # its length on the time axis
    more = [c for c in line.categories if c not in _COLOURS]
    colours = _COLOURS | dict(zip(more, _MORE_COLOURS))
    bars: dict[str, list[_Bar]] = {c: [] for c in line.categories if c in colours}
    for bar in _bars(line, line.duration_s / end):
        category = bar.event.category
        bars.setdefault(category if category in colours else "other", []).append(bar)
    for label, of_label in bars.items():
        colour, ink = colours.get(label, _OTHER_COLOUR)
        edges = [min(0.8, 0.1 * bar.length / point) for bar in of_label]  # white ones part neighbours
        drawn = PolyCollection(
            [_corners(bar) for bar in of_label],
            facecolors=colour,
            edgecolors="white",
            linewidths=edges,
            label=label,
        )
        annotate(drawn, [_note(bar.event, line.start_s) for bar in of_label])
        axes.add_collection(drawn, autolim=False)
        for bar in of_label:
            size = min(8, 0.8 * bar.height * lane_pt)
            # 0.62 em is more than the mean width of a letter.
            if size >= 5 and (0.62 * size * len(bar.event.name) + 4) * point <= bar.length:
                axes.text(
                    bar.start + bar.length / 2,
                    bar.top + bar.height / 2,
                    bar.event.name,
                    size=size,
                    color=ink,
                    ha="center",
                    va="center_baseline",
                    parse_math=False,
                )
    above = 1 + 6 / (len(line.lanes) * lane_pt)  # 6 points
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, above),
        ncols=len(bars),
        frameon=False,
        fontsize=9,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
    )


def _bars(line: Timeline, unit_s: float) -> Iterator[_Bar]:
    height = _own_height(line)
    for i, lane in enumerate(line.lanes):
        yield from (_bar(s, line, unit_s, i + _TOP, height) for s in lane.own)
        yield from (_bar(s, line, unit_s, i + 0.16, 0.24) for s in lane.stream)


def _bar(s: Segment, line: Timeline, unit_s: float, top: float, height: float) -> _Bar:
    return _Bar((s.start_s - line.start_s) / unit_s, s.duration_s / unit_s, top, height, s.event)


def _note(event: Event, origin_s: float) -> str:
    """What a bar is, in words."""
    (duration, unit), (start, of_start) = _told(event.duration_s), _told(event.start_s - origin_s)
    kind = "" if event.category == event.name else f" ({event.category})"
    return f"rank {event.rank}: {event.name}{kind}, {duration} {unit}, from {start} {of_start} on"


def _told(duration_s: float) -> tuple[str, str]:
    unit_s, unit = time_unit(duration_s, digits=3)
    return (f"{duration_s / unit_s:.3g}", unit) if duration_s else ("0", "s")


def _corners(bar: _Bar) -> list[tuple[float, float]]:
    right, bottom = bar.start + bar.length, bar.top + bar.height
    return [(bar.start, bar.top), (right, bar.top), (right, bottom), (bar.start, bottom)]
