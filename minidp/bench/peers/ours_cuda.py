"""minidp on a GPU, by the path that users take: ``spawn(..., device="cuda")``."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import minidp
from minidp.bench.jobs import Training
from minidp.bench.peers.ours import Ours, strategy_of
from minidp.bench.peers.serve import serve
from minidp.comm import Communicator


class OnDevice(Ours):
    """A rank of ``comm`` whose batch lies on its device, and whose bursts are timed by the device."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self._clock = comm.device.clock(time.perf_counter)

    def elapse(self, call: Callable[[], object], repeats: int) -> float:
        if self._clock is None:
            return super().elapse(call, repeats)
        start = self._clock.mark()
        for _ in range(repeats):
            call()
        end = self._clock.mark()
        seconds: float = self._clock.seconds(end) - self._clock.seconds(start)
        return seconds

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
    minidp.spawn(_rank, world_size, socket, device="cuda", blas_threads=1, progress=False)


def _rank(comm: Communicator, socket: str) -> None:
    serve(OnDevice(comm), socket)
