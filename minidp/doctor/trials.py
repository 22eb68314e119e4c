"""The worlds of the CPU, tried: two ranks take a step together, in each."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

import minidp
from minidp import nn, optim, parallel
from minidp.comm import Communicator
from minidp.nn import functional as F

TIMEOUT_S = 30.0
RANKS = 2


def one_step(comm: Communicator, served: bool) -> np.ndarray:
    """w after one step of a tiny model, each rank with its own sample."""
    model = nn.Sequential(nn.Linear(3, 2), seed=0)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    build: Any = parallel.ParameterServer if served else parallel.DataParallel
    strategy = build(model, optimizer, comm)
    x = np.eye(RANKS, 3, dtype=np.float32)
    strategy.forward_backward(x[comm.rank : comm.rank + 1], np.array([comm.rank]), F.cross_entropy)
    strategy.step()
    state = strategy.state_dict()
    return np.concatenate([state[name].ravel() for name in sorted(state)])


def try_worlds() -> dict[str, str | None]:
    """``process``, ``virtual`` and ``servers``: what went wrong in each, or None."""
    quiet = logging.getLogger("minidp.launch")
    level = quiet.level
    quiet.setLevel(logging.ERROR)  # how many cores there are, the page says itself
    try:
        process, w = _try(world="process")
        virtual, same = _try(world="virtual")
        servers, served = _try(world="process", servers=1)
    finally:
        quiet.setLevel(level)
    if w is not None and same is not None and not np.array_equal(w, same):
        virtual = "it ended at another w than processes"
    if w is not None and served is not None and not np.allclose(w, served, atol=1e-6):
        servers = "they ended at another w than workers alone"
    return {"process": process, "virtual": virtual, "servers": servers}


def _try(world: str, servers: int = 0) -> tuple[str | None, np.ndarray | None]:
    try:
        found = minidp.spawn(
            one_step,
            RANKS,
            servers > 0,
            world=world,
            servers=servers,
            blas_threads=1,
            timeout_s=TIMEOUT_S,
            progress=False,
        )
    except (RuntimeError, OSError, MemoryError) as error:  # RankFailed and the other errors of communication too
        return str(error).partition("\n")[0], None
    return None, found[0]
