"""A collective as an animation: ranks, their chunks, and the messages between them, step by step."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from minidp.trace import clock, stage
from minidp.trace.page import page

MOST_RANKS, MOST_CHUNKS = 12, 12  # more columns, or layers of them, are too fine to be told apart on a telephone

Cell = tuple[int, ...]
"""How often each rank's own value is in the sum that a chunk holds."""
State = tuple[tuple[Cell, ...], ...]
"""rank → chunk → cell."""


class Transfer(Protocol):
    """In ``step``, rank ``src`` sends its ``chunk`` to ``dst``, which reduces it into its own or copies it."""

    @property
    def step(self) -> int: ...
    @property
    def src(self) -> int: ...
    @property
    def dst(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def op(self) -> str: ...


class Schedule(Protocol):
    """A collective as a list of transfers, such as `minidp.comm.schedules` has them."""

    @property
    def name(self) -> str: ...
    @property
    def world_size(self) -> int: ...
    @property
    def chunks(self) -> int: ...
    @property
    def transfers(self) -> Sequence[Transfer]: ...


@dataclass(frozen=True)
class Animation:
    """What `animate` returns. In a notebook a cell that ends with it shows it.

    ``svg`` is one animated picture (SMIL): it moves wherever browsers show pictures, also as an ``<img>``, without
    any script. Where nothing moves (on paper, or for who asks for less motion) it shows how all ends.
    """

    title: str
    states: tuple[State, ...]
    """Before the first step, and after each."""
    svg: str
    about: str
    """The same in a sentence."""

    @property
    def steps(self) -> int:
        return len(self.states) - 1

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``.svg``, or ``.html``: one page with a button and a slider, which needs no other file.

        Raises: ValueError for another suffix.
        """
        path = Path(path)
        if path.suffix not in _WRITERS:
            raise ValueError(f"{path}: an animation is saved as {' or '.join(_WRITERS)}")
        path.write_text(_WRITERS[path.suffix](self), encoding="utf-8")

    def html(self) -> str:
        """The text of the page."""
        top = 2 * self.steps
        controls = (
            '<div class="controls"><button type="button" id="play">Pause</button>'
            f'<input id="step" type="range" min="0" max="{top}" value="0" aria-label="step">'
            '<output id="where" for="step"></output></div>'
        )
        times = ",".join(f"{clock.moment(half, self.steps):g}" for half in range(top + 1))
        script = _SCRIPT.replace("TIMES", times).replace("TOTAL", f"{clock.total_s(self.steps):g}")
        note = (
            "<p>The slider stops between two steps, and in the midst of each, when messages are on their way.</p>"
        )
        return page(self.title, [f'<div class="stage">{self.svg}</div>', controls, note], script, heading=False)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"image/svg+xml": self.svg, "text/plain": self.about}


_WRITERS: dict[str, Callable[[Animation], str]] = {".svg": lambda made: made.svg, ".html": Animation.html}

# Positions of the slider: even ones are between steps, odd ones within.
_SCRIPT = """
const svg = document.querySelector("svg"), play = document.getElementById("play");
const slider = document.getElementById("step"), where = document.getElementById("where");
const times = [TIMES], total = TOTAL, steps = (times.length - 1) / 2;
const says = half => half % 2 ? `in step ${(half + 1) / 2} of ${steps}` : `after ${half / 2} of ${steps} steps`;
function tell(half) {
  slider.value = half;
  where.textContent = says(half);
  slider.setAttribute("aria-valuetext", says(half));
}
function moving(on) {
  if (on) svg.unpauseAnimations(); else svg.pauseAnimations();
  play.textContent = on ? "Pause" : "Play";
}
function follow() {
  if (!svg.animationsPaused()) {
    const now = svg.getCurrentTime() % total;
    tell(times.findLastIndex(time => time <= now + 1e-3));
  }
  requestAnimationFrame(follow);
}
play.addEventListener("click", () => moving(svg.animationsPaused()));
slider.addEventListener("input", () => {
  moving(false);
  svg.setCurrentTime(times[slider.value]);
  tell(+slider.value);
});
svg.classList.add("controlled");
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  moving(false);
  svg.setCurrentTime(0);
}
tell(0);
follow();
"""


def animate(schedule: Schedule, path: str | os.PathLike[str] | None = None, title: str | None = None) -> Animation:
    """Draw a collective of `minidp.comm.schedules` as an animation, and save it if ``path`` is given.

    Each rank is a card, each of its chunks a column in it. A column has a layer for each rank, which is coloured
    once that rank's own value is in the sum. Messages are such columns, on their way.

    Args:
        schedule: such as ``schedules.ring(4)``.
        path: a file whose suffix says the format (.svg, .html); an existing one is overwritten.
        title: stands above the picture (default: the schedule's name and ranks).

    The same schedule gives the same text. Bytes are told as parts of n, the bytes of the whole array.

    Raises: ValueError for more than 12 ranks or chunks, or another suffix.
    """
    for count, most, what in (
        (schedule.world_size, MOST_RANKS, "ranks"),
        (schedule.chunks, MOST_CHUNKS, "chunks"),
    ):
        if count > most:
            of = f"{schedule.name} of {schedule.world_size} ranks"
            raise ValueError(f"{of} has {count} {what}: more than {most} can't be drawn")
    ranks = f"{schedule.world_size} rank{'s' * (schedule.world_size > 1)}"
    title = title or f"{schedule.name.replace('_', ' ').capitalize()}, {ranks}"
    seen = states(schedule)
    steps = f"{len(seen) - 1} step{'s' * (len(seen) != 2)}"
    about = f"{title}: {ranks}, {steps}, {sum(1 for _ in schedule.transfers)} chunks sent"
    made = Animation(title, seen, stage.draw(schedule, seen, title, about), about)
    if path is not None:
        made.save(path)
    return made


def states(schedule: Schedule) -> tuple[State, ...]:
    """What each chunk of each rank holds: before the first step, and after each. All transfers of a step read what
    was before it."""
    ranks, chunks = range(schedule.world_size), range(schedule.chunks)
    now = [[tuple(int(k == rank) for k in ranks) for _ in chunks] for rank in ranks]
    found = [_frozen(now)]
    for transfers in rounds(schedule):
        before = found[-1]
        for t in transfers:
            sent = before[t.src][t.chunk]
            own = now[t.dst][t.chunk]
            now[t.dst][t.chunk] = tuple(a + b for a, b in zip(own, sent)) if t.op == "reduce" else sent
        found.append(_frozen(now))
    return tuple(found)


def rounds(schedule: Schedule) -> list[list[Transfer]]:
    """The transfers, step by step."""
    found: list[list[Transfer]] = [[] for _ in range(1 + max((t.step for t in schedule.transfers), default=-1))]
    for t in schedule.transfers:
        found[t.step].append(t)
    return found


def _frozen(state: list[list[Cell]]) -> State:
    return tuple(tuple(cells) for cells in state)
