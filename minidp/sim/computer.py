"""A rank's computer: a task whose metered work takes virtual time."""

from __future__ import annotations

from minidp import backend
from minidp.sim.cluster import Cluster
from minidp.sim.loop import Action, Loop, Task


class Computer(Task):
    """The task of a rank. What it computes, as `backend.meter` counts it, is charged to its clock.

    Each stretch of computing between two waits has a jitter factor of its own.
    """

    def __init__(self, loop: Loop, cluster: Cluster, rank: int, run: Action) -> None:
        super().__init__(loop, rank, lambda: self._metered(run))
        self.cluster = cluster
        self._meter: backend.Meter | None = None
        self._charged = (0, 0.0, 0.0)
        self._slowness = cluster.slowness(rank)
        self._jitter = cluster.jitter_factors(rank)
        self._factor: float | None = None

    def _metered(self, run: Action) -> None:
        with backend.meter() as self._meter:
            run()

    def catch_up(self) -> None:
        """Charge what was computed since the last time."""
        meter = self._meter
        if meter is None or meter.operations == self._charged[0]:
            return
        operations, flops, nbytes = self._charged
        self._charged = (meter.operations, meter.flops, meter.nbytes)
        if self._factor is None:
            self._factor = self._slowness * self._jitter.next()
        work = self.cluster.compute_s(meter.operations - operations, meter.flops - flops, meter.nbytes - nbytes)
        self.clock += work * self._factor

    def waited(self) -> None:
        """What it computes from now on is another stretch."""
        self._factor = None
