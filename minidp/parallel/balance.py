"""Load balance (article 2.4): samples in proportion to speed, so that nobody waits for the slowest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minidp.parallel.strategy import Strategy


def measure_speeds(
    strategy: Strategy, x: Any, y: Any, loss_fn: Callable[..., Any], repeats: int = 3
) -> list[float]:
    """Samples a second of every rank, in rank order, as measured on its clock. Collective: the same on all ranks.

    They are what ``DataLoader(weights=…)`` takes: shares n_i in proportion to them make all ranks ready at the
    same time, so that a step takes max n_i / speed_i, plus communication. ∇L stays what it was, whatever the
    shares, since it is weighted with n_i.

    Each rank computes the gradient of the batch (x, y) once to warm up, then ``repeats`` times; its fastest
    counts. Nothing is updated or sent meanwhile. Take a batch of about the size that a rank will get.

    Raises ValueError for an empty batch, RuntimeError in the middle of a step.
    """
    if len(x) == 0 or repeats < 1:
        raise ValueError(f"measure_speeds needs samples and repeats: {len(x)} samples, repeats={repeats}")
    if strategy.in_step:
        raise RuntimeError("measure_speeds in the middle of a step: call it before a backward, or after step()")
    times = []
    for _ in range(1 + repeats):
        start = strategy.comm.now()
        loss_fn(strategy.model(x), y).backward()
        times.append(strategy.comm.now() - start)
        strategy.discard()
    fastest = min(times[1:])
    return strategy.comm.all_gather_object(len(x) / fastest if fastest > 0 else 1.0, "measure_speeds")
