"""Rounds, medians and ratios: how two things are compared on a machine whose speed changes by the minute."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Protocol

PROPER_PAIRS = 9  # fewer are a smoke test


class Contender(Protocol):
    """Something that can be let off: ``Team`` is one."""

    def burst(self, repeats: int, warm_up: int = 0) -> float:
        """Seconds for ``repeats`` repetitions."""


@dataclass(frozen=True)
class Bar:
    """A limit that the issue of this bench sets. With ``most`` a band: at least ``limit``, at most that."""

    limit: float
    at_least: bool = True
    most: float = math.inf

    def met(self, value: float) -> bool:
        return self.limit <= value <= self.most if self.at_least else value <= self.limit

    def __str__(self) -> str:
        if self.most < math.inf:
            return f"{self.limit:g}–{self.most:g}"
        return f"{'≥' if self.at_least else '≤'} {self.limit:g}"


@dataclass(frozen=True)
class Figure:
    """A median with its quartiles, and the bar that it is held to, if any."""

    median: float
    low: float
    high: float
    bar: Bar | None = None

    @classmethod
    def of(cls, samples: Sequence[float], bar: Bar | None = None) -> Figure:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], bar)
        low, _, high = quantiles(samples, n=4, method="inclusive")
        return cls(median(samples), low, high, bar)

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.bar.met(self.median)


def ratio(numerator: Sequence[float], denominator: Sequence[float], bar: Bar | None = None) -> Figure:
    """The median of the ratios within rounds: only what followed each other within a second is divided."""
    return Figure.of([a / b for a, b in zip(numerator, denominator, strict=True)], bar)


def compare(
    contenders: Mapping[str, Contender], pairs: int, burst_s: float, tick: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Let all off in turn, ``pairs`` times: A, B, C, A, B, C, …

    Returns, for each, its seconds per repetition in every round. A burst takes about ``burst_s`` for each,
    whatever its speed; a tenth as much before it, untimed, brings caches and clocks to where they were.
    """
    repeats = {name: _repeats(contender, burst_s) for name, contender in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(pairs):
        for name, contender in contenders.items():
            n = repeats[name]
            samples[name].append(contender.burst(n, warm_up=max(2, n // 10)) / n)
            tick()
    return samples


def _repeats(contender: Contender, burst_s: float) -> int:
    """How many repetitions take about ``burst_s``: found by bursts that double until one takes a fifth of it."""
    repeats = 1
    while (seconds := contender.burst(repeats)) < burst_s / 5:
        repeats *= 2
    return max(1, math.ceil(repeats * burst_s / seconds))
