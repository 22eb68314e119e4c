"""The plan as a picture: samples a second beside what they could be, and what a step consists of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minidp.plan.report import number, plural, seconds, work
from minidp.plan.study import Job, Point, pays_up_to

_BLUE, _ORANGE, _RED, _GREY = "#0072B2", "#E69F00", "#D55E00", "#999999"  # told apart by the colour-blind, too
_LABELS = 16  # of numbers of ranks that find room side by side


def draw(job: Job, points: Sequence[Point], worth: float, path: Path) -> None:
    """Write the picture to ``path``, whose suffix says of what kind. ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot draws with matplotlib, which is missing: pip install matplotlib") from error

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    figure.suptitle(
        f"{number(job.params)} parameters, {work(job)}: {job.scaling} scaling",
        size=12,
        weight="bold",
        x=0.01,
        ha="left",
    )
    left, right = figure.subplots(1, 2)
    _rates(left, points, pays_up_to(points, worth))
    _shares(right, points)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.legend(
            frameon=False,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=3,
            fontsize=9,
            borderaxespad=0.3,
            borderpad=0.2,
            columnspacing=1.2,
            handlelength=1.6,
        )
    figure.savefig(path, dpi=150)


def _rates(axes: Any, points: Sequence[Point], limit: int | None) -> None:
    ranks = [point.ranks for point in points]
    ideal = [point.samples_per_s / point.efficiency for point in points]
    axes.plot(ranks, ideal, color=_GREY, linestyle="--", label="if nobody waited")
    axes.plot(ranks, [point.samples_per_s for point in points], color=_BLUE, marker="o", label="timed")
    if limit is not None:
        axes.axvline(limit, color=_RED, linewidth=1, zorder=1, label=f"pays up to {plural(limit, 'rank')}")
    axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="samples a second")
    shown = ranks[:1]
    for p in ranks[1:]:
        if p >= shown[-1] * (ranks[-1] / ranks[0]) ** (1 / _LABELS):  # far enough, where scales are logarithmic
            shown.append(p)
    _label(axes, shown, [f"{p:,}" for p in shown])


def _shares(axes: Any, points: Sequence[Point]) -> None:
    places = range(len(points))
    compute = [min(1.0, point.compute_s / point.step_s) for point in points]
    axes.bar(places, compute, color=_BLUE, label="computing")
    axes.bar(places, [1 - share for share in compute], bottom=compute, color=_ORANGE, label="waiting")
    room = max(0.6, 2 - len(points) / 2)  # few bars stay slim
    axes.set(xlim=(-room, len(points) - 1 + room), ylim=(0, 1), xlabel="ranks: time of a step")
    axes.set_ylabel("share of a step")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    shown = places[:: -(-len(points) // _LABELS)]
    _label(axes, shown, [f"{points[i].ranks:,}: {seconds(points[i].step_s)}" for i in shown])


def _label(axes: Any, places: Sequence[int], labels: list[str]) -> None:
    axes.set_xticks(places, labels, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_xticks([], minor=True)
