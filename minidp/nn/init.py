"""Initial values of parameters: functions of a generator, always drawn in float64 on the host."""

from __future__ import annotations

import math

import numpy as np


def fan_in_uniform(rng: np.random.Generator, shape: tuple[int, ...], fan_in: int) -> np.ndarray:
    """U(−1/√fan_in, 1/√fan_in): what PyTorch gives the weight and the bias of its Linear and Conv layers.

    It is He initialisation (He et al. 2015) with the gain of a = √5, kept for comparison's sake.
    """
    bound = 1 / math.sqrt(max(fan_in, 1))
    return rng.uniform(-bound, bound, shape)
