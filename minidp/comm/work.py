"""Operations that have been begun and not finished."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidp.comm.communicator import Communicator


class Work(ABC):
    """An operation that has been begun with ``async_op=True``. It is finished when ``wait`` returns."""

    @abstractmethod
    def wait(self) -> int | None:
        """Finish the operation; for a receive, the rank that the message came from."""


class Later(Work):
    """A collective that runs when it is waited for, or before the next collective, in the order of issue.

    On the CPU nothing could move it on while the caller computes, so nothing is begun early: the order of
    collectives stays the order of the program on every rank.
    """

    def __init__(self, comm: Communicator, run: Callable[[], Any]) -> None:
        self._comm, self._run, self.done = comm, run, False

    def wait(self) -> None:
        while not self.done:
            self._comm.run_oldest()

    def run(self) -> None:
        self.done = True
        self._run()
