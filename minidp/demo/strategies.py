"""The strategies that ``--strategy`` can name: how each is built, who waits for whom, and at which η."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minidp import nn, optim, parallel
from minidp.comm import Communicator

TARGET = 0.95  # test accuracy: how long until then?
SERVERS, STALENESS, SYNC_EVERY = 1, 2, 8  # where the options say nothing


@dataclass(frozen=True)
class Knobs:
    """What strategies can be told. ``staleness`` is the bound s of ``ssp``."""

    staleness: int = STALENESS
    sync_every: int = SYNC_EVERY
    count_lost: bool = True


Build = Callable[[nn.Module, optim.Optimizer, Communicator, Knobs], parallel.Strategy]


@dataclass(frozen=True)
class Way:
    """A way to train together.

    Attributes:
        build: (model, optimizer, comm, knobs) → the strategy.
        title: what it is, for who meets it first.
        free: whether nobody waits for anybody.
        served: whether it needs servers.
        stale: whether each worker's gradient is an update by itself, of a w that may have moved meanwhile. N of
            them move w about N times as far as one synchronous step: such a strategy gets η/N.
        in_step: whether all workers must make the same number of steps.
    """

    build: Build
    title: str
    free: bool = False
    served: bool = False
    stale: bool = False
    in_step: bool = False

    def lr(self, lr: float, workers: int) -> float:
        return lr / workers if self.stale else lr


def _served(staleness: Callable[[Knobs], int | None]) -> Build:
    def build(model: nn.Module, optimizer: optim.Optimizer, comm: Communicator, knobs: Knobs) -> Any:
        return parallel.ParameterServer(model, optimizer, comm, staleness=staleness(knobs))

    return build


WAYS = {
    "sync": Way(
        lambda model, optimizer, comm, knobs: parallel.DataParallel(model, optimizer, comm),
        "gradients are averaged among the workers",
        in_step=True,
    ),
    "ps": Way(
        _served(lambda knobs: 0),
        "gradients are averaged on the servers",
        served=True,
        in_step=True,
    ),
    "ssp": Way(
        _served(lambda knobs: knobs.staleness),
        "each push is an update; nobody is more than s steps ahead",
        served=True,
        stale=True,
    ),
    "async": Way(
        _served(lambda knobs: None), "each push is an update, when it comes", free=True, served=True, stale=True
    ),
    "hogwild": Way(
        lambda model, optimizer, comm, knobs: parallel.Hogwild(
            model, optimizer, comm, count_lost=knobs.count_lost
        ),
        "all write one w that they share, without a lock",
        free=True,
        stale=True,
    ),
    "local": Way(
        lambda model, optimizer, comm, knobs: parallel.LocalSGD(model, optimizer, comm, knobs.sync_every),
        "replicas are averaged every H steps",
        in_step=True,
    ),
}
ALL = "all"
