"""A worker's life, from birth to its report. Importable by itself: the user's script never runs again in it."""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, TextIOBase
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np

from minidp.backend import Device, DeviceUnavailable, to_numpy
from minidp.comm.arena import Arena
from minidp.comm.board import Board
from minidp.comm.endpoint import Endpoint
from minidp.comm.errors import in_words
from minidp.comm.transport import on_device
from minidp.comm.wording import name_ranks
from minidp.comm.world import join_world
from minidp.launch import blas, lifeline, logs, memory, servers
from minidp.launch.whereabouts import Sampler

# Reports travel in pieces that a pipe takes as a whole or not at all: a worker that is stopped in the middle of
# a long one does not keep the parent waiting for the rest.
PIECE, MORE, LAST = 4000, b"+", b"."

inside_worker = False
"""True in a worker: ``spawn`` there is an error."""


@dataclass(frozen=True)
class Surroundings:
    """What a worker takes over from its parent, which a fork server does not know."""

    environ: dict[str, str]
    path: list[str]
    argv: list[str]
    folder: str
    log_levels: dict[str, int]
    blas_threads: int

    @classmethod
    def here(cls, blas_threads: int) -> Surroundings:
        return cls(dict(os.environ), list(sys.path), list(sys.argv), os.getcwd(), logs.levels(), blas_threads)

    def take_over(self) -> None:
        os.environ.clear()
        os.environ.update(self.environ)
        sys.path[:] = self.path
        sys.argv[:] = self.argv
        with contextlib.suppress(OSError):
            os.chdir(self.folder)
        blas.limit(self.blas_threads)
        memory.keep()


@dataclass(frozen=True)
class Job:
    """One rank's part of a run, as it travels to the worker."""

    rank: int
    world_size: int
    servers: int  # ranks from world_size on
    device: bytes  # by cloudpickle: what it needs may lie on the parent's sys.path
    timeout_s: float
    arena: Arena
    function: bytes  # (fn, args), by cloudpickle: a notebook's or a script's own functions travel too
    surroundings: Surroundings
    parent_pid: int
    record: Path | None = None  # where servers write down what they do

    @property
    def name(self) -> str:
        """``rank 2`` or ``server 0``."""
        return name_ranks([self.rank], servers_from=self.world_size)


class _ToParent(TextIOBase):
    """sys.stdout or sys.stderr of a worker: whole lines go to the parent, which prints them where it prints."""

    def __init__(self, send: Callable[[tuple[str, Any]], None], stream: str) -> None:
        self._send, self._stream, self._rest = send, stream, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        lines, newline, self._rest = (self._rest + text).rpartition("\n")
        if newline:
            self._send((self._stream, lines + newline))
        return len(text)

    def flush(self) -> None:
        if self._rest:
            rest, self._rest = self._rest, ""
            self._send((self._stream, rest))


def main(job: Job, report: Connection, log: Connection, pipe: Connection) -> None:
    """Run the job and report once: ("returned", value) or ("raised", …). What ``spawn`` starts in each worker."""
    global inside_worker
    inside_worker = True
    faulthandler.enable(2)  # who dies by SIGSEGV says no word: its stack goes to the terminal
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lifeline.hold(pipe.fileno(), job.parent_pid)
    lock = threading.Lock()

    def send(message: tuple[str, Any]) -> None:
        data = message[1] if isinstance(message[1], bytes) else cloudpickle.dumps(message[1])
        data = message[0].encode() + b"\0" + data
        with lock:
            for at in range(0, len(data), PIECE):
                report.send_bytes((LAST if at + PIECE >= len(data) else MORE) + data[at : at + PIECE])

    sys.stdout, sys.stderr = _ToParent(send, "stdout"), _ToParent(send, "stderr")
    try:
        job.surroundings.take_over()
        logs.send_to(log, job.surroundings.log_levels)
        message = _run(job)
    except BaseException as error:  # also SystemExit and KeyboardInterrupt: a rank that ends so has failed
        message = ("raised", _pack(error))
    sys.stdout.flush()
    sys.stderr.flush()
    send(message)
    report.close()
    log.close()
    if message[0] == "returned" and not pickle.loads(job.device).on_host:
        threading.Event().wait()  # what this process shares of its device ends with it: until the parent ends all
    # No atexit, no thread joined, no destructor: nothing of the user's can keep a finished worker alive.
    os._exit(0)


def _run(job: Job) -> tuple[str, Any]:
    total, is_server = job.world_size + job.servers, job.rank >= job.world_size
    # A server waits as long as workers compute; workers wait for it with patience of their own.
    patience = math.inf if is_server else job.timeout_s
    everybody = join_world(job.arena, job.rank, total, patience, job.world_size)
    Sampler(Board(job.arena, total, job.world_size), job.rank).start()
    device: Device = pickle.loads(job.device)
    if not is_server:
        _start(device, job)
    if job.servers:
        value = servers.live(Endpoint(everybody, job.world_size), job.function, job.record, device)
    else:
        comm = on_device(everybody, device)
        function, args = pickle.loads(job.function)
        try:
            value = function(comm, *args)
            device.synchronize()  # peers may wait for what this process has asked of it, and which ends with it
        except BaseException:
            comm.close()
            raise
        everybody.close()  # but not the way between devices: peers may still be reading
    try:
        data = _packed(value, device)
    except Exception as error:
        raise TypeError(
            f"what rank {job.rank} returned can't be pickled ({error}): return arrays, numbers, strings and "
            "containers of them"
        ) from error
    everybody.leave()
    return "returned", data


def _start(device: Device, job: Job) -> None:
    """Take hold of the device. In a thread, since a broken driver may never answer, and nobody waits for ever."""
    problem: list[Exception] = []

    def start() -> None:
        try:
            device.start(job.rank)
        except Exception as error:
            problem.append(error)

    if not device.on_host:
        thread = threading.Thread(target=start, daemon=True)
        thread.start()
        thread.join(job.timeout_s)
        if thread.is_alive():
            raise DeviceUnavailable(f"device={device.name!r} has not started within {job.timeout_s:g} s")
        if problem:
            raise problem[0]
    device.start(job.rank)  # of this thread, too


def _packed(value: Any, device: Device) -> bytes:
    """The pickled result. Arrays of a device leave as arrays of the host: the parent has not touched the device,
    and shall not have to."""
    if device.on_host:
        return cloudpickle.dumps(value)  # type: ignore[no-any-return]
    file = BytesIO()
    _ToHost(file, device).dump(value)
    return file.getvalue()


class _ToHost(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, file: BytesIO, device: Device) -> None:
        super().__init__(file)
        self._device = device

    def reducer_override(self, obj: Any) -> Any:
        if self._device.is_here(obj):
            return np.asarray, (to_numpy(obj),)
        return super().reducer_override(obj)


def _pack(error: BaseException) -> bytes:
    """An exception with its traceback as text; the exception itself only if it survives the journey."""
    trace = "".join(traceback.format_exception(error))
    data = cloudpickle.dumps(None)
    with contextlib.suppress(BaseException):  # the user's __reduce__ may do anything
        there_and_back = cloudpickle.dumps(error)
        pickle.loads(there_and_back)
        data = there_and_back
    return cloudpickle.dumps((in_words(error), trace, data))  # type: ignore[no-any-return]
