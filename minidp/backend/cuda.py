"""The GPU, through CuPy: the only file of the house, besides ``comm/nccl.py``, that knows CUDA's calls.

CuPy is imported when a device is started, not before. Nothing here runs in a process that forks afterwards:
``spawn`` starts the device in its workers, never in the parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from minidp.backend.arrays import Array
from minidp.backend.counting import count_move
from minidp.backend.device import Beside, Device, DeviceUnavailable, Later

INSTEAD = 'Run the same on the processor: device="cpu".'
OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
GRAIN = 2 * 2**20  # memory is mapped into other processes in pieces of 2 MiB: what is shared fills them


class Cuda(Device):
    """A GPU. ``number`` None: GPU ``local_rank`` modulo how many there are; else that one for every rank."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number
        self.name = "cuda" if number is None else f"cuda:{number}"
        self._index: int | None = None
        self._mine: dict[bytes, Any] = {}  # what this process has shared, by handle: it can't open its own
        self._opened: dict[bytes, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Cuda, (self.number,)  # in another process it has yet to be started, and nothing is opened

    @property
    def xp(self) -> Any:
        import cupy

        return cupy

    # -- of this process ---------------------------------------------------------------------------------

    def check(self) -> None:
        if importlib.util.find_spec("cupy") is None:
            raise DeviceUnavailable(
                f"device={self.name!r} needs CuPy, which is not installed: pip install 'minidp[gpu13]' (or gpu12, "
                "for drivers older than 580)",
                INSTEAD,
            )
        try:
            ctypes.CDLL("libcuda.so.1")  # the driver's library: loading it starts nothing
        except OSError as error:
            raise DeviceUnavailable(
                f"device={self.name!r} needs an NVIDIA GPU and its driver, and this machine has none ({error})",
                INSTEAD,
            ) from error

    def start(self, local_rank: int = 0) -> None:
        if self._index is not None:  # started, perhaps by another thread: each has a current device of its own
            self.xp.cuda.Device(self._index).use()
            return
        self.check()
        try:
            import cupy

            count = cupy.cuda.runtime.getDeviceCount()
            index = local_rank % count if self.number is None else self.number
            if index >= count:
                raise DeviceUnavailable(
                    f"device={self.name!r}: this machine has {count} GPU{'s' * (count > 1)}, numbered from 0"
                )
            cupy.cuda.Device(index).use()
            ones = cupy.ones((2, 2), np.float32)
            works = float((ones @ ones).sum()) == 8.0  # the compiler, the libraries and the card itself
        except DeviceUnavailable:
            raise
        except Exception as error:  # of the driver, a library or the compiler; or other processes have its memory
            raise DeviceUnavailable(
                f"device={self.name!r} can't be used: {error}. python -m minidp.doctor tells more", INSTEAD
            ) from error
        if not works:
            raise DeviceUnavailable(f"device={self.name!r} gives wrong sums: this GPU or its driver is broken")
        self._index = index

    @property
    def _runtime(self) -> Any:
        return self.xp.cuda.runtime

    @property
    def index(self) -> int:
        """Its number in this process."""
        if self._index is None:
            self.start()
        assert self._index is not None
        return self._index

    def describe(self) -> str:
        properties = self._runtime.getDeviceProperties(self.index)
        size = properties["totalGlobalMem"] / 2**30
        return f"GPU {self.index}, {properties['name'].decode()}, {size:.0f} GiB"

    def identity(self) -> str:
        place: str = self.xp.cuda.Device(self.index).pci_bus_id
        return place

    def synchronize(self) -> None:
        self._runtime.deviceSynchronize()  # all streams: also what goes on beside

    # -- between processes -------------------------------------------------------------------------------

    def share(self, nbytes: int) -> tuple[Array, bytes]:
        cuda = self.xp.cuda
        size = max(1, -(-nbytes // GRAIN)) * GRAIN
        try:
            block = cuda.Memory(size)  # not of CuPy's pool, whose blocks have no handles
        except RuntimeError:
            self.xp.get_default_memory_pool().free_all_blocks()  # which may hold what was dropped
            try:
                block = cuda.Memory(size)
            except RuntimeError as error:
                if getattr(error, "status", None) != OUT_OF_MEMORY:
                    raise
                free, total = self._runtime.memGetInfo()
                raise MemoryError(
                    f"{size:,} bytes of GPU memory are needed, {free:,} of {total:,} are free: use fewer ranks a "
                    "GPU, a smaller model or a smaller optimizer state"
                ) from error
        memory = cuda.MemoryPointer(block, 0)
        memory.memset_async(0, size)
        array = self.xp.ndarray((nbytes,), np.uint8, memory)
        handle = self._handle(lambda: self._runtime.ipcGetMemHandle(memory.ptr))
        self._mine[handle] = array
        return array, handle

    def open(self, handle: bytes, nbytes: int) -> Array:
        if handle in self._mine:
            return self._mine[handle]
        if handle not in self._opened:  # once a process
            cuda = self.xp.cuda
            address = self._open(self._runtime.ipcOpenMemHandle, handle)
            memory = cuda.UnownedMemory(address, nbytes, self, self.index)
            self._opened[handle] = self.xp.ndarray((nbytes,), np.uint8, cuda.MemoryPointer(memory, 0))
        return self._opened[handle]

    def new_event(self) -> tuple[Any, bytes]:
        event = self.xp.cuda.Event(disable_timing=True, interprocess=True)
        handle = self._handle(lambda: self._runtime.ipcGetEventHandle(event.ptr))
        self._mine[handle] = event
        return event, handle

    def open_event(self, handle: bytes) -> Any:
        if handle in self._mine:
            return self._mine[handle]
        kind = self.xp.cuda.Event
        event = kind.__new__(kind)  # CuPy has no constructor for events of others; this one closes it at its end
        event.ptr = self._open(self._runtime.ipcOpenEventHandle, handle)
        return event

    def record(self, event: Any) -> None:
        event.record()

    def wait(self, event: Any) -> None:
        self._runtime.streamWaitEvent(self.xp.cuda.get_current_stream().ptr, event.ptr)

    def _handle(self, ask: Any) -> bytes:
        """What others open it by, with a number that tells whose it is. Without such handles, as in some
        containers, only this process can open it."""
        try:
            other: bytes = ask()
        except RuntimeError:
            other = b""
        return b"%d %d " % (os.getpid(), len(self._mine)) + other

    def _open(self, call: Any, handle: bytes) -> int:
        _, _, other = handle.split(b" ", 2)
        try:
            address: int = call(other) if other else 0
        except RuntimeError as error:
            raise OSError(f"GPU memory of another process can't be opened: {error}") from error
        if not address:
            raise OSError("GPU memory can't be shared between processes here: the driver gives no handles")
        return address

    def clock(self, now: Callable[[], float]) -> EventClock:
        self.synchronize()
        return EventClock(self.xp.cuda, now())

    # -- what the host need not wait for -------------------------------------------------------------------

    def beside(self) -> Beside:
        return SideStream(self.xp.cuda)

    def later(self, x: Array) -> Later:
        from cupyx import empty_pinned

        if not x.size:
            return Later(np.empty(x.shape, x.dtype))
        host = empty_pinned(x.shape, x.dtype)  # page-locked: the copy goes on by itself
        x.get(out=host, blocking=False)
        count_move(to_host=host.nbytes)
        return Coming(host, self.xp.cuda.get_current_stream().record())


class EventClock:
    """A GPU's time, by events on the current stream: about half a microsecond exact."""

    def __init__(self, cuda: Any, origin_s: float) -> None:
        self._cuda, self._origin_s = cuda, origin_s
        self._origin = self.mark()

    def mark(self) -> Any:
        event = self._cuda.Event()
        event.record()
        return event

    def seconds(self, mark: Any) -> float:
        mark.synchronize()
        milliseconds: float = self._cuda.get_elapsed_time(self._origin, mark)
        return self._origin_s + milliseconds / 1000


class Coming(Later):
    """A copy under way, and the event that ends it."""

    def __init__(self, host: np.ndarray, event: Any) -> None:
        super().__init__(host)
        self._event = event

    def get(self) -> np.ndarray:
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host

    def __del__(self) -> None:
        # Nobody asked for it. Its memory must not serve others before the copy has ended.
        with contextlib.suppress(Exception):
            self.get()


class SideStream(Beside):
    """A second stream of this process."""

    def __init__(self, cuda: Any) -> None:
        self._cuda = cuda
        self._stream = cuda.Stream(non_blocking=True)
        self._begun, self._ended = (cuda.Event(disable_timing=True) for _ in range(2))

    def __enter__(self) -> None:
        self._begun.record()
        self._stream.wait_event(self._begun)
        self._stream.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._ended.record()
        self._stream.__exit__(*exception)

    def join(self) -> None:
        self._cuda.get_current_stream().wait_event(self._ended)
