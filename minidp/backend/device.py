"""Devices: where the arrays of a rank lie, and what ranks that share one need of it.

``"cpu"`` is the host: NumPy, in order, at once. ``"cuda"`` is a GPU, through CuPy (``cuda.py``): it computes in
the order in which it is asked, on a stream, while the host runs ahead. So two things are said explicitly: when the
host waits for the device (`Device.synchronize`, a move to the host), and when one rank's stream waits for
another's (an *event*, which is recorded in one stream and waited for in others, of other processes too).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from minidp.backend.arrays import Array, asarray, to_numpy


class DeviceUnavailable(RuntimeError):
    """There is no such device here: the ``reason``, and what works ``instead``."""

    def __init__(self, reason: str, instead: str = "") -> None:
        super().__init__(reason, instead)
        self.reason, self.instead = reason, instead

    def __str__(self) -> str:
        return f"{self.reason}. {self.instead}".strip()


class Device(ABC):
    """A kind of place for arrays; after `start`, the one of them that this process uses.

    Attributes:
        name: as users write it: ``"cpu"``, ``"cuda"``, ``"cuda:1"``.
        xp: the array module; importing it may take a while, so that a device has it only when asked.
        on_host: whether it is the host itself.
    """

    name: str = ""
    on_host: ClassVar[bool] = False

    @property
    @abstractmethod
    def xp(self) -> Any: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def asarray(self, x: Any, dtype: Any = None) -> Array:
        """`x` here: itself if it is here already, else moved."""
        return asarray(x, self.xp, dtype)

    def is_here(self, x: Any) -> bool:
        """Whether `x` is an array of this kind of device, not of the host's."""
        return not self.on_host and isinstance(x, self.xp.ndarray)

    # -- of this process ---------------------------------------------------------------------------------

    def check(self) -> None:  # noqa: B027
        """Raise DeviceUnavailable if there plainly is none. Cheap, and nothing of the device is touched: whoever
        asks may still fork. That it works only `start` can tell."""

    def start(self, local_rank: int = 0) -> None:  # noqa: B027
        """Take hold of it in this process: of several alike, number ``local_rank`` modulo their number.

        Raises DeviceUnavailable, with the reason.
        """

    def describe(self) -> str:
        """Which one it is, for people."""
        return self.name

    def identity(self) -> str:
        """Equal for two processes if they use the same one."""
        return self.name

    def synchronize(self) -> None:  # noqa: B027
        """Let the host wait until the device has done all that it was asked to."""

    # -- between the processes of ranks that share it ----------------------------------------------------

    def share(self, nbytes: int) -> tuple[Array, bytes]:
        """New memory that other processes can `open`: zeroed bytes (uint8), and the handle to open them by.

        It lives as long as this process. Raises MemoryError, in bytes; OSError where it can't be shared.
        """
        raise OSError(f"memory of {self.name} can't be shared between processes")

    def open(self, handle: bytes, nbytes: int) -> Array:
        """The memory of a handle that this or another process got from `share`: the same bytes. OSError if it
        can't be reached from here."""
        raise OSError(f"memory of {self.name} can't be shared between processes")

    def new_event(self) -> tuple[Any, bytes]:
        """An event, and the handle by which other processes can `open_event` it."""
        raise OSError(f"{self.name} has no events")

    def open_event(self, handle: bytes) -> Any:
        """The event of a handle, also of one's own."""
        raise OSError(f"{self.name} has no events")

    def record(self, event: Any) -> None:  # noqa: B027
        """Let the event stand for all that this process has asked of the device up to now."""

    def wait(self, event: Any) -> None:  # noqa: B027
        """Let all that this process asks of the device from now on come after what the event stands for at this
        moment. The host does not wait."""

    def clock(self, now: Callable[[], float]) -> Any:
        """The device's own clock for a ``trace.Recorder`` whose clock is ``now``; None if it has no other."""
        return None

    # -- what the host need not wait for -------------------------------------------------------------------

    def beside(self) -> Beside:
        """A second queue of work, which runs beside the first where the device can."""
        return Beside()

    def later(self, x: Array) -> Later:
        """Begin to bring `x`, as it is now, to the host, which goes on, and asks for it when it needs it."""
        return Later(np.array(to_numpy(x)))

    def put(self, x: Array, host: np.ndarray) -> None:
        """Overwrite `x` by the array of the host, which may change afterwards unless it is page-locked."""
        x[...] = self.asarray(host)


class Later:
    """An array on its way to the host."""

    def __init__(self, host: np.ndarray) -> None:
        self._host = host

    def get(self) -> np.ndarray:
        """The array; waits until it has come, and for nothing that was asked of the device afterwards."""
        return self._host


class Beside:
    """A queue of work of its own: ``with beside: …`` asks the device for something that others need not wait for.

    What is asked inside comes after all that had been asked outside before; `join` lets what is asked from then on
    come after it.
    """

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def join(self) -> None: ...


class Host(Device):
    """The processor and its memory."""

    name = "cpu"
    on_host = True

    @property
    def xp(self) -> Any:
        return np


HOST = Host()


def get_device(which: str | Device) -> Device:
    """The device of that name: ``"cpu"``, ``"cuda"`` (a GPU a rank, in turn), ``"cuda:1"`` (that GPU, for all).

    Nothing is touched or imported. ValueError for other names.
    """
    if isinstance(which, Device):
        return which
    if which == "cpu":
        return HOST
    kind, _, number = str(which).partition(":")
    if kind == "cuda" and (number.isdecimal() or which == "cuda"):
        from minidp.backend.cuda import Cuda  # late: most runs have none

        return Cuda(int(number) if number else None)
    raise ValueError(
        f"unknown device {which!r}; valid: 'cpu', 'cuda' (a GPU a rank, in turn), 'cuda:0', 'cuda:1' …"
    )
