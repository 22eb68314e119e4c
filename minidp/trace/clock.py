"""Parts of an SVG that come, go and move by one clock, which begins again when all is over (SMIL)."""

from __future__ import annotations

from itertools import pairwise

FIRST_S, STEP_S, LAST_S = 1.0, 1.8, 2.5  # before the first step, of each, and after the last one
_LEAVES_S, _ARRIVES_S = 0.1, 1.3  # within a step


def total_s(steps: int) -> float:
    """Seconds from the beginning to the moment at which all begins again."""
    return FIRST_S + steps * STEP_S + LAST_S


def moment(half: int, steps: int) -> float:
    """Seconds at which ``half`` halves of steps are over: at odd ones messages are on their way."""
    step, within = divmod(half, 2)
    if within:
        return FIRST_S + step * STEP_S + (_LEAVES_S + _ARRIVES_S) / 2
    return FIRST_S + step * STEP_S - 0.05 if step else 0.0  # what has arrived lies still


def arrival_s(step: int) -> float:
    """When the messages of a step, counted from 0, have arrived."""
    return FIRST_S + step * STEP_S + _ARRIVES_S


class Clock:
    """Makes what is seen during some of the states 0 … ``steps`` only, and what passes between two of them."""

    def __init__(self, steps: int) -> None:
        self.steps, self.total = steps, total_s(steps)
        self.begins = [0.0, *(arrival_s(step) for step in range(steps))]

    def shown(self, seen: list[bool], inner: str, attributes: str = "") -> str:
        """A group that is there in the states of which ``seen`` is true."""
        if not any(seen):
            return ""
        if all(seen):
            return f"<g{attributes}>{inner}</g>"
        kind = "end" if seen[-1] else "passing"
        return self.group(list(zip(self.begins, seen)), inner, f'{attributes} class="{kind}"', seen[-1])

    def during(self, step: int, inner: str, attributes: str = "") -> str:
        """A group that is there while the messages of ``step`` are on their way."""
        start = FIRST_S + step * STEP_S
        times = [(0.0, False), (start + _LEAVES_S, True), (start + _ARRIVES_S, False)]
        return self.group(times, inner, f'{attributes} class="passing"', False)

    def travel(self, step: int, way: str) -> str:
        """Along ``way`` while the messages of ``step`` go."""
        start = FIRST_S + step * STEP_S
        times = self._times([0.0, start + _LEAVES_S, start + _ARRIVES_S, self.total])
        return (
            f'<animateMotion path="{way}" dur="{number(self.total)}s" repeatCount="indefinite" calcMode="spline" '
            f'keyPoints="0;0;1;1" keyTimes="{times}" keySplines="0 0 1 1;.4 0 .4 1;0 0 1 1"/>'
        )

    def group(self, times: list[tuple[float, bool]], inner: str, attributes: str, at_last: bool) -> str:
        """One that comes or goes at these seconds, and is there ``at_last`` or not: also where nothing moves."""
        changes = [times[0]] + [b for a, b in pairwise(times) if a[1] != b[1]]
        values = ";".join("1" if seen else "0" for _, seen in changes)
        return (
            f'<g{attributes} opacity="{int(at_last)}"><animate attributeName="opacity" calcMode="discrete" '
            f'dur="{number(self.total)}s" repeatCount="indefinite" values="{values}" '
            f'keyTimes="{self._times([t for t, _ in changes])}"/>{inner}</g>'
        )

    def _times(self, seconds: list[float]) -> str:
        return ";".join(f"{each / self.total:.5f}".rstrip("0").rstrip(".") for each in seconds)


def number(value: float) -> str:
    """A length as text, to hundredths."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if round(value, 2) else "0"
