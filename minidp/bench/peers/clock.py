"""How soon a spawned function runs: a program of its own, so that nothing but minidp is loaded beside it."""

from __future__ import annotations

import json
import time
from typing import Any

import minidp


def clock(comm: Any) -> float:
    """When this function runs on a rank, by CLOCK_MONOTONIC: one clock for all processes of a machine."""
    return time.perf_counter()


def spawn_times() -> list[float]:
    """Seconds until a function runs on both of 2 workers: of this process's first spawn, and of its second."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        times.append(max(minidp.spawn(clock, 2, progress=False)) - start)
    return times


if __name__ == "__main__":
    print(json.dumps(spawn_times()))
