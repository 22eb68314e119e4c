"""minidp on a GPU, by the path that users take: ``spawn(..., device="cuda")``."""

from __future__ import annotations

import time
from collections.abc import Callable

import minidp
from minidp.bench.peers.ours import Ours
from minidp.bench.peers.serve import serve
from minidp.comm import Communicator


class OnDevice(Ours):
    """A rank of ``comm`` whose bursts are timed by its device."""

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


def main(socket: str, world_size: int) -> None:
    minidp.spawn(_rank, world_size, socket, device="cuda", blas_threads=1, progress=False)


def _rank(comm: Communicator, socket: str) -> None:
    serve(OnDevice(comm), socket)
