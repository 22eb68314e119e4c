"""PyTorch DistributedDataParallel, and torch.distributed's all_reduce, over gloo: processes of one machine."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from importlib import import_module
from typing import Any

from minidp.bench.jobs import AllReduce, Training
from minidp.bench.peers.eager import build, limit_threads, torch, training_step
from minidp.bench.peers.serve import Contestant, leave, serve

dist: Any = import_module("torch.distributed")


class Gloo(Contestant):
    """A rank of the gloo process group."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def threads(self) -> int:
        return int(torch.get_num_threads())

    def barrier(self) -> None:
        dist.barrier()

    def all_reduce(self, job: AllReduce) -> tuple[Callable[[], object], Callable[[float], None], Any]:
        array = torch.zeros(job.nbytes // 4)
        return lambda: dist.all_reduce(array), array.fill_, array

    def training(self, job: Training) -> Callable[[], Any]:
        model, x, y = build(job, self.rank)
        return training_step(torch.nn.parallel.DistributedDataParallel(model), x, y)


def main(socket: str, world_size: int, rank: int) -> None:
    limit_threads()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{socket}.store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    serve(Gloo(rank, world_size), socket)
    dist.destroy_process_group()
    leave()
