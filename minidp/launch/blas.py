"""How many threads BLAS may use in each rank: cores ÷ ranks, or the machine is oversubscribed.

OpenBLAS starts as many threads as there are cores in every process. With N ranks they fight for the cores, and
every measured speed-up is false.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import threadpoolctl

VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")

_held: list[Any] = []  # a limiter restores the old number when it is collected


def cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(world_size: int, asked: Any = None) -> int:
    """BLAS threads for each of ``world_size`` ranks: ``asked``, or cores ÷ ranks, at least 1."""
    if asked is None:
        return max(1, cores() // world_size)
    if not isinstance(asked, int | np.integer) or isinstance(asked, bool) or asked < 1:
        raise ValueError(f"blas_threads={asked!r}: give a whole number, at least 1, or None for cores ÷ ranks")
    return int(asked)


def limit(threads: int) -> None:
    """Let BLAS use ``threads`` threads in this process from now on."""
    _held.append(threadpoolctl.threadpool_limits(threads, user_api="blas"))
    for variable in VARIABLES:
        os.environ[variable] = str(threads)
