"""Delayed gradients, made less wrong."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

from minidp.backend import Array

Correction: TypeAlias = Callable[[Array, Array, Array, int], Array]
"""``(g, w, given, lo)`` → the gradient that is applied: g was computed at ``given`` and meets ``w``, elements lo,
lo + 1, … of the flat parameters. Runs on servers, block by block."""


class DelayCompensation:
    """DC-ASGD: g + λ g ⊙ g ⊙ (w − w_bak), a first step of Taylor's series from the weights that the worker had to
    those that its gradient meets, with λ g ⊙ g in place of the Hessian (Zheng et al., ICML 2017, section 3).

    λ = 0 is plain asynchronous SGD. Exact on Fractions.
    """

    def __init__(self, strength: Any) -> None:
        if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= float(strength) < float("inf"):
            raise ValueError(
                f"delay_compensation={strength!r}: give λ, a number ≥ 0, or a function (g, w, given, lo)"
            )
        self.strength = strength

    def __call__(self, g: Array, w: Array, given: Array, lo: int) -> Array:
        return g + self.strength * (g * g * (w - given))

    def __repr__(self) -> str:
        return f"DelayCompensation({self.strength})"


def slowed(lr: Any, staleness: int) -> Any:
    """Staleness-aware rate: η / τ for τ ≥ 1, η for a gradient that is not late (Zhang et al., IJCAI 2016)."""
    return lr / staleness if staleness > 1 else lr
