"""Learning rates as pure functions of the update index t = 0, 1, 2 …: picklable, nothing to step or save."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """η(t) = lr."""

    lr: float

    def __call__(self, t: int) -> float:
        return self.lr


@dataclass(frozen=True)
class LinearScaling:
    """η(t) rises from lr to workers · lr over `warmup_steps` updates, then stays."""

    lr: float
    workers: int
    warmup_steps: int = 0

    def __call__(self, t: int) -> float:
        if t >= self.warmup_steps:
            return self.workers * self.lr
        return self.lr + (self.workers - 1) * self.lr * t / self.warmup_steps


@dataclass(frozen=True)
class Cosine:
    """η(t) rises linearly to lr over `warmup_steps`, then falls along half a cosine to final_lr at `steps`."""

    lr: float
    steps: int
    final_lr: float = 0.0
    warmup_steps: int = 0

    def __call__(self, t: int) -> float:
        if t < self.warmup_steps:
            return self.lr * (t + 1) / self.warmup_steps
        done = min((t - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 1.0)
        return self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * done)) / 2


def constant(lr: float) -> Callable[[int], float]:
    """Return η(t) = lr."""
    return Constant(lr)


def linear_scaling(lr: float, workers: int, warmup_steps: int) -> Callable[[int], float]:
    """Return the linear scaling rule: N workers, N times the batch, N times the rate (Goyal et al. 2017, §2).

    The rate starts at `lr`, rises by the same amount at each update, and is ``workers * lr`` from update
    `warmup_steps` on: a big rate right at the start can diverge, where the small one would not.
    """
    if workers < 1 or warmup_steps < 0:
        raise ValueError(f"linear_scaling: workers {workers} must be ≥ 1 and warmup_steps {warmup_steps} ≥ 0")
    return LinearScaling(lr, workers, warmup_steps)


def cosine(lr: float, steps: int, final_lr: float = 0.0, warmup_steps: int = 0) -> Callable[[int], float]:
    """Return cosine decay (Loshchilov & Hutter 2017): `lr` after the warm-up, `final_lr` from t = `steps` on.

    During warm-up η(t) = lr (t + 1) / warmup_steps: no update is lost on a rate of 0.
    """
    if steps < 1 or not 0 <= warmup_steps <= steps:
        raise ValueError(f"cosine: steps {steps} must be ≥ 1 and warmup_steps {warmup_steps} in 0 … steps")
    return Cosine(lr, steps, final_lr, warmup_steps)
