"""One batch on two of our ranks: shared out as samples, as parts of layers, as layers; and on one, to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import minidp
from minidp import optim, parallel
from minidp.bench.jobs import LEARNING_RATE, Training
from minidp.bench.peers.ours import Ours, model_of
from minidp.bench.peers.serve import serve
from minidp.comm import Communicator


class OneBatch(Ours):
    """A rank of one or two. Both halves of the batch are alike, so that a half has the loss of the whole.

    Args:
        way: ``"alone"`` and ``"data"``: DataParallel; ``"dp"``, ``"tp"``, ``"pp"``: that axis of a mesh;
            ``"sharded_1"``, ``"sharded_2"``: that stage of ShardedDataParallel.
    """

    def __init__(self, comm: Communicator, way: str) -> None:
        super().__init__(comm)
        self.way = way

    def training(self, job: Training) -> Callable[[], Any]:
        from minidp.nn.functional import cross_entropy

        strategy = self._strategy(job)
        _, count = strategy.shard
        half = job.batch // 2
        x, y = (np.concatenate([array[:half]] * (2 // count)) for array in job.batch_of(0))

        def step() -> Any:
            loss = strategy.forward_backward(x, y, cross_entropy)
            strategy.step()
            return loss

        return step

    def _strategy(self, job: Training) -> Any:
        model = model_of(job)
        optimizer = optim.SGD(model.parameters(), lr=LEARNING_RATE)
        if self.way in ("dp", "tp", "pp"):
            return parallel.HybridParallel(model, optimizer, parallel.Mesh(self.comm, **{self.way: 2}))
        if self.way.startswith("sharded"):
            return parallel.ShardedDataParallel(model, optimizer, self.comm, stage=int(self.way[-1]))
        return parallel.DataParallel(model, optimizer, self.comm)


def main(socket: str, world_size: int, way: str) -> None:
    minidp.spawn(_rank, world_size, socket, way, blas_threads=1, progress=False)


def _rank(comm: Communicator, socket: str, way: str) -> None:
    serve(OneBatch(comm, way), socket)
