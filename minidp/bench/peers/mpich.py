"""mpi4py over MPICH: its Allreduce alone, and PyTorch that trains with one Allreduce of all gradients a step."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from minidp.bench.jobs import AllReduce, Training
from minidp.bench.leftovers import named_memory
from minidp.bench.peers.serve import Contestant, leave, serve

MPI: Any = import_module("mpi4py.MPI")


class Mpich(Contestant):
    """A rank of COMM_WORLD. MPICH spins inside its calls; between bursts no call is open."""

    def __init__(self) -> None:
        self.comm = MPI.COMM_WORLD
        self.rank, self.world_size = self.comm.Get_rank(), self.comm.Get_size()

    def threads(self) -> int:
        return 1  # PyTorch is imported only to train, and then limited to one thread

    def barrier(self) -> None:
        self.comm.Barrier()

    def all_reduce(self, job: AllReduce) -> tuple[Callable[[], object], Callable[[float], None], Any]:
        comm, array = self.comm, np.zeros(job.nbytes // 4, np.float32)
        # The datatype given, the buffer specified once: nothing is looked up in the timed call.
        buffer, in_place, allreduce = [array, MPI.FLOAT], MPI.IN_PLACE, comm.Allreduce
        return lambda: allreduce(in_place, buffer), array.fill, array

    def training(self, job: Training) -> Callable[[], Any]:
        from minidp.bench.peers import eager

        eager.limit_threads()
        torch = eager.torch
        model, x, y = eager.build(job, self.rank)
        parameters = list(model.parameters())
        flat = torch.zeros(sum(p.numel() for p in parameters))
        pieces = flat.split([p.numel() for p in parameters])
        views = [piece.view_as(p) for piece, p in zip(pieces, parameters)]
        buffer, mean = [flat.numpy(), MPI.FLOAT], 1 / self.world_size

        def exchange() -> None:
            # One copy in, none out: the optimizer reads the summed gradients where they lie.
            torch.cat([p.grad.view(-1) for p in parameters], out=flat)
            self.comm.Allreduce(MPI.IN_PLACE, buffer)
            flat.mul_(mean)
            for p, view in zip(parameters, views):
                p.grad = view

        return eager.training_step(model, x, y, exchange)


def main(socket: str, world_size: int) -> None:
    contestant = Mpich()
    assert contestant.world_size == world_size, contestant.world_size
    serve(contestant, socket)
    segments = named_memory(os.getpid())
    MPI.Finalize()
    for segment in segments:  # MPICH would remove them, but only as the interpreter ends, which is not waited for
        segment.unlink(missing_ok=True)
    leave()
