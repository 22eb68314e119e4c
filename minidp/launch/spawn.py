"""``spawn``: run a function on every rank, get back what each returned, and leave nothing behind."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import numpy as np

from minidp.backend import Device, get_device
from minidp.comm.board import Board
from minidp.comm.world import reserve_world
from minidp.launch import blas, interrupts, supervise, worker
from minidp.launch.logs import RankHandler
from minidp.launch.progress import Display, wanted
from minidp.launch.servers import live
from minidp.launch.whereabouts import telling
from minidp.sim import Cluster

T = TypeVar("T")
WORLDS = ("process", "virtual")
_log = logging.getLogger("minidp.launch")
_starting = threading.Lock()  # two threads may spawn at once, but starting hides __main__ and sets variables


def spawn(
    fn: Callable[..., T],
    world_size: int,
    *args: Any,
    servers: int = 0,
    world: str = "process",
    device: str | Device = "cpu",
    cluster: Cluster | None = None,
    blas_threads: int | None = None,
    timeout_s: float = 60.0,
    progress: bool | None = None,
    record: str | os.PathLike[str] | None = None,
) -> list[T]:
    """Run ``fn(comm, *args)`` on ``world_size`` ranks and return what each returned, in rank order.

    Each rank is a process of its own, or, in the virtual world, a task in this thread. Functions travel by value
    where they must: those of a notebook cell, of a script without a ``__main__`` guard, lambdas. Prints and log
    records of the ranks appear where the parent's do.

    Args:
        fn: called as ``fn(comm, *args)`` with the rank's ``Communicator``.
        world_size: number of ranks, at least 1.
        servers: as many parameter servers besides, each a process (or task) of its own, for
            `parallel.ParameterServer`; they end with the last rank.
        world: ``"process"``, one worker process a rank; ``"virtual"``, all ranks here, one at a time, on a virtual
            clock: two runs are equal to the bit. Module globals are then shared by all ranks.
        device: where strategies keep models, and collectives take arrays from besides the host: ``"cpu"``,
            ``"cuda"`` (GPUs through CuPy, which ranks take in turn) or ``"cuda:1"`` (that one for all ranks).
        cluster: what a virtual world's ranks live on; default ``sim.Cluster(nodes=world_size)``.
        blas_threads: BLAS threads a rank; default cores ÷ ranks. Logged at INFO, too few cores at WARNING. The
            virtual world has always one.
        timeout_s: how long a rank waits for another in a collective before CollectiveTimeout. In the virtual
            world, where that can't happen, how long a rank may block outside of ``comm`` (if the caller is the
            main thread; elsewhere nobody can interrupt it).
        record: with servers, a file to write their events to as they happen; ``python -m minidp.replay`` runs it
            again with the same bits. BLAS then has one thread.
        progress: show each rank's steps, if standard error is a terminal, or in a notebook; False: never.

    Where a strategy lets the run go on without a rank that has died, its result is None, and a warning is logged.

    Raises:
        RankFailed: the first failure of any rank: ``rank 2 of 4 raised ValueError: …`` (its ``__cause__``) or
            ``rank 2 of 4 was killed by SIGKILL``. For an error of communication it can be caught as that error
            too, ``except CollectiveMismatch``. All other ranks have ended.
        ValueError, TypeError: arguments that can't work. MemoryError: no room for the run, in bytes.
        DeviceUnavailable: there is no such device; the message says what works instead. (Where there is a driver,
            but the device does not work, it is the ``__cause__`` of RankFailed.)
        KeyboardInterrupt: after the workers are gone. After any ending no process, descriptor or segment is left.
    """
    _check(fn, world_size, servers, world, timeout_s)
    _check_virtual(world, cluster, blas_threads)
    device = get_device(device)
    device.check()
    world_size, servers = int(world_size), int(servers)
    function = _pack(fn, args)
    log = (
        None
        if record is None
        else _begin_log(Path(record), function, world_size, servers, world, device, blas_threads)
    )
    if world == "virtual":
        from minidp.launch.virtual import run  # late: the process world needs nothing of it

        life_of = partial(live, function=function, record=log, device=device) if servers else None
        return run(function, world_size, cluster, float(timeout_s), servers, life_of, device)
    asked: list[bool] = []
    with telling(lambda: asked.append(True)):
        threads = blas_threads if log is None else 1
        return _in_processes(function, world_size, servers, device, threads, timeout_s, progress, asked, log)


def _in_processes(
    function: bytes,
    world_size: int,
    servers: int,
    device: Device,
    blas_threads: int | None,
    timeout_s: float,
    progress: bool | None,
    asked: list[bool],
    log: Path | None,
) -> list[Any]:
    there = cloudpickle.dumps(device)
    threads = blas.threads_per_rank(world_size, blas_threads)
    surroundings = worker.Surroundings.here(threads)
    title = (
        f"{world_size} worker process{'es' * (world_size > 1)}, {threads} BLAS thread{'s' * (threads > 1)} each"
    )
    if servers:
        title += f", {servers} server{'s' * (servers > 1)}"
    _log.info(title)
    total = world_size + servers
    if world_size * threads + servers > blas.cores():
        _log.warning("%s on %d cores: they take turns, so timings mean nothing", title, blas.cores())
    workers: list[supervise.Worker] = []
    arena = reserve_world(total)
    board = Board(arena, total, world_size)
    display = Display(board, title, wanted(progress))
    try:
        with interrupts.held(), _starting:
            context = _context()
            for rank in range(total):
                job = worker.Job(
                    rank, world_size, servers, there, timeout_s, arena, function, surroundings, os.getpid(), log
                )
                workers.append(_start(context, job, display))
        return supervise.run(workers, board, display, asked)
    finally:
        with interrupts.held():
            display.close()
            for each in workers:
                each.lifeline.close()
            for each in workers:
                each.end()
            board.close()
            arena.close()


def _check(fn: Any, world_size: Any, servers: Any, world: str, timeout_s: Any) -> None:
    if worker.inside_worker or _inside_virtual_rank():
        raise RuntimeError(
            "spawn was called inside a worker of another spawn: call it in the parent; comm.split makes groups"
        )
    if not callable(fn):
        raise TypeError(f"fn must be a function of (comm, *args), not {type(fn).__name__}")
    for name, value in (("world_size", world_size), ("servers", servers)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{name} must be a whole number, not {value!r}")
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: at least one rank is needed")
    if servers < 0:
        raise ValueError(f"servers={servers}: give 0 (none) or more")
    if world not in WORLDS:
        raise ValueError(f"unknown world {world!r}; valid: {', '.join(map(repr, WORLDS))}")
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not timeout_s > 0:
        raise ValueError(f"timeout_s={timeout_s!r}: give a positive number of seconds")


def _begin_log(
    path: Path,
    function: bytes,
    world_size: int,
    servers: int,
    world: str,
    device: Device,
    blas_threads: int | None,
) -> Path:
    if not servers:
        raise ValueError("record= writes down what servers do, and this run has none: give servers=1 or more")
    if blas_threads not in (None, 1):
        raise ValueError(
            f"blas_threads={blas_threads}: a run that is recorded has one, for bits that can be repeated"
        )
    from minidp.parallel.event_log import create  # late: it is not needed otherwise

    create(
        path.absolute(), function, sys.path, workers=world_size, servers=servers, world=world, device=device.name
    )
    return path.absolute()


def _inside_virtual_rank() -> bool:
    loop = sys.modules.get("minidp.sim.loop")  # not there: there is no virtual world
    return loop is not None and loop.rank_here() is not None


def _check_virtual(world: str, cluster: Any, blas_threads: Any) -> None:
    if world == "virtual":
        if cluster is not None and not isinstance(cluster, Cluster):
            raise TypeError(f"cluster must be a minidp.sim.Cluster, not {type(cluster).__name__}")
        if blas_threads not in (None, 1):
            raise ValueError(
                f"blas_threads={blas_threads!r}: the virtual world has one BLAS thread, so that its results do "
                "not depend on the number of cores; leave it out"
            )
    elif cluster is not None:
        raise ValueError(f"cluster= describes a virtual world; this one is {world!r}: give world='virtual'")


def _pack(fn: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    try:
        return cloudpickle.dumps((fn, args))  # type: ignore[no-any-return]
    except Exception as error:
        name = getattr(fn, "__qualname__", repr(fn))
        raise TypeError(
            f"{name} and its arguments can't be sent to the workers: {error}. Open files, locks, sockets and "
            "generators can't travel; make them inside the function"
        ) from error


def _context() -> Any:
    """The multiprocessing context whose server is started under one BLAS thread, with minidp preloaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["minidp.launch.born"])
    # The server knows neither sys.path nor later changes of the environment: both are sent with each job.
    home = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    with _environ(PYTHONPATH=search, **dict.fromkeys(blas.VARIABLES, "1")):
        forkserver.ensure_running()
    return context


def _start(context: Any, job: worker.Job, display: Display) -> supervise.Worker:
    report, report_out = context.Pipe(duplex=False)
    log, log_out = context.Pipe(duplex=False)
    pipe, lifeline = context.Pipe(duplex=False)
    theirs: list[Connection] = [report_out, log_out, pipe]
    process = context.Process(
        target=worker.main, args=(job, *theirs), name=f"minidp-{job.name.replace(' ', '-')}", daemon=True
    )
    with _no_main():
        process.start()
    for connection in theirs:
        connection.close()
    handler = RankHandler(job.rank, job.name, log, display.hidden)
    return supervise.Worker(job.rank, process, report, handler, lifeline)


@contextmanager
def _no_main() -> Iterator[None]:
    """Hide the user's script while a process starts, so that multiprocessing does not run it again there."""
    script = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


@contextmanager
def _environ(**changes: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
