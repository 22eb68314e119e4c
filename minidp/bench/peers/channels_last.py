"""PyTorch, one process, with images and convolutions in its other memory format: faster on processors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minidp.bench.jobs import Training
from minidp.bench.peers.eager import Eager, build, limit_threads, torch, training_step
from minidp.bench.peers.serve import leave, serve


class ChannelsLast(Eager):
    def training(self, job: Training) -> Callable[[], Any]:
        model, x, y = build(job, self.rank)
        form = torch.channels_last
        return training_step(model.to(memory_format=form), x.to(memory_format=form), y)


def main(socket: str, world_size: int) -> None:
    assert world_size == 1, world_size
    limit_threads()
    serve(ChannelsLast(), socket)
    leave()
