"""PyTorch on a GPU, one process, eager mode: the yardstick of ``step --device cuda``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minidp.bench.jobs import Training
from minidp.bench.peers.eager import Eager, build, limit_threads, torch, training_step
from minidp.bench.peers.serve import leave, serve


class EagerCuda(Eager):
    """Float32 throughout: PyTorch's default for products, said for convolutions too, whose default is TF32."""

    def elapse(self, call: Callable[[], object], repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def training(self, job: Training) -> Callable[[], Any]:
        model, x, y = build(job, self.rank)
        return training_step(model.cuda(), x.cuda(), y.cuda())


def main(socket: str, world_size: int) -> None:
    assert world_size == 1, world_size
    limit_threads()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    serve(EagerCuda(), socket)
    leave()
