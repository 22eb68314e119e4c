"""Runs beside each other as a picture: loss against time, and how stale their gradients were."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from minidp.trace.lanes import time_unit
from minidp.trace.page import can_draw, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, whose colours stay apart for colour-blind readers; dashes tell apart what coincides.
Style = tuple[str, Any]  # colour, dashes as matplotlib has them
STYLES: tuple[Style, ...] = (
    ("black", "-"),
    ("#E69F00", (0, (4, 2))),
    ("#009E73", "-"),
    ("#0072B2", "-"),
    ("#D55E00", (0, (1.5, 1))),
    ("#CC79A7", (0, (6, 2, 1.5, 2))),
    ("#56B4E9", "-"),
)
INK, _GRID, AXIS = "#333333", "#E8E8E8", "#999999"
_WIDTH, _HEIGHT, DPI = 10.0, 4.2, 150  # inches
_REST = 0.005  # of all gradients: what is rarer than that is put into the last bar


def plot_curves(
    losses: Mapping[str, Sequence[tuple[float, float]]],
    staleness: Mapping[str, Mapping[int, int]],
    path: str | os.PathLike[str] | None = None,
    title: str | None = None,
    clock: str = "time",
    names: Sequence[str] = (),
    unit: str | None = None,
) -> Figure:
    """Draw (seconds, loss) of each run, and beside it the histogram of {τ: gradients} of those that have one.

    Args:
        losses: by name, in order of time; losses are positive. A run has the same colour in both pictures.
        staleness: by the same names; without any that has gradients, there is no histogram. Bars are parts of a
            run's gradients; the last ones stand for all that are later still.
        path: a file whose suffix says the format (.png, .svg, .pdf, .html); an existing one is overwritten.
        title: stands above the picture.
        clock: what the time is called; "": nothing but its unit.
        unit: what the first figures of the pairs are, if not seconds, such as "steps".
        names: all that there may be in such pictures, so that a run looks the same in each of them.

    Returns: the figure. It belongs to no window and to no pyplot state, and needs no display.

    Raises: ImportError without matplotlib.
    """
    can_draw("plot_curves needs")
    from matplotlib.figure import Figure

    styles = {name: STYLES[i % len(STYLES)] for i, name in enumerate(dict.fromkeys([*names, *losses]))}
    shown = {name: counts for name, counts in staleness.items() if sum(counts.values())}
    figure = Figure(figsize=(_WIDTH if shown else 0.62 * _WIDTH, _HEIGHT))
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1, wspace=0.06)
    if title:
        figure.suptitle(title, size=12, weight="bold", x=0.02, ha="left", parse_math=False)
    left, *right = figure.subplots(1, 1 + bool(shown), squeeze=False, width_ratios=(3, 2)[: 1 + bool(shown)])[0]
    _draw_losses(left, losses, styles, clock, unit)
    for axes in right:
        _draw_staleness(axes, shown, styles)
    if path is not None:
        save(figure, path, title, "Curves of the training loss", DPI)
    return figure


def _draw_losses(
    axes: Axes,
    losses: Mapping[str, Sequence[tuple[float, float]]],
    styles: Mapping[str, Style],
    clock: str,
    unit: str | None,
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    frame(axes, "both")
    unit_s = 1.0
    if unit is None:
        unit_s, unit = time_unit(max((curve[-1][0] for curve in losses.values() if curve), default=1.0), digits=2)
    for name, curve in losses.items():
        colour, dashes = styles[name]
        times, values = [time_s / unit_s for time_s, _ in curve], [loss for _, loss in curve]
        alone = "o" if len(curve) == 1 else ""  # a line of one point is not seen
        axes.plot(times, values, color=colour, linestyle=dashes, linewidth=1.8, marker=alone, label=name)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 1.01 * low:  # else all labels are alike
        low, high = axes.set_ylim(low / 1.05, high * 1.05)
    axes.yaxis.set_major_locator(LogLocator(subs=_subs(high / low)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{clock} [{unit}]" if clock else unit, size=9, color=INK)
    axes.set_title("training loss L(w)", size=10, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9, handlelength=2.6, labelcolor=INK)


def _draw_staleness(axes: Axes, counts: Mapping[str, Mapping[int, int]], styles: Mapping[str, Style]) -> None:
    from matplotlib.ticker import PercentFormatter

    frame(axes, "y")
    last = max(_last(of_run) for of_run in counts.values())
    later = any(late > last for of_run in counts.values() for late in of_run)
    width = 0.84 / len(counts)
    for i, (name, of_run) in enumerate(counts.items()):
        total = sum(of_run.values())
        parts = [of_run.get(late, 0) / total for late in range(last + 1)]
        parts.append(sum(times for late, times in of_run.items() if late > last) / total)
        places = [late - 0.42 + (i + 0.5) * width for late in range(last + 2)]
        bars = len(parts) if later else last + 1
        axes.bar(
            places[:bars], parts[:bars], width, color=styles[name][0], label=name, edgecolor="white", linewidth=0.5
        )
    axes.set_xticks(*_ticks(last, later))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("staleness τ [updates]", size=9, color=INK)
    axes.set_title("part of the gradients", size=10, loc="left", color=INK)
    axes.legend(frameon=False, fontsize=9, handlelength=1.2, labelcolor=INK)


def _subs(ratio: float) -> tuple[float, ...]:
    """What a power of ten is multiplied by, for labels of an axis whose ends have this ratio."""
    if ratio > 1e5:  # a run that diverges
        return (1,)
    return (1, 2, 5) if ratio > 10 else (1, 1.5, 2, 3, 4, 5, 7)


def _ticks(last: int, later: bool) -> tuple[list[int], list[str]]:
    """Where there are labels, and what they say; that of all that is ``later`` needs the most room."""
    every = 1 + last // (12 if last < 1000 else 8)
    ticks = list(range(0, last + 1, every))
    if not later:
        return ticks, [str(late) for late in ticks]
    ticks = [late for late in ticks if every == 1 or 2 * (last + 1 - late) >= 3 * every]
    return [*ticks, last + 1], [*map(str, ticks), f">{last}"]


def _last(counts: Mapping[int, int]) -> int:
    """The largest staleness that gets a bar of its own: what is later is rare."""
    total, rest = sum(counts.values()), 0
    for late in sorted(counts, reverse=True):
        rest += counts[late]
        if rest > _REST * total:
            return late
    return 0


def frame(axes: Axes, grid: Literal["both", "y"]) -> None:
    axes.grid(axis=grid, which="major", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, color=AXIS, labelcolor=INK)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(AXIS)
