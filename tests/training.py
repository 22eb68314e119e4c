"""What tests of whole trainings share: ranks without noise, and the loop."""

from __future__ import annotations

from typing import Any

import minidp
from minidp import data
from minidp.nn import functional as F


def spawned(function: Any, ranks: int, world: str, *args: Any) -> list[Any]:
    """What each rank returned; one BLAS thread each, no progress."""
    return minidp.spawn(function, ranks, *args, world=world, progress=False, blas_threads=1)


def go_on(strategy: Any, dataset: Any, size: int, updates: int) -> None:
    """Train until so many updates have been made, by global batches of this size."""
    loader = data.DataLoader(dataset, global_batch_size=size, shard=strategy.shard, shuffle=True)
    while strategy.updates < updates:
        epoch, step = loader.position(strategy.updates)
        for x, y in loader.epoch(epoch, start_step=step):
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
            if strategy.updates == updates:
                break
