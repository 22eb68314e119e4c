"""``backend/cuda.py`` on a fake CuPy: what it asks for, in which order things happen, and what its errors say."""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.backend import array_types, get_device
from minidp.backend.counting import meter
from minidp.backend.cuda import Cuda
from minidp.backend.device import DeviceUnavailable
from tests import fake_cupy
from tests.fake_cupy import GRAIN, CUDARuntimeError, Machine, Process

HOME = Path(minidp.__file__).parent


@pytest.fixture(autouse=True)
def _a_driver_and_cupy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    known = dict(array_types)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    yield
    array_types.clear()
    array_types.update(known)


@contextmanager
def inside(process: Process) -> Iterator[None]:
    """As if this were that process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", process.module)
        patch.setitem(sys.modules, "cupyx", SimpleNamespace(empty_pinned=fake_cupy.empty_pinned))
        patch.setattr(os, "getpid", lambda: id(process))
        yield


def started(machine: Machine, number: int | None = None, rank: int = 0) -> tuple[Process, Any]:
    process, device = Process(machine), Cuda(number)
    with inside(process):
        device.start(rank)
    return process, device


# ── the start ──────────────────────────────────────────────────────────────────────────────────────────


def test_which_gpu_a_rank_gets() -> None:
    machine = Machine(gpus=2)
    assert [started(machine, None, rank)[0].device for rank in range(5)] == [0, 1, 0, 1, 0]
    assert [started(machine, 1, rank)[0].device for rank in range(3)] == [1, 1, 1]
    process, device = started(machine, 1)
    with inside(process):
        device.start(0)  # again: it stays
        assert (device.describe(), device.identity()) == ("GPU 1, Double 1, 80 GiB", "0000:01:00.0")
        assert device.name == get_device("cuda:1").name == "cuda:1"
    assert process.device == 1


def refused(process: Process, device: Cuda) -> str:
    with inside(process), pytest.raises(DeviceUnavailable) as caught:
        device.start(0)
    assert device._index is None
    return str(caught.value)


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(gpus=2)
    assert refused(Process(machine), Cuda(2)).startswith(
        "device='cuda:2': this machine has 2 GPUs, numbered from 0"
    )
    assert "has 1 GPU, numbered" in refused(Process(Machine()), Cuda(1))
    assert refused(Process(machine, sums=1.5), Cuda()).startswith("device='cuda' gives wrong sums")
    instead = 'doctor tells more. Run the same on the processor: device="cpu".'
    for error in (
        Exception("can't compile"),
        RuntimeError("no headers"),
        MemoryError("out of memory"),
        OSError("x"),
    ):
        said = refused(Process(machine, compiler=error), Cuda())
        assert said.startswith(f"device='cuda' can't be used: {error}. ")
        assert said.endswith(instead)
    machine.status = 35
    assert "can't be used: cudaErrorInsufficientDriver" in refused(Process(machine), Cuda())
    monkeypatch.setattr(ctypes, "CDLL", lambda name: exec("raise OSError('libcuda.so.1: not there')"))
    assert "has none (libcuda.so.1: not there). Run the same" in refused(Process(machine), Cuda())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "needs CuPy, which is not installed: pip install" in refused(Process(machine), Cuda())


def test_it_travels_as_if_never_started() -> None:
    process, device = started(Machine(gpus=2), 1)
    with inside(process):
        device.share(10)
        device.new_event()
        again = pickle.loads(pickle.dumps(device))
    assert (again.number, again.name, again._index, again._mine) == (1, "cuda:1", None, {})


# ── memory between processes ───────────────────────────────────────────────────────────────────────────


def test_memory_of_another_process() -> None:
    machine = Machine(gpus=2)
    (a, mine), (b, theirs) = started(machine, 0), started(machine, 1)
    with inside(a):
        array, handle = mine.share(GRAIN + 1)
        assert (array.shape, array.dtype, machine.free) == ((GRAIN + 1,), np.uint8, 6 * GRAIN)
        assert not array.get().any()
        assert mine.open(handle, GRAIN + 1) is array, "a process can't open its own"
        array[...] = 7
        a.module.cuda.runtime.deviceSynchronize()
    with inside(b):
        seen = theirs.open(handle, GRAIN + 1)
        assert (seen.get() == 7).all()
        assert theirs.open(handle, GRAIN + 1) is seen, "opened once"
    assert b.opened == [(array.memptr.ptr, 1)]


def test_memory_that_is_not_to_be_had() -> None:
    machine = Machine(free=4 * GRAIN)
    process, device = started(machine)
    with inside(process):
        device.share(3 * GRAIN)
        process.pool_holds = 2 * GRAIN  # arrays that were dropped: CuPy keeps their memory
        device.share(2 * GRAIN)
        with pytest.raises(
            MemoryError, match="4,194,304 bytes of GPU memory are needed, 2,097,152 of 8,388,608 are"
        ):
            device.share(GRAIN + 1)
        device.share(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(process.module.cuda, "Memory", lambda size: exec("raise RuntimeError('another')"))
            with pytest.raises(RuntimeError, match="another"):
                device.share(1)


def test_without_ipc_a_process_has_its_own_memory_only() -> None:
    machine = Machine()
    machine.ipc = False
    (a, mine), (b, theirs) = started(machine), started(machine)
    with inside(a):
        array, handle = mine.share(8)
        event, name = mine.new_event()
        assert mine.open(handle, 8) is array
        assert mine.open_event(name) is event
    with inside(b):
        theirs.share(8)
        for call in (lambda: theirs.open(handle, 8), lambda: theirs.open_event(name)):
            with pytest.raises(OSError, match="the driver gives no handles"):
                call()
    machine.ipc = True
    with inside(a):
        handle = mine.share(8)[1]
    machine.ipc = False
    with inside(b), pytest.raises(OSError, match="another process can't be opened: cudaErrorDeviceUninit"):
        theirs.open(handle, 8)


def test_events_order_the_streams_of_two_processes() -> None:
    machine = Machine()
    (a, mine), (b, theirs) = started(machine), started(machine)
    with inside(a):
        array, handle = mine.share(4)
        event, name = mine.new_event()
        mine.record(event)
    with inside(b):
        seen, opened = theirs.open(handle, 4), theirs.open_event(name)
        theirs.wait(opened)  # that it is zero
        assert not seen.get().any()
    with inside(a):
        array[...] = 3
        mine.record(event)
        array[...] = 4  # after what it stands for
    with inside(b):
        assert not seen.get().any(), "nobody has asked to wait"
        theirs.wait(opened)
        assert (seen.get() == 3).all()
        assert opened.ptr == event.ptr


# ── what the host need not wait for ────────────────────────────────────────────────────────────────────


def test_later_is_as_it_was_and_put_as_it_is() -> None:
    process, device = started(Machine())
    with inside(process):
        x = device.asarray(np.arange(4.0))
        with meter() as m:
            coming = device.later(x)
            x[...] = 9.0
            assert (m.moves, m.to_host) == (1, 32)
            assert coming._host[0] == 99, "under way"
            assert coming.get().tolist() == coming.get().tolist() == [0, 1, 2, 3]
            assert device.later(device.asarray(np.empty((0, 3)))).get().shape == (0, 3)
        host = np.arange(4.0)
        device.put(x, host)
        host[...] = 5
        assert x.get().tolist() == [0, 1, 2, 3]


def test_beside_comes_after_what_was_asked_before_and_before_the_join() -> None:
    process, device = started(Machine())
    with inside(process):
        x = device.asarray(np.zeros(2))
        beside = device.beside()
        beside.join()  # nothing yet
        x[...] = 1.0
        with beside:
            y = device.asarray(np.zeros(2))
            y[...] = x
            x[...] = 2.0
        assert x.get().tolist() == [1, 1], "it goes on beside"
        beside.join()
        assert (x.get().tolist(), y.get().tolist()) == ([2, 2], [1, 1])
        try:
            with beside:
                x[...] = 3.0
                raise KeyError
        except KeyError:
            assert process.current == [0]
        device.synchronize()  # whatever stream it is asked for in
        assert x.host.tolist() == [3, 3]


# ── names ──────────────────────────────────────────────────────────────────────────────────────────────


def uses(source: str, root: str) -> set[str]:
    """``a.b.c`` for each ``root.a.b.c`` that is read."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
            if isinstance(node, ast.Attribute) and (node.attr, root) == ("xp", "xp"):
                node = ast.Name("xp")  # self.xp, device.xp
            if isinstance(node, ast.Name) and node.id == root:
                found.add(".".join(names))
    return found


def test_every_name_of_cupy_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    cupy = pytest.importorskip("cupy")
    import cupyx

    text = {path: path.read_text() for path in HOME.rglob("*.py")}
    cuda, nccl = text[HOME / "backend/cuda.py"], text[HOME / "comm/nccl.py"]
    wanted = {f"cuda.{name}" for name in uses(cuda, "cuda")} | uses(cuda, "cupy")
    wanted |= {f"cuda.runtime.{name}" for name in uses(cuda.replace("self._runtime", "runtime"), "runtime")}
    for room in ("autograd", "nn", "optim", "compress", "parallel", "comm", "backend"):
        for path in (HOME / room).rglob("*.py"):
            wanted |= uses(text[path], "xp")
    wanted -= {"synchronize", "__name__"}  # of registered modules only
    assert len(wanted) > 60
    missing = []
    for name in sorted(wanted):
        at: Any = cupy
        for part in name.split("."):
            at = getattr(at, part, missing)
        if at is missing:
            missing.append(name)
    assert missing == []
    assert cupyx.empty_pinned
    from cupy.cuda import nccl as binding

    from minidp.comm.nccl import TYPES

    for name in {f"NCCL_{each}" for each in (*TYPES.values(), "SUM", "AVG", "MAX", "MIN")} | {"available"}:
        assert hasattr(binding, name), name
    assert len(binding.get_unique_id()) == 128
    calls = {name.partition(".")[2] for name in uses(nccl, "self") if name.startswith(("_nccl.", "_comm."))}
    assert calls >= {"abort", "get_unique_id", "NcclCommunicator"}
    for name in uses(nccl, "comm") | calls - {"available"}:
        assert hasattr(binding, name) or hasattr(binding.NcclCommunicator, name), name
    assert issubclass(cupy.cuda.runtime.CUDARuntimeError, RuntimeError)
    assert CUDARuntimeError(2).status == 2
