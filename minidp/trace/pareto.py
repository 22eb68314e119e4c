"""Choices beside each other as a picture: what each is worth against what it costs, and the Pareto front."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from minidp.trace.curves import AXIS, DPI, INK, STYLES, frame
from minidp.trace.lanes import time_unit
from minidp.trace.page import can_draw, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_WIDTH, _HEIGHT = 11.0, 4.8  # inches
_COLOURS = [colour for colour, _ in STYLES]
_MARKER = 7.0  # points, as are the next two
_PLACES = [(x, y) for x in (0, 1, -1) for y in (0, 1, -1) if (x, y) != (0, 0)]
_REACHES = (10.0, 17.0, 25.0, 34.0, 44.0, 56.0, 70.0)  # from a point to the nearest edge of its name
_ROUNDS = 4
_FRONT = "front"


class Choice(NamedTuple):
    """One point: ``costs`` are (bytes, seconds), both positive; ``worth`` a part of 1, such as an accuracy."""

    name: str
    costs: tuple[float, float]
    worth: float
    kind: str
    """Choices of a kind have a colour."""
    solid: bool
    """A full point, or a ring."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of (cost, worth) are on the Pareto front, from the cheapest on.

    Those for which no other is at least as good in both and better in one. Equal ones are on it together.
    """
    found = [
        at
        for at, (cost, worth) in enumerate(points)
        if not any(c <= cost and w >= worth and (c, w) != (cost, worth) for c, w in points)
    ]
    return sorted(found, key=lambda at: points[at])


def plot_pareto(
    choices: Sequence[Choice],
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
    solid: tuple[str, str] = ("", ""),
) -> Figure:
    """Draw worth against bytes, and against seconds, with the front of each: two panels that share an axis.

    Args:
        choices: one or more; names are written beside their points.
        path: a file whose suffix says the format (.png, .svg, .pdf, .html); an existing one is overwritten.
        title: stands above the picture.
        solid: what full points are, and what rings are, for the legend.

    Returns: the figure. It belongs to no window and to no pyplot state, and needs no display.

    Raises: ImportError without matplotlib; ValueError without choices.
    """
    if not choices:
        raise ValueError("plot_pareto: there is nothing to draw, give at least one choice")
    can_draw("plot_pareto needs")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, _HEIGHT))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1, wspace=0.04)
    if title:
        figure.suptitle(title, size=12, weight="bold", x=0.02, ha="left", parse_math=False)
    left, right = figure.subplots(1, 2, sharey=True)
    unit_s, unit = time_unit(max(choice.costs[1] for choice in choices), digits=2)
    names = [
        _draw(left, choices, [choice.costs[0] for choice in choices], "sent by a rank in a step [bytes]"),
        _draw(right, choices, [choice.costs[1] / unit_s for choice in choices], f"time of the training [{unit}]"),
    ]
    left.set_title("test accuracy", size=10, loc="left", color=INK)
    _legend(left, choices, solid)
    figure.draw_without_rendering()  # now everything has its place
    for axes, of_axes in zip((left, right), names):
        _place(axes, of_axes)
    if path is not None:
        save(figure, path, title, "Test accuracy against bytes, and against time, of each choice", DPI)
    return figure


def _draw(axes: Axes, choices: Sequence[Choice], costs: Sequence[float], label: str) -> list[Annotation]:
    """Points, front and axes of a panel; the names, which have no place yet."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, StrMethodFormatter

    frame(axes, "both")
    axes.set_xscale("log")
    axes.margins(x=0.12, y=0.14)
    points = [(cost, choice.worth) for cost, choice in zip(costs, choices)]
    best = [points[at] for at in front(points)]
    corners = [best[0], *(corner for here, then in pairwise(best) for corner in ((then[0], here[1]), then))]
    axes.plot(*zip(*corners), color=AXIS, linewidth=1.0, zorder=1.5, gid=_FRONT)
    colours = _colours(choices)
    names = []
    for point, choice in zip(points, choices):
        colour = colours[choice.kind]
        face = colour if choice.solid else "white"
        axes.plot(
            *point, "o", markersize=_MARKER, color=colour, markerfacecolor=face, markeredgewidth=1.6, zorder=3
        )
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 0.5, "shrinkB": 4.0}
        weight = "bold" if point in best else "normal"
        name = axes.annotate(
            choice.name,
            point,
            (0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            size=9,
            weight=weight,
            color=colour,
            arrowprops=line,
            zorder=4,
        )
        name.set_in_layout(False)
        names.append(name)
    low, high = axes.get_xlim()
    few, many = (1, 2, 5) if high < 1000 * low else (1,), (1, 1.5, 2, 3, 4, 5, 7)
    axes.xaxis.set_major_locator(LogLocator(subs=many if high < 20 * low else few, numticks=20))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if high > 100 else "{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda worth, _: f"{100 * worth:g}%"))
    axes.set_xlabel(label, size=9, color=INK)
    return names


def _colours(choices: Sequence[Choice]) -> dict[str, str]:
    kinds = dict.fromkeys(choice.kind for choice in choices)
    return {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(kinds)}


def _legend(axes: Axes, choices: Sequence[Choice], solid: tuple[str, str]) -> None:
    from matplotlib.lines import Line2D

    def dot(marker: str, colour: str, face: str, label: str) -> Line2D:
        return Line2D(
            [],
            [],
            marker=marker,
            linestyle="",
            markersize=_MARKER,
            color=colour,
            markerfacecolor=face,
            label=label,
        )

    handles = [dot("s", colour, colour, kind) for kind, colour in _colours(choices).items()]
    handles += [dot("o", INK, face, label) for face, label in zip((INK, "white"), solid) if label]
    handles.append(Line2D([], [], color=AXIS, linewidth=1.0, label="Pareto front"))
    axes.legend(handles=handles, frameon=False, fontsize=9, handlelength=1.2, labelcolor=INK, loc="best")


# --- names beside points, none upon another ---------------------------------------------------------------------


def _place(axes: Axes, names: list[Annotation]) -> None:
    """Give each name the nearest place at its point that is free. A name that is far gets a line to its point."""
    from matplotlib.transforms import Bbox

    scale = axes.figure.dpi / 72  # pixels of a point
    room = axes.get_window_extent()
    at = [tuple(axes.transData.transform(name.xy)) for name in names]
    half = (_MARKER / 2 + 1.5) * scale
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half) for x, y in at]
    if (legend := axes.get_legend()) is not None:
        taken.append(legend.get_window_extent())
    sizes = [name.get_window_extent() for name in names]
    lines = [
        Bbox([start, end]).padded(1)
        for line in axes.get_lines()
        if line.get_gid() == _FRONT
        for start, end in pairwise(axes.transData.transform(line.get_xydata()))
    ]
    boxes: dict[int, Bbox] = {}
    for _ in range(_ROUNDS):  # again: those that came later may have left room
        for i, (x, y) in enumerate(at):
            others = [*taken, *(box for j, box in boxes.items() if j != i)]
            choices = list(_around(x, y, sizes[i], scale))
            costs = [
                disliked + _trouble(box, others, lines, room) + _hidden_by_line((x, y), box, boxes, i)
                for disliked, box in choices
            ]
            boxes[i] = choices[costs.index(min(costs))][1]
    for i, name in enumerate(names):
        box, (x, y) = boxes[i], at[i]
        name.set_position(((box.x0 + box.x1 - 2 * x) / 2 / scale, (box.y0 + box.y1 - 2 * y) / 2 / scale))
        dx, dy = max(box.x0 - x, x - box.x1, 0.0), max(box.y0 - y, y - box.y1, 0.0)
        if name.arrow_patch is not None:
            name.arrow_patch.set_visible(max(dx, dy) > (_REACHES[0] + 3) * scale)


def _around(x: float, y: float, size: Bbox, scale: float) -> Iterator[tuple[float, Bbox]]:
    """(how much it is disliked, box) of the places around a point: near ones first, and beside it."""
    from matplotlib.transforms import Bbox

    for reach in _REACHES:
        for across, up in _PLACES:
            askew = bool(across and up)
            far = reach * scale * (0.7 if askew else 1.0)
            cx, cy = x + across * (far + size.width / 2), y + up * (far + size.height / 2)
            corner = (cx - size.width / 2, cy - size.height / 2, cx + size.width / 2, cy + size.height / 2)
            yield reach + 3 * askew, Bbox.from_extents(*corner)


def _trouble(box: Bbox, others: Sequence[Bbox], lines: Sequence[Bbox], room: Bbox) -> float:
    """How much a name there hides, or leaves the panel: worse than any reach; than most, to lie on the front."""
    hidden = sum(_common(box.padded(1.5), other) for other in others)
    outside = float(max(room.x0 - box.x0, box.x1 - room.x1, room.y0 - box.y0, box.y1 - room.y1, 0.0))
    crossed = any(_common(box, line) for line in lines)
    return 100 * bool(hidden or outside) + hidden + 20 * outside + 12 * crossed


def _hidden_by_line(point: tuple[float, float], box: Bbox, boxes: dict[int, Bbox], own: int) -> float:
    """What it is worth that the line from a name to its point crosses no other name."""
    (x, y), (cx, cy) = point, ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    steps = [(x + (cx - x) * part / 16, y + (cy - y) * part / 16) for part in range(17)]
    return 30.0 * any(other.contains(*step) for j, other in boxes.items() if j != own for step in steps)


def _common(a: Bbox, b: Bbox) -> float:
    """Square pixels that both cover."""
    across, up = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(0.0, across) * max(0.0, up))
