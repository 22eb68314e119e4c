"""What every contestant's ranks have in common: wait blocked for a burst, run it, say how long it took."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Client
from typing import Any, NamedTuple, NoReturn

import numpy as np

from minidp.bench.jobs import AllReduce, Array, Exchange, Job, Training


class Hello(NamedTuple):
    """The first message of a rank."""

    rank: int
    pid: int
    threads: int  # that its linear algebra uses
    helpers: tuple[int, ...] = ()  # pids of processes that work for it


class Burst(NamedTuple):
    """The command to run the prepared job: ``warm_up`` times untimed, then ``repeats`` times."""

    warm_up: int
    repeats: int


class Contestant:
    """One rank of a contestant. A subclass says how it does each job; a job it can't do raises."""

    rank = 0
    world_size = 1

    def threads(self) -> int:
        """Threads that a matrix product may use in this process."""
        raise NotImplementedError

    def helpers(self) -> tuple[int, ...]:
        """The pids of other processes that work for this rank: what they take is not a neighbour's."""
        return ()

    def barrier(self) -> None:
        """Wait for all ranks."""

    def elapse(self, call: Callable[[], object], repeats: int) -> float:
        """Seconds that so many calls take."""
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return time.perf_counter() - start

    def all_reduce(self, job: AllReduce) -> tuple[Callable[[], object], Callable[[float], None], Any]:
        """The call to time, a function that fills the array with a number, and the array."""
        raise NotImplementedError

    def training(self, job: Training) -> Callable[[], Any]:
        """The step to time; it returns this rank's loss, before the update."""
        raise NotImplementedError

    def exchange(self, job: Exchange) -> Callable[[], Array]:
        """The call to time; it returns w, which has begun as zeros and may have room for alignment at its end."""
        raise NotImplementedError

    def prepare(self, job: Job) -> tuple[Callable[[], object], float]:
        """The call to time, and a figure by which the bench sees that all contestants do the same work."""
        if isinstance(job, Training):
            step = self.training(job)
            losses = [float(step()) for _ in range(4)]
            return step, losses[-1]
        if isinstance(job, Exchange):
            exchange = self.exchange(job)
            return exchange, float(np.linalg.norm(exchange()))
        reduce, fill, array = self.all_reduce(job)
        fill(self.rank + 1)
        reduce()
        figure = float(array[-1])
        fill(0)
        return reduce, figure


def serve(contestant: Contestant, socket: str) -> None:
    """Take jobs and bursts from ``socket`` until the bench closes it. Blocks between bursts, never spins."""
    with suppress(FileNotFoundError, EOFError, ConnectionError), Client(socket, "AF_UNIX") as connection:
        connection.send(Hello(contestant.rank, os.getpid(), contestant.threads(), contestant.helpers()))
        call: Callable[[], object] = lambda: None  # noqa: E731
        while True:
            command = connection.recv()
            if isinstance(command, Burst):
                connection.send(_burst(contestant, call, command))
            else:
                call, figure = contestant.prepare(command)
                connection.send(figure)


def leave() -> NoReturn:
    """End this process now: with PyTorch in it the interpreter takes a second to clear itself away."""
    os._exit(0)


def _burst(contestant: Contestant, call: Callable[[], object], burst: Burst) -> float:
    """Seconds that ``burst.repeats`` calls took on this rank, from a moment when all ranks were ready."""
    for _ in range(burst.warm_up):
        call()
    contestant.barrier()
    return contestant.elapse(call, burst.repeats)
