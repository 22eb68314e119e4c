"""The processes of one contestant: started once, blocked between bursts, gone at the end whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from minidp.bench.jobs import Job
from minidp.bench.leftovers import named_memory
from minidp.bench.peers.serve import Burst, Hello
from minidp.launch import blas, interrupts

START_S = 60.0  # for all ranks to say hello: PyTorch's import alone takes seconds from a cold disk
ANSWER_S = 120.0  # for a preparation or a burst
LEAVE_S = 8.0  # for ranks to end by themselves once their socket is closed (they may be importing); then killed

_HOME = str(Path(__file__).resolve().parents[2])


class PeerFailed(RuntimeError):
    """A contestant did not start, died, fell silent, or did other work than the others."""


class Team:
    """All ranks of one contestant, as a context manager.

    ``with Team(...)`` launches; ``gather()`` waits until all ranks have said hello, so that several teams start
    at the same time. Each rank holds one end of a Unix socket: it blocks there between bursts, and ends when the
    other end closes, even if the bench was killed.

    Args:
        name: for messages.
        commands: one command line for each process to launch; they may start others. The word ``SOCKET`` in one
            stands for the address that the ranks connect to.
        world_size: ranks that will connect.
        address: where to put the socket, in a folder that is this bench's own.
    """

    def __init__(self, name: str, commands: Sequence[Sequence[str]], world_size: int, address: Path) -> None:
        self.name, self.world_size = name, world_size
        self._commands, self._address = commands, address
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ranks: list[Connection] = []
        self._pids: list[int] = []

    def __enter__(self) -> Team:
        with interrupts.held():
            self._log = tempfile.TemporaryFile()
            self._listener = socket.socket(socket.AF_UNIX)
            try:
                self._listener.bind(str(self._address))
                self._listener.listen(self.world_size)
                self._listener.settimeout(0.1)
                for command in self._commands:
                    self._processes.append(self._launch(command))
            except BaseException:
                self.close()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _launch(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        search = os.pathsep.join([_HOME, *filter(None, [os.environ.get("PYTHONPATH")])])
        # A session of its own: Ctrl-C reaches the bench alone, which then ends its teams in order.
        return subprocess.Popen(
            [str(self._address) if word == "SOCKET" else word for word in command],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env=os.environ | dict.fromkeys(blas.VARIABLES, "1") | {"PYTHONPATH": search},
        )

    def gather(self) -> None:
        """Wait until all ranks have said hello. PeerFailed if they don't, or if one computes with more threads."""
        arrived: dict[int, Connection] = {}
        deadline = time.monotonic() + START_S
        while len(arrived) < self.world_size:
            try:
                accepted, _ = self._listener.accept()
            except TimeoutError:
                if any(process.poll() is not None for process in self._processes):
                    raise self._failed("ended before all of its ranks were ready") from None
                if time.monotonic() > deadline:
                    raise self._failed(f"was not ready after {START_S:g} s") from None
                continue
            accepted.setblocking(True)
            rank = Connection(accepted.detach())
            self._ranks.append(rank)  # from now on close() closes it
            hello: Hello = self._receive([rank])[0]
            self._pids += [hello.pid, *hello.helpers]
            arrived[hello.rank] = rank
            if hello.threads != 1:
                raise self._failed(f"computes with {hello.threads} threads in rank {hello.rank}, not with one")
        self._ranks = [arrived[rank] for rank in range(self.world_size)]

    def prepare(self, job: Job) -> float:
        """Get ``job`` ready on all ranks; the mean of their check figures."""
        figures: list[float] = self._ask(job)
        return sum(figures) / self.world_size

    def burst(self, repeats: int, warm_up: int = 0) -> float:
        """Seconds for ``repeats`` repetitions of the prepared job: the slowest rank's."""
        seconds: list[float] = self._ask(Burst(warm_up, repeats))
        return max(seconds)

    def release(self) -> None:
        """Close the sockets: the ranks end by themselves, those of several teams at the same time."""
        for rank in self._ranks:
            rank.close()
        self._listener.close()

    @property
    def pids(self) -> set[int]:
        """Of all ranks, what works for them, and what launched them."""
        return {*self._pids, *(process.pid for process in self._processes)}

    def close(self) -> None:
        """Let the ranks end by themselves, then kill what has not ended. Twice is once."""
        with interrupts.held():
            self.release()
            if not self._ended(LEAVE_S):
                segments = [segment for pid in self._pids for segment in named_memory(pid)]
                self._signal(signal.SIGTERM)  # mpiexec ends its ranks when it is asked to
                if not self._ended(LEAVE_S):
                    self._signal(signal.SIGKILL)
                    for pid in self._pids:  # ranks that are in another session than the process launched here
                        with contextlib.suppress(OSError):
                            os.kill(pid, signal.SIGKILL)
                    self._ended(LEAVE_S)
                for segment in segments:
                    segment.unlink(missing_ok=True)
            self._end_helpers()
            self._log.close()
            self._address.unlink(missing_ok=True)

    def _ask(self, message: object) -> list[Any]:
        for rank in self._ranks:
            try:
                rank.send(message)
            except OSError:
                raise self._failed("died") from None
        return self._receive(self._ranks)

    def _receive(self, ranks: Sequence[Connection]) -> list[Any]:
        """One message from each. A rank that is gone is noticed while the others are still waited for."""
        answers: dict[Connection, Any] = {}
        deadline = time.monotonic() + ANSWER_S
        while len(answers) < len(ranks):
            silent = [rank for rank in ranks if rank not in answers]
            ready = connection.wait(silent, max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failed(f"did not answer within {ANSWER_S:g} s")
            for rank in silent:
                if rank in ready:
                    try:
                        answers[rank] = rank.recv()
                    except (EOFError, OSError):
                        raise self._failed("died") from None
        return [answers[rank] for rank in ranks]

    def _ended(self, seconds: float) -> bool:
        """Whether all processes launched here end within so many seconds."""
        deadline = time.monotonic() + seconds
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        return all(process.poll() is not None for process in self._processes)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(OSError):
                    os.killpg(process.pid, number)

    def _end_helpers(self) -> None:
        """End what a rank that was killed has left: some of Ray's processes do not notice that."""
        groups = {process.pid for process in self._processes}
        for pid in self._pids:
            with contextlib.suppress(OSError):
                if os.getpgid(pid) in groups:
                    os.kill(pid, signal.SIGKILL)

    def _failed(self, what: str) -> PeerFailed:
        self._ended(0.5)  # its last words may be on their way
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return PeerFailed(f"{self.name} {what}" + ("".join(f"\n    {line}" for line in lines[-6:])))
