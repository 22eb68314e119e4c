"""CuPy on a machine without a GPU: exactly what ``minidp/backend/cuda.py`` calls, with CuPy's argument rules.

A `Machine` has GPUs, and processes with a `module` each, all of them in this process. It is as late as it may be:
what a stream was asked for is done when somebody waits for it, and then only as much as he waits for. So an order
that nobody has asked for is not there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

GRAIN = 2 * 2**20


class CUDARuntimeError(RuntimeError):
    def __init__(self, status: int) -> None:
        self.status = status
        names = {
            2: "cudaErrorMemoryAllocation",
            35: "cudaErrorInsufficientDriver",
            201: "cudaErrorDeviceUninitialized",
        }
        super().__init__(f"{names.get(status, 'cudaErrorUnknown')}: status {status}")


class Machine:
    """``status``: what the driver answers, 0 if all is well; ``ipc``: whether it lets processes share."""

    def __init__(self, gpus: int = 1, free: int = 8 * GRAIN) -> None:
        self.gpus, self.free, self.total, self.status, self.ipc = gpus, free, free, 0, True
        self.memory: dict[int, np.ndarray] = {}
        self.events: dict[int, list[tuple[Queue, int]]] = {}
        self.handles: dict[bytes, tuple[Any, int]] = {}
        self.numbers = itertools.count(1)


class Queue:
    """The work of a stream: callables, of which ``done`` many have run."""

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []
        self.done = 0

    def run(self, until: int | None = None) -> None:
        until = len(self.work) if until is None else until
        while self.done < until:
            self.done += 1
            self.work[self.done - 1]()


class Process:
    """One process on the machine: its current stream, and the ``cupy`` that it imports."""

    def __init__(self, machine: Machine, sums: float = 1.0, compiler: Exception | None = None) -> None:
        self.machine, self.sums, self.compiler = machine, sums, compiler
        self.queues = {0: Queue()}
        self.current, self.device = [0], -1
        self.pool_holds = 0
        self.opened: list[tuple[int, int]] = []
        self.module = ModuleType("cupy")
        self.module.__dict__.update(_names(self))

    def queue(self) -> Queue:
        assert self.device >= 0, "no device was chosen"
        return self.queues[self.current[-1]]

    def ask(self, work: Callable[[], object]) -> None:
        self.queue().work.append(work)


def _names(process: Process) -> dict[str, Any]:
    machine = process.machine

    def driver() -> None:
        if machine.status:
            raise CUDARuntimeError(machine.status)

    # -- cupy.cuda.runtime -------------------------------------------------------------------------------

    def device_count() -> int:
        driver()
        return machine.gpus

    def handle_of(ptr: int) -> bytes:
        assert ptr in machine.memory or ptr in machine.events, "not the beginning of an allocation"
        if not machine.ipc:
            raise CUDARuntimeError(201)
        handle = b"%63d " % ptr  # with blanks in it: any byte may come
        machine.handles[handle] = process, ptr
        return handle

    def open_handle(handle: bytes) -> int:
        if len(handle) != 64:
            raise IndexError("index out of range")
        owner, ptr = machine.handles[handle]
        if owner is process or not machine.ipc:
            raise CUDARuntimeError(201)
        process.opened.append((ptr, process.device))
        return ptr

    def stream_wait_event(stream: int, event: int, flags: int = 0) -> None:
        records = machine.events[event]
        if records:  # what was recorded last, at this moment
            queue, position = records[-1]
            process.queues[stream].work.append(lambda: queue.run(position))

    def record(event: int, stream: int) -> None:
        queue = process.queues[stream]
        machine.events[event].append((queue, len(queue.work)))

    def wait_for_all() -> None:
        for queue in process.queues.values():
            queue.run()

    runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=device_count,
        getDeviceProperties=lambda index: {"name": b"Double %d" % index, "totalGlobalMem": 80 * 2**30},
        memGetInfo=lambda: (machine.free, machine.total),
        ipcGetMemHandle=handle_of,
        ipcOpenMemHandle=open_handle,
        ipcGetEventHandle=handle_of,
        ipcOpenEventHandle=open_handle,
        streamWaitEvent=stream_wait_event,
        deviceSynchronize=wait_for_all,
    )

    # -- cupy.cuda ---------------------------------------------------------------------------------------

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        def use(self) -> None:
            driver()
            assert 0 <= self.index < machine.gpus
            process.device = self.index

        @property
        def pci_bus_id(self) -> str:
            return f"0000:{self.index:02x}:00.0"

    class Memory:
        def __init__(self, size: int) -> None:
            assert size % GRAIN == 0, "smaller pieces share a handle"
            if size > machine.free:
                raise CUDARuntimeError(2)  # the pool's OutOfMemoryError comes from the pool only
            machine.free -= size
            self.ptr, self.size = GRAIN * next(machine.numbers), size
            machine.memory[self.ptr] = np.full(size, 0xAB, np.uint8)

    class UnownedMemory:
        def __init__(self, ptr: int, size: int, owner: object, device_id: int = -1) -> None:
            assert device_id == process.device, "CuPy would look for the peer, and warn or fail"
            self.ptr, self.size = ptr, size

    class MemoryPointer:
        def __init__(self, mem: Any, offset: int) -> None:
            self.mem, self.ptr = mem, mem.ptr + offset

        def memset_async(self, value: int, size: int) -> None:
            process.ask(lambda: machine.memory[self.ptr][:size].fill(value))

    class Event:
        def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
            if interprocess and not disable_timing:
                raise ValueError("Timing must be disabled for interprocess events")
            self.ptr = next(machine.numbers)
            machine.events[self.ptr] = []

        def record(self, stream: Any = None) -> None:
            record(self.ptr, process.current[-1] if stream is None else stream.ptr)

        def synchronize(self) -> None:
            for queue, position in machine.events[self.ptr][-1:]:
                queue.run(position)

    class Stream:
        def __init__(self, null: bool = False, non_blocking: bool = False, ptr: int | None = None) -> None:
            assert non_blocking or ptr is not None, "would wait for the null stream"
            self.ptr = next(machine.numbers) if ptr is None else ptr
            process.queues.setdefault(self.ptr, Queue())

        def __enter__(self) -> None:
            process.current.append(self.ptr)

        def __exit__(self, *args: object) -> None:
            process.current.pop()

        def record(self, event: Any = None) -> Any:
            event = event or Event()
            event.record(self)
            return event

        def wait_event(self, event: Any) -> None:
            stream_wait_event(self.ptr, event.ptr)

        def synchronize(self) -> None:
            process.queues[self.ptr].run()

    cuda = SimpleNamespace(
        Device=Device, Memory=Memory, UnownedMemory=UnownedMemory, MemoryPointer=MemoryPointer, Event=Event,
        Stream=Stream, get_current_stream=lambda: Stream(ptr=process.current[-1]), runtime=runtime,
    )  # fmt: skip

    # -- arrays ------------------------------------------------------------------------------------------

    class ndarray:  # noqa: N801
        def __init__(self, shape: tuple[int, ...], dtype: Any = float, memptr: Any = None) -> None:
            self.shape, self.dtype = shape, np.dtype(dtype)
            self.nbytes = int(np.prod(shape)) * self.dtype.itemsize
            self.size = self.nbytes // self.dtype.itemsize
            data = np.zeros(self.nbytes, np.uint8) if memptr is None else machine.memory[memptr.ptr][: self.nbytes]
            self.memptr, self.host = memptr, data.view(self.dtype).reshape(shape)

        def __matmul__(self, other: Any) -> Any:
            if process.compiler is not None:
                raise process.compiler
            return _made(self.host @ other.host)

        def sum(self) -> Any:
            return _made(self.host.sum(keepdims=True) * process.sums)

        def __float__(self) -> float:
            process.queue().run()
            return float(self.host.item())

        def __setitem__(self, index: Any, value: Any) -> None:
            assert not isinstance(value, np.ndarray), "non-scalar numpy.ndarray cannot be used for fill"
            source = value.host if isinstance(value, ndarray) else value
            process.ask(lambda: self.host.__setitem__(index, source))

        def get(self, stream: Any = None, order: str = "C", out: Any = None, blocking: bool = True) -> np.ndarray:
            assert out is None or (out.dtype, out.shape) == (self.dtype, self.shape)
            assert blocking or isinstance(out, Pinned), "not page-locked: the driver would wait"
            out = np.empty(self.shape, self.dtype) if out is None else out
            process.ask(lambda: out.__setitem__(..., self.host))
            if blocking:
                process.queue().run()
            return out

    def _made(host: np.ndarray) -> Any:
        array = ndarray(host.shape, host.dtype)
        array.host[...] = host
        return array

    def asarray(a: Any, dtype: Any = None) -> Any:
        if isinstance(a, ndarray):
            return a
        source = a if isinstance(a, Pinned) else a.copy()  # others go through a page-locked copy
        array = ndarray(a.shape, dtype or a.dtype)
        process.ask(lambda: array.host.__setitem__(..., source))
        return array

    def free_all_blocks() -> None:
        machine.free += process.pool_holds
        process.pool_holds = 0

    pool = SimpleNamespace(free_all_blocks=free_all_blocks)
    ones = lambda shape, dtype: _made(np.ones(shape, dtype))  # noqa: E731
    return {
        "ndarray": ndarray,
        "asarray": asarray,
        "ones": ones,
        "cuda": cuda,
        "get_default_memory_pool": lambda: pool,
    }


class Pinned(np.ndarray):
    """A page-locked array of the host."""


def empty_pinned(shape: tuple[int, ...], dtype: Any = float, order: str = "C") -> Pinned:
    assert np.prod(shape), "of size 0: not known to work"
    return np.full(shape, 99, dtype).view(Pinned)
