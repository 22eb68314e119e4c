"""minidp's parameter server: one worker, one server process, synchronous."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

import minidp
from minidp import nn, optim, parallel
from minidp.bench.jobs import LEARNING_RATE, Array, Exchange
from minidp.bench.peers.ours import Ours
from minidp.bench.peers.serve import serve
from minidp.comm import Communicator
from minidp.parallel.wire import Op, Request, Status


class Pot(nn.Module):
    """w alone."""

    def __init__(self, size: int) -> None:
        self.w = nn.Parameter(np.zeros(size, np.float32))


class Synchronous(Ours):
    """The worker."""

    staleness: ClassVar[int | None] = 0

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self._strategy = self._strategy_of(1)

    def _strategy_of(self, size: int) -> parallel.ParameterServer:
        model = Pot(size)
        rule = optim.SGD(model.parameters(), lr=LEARNING_RATE)
        return parallel.ParameterServer(model, rule, self.comm, staleness=self.staleness)

    def helpers(self) -> tuple[int, ...]:
        return tuple(server.pid for server in self._strategy.servers())

    def exchange(self, job: Exchange) -> Callable[[], Array]:
        """What ``ParameterServer.step`` does with the gradient once it lies in its slab."""
        self._strategy.release()
        strategy = self._strategy = self._strategy_of(job.nbytes // 4)
        links, w, gradient = strategy._links, strategy._slabs.params[0], strategy._slabs.grads[0]
        gradient[...] = 0
        gradient[: job.nbytes // 4] = job.gradient()
        request = Request(Op.PUSH, 0, samples=1)

        def repetition() -> Any:
            (reply,) = links.exchange(request, gradient, w)
            if reply.status != Status.DONE:
                raise RuntimeError(f"the server refused a gradient: {Status(reply.status).name}")
            return w

        return repetition


def main(socket: str, world_size: int, contestant: type[Synchronous] = Synchronous) -> None:
    minidp.spawn(_rank, world_size, socket, contestant, servers=1, blas_threads=1, progress=False)


def _rank(comm: Communicator, socket: str, contestant: type[Synchronous]) -> None:
    serve(contestant(comm), socket)
