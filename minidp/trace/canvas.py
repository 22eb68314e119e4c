"""An empty picture in the look of minidp's own, for what notebooks draw by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minidp.trace.curves import STYLES, frame
from minidp.trace.page import can_draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: tuple[str, ...] = tuple(colour for colour, _ in STYLES)
"""Okabe and Ito's palette, whose colours stay apart for colour-blind readers. Black comes first."""


def figure(
    width: float = 7.0, height: float = 3.2, columns: int = 1, title: str | None = None
) -> tuple[Figure, list[Axes]]:
    """A picture of ``width`` × ``height`` inches with so many axes beside each other.

    What is drawn into them takes the colours of ``COLOURS`` in turn. In a notebook a cell that ends with the
    figure shows it, after ``%matplotlib inline``. It belongs to no window and to no pyplot state.

    Raises: ImportError without matplotlib.
    """
    can_draw("figure needs")
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height))
    drawn.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08, wspace=0.06)
    if title:
        drawn.suptitle(title, size=12, weight="bold", x=0.02, ha="left", parse_math=False)
    found = list(drawn.subplots(1, columns, squeeze=False)[0])
    for axes in found:
        frame(axes, "both")
        axes.set_prop_cycle(color=COLOURS)
    return drawn, found
