"""A worker's end: it never outlives its parent, however that dies.

Three nets, because each has a hole. The kernel's parent-death signal fires when the fork server dies, which
holds a pipe end of ours; that end is therefore closed in the worker. A pipe that the parent keeps open and never
writes to closes when the parent dies, even by SIGKILL; a pidfd of the parent says the same thing. A thread
waits for either and kills the process: within 10 ms, or 110 ms if a long operation holds the interpreter.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from multiprocessing import forkserver

_PR_SET_PDEATHSIG = 1


def hold(pipe: int, parent_pid: int) -> None:
    """Die with the process ``parent_pid``, which holds the other end of ``pipe``. First thing in a worker."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    server = getattr(forkserver, "_forkserver")  # noqa: B009 (private, and not in the type stubs)
    if getattr(server, "_forkserver_alive_fd", None) is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = None
    watched = [pipe]
    if hasattr(os, "pidfd_open"):
        with contextlib.suppress(OSError):
            watched.append(os.pidfd_open(parent_pid))
    threading.Thread(target=_wait_and_die, args=(watched,), name="minidp-lifeline", daemon=True).start()


def _wait_and_die(watched: list[int]) -> None:
    poll = select.poll()
    for descriptor in watched:
        poll.register(descriptor, select.POLLIN | select.POLLHUP)
    poll.poll()
    os.kill(os.getpid(), signal.SIGKILL)
