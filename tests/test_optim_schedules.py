"""Learning rates as functions of the update index."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp import optim

checked = settings(derandomize=True, deadline=None)


def test_linear_scaling_ramps_by_equal_amounts_to_workers_times_the_rate():
    rate = optim.linear_scaling(0.1, workers=8, warmup_steps=7)
    values = [rate(t) for t in range(12)]
    assert np.allclose(values[:8], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], rtol=1e-15)
    assert values[7:] == [0.8] * 5
    assert [optim.linear_scaling(0.1, 4, 0)(t) for t in (0, 5)] == [0.4, 0.4]
    assert [optim.linear_scaling(0.1, 1, 3)(t) for t in range(5)] == [0.1] * 5


@checked
@given(st.integers(1, 50), st.integers(0, 50), st.floats(0, 1))
def test_cosine_rises_over_the_warmup_then_falls_to_the_final_rate(steps, warmup, final):
    warmup = min(warmup, steps)
    rate = optim.cosine(1.0, steps, final, warmup)
    values = [rate(t) for t in range(steps + 5)]
    assert np.allclose(values[:warmup], np.arange(1, warmup + 1) / max(warmup, 1))
    assert warmup == steps or values[warmup] == 1
    assert np.allclose(values[steps + (warmup == steps):], final)  # fmt: skip
    assert all(a >= b - 1e-15 for a, b in pairwise(values[warmup:]))
    middle = (steps + warmup) / 2
    assert rate(middle) == pytest.approx((1 + final) / 2) or warmup == steps


def test_schedules_are_values():
    for rate in (optim.constant(0.1), optim.linear_scaling(0.1, 4, 10), optim.cosine(0.1, 100, 0.01, 5)):
        again = pickle.loads(pickle.dumps(rate))
        assert again == rate
        assert again(3) == rate(3)
        assert repr(again) == repr(rate)
    assert repr(optim.constant(0.1)) == "Constant(lr=0.1)"
    for wrong in (
        lambda: optim.linear_scaling(0.1, 0, 1),
        lambda: optim.cosine(0.1, 0),
        lambda: optim.cosine(0.1, 5, 0, 6),
    ):
        with pytest.raises(ValueError, match="must be"):
            wrong()
