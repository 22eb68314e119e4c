"""How the training loss falls: of all ranks together, in a few dozen points."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minidp.autograd import Tensor
from minidp.comm import Communicator

POINTS = 40  # of a run, at most


class Moment(NamedTuple):
    """The mean loss of the samples of some steps, the last of which was ``step``, at ``time_s``."""

    step: int
    time_s: float
    loss: float


class Curve:
    """Puts the loss of each step aside, and asks for nothing before the end: no step takes longer for it.

    Args:
        wanted: else nothing is kept.
    """

    def __init__(self, comm: Communicator, wanted: bool = True) -> None:
        self._comm, self._wanted, self._start_s = comm, wanted, comm.now()
        self._losses: list[tuple[Any, int]] = []
        self._when: list[tuple[int, float]] = []

    def add(self, loss: Tensor, samples: int, step: int) -> None:
        """``loss`` is the mean over so many ``samples`` (tokens, for text) of this rank."""
        if self._wanted:
            self._losses.append((loss.data.copy(), samples))  # on its device
            self._when.append((step, self._comm.now() - self._start_s))

    def moments(self) -> list[Moment]:
        """Σ n_i L_i / Σ n_i of all ranks, the same on each. Collective, after as many steps on all of them."""
        if not self._wanted:
            return []
        sums = np.array([[float(loss) * samples, samples] for loss, samples in self._losses]).reshape(-1, 2)
        self._comm.all_reduce(sums)
        found = []
        for of_part in np.array_split(np.arange(len(sums)), min(POINTS, max(1, len(sums)))):
            if of_part.size:
                loss_sum, samples = sums[of_part].sum(0)
                step, time_s = self._when[of_part[-1]]
                found.append(Moment(step, time_s, float(loss_sum / samples)))
        return found
