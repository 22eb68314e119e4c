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
    def wait(self) -> Any:
        """Finish the operation. Returns what it would return without ``async_op``: of a receive the rank that the
        message came from, of ``all_gather_int`` the numbers."""


class Later(Work):
    """A collective that runs when it is waited for, or before the next collective of its communicator.

    On the CPU nothing could move it on while the caller computes, so nothing is begun early: the collectives of a
    communicator keep the order of the program on every rank. (Of two communicators they keep the order in which
    they are waited for; that must be the same on all ranks.) An error that it meets is raised by ``wait``.
    """

    def __init__(self, comm: Communicator, run: Callable[[], Any]) -> None:
        self._comm, self._run, self.done = comm, run, False
        self._value: Any = None
        self._error: Exception | None = None

    def wait(self) -> Any:
        while not self.done:
            self._comm.run_oldest()
        if self._error is not None:
            raise self._error
        return self._value

    def run(self) -> None:
        self.done = True
        behind, self._comm._later = self._comm._later, []  # for what it calls runs all that it finds there, first
        try:
            self._value = self._run()
        except Exception as error:
            self._error = error
            raise
        finally:
            self._comm._later[:0] = behind
