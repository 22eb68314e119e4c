"""Runs with servers: one group of all endpoints, the workers' communicators beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidp.comm.communicator import Communicator


@dataclass(frozen=True)
class Endpoint:
    """One end of a run of N workers and M servers, which is a world of N + M ranks, workers first.

    Attributes:
        comm: the group of all; ``comm.rank`` is this end's rank in it.
        workers: N.
    """

    comm: Communicator
    workers: int
    _sessions: Iterator[int] = field(default_factory=count, repr=False)
    _strategies: Counter[bool] = field(default_factory=Counter, repr=False)

    def next_session(self) -> int:
        """A number that no other call, here or at another end, gives."""
        return self.comm.rank + self.comm.world_size * next(self._sessions)

    def join(self, spares: bool) -> None:
        """A strategy begins, which can go on without this worker, or can't."""
        self._strategies[spares] += 1
        self._say()

    def part(self, spares: bool) -> None:
        """A strategy that has joined is no more."""
        self._strategies[spares] -= 1
        self._say()

    def _say(self) -> None:
        self.comm.expendable(self._strategies[True] > 0 and not self._strategies[False])

    @property
    def servers(self) -> range:
        """Ranks of the servers."""
        return range(self.workers, self.comm.world_size)

    @property
    def is_server(self) -> bool:
        return self.comm.rank >= self.workers

    def worker_group(self) -> Communicator | None:
        """The communicator that a worker's function is called with; None on servers. Collective, once a run.

        Its traffic counts what goes to servers as well.
        """
        group = self.comm.split(None if self.is_server else 0, self.comm.rank, "world")
        if group is not None:
            group.endpoint, group.traffic = self, self.comm.traffic
        return group
