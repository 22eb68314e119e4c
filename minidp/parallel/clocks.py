"""Who may go on when: the clocks of a parameter server's workers, as pure arithmetic.

A worker's clock is the number of steps that it has pushed, which is also the number of the step that it computes
next. With a bound s (Ho et al., "Stale Synchronous Parallel Parameter Server", NIPS 2013, section 2) a worker may
start step c only when everybody has pushed the steps before c − s:

    min over workers of clock  ≥  c − s

So running workers are at most s steps apart, and step c is computed from a w that holds every update of the steps
up to c − s − 1, and the worker's own. s = 0 is the barrier of synchronous training, None no rule at all.
Workers that have left, or wait for all others in a collective of the strategy, hold nobody back.
"""

from __future__ import annotations

import math


class Clocks:
    """The clocks of ``workers`` workers, numbered from 0, and who of them waits.

    Args:
        staleness: s ≥ 0, or None: nobody ever waits.
    """

    def __init__(self, workers: int, staleness: int | None) -> None:
        self.staleness = staleness
        self.clocks = [0] * workers
        self.waiting: set[int] = set()
        """Workers that have pushed and were not let go."""
        self._apart: set[int] = set()  # parked for a collective: nobody waits for them
        self._left: set[int] = set()

    def push(self, worker: int) -> None:
        """``worker`` has pushed a step, and waits to be let go."""
        self.clocks[worker] += 1
        self.waiting.add(worker)

    def park(self, worker: int) -> None:
        """``worker`` waits for the others in a collective."""
        self._apart.add(worker)

    def come_back(self) -> None:
        """The collective is over."""
        self._apart.clear()

    def leave(self, worker: int) -> None:
        """``worker`` has returned or died."""
        self._left.add(worker)
        self.waiting.discard(worker)

    @property
    def present(self) -> list[int]:
        """Workers that have not left."""
        return [worker for worker in range(len(self.clocks)) if worker not in self._left]

    def _farthest(self) -> float:
        """The highest clock with which a worker may start its next step."""
        if self.staleness is None:
            return math.inf
        held = (self.clocks[other] for other in self.present if other not in self._apart)
        return min(held, default=math.inf) + self.staleness

    def let_go(self) -> list[int]:
        """Those who waited and may go on now, in order; they wait no more."""
        farthest = self._farthest()
        free = sorted(worker for worker in self.waiting if self.clocks[worker] <= farthest)
        self.waiting.difference_update(free)
        return free
