"""minidp itself, by the path that users take: ``DataParallel`` in one process, or on ranks of ``minidp.spawn``."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import threadpoolctl

import minidp
from minidp import nn, optim, parallel
from minidp.bench.jobs import CNN, LEARNING_RATE, MLP, AllReduce, Training, Transformer
from minidp.bench.peers.serve import Contestant, serve
from minidp.comm import Communicator


def model_of(job: Training) -> nn.Module:
    """The job's model with its initial weights."""
    model: nn.Module
    match job:
        case MLP(widths):
            layers: list[nn.Module] = []
            for inputs, outputs in pairwise(widths):
                layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            model = nn.Sequential(*layers[:-1])
        case CNN(channels, side):
            model = nn.cnn((1, side, side), channels, job.classes)
        case Transformer():
            model = job.model()
        case _:
            raise TypeError(f"nobody knows how to build {job}")
    model.load_state_dict(job.state())
    return model


def strategy_of(job: Training, comm: Communicator, **options: Any) -> parallel.Strategy:
    """What trains it; ``options`` of ``DataParallel``."""
    model = model_of(job)
    return parallel.DataParallel(model, optim.SGD(model.parameters(), lr=LEARNING_RATE), comm, **options)


class Ours(Contestant):
    """A rank of ``comm``."""

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.rank, self.world_size = comm, comm.rank, comm.world_size

    def threads(self) -> int:
        return max((pool["num_threads"] for pool in threadpoolctl.threadpool_info()), default=1)

    def barrier(self) -> None:
        self.comm.barrier()

    def all_reduce(self, job: AllReduce) -> tuple[Callable[[], object], Callable[[float], None], Any]:
        comm, array = self.comm, np.zeros(job.nbytes // 4, np.float32)
        return lambda: comm.all_reduce(array), array.fill, array

    def training(self, job: Training) -> Callable[[], Any]:
        from minidp.nn.functional import cross_entropy

        strategy = strategy_of(job, self.comm)
        x, y = (self.comm.device.asarray(array) for array in job.batch_of(self.rank))

        def step() -> Any:
            loss = strategy.forward_backward(x, y, cross_entropy)
            strategy.step()
            return loss

        return step


def main(socket: str, world_size: int) -> None:
    """Ranks as users have them, a single one too: in processes that ``spawn`` starts."""
    minidp.spawn(_rank, world_size, socket, blas_threads=1, progress=False)


def _rank(comm: Communicator, socket: str) -> None:
    serve(Ours(comm), socket)
