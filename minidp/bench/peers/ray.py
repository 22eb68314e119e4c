"""A Ray actor that holds w as a NumPy array; this process is the worker that pushes to it.

Ray brings half a dozen processes of its own, which take about 0.03 of a core while nobody asks for anything. When
this process ends, so do they, and their folder is removed; if it is killed, the team ends them (the folder stays).
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from types import FrameType
from typing import Any

import numpy as np
import threadpoolctl

from minidp.bench import leftovers
from minidp.bench.jobs import LEARNING_RATE, Array, Exchange
from minidp.bench.peers.serve import Contestant, leave, serve

STORE_BYTES = 256 * 2**20  # of Ray's shared memory: dozens of the largest arrays, and small enough for a laptop


def parameters(ray: Any) -> Any:
    """The actor's class. Made in a function, it travels by value, and the actor imports nothing of minidp."""

    class Parameters:
        def hold(self, size: int, lr: float) -> None:
            self.w, self.work, self.lr = np.zeros(size, np.float32), np.empty(size, np.float32), np.float32(lr)

        def push_pull(self, gradient: Array) -> Array:
            np.multiply(gradient, self.lr, out=self.work)
            self.w -= self.work
            return self.w

    return ray.remote(Parameters)


class Driver(Contestant):
    def __init__(self, ray: Any) -> None:
        self._get, self._actor = ray.get, parameters(ray).remote()
        self._hold(1)

    def _hold(self, size: int) -> None:
        self._get(self._actor.hold.remote(size, LEARNING_RATE))

    def threads(self) -> int:
        return max((pool["num_threads"] for pool in threadpoolctl.threadpool_info()), default=1)

    def helpers(self) -> tuple[int, ...]:
        return tuple(leftovers.children())

    def exchange(self, job: Exchange) -> Callable[[], Array]:
        gradient, get, push_pull = job.gradient(), self._get, self._actor.push_pull
        self._hold(len(gradient))

        def repetition() -> Any:
            return get(push_pull.remote(gradient))  # a view of Ray's shared memory, where it is not small

        return repetition


def main(socket: str, world_size: int) -> None:
    assert world_size == 1, world_size
    # A password of this run's own: otherwise Ray leaves one in the home folder. And it is not to report its use.
    os.environ |= {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    signal.signal(signal.SIGTERM, _leave)
    ray: Any = import_module("ray")
    with tempfile.TemporaryDirectory(prefix="minidp-ray-", ignore_cleanup_errors=True) as folder:
        try:
            ray.init(
                address="local",
                num_cpus=1,
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
                _temp_dir=folder,
            )
            serve(Driver(ray), socket)
        finally:
            ray.shutdown()
    leave()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
