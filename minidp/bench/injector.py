"""Faults, and the program that they strike: what a rank does when its moment has come.

A fault is one line, ``kill@update:5 rank=1``: what happens, at which moment of which step, to whom.

    forward    in a layer of the model              backward   when a gradient has come
    reduce     before a block is summed             update     before a block of w is written
    flip       before the other buffer becomes w    save       between a checkpoint's last byte and its name
    metrics    at an all-reduce of the user's own
"""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from minidp import nn, optim, parallel
from minidp.comm import MAX, CommError, Communicator
from minidp.nn import functional as F

STEPS, SAVE_EVERY, SLOW_S = 8, 2, 0.3
INSIDE = ("forward", "backward", "reduce", "update", "flip")
MOMENTS: dict[str, tuple[str, ...]] = {
    "raise": (*INSIDE, "save", "metrics"),
    "kill": (*INSIDE, "save", "metrics"),
    "exit": (*INSIDE, "save", "metrics"),
    "second": INSIDE,
    "pause": (*INSIDE, "save", "metrics"),
    "slow": (*INSIDE, "save", "metrics"),
    "memory": INSIDE,
    "nan": ("backward",),
    "bit": ("metrics", "verify"),
    "return": ("forward", "metrics"),
    "order": ("metrics",),
    "shape": ("metrics",),
    "dtype": ("metrics",),
    "op": ("metrics",),
    "disk": ("save",),
}
"""What there is, and when it may happen. ``verify``: when the ranks compare what gradients have become."""


@dataclass(frozen=True)
class Fault:
    """Of one rank, once."""

    kind: str
    moment: str
    step: int
    rank: int

    def __str__(self) -> str:
        return f"{self.kind}@{self.moment}:{self.step} rank={self.rank}"


class Injected(Exception):
    """What an injected fault raises."""


class _Leaves(Exception):
    """Of a rank that returns early."""


class Injector:
    """Strikes this rank when its moment comes, after it has written down that it does."""

    def __init__(self, fault: Fault | None, rank: int, diary: Callable[..., None]) -> None:
        self._fault = fault if fault is not None and fault.rank == rank else None
        self._diary = diary
        self.strategy: Any = None
        """That it may look into, and change."""

    def at(self, moment: str, *things: Any) -> None:
        """This is ``moment``; the fault's, perhaps."""
        fault = self._fault
        if fault is not None and fault.moment == moment and fault.step == self.strategy.updates:
            self._fault = None  # once
            self._diary(fault=str(fault), pid=os.getpid())
            _STRIKE[fault.kind](self.strategy, *things)


def _raise(*_: Any) -> None:
    raise Injected("an injected fault")


def _kill(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _exit(*_: Any) -> None:
    os._exit(3)


def _pause(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _slow(*_: Any) -> None:
    time.sleep(SLOW_S)


def _memory(*_: Any) -> None:
    np.empty(2**60, np.uint8)


def _nan(_: Any, parameter: nn.Parameter) -> None:
    parameter.grad.numpy()[...] = np.nan  # type: ignore[union-attr]


def _bit(strategy: Any, *_: Any) -> None:
    rng = np.random.default_rng(strategy.updates)
    mine = strategy._own.view(np.uint8)
    mine[rng.integers(mine.size)] ^= 1 << int(rng.integers(8))


def _return(*_: Any) -> None:
    raise _Leaves


def _order(_: Any, comm: Communicator) -> None:
    comm.barrier()


def _shape(_: Any, comm: Communicator) -> None:
    comm.all_reduce(np.ones(3))


def _dtype(_: Any, comm: Communicator) -> None:
    comm.all_reduce(np.ones(2, np.int64))


def _op(_: Any, comm: Communicator) -> None:
    comm.all_reduce(np.ones(2), MAX)


def _disk(*_: Any) -> None:
    """No file may grow beyond this: the system says so as it does when the disk is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


_STRIKE: dict[str, Callable[..., None]] = {
    "raise": _raise,
    "kill": _kill,
    "exit": _exit,
    "second": _raise,
    "pause": _pause,
    "slow": _slow,
    "memory": _memory,
    "nan": _nan,
    "bit": _bit,
    "return": _return,
    "order": _order,
    "shape": _shape,
    "dtype": _dtype,
    "op": _op,
    "disk": _disk,
}


# --- the program ------------------------------------------------------------------------------------------------


class _Tripwire(nn.Module):
    """A layer that does nothing, at a moment."""

    def __init__(self, injector: Injector) -> None:
        self._injector = injector

    def forward(self, x: Any) -> Any:
        self._injector.at("forward")
        return x


def program(comm: Communicator, fault: Fault | None, folder: Path, resume: bool = False) -> list[str]:
    """Train for some steps, with checkpoints and a collective of one's own; the hash of each committed step."""
    path = folder / f"diary-{comm.rank}"

    def diary(**entry: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"time": time.monotonic(), **entry}) + "\n")

    injector = Injector(fault, comm.rank, diary)
    model = nn.Sequential(nn.Linear(8, 256), _Tripwire(injector), nn.ReLU(), nn.Linear(256, 3), seed=0)
    strategy = parallel.DataParallel(model, optim.Adam(model.parameters(), lr=0.01), comm, checksum=True)
    _arm(strategy, injector)
    if resume:
        strategy.load(folder)
    hashes = [_hash(strategy)]
    try:
        while strategy.updates < STEPS:
            rng = np.random.default_rng([strategy.updates, comm.rank])
            x, y = rng.standard_normal((16, 8)).astype(np.float32), rng.integers(0, 3, 16)
            loss = strategy.forward_backward(x, y, F.cross_entropy)
            injector.at("metrics", comm)
            comm.all_reduce(np.array([float(loss), 1.0]))
            strategy.step()
            hashes.append(_hash(strategy))
            if strategy.updates % SAVE_EVERY == 0:
                if comm.rank or (fault is not None and fault.kind == "disk"):
                    injector.at("save")
                strategy.save(folder)
    except _Leaves:
        return hashes
    except CommError as error:
        diary(told=type(error).__name__, text=str(error), updates=strategy.updates, state=_hash(strategy))
        if fault is not None and fault.kind == "second" and comm.rank == (fault.rank + 1) % comm.world_size:
            os.kill(os.getpid(), signal.SIGKILL)  # while it tidies up
        raise
    except (parallel.NonFiniteGradient, parallel.CorruptGradient, OSError) as error:
        diary(told=type(error).__name__, text=str(error), updates=strategy.updates, state=_hash(strategy))
        raise
    return hashes


def _arm(strategy: Any, injector: Injector) -> None:
    """Let the strategy pass the injector at each moment, on this rank."""

    def passing(moment: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            injector.at(moment)
            return function(*args, **options)

        return wrapped

    injector.strategy = strategy
    strategy._reduce = passing("reduce", strategy._reduce)
    strategy._update = passing("update", strategy._update)
    strategy._slabs.flip = passing("flip", strategy._slabs.flip)
    if strategy._seals is not None:
        strategy._seals.verify = passing("verify", strategy._seals.verify)
    first = next(iter(strategy.model.parameters()))
    first.register_post_accumulate_grad_hook(lambda parameter: injector.at("backward", parameter))
    if strategy.comm.rank == 0:  # who writes; this process is a worker, and ends with the run
        os.fsync = passing("save", os.fsync)


def _hash(strategy: Any) -> str:
    """Of the committed step: w, and the optimizer's state."""
    digest, slabs = blake2b(digest_size=8), strategy._slabs
    digest.update(slabs.params[slabs.current].data)
    for slot in sorted(slabs.state):
        digest.update(slabs.state[slot][slabs.current].data)
    return digest.hexdigest()
