"""How an animated collective is drawn: one SVG whose parts come and go by a common clock.

All lengths are in units of which the picture is 640 wide; letters are of 22, so that on a telephone, where it is
half as large, they still can be read.
"""

from __future__ import annotations

from html import escape
from itertools import product
from math import atan2, cos, degrees, pi, sin
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from minidp.trace.clock import FIRST_S, LAST_S, STEP_S, Clock
from minidp.trace.clock import number as _n
from minidp.trace.page import readable

if TYPE_CHECKING:
    from minidp.trace.animation import Schedule, State

# Okabe and Ito's palette without black, then two more. Layers also differ by their place.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C", "#7A4FB5")
_WIDTH, _LINE, _CARD, _LEVELS, _PAD = 640, 28, 118, 56, 9
_HEAD = 26  # of a card, where its rank's name stands
_BEND = 0.34  # of its length, by which a message's way bends to the right: what comes the other way passes beside
_SMALLER = 0.7  # are messages than what they become

_STYLE = """
.minidp-animation { --paper: #ffffff; --ink: #222222; --soft: #595959; --card: #f2f2f2; --cell: #dcdcdc;
  --way: #c4c4c4; font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
@media (prefers-color-scheme: dark) { .minidp-animation { --paper: #17191c; --ink: #ececec; --soft: #b4b4b4;
  --card: #26292e; --cell: #43474d; --way: #565b62; } }
.minidp-animation text { fill: var(--ink); font-size: 22px; }
.minidp-animation .title { font-size: 26px; font-weight: 600; }
.minidp-animation .soft { fill: var(--soft); }
.minidp-animation .paper { fill: var(--paper); }
.minidp-animation .card { fill: var(--card); }
.minidp-animation .empty { fill: var(--cell); }
.minidp-animation .whole { fill: none; stroke: var(--ink); stroke-width: 2; }
.minidp-animation .twice { fill: var(--ink); }
.minidp-animation .way { fill: none; stroke: var(--way); stroke-width: 2; }
.minidp-animation .used { fill: none; stroke: var(--ink); stroke-width: 3; }
.minidp-animation .edge { fill: none; stroke: var(--ink); stroke-width: 1.5; }
"""
# Who asks for less motion, and paper, see the end; a page with controls moves only as it is told.
_STILL = (
    "{ .minidp-animation:not(.controlled) .end { opacity: 1 !important; } "
    ".minidp-animation:not(.controlled) .passing { opacity: 0 !important; } }\n"
)
_STYLE += f"@media (prefers-reduced-motion: reduce) {_STILL}@media print {_STILL}"


class _Place(NamedTuple):
    """Where things are: the middle of each rank's columns, and how large they are."""

    middles: list[tuple[float, float]]
    ranks: int
    chunks: int
    column: float
    height: float
    """Of all cards together."""

    def rect(self, rank: int | None, chunk: int, attributes: str, layers: tuple[int, int] | None = None) -> str:
        """A column or layers of it, from the bottom; of None as if that rank's middle were at the origin."""
        x, y = (0.0, 0.0) if rank is None else self.middles[rank]
        first, stop = layers or (0, self.ranks)
        layer = _LEVELS / self.ranks
        left, top = x + (chunk - self.chunks / 2) * self.column + 1, y + _LEVELS / 2 - stop * layer
        size = f'width="{_n(self.column - 2)}" height="{_n((stop - first) * layer)}"'
        return f'<rect x="{_n(left)}" y="{_n(top)}" {size} {attributes}/>'

    def layer(self, rank: int | None, chunk: int, k: int, data: str = "") -> str:
        """Rank k's layer of a column."""
        return self.rect(rank, chunk, f'fill="{COLOURS[k % len(COLOURS)]}"{data}', (k, k + 1))


def _place(ranks: int, chunks: int, top: float) -> _Place:
    """Ranks on an ellipse, clockwise from the top; two of them side by side."""
    wide = (0, 140, 200, 215)[ranks - 1] if ranks < 5 else 245
    high = (0, 0, 130, 165, 165, 190, 215, 235, 255)[ranks - 1] if ranks < 10 else 300
    start = -pi if ranks == 2 else -pi / 2
    turns = [start + 2 * pi * rank / ranks for rank in range(ranks)]
    heights = [high * sin(turn) for turn in turns]
    offset = top + _HEAD + _PAD + _LEVELS / 2 - min(heights)
    middles = [(_WIDTH / 2 + wide * cos(turn), offset + h) for turn, h in zip(turns, heights)]
    card = _HEAD + _LEVELS + 2 * _PAD
    columns = _CARD if ranks < 11 else 100  # else cards would hide the ends of their neighbours
    return _Place(middles, ranks, chunks, min(44, columns / chunks), max(heights) - min(heights) + card)


def draw(schedule: Schedule, states: tuple[State, ...], title: str, about: str) -> str:
    """The text of the SVG. Without animation it shows how all ends."""
    titles = wrap(title, 44) or [""]
    top = 20 + 32 * len(titles) + 2 * _LINE + 16
    place = _place(schedule.world_size, schedule.chunks, top)
    height = top + place.height + 2 * _LINE + 44
    clock = Clock(len(states) - 1)
    parts = [f'<rect class="paper" width="{_WIDTH}" height="{_n(height)}" rx="10"/>']
    parts += [f'<text class="title" x="24" y="{44 + 32 * i}">{escape(t)}</text>' for i, t in enumerate(titles)]
    parts += _captions(schedule, states, clock, 44 + 32 * len(titles))
    parts += _ways(schedule, clock, place)
    parts += _cards(states, clock, place)
    parts += _messages(schedule, states, clock, place)
    parts += _legend(place, states[-1], top + place.height + 44)
    return readable(
        f'<svg xmlns="http://www.w3.org/2000/svg" class="minidp-animation" viewBox="0 0 {_WIDTH} {_n(height)}" '
        f'width="{_n(0.8 * _WIDTH)}" height="{_n(0.8 * height)}" role="img" aria-label="{escape(about)}">\n'
        f"<style>{_STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _captions(schedule: Schedule, states: tuple[State, ...], clock: Clock, y: float) -> list[str]:
    """The step, and the bytes so far."""
    steps, found = clock.steps, []
    sent = [0] * schedule.world_size
    ops: list[set[str]] = [set() for _ in range(steps)]
    costs = [_cost(sent, schedule.chunks)]
    for step in range(steps):
        for t in schedule.transfers:
            if t.step == step:
                sent[t.src] += 1
                ops[step].add(t.op)
        costs.append(_cost(sent, schedule.chunks))
    whole = all(_whole(cell) for cells in states[-1] for cell in cells)
    ends = f"End: each rank has the sum of all {schedule.world_size}" if whole else f"End, after {steps} steps"
    words: dict[tuple[str, ...], str] = {
        ("reduce",): "receivers add it to their own",
        ("copy",): "receivers take it as it is",
    }

    def text(line: str, name: str, dy: float = 0.0) -> str:
        return f'<text class="{name}" x="24" y="{_n(y + dy)}">{escape(line)}</text>'

    if steps == 0:
        why = ": one rank has it all" * (schedule.world_size == 1)
        return [text(f"Nothing is sent{why}", "step"), text(costs[0], "soft bytes", _LINE)]
    # The caption of a step stays until the next one begins.
    edges = [0.0, *(FIRST_S + step * STEP_S for step in range(steps)), clock.total - LAST_S]
    lines = ["Before the first step"]
    lines += [
        f"Step {i + 1} of {steps}: {words.get(tuple(ops[i]), 'some add it, some take it')}" for i in range(steps)
    ]
    lines.append(ends)
    for i, line in enumerate(lines):
        times = [(0.0, i == 0), *((edges[j], j == i) for j in range(1, len(lines)))]
        kind = "end" if i == len(lines) - 1 else "passing"
        found.append(clock.group(times, text(line, "step"), f' class="{kind}"', kind == "end"))
    shown = list(dict.fromkeys(costs))
    found += [clock.shown([cost == each for cost in costs], text(each, "soft bytes", _LINE)) for each in shown]
    return found


def _cost(sent: list[int], chunks: int) -> str:
    most, least, total = (f"{count / chunks:.3g} n" for count in (max(sent), min(sent), sum(sent)))
    if len(sent) == 1 or total == "0 n":
        return "Sent so far: 0 of n bytes"
    by_one = f"{most} by each rank" if most == least else f"{most} by a rank at most"
    return f"Sent so far: {by_one}, {total} in all"


def _whole(cell: tuple[int, ...]) -> bool:
    return all(count == 1 for count in cell)


def _way(start: tuple[float, float], end: tuple[float, float]) -> tuple[str, tuple[float, float, float]]:
    """A bent line as a path, and its midst: x, y, and the angle of its direction in degrees."""
    (x, y), dx, dy = start, end[0] - start[0], end[1] - start[1]
    aside = -_BEND * dy, _BEND * dx
    path = f"M{_n(x)} {_n(y)}Q{_n(x + dx / 2 + aside[0])} {_n(y + dy / 2 + aside[1])} {_n(x + dx)} {_n(y + dy)}"
    return path, (x + dx / 2 + aside[0] / 2, y + dy / 2 + aside[1] / 2, degrees(atan2(dy, dx)))


def _ways(schedule: Schedule, clock: Clock, place: _Place) -> list[str]:
    """A line for each pair that ever talks, with its direction; above it, while it is used, a darker one."""
    used: dict[tuple[int, int], list[int]] = {}
    for t in schedule.transfers:
        if t.step not in used.setdefault((t.src, t.dst), []):
            used[t.src, t.dst].append(t.step)
    below, above = [], []
    for (src, dst), steps in used.items():
        path, (x, y, angle) = _way(place.middles[src], place.middles[dst])
        head = f'd="M-7 -7L4 0L-7 7" transform="translate({_n(x)} {_n(y)}) rotate({_n(angle)})"'
        below.append(f'<path class="way" d="{path}"/><path class="way" {head}/>')
        bright = f'<path class="used" d="{path}"/><path class="used" {head}/>'
        above += [clock.during(step, bright) for step in steps]
    return [*below, *above]


def _cards(states: tuple[State, ...], clock: Clock, place: _Place) -> list[str]:
    """Each rank's name and empty columns; above them the layers that there ever are."""
    found, ranks, chunks = [], range(place.ranks), range(place.chunks)
    width = max(place.chunks * place.column, 88) + 2 * _PAD
    for rank, (x, y) in enumerate(place.middles):
        top = y - _LEVELS / 2 - _HEAD - _PAD
        columns = "".join(place.rect(rank, chunk, 'class="empty"') for chunk in chunks)
        found.append(
            f'<rect class="card" x="{_n(x - width / 2)}" y="{_n(top)}" width="{_n(width)}" '
            f'height="{_HEAD + _LEVELS + 2 * _PAD}" rx="8"/><text x="{_n(x)}" y="{_n(top + 26)}" '
            f'text-anchor="middle">rank {rank}</text>{columns}'
        )
    layers: dict[tuple[bool, ...], list[str]] = {}  # by when they are there: those come and go together
    signs: dict[tuple[bool, ...], list[str]] = {}
    for rank, chunk in product(ranks, chunks):
        cells = [state[rank][chunk] for state in states]
        for k in ranks:
            part = place.layer(rank, chunk, k, f' data-part="{rank} {chunk} {k}"')
            layers.setdefault(tuple(cell[k] > 0 for cell in cells), []).append(part)
            twice = place.rect(rank, chunk, f'class="twice" data-twice="{rank} {chunk} {k}"', (k, k + 1))
            signs.setdefault(tuple(cell[k] > 1 for cell in cells), []).append(twice)
        frame = place.rect(rank, chunk, f'class="whole" data-whole="{rank} {chunk}"')
        signs.setdefault(tuple(_whole(cell) for cell in cells), []).append(frame)
    for groups in (layers, signs):
        found += [clock.shown(list(seen), "".join(inner)) for seen, inner in groups.items() if any(seen)]
    return found


def _messages(schedule: Schedule, states: tuple[State, ...], clock: Clock, place: _Place) -> list[str]:
    """Chunks on their way, smaller than at home, with what they hold when they leave."""
    together: dict[tuple[int, int, int, str], list[int]] = {}
    for t in schedule.transfers:
        together.setdefault((t.step, t.src, t.dst, t.op), []).append(t.chunk)
    found = []
    for (step, src, dst, op), chunks in together.items():
        inner = ""
        for chunk in chunks:
            cell = states[step][src][chunk]
            inner += place.rect(None, chunk, 'class="paper"')
            inner += "".join(place.layer(None, chunk, k) for k in range(place.ranks) if cell[k])
            inner += place.rect(None, chunk, 'class="edge"')
        data = f' data-message="{step} {src} {dst} {op}" data-chunks="{" ".join(map(str, chunks))}"'
        way, _ = _way(place.middles[src], place.middles[dst])
        moved = f'<g>{clock.travel(step, way)}<g transform="scale({_SMALLER})">{inner}</g></g>'
        found.append(clock.during(step, moved, data))
    return found


def _legend(place: _Place, final: State, y: float) -> list[str]:
    found = [f'<text class="soft" x="24" y="{_n(y)}">from rank</text>']
    pitch = min(60, (_WIDTH - 24 - 148) / place.ranks) if place.ranks < 10 else 38
    for k in range(place.ranks):
        x = 148 + k * pitch + max(0, k - 10) * 14  # numbers of two digits need more
        found.append(
            f'<rect x="{_n(x)}" y="{_n(y - 16)}" width="16" height="16" fill="{COLOURS[k % len(COLOURS)]}"/>'
            f'<text class="soft" x="{_n(x + 20)}" y="{_n(y)}">{k}</text>'
        )
    words = "column: the whole array" if place.chunks == 1 else f"columns: {place.chunks} chunks"
    cells = [cell for of_rank in final for cell in of_rank]
    if place.ranks > 1 and any(_whole(cell) for cell in cells):
        words += f"; framed: sum of all {place.ranks}"
    if any(count > 1 for cell in cells for count in cell):
        words += "; dark: more than once"
    found.append(f'<text class="soft" x="24" y="{_n(y + _LINE)}">{words}</text>')
    return found
