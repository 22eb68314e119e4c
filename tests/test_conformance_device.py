"""The suite of all worlds, for arrays of a device: collective × world × transport × ranks × dtype × length × op.

Answers are closed forms and the host's bits; and what goes wrong, goes wrong on all ranks, as on the CPU.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.comm import MAX, Communicator
from tests import device_cases
from tests.device_cases import Here
from tests.leftovers import nothing_is_left
from tests.strict_device import StrictDevice
from tests.told import told

NOTICE_S = 0.2
SLOT = 64
SPAWN = {
    "shared": ("process", StrictDevice, "memory of the device that all ranks see"),
    "places": (
        "process",
        partial(StrictDevice, places=4),
        "memory of the device that all ranks see",
    ),  # no NCCL here
    "staged": ("process", partial(StrictDevice, shareable=False), "host memory"),
    "virtual": ("virtual", StrictDevice, "host memory"),
}


def small(fn: Callable[[Any], Any], slot: int | None = SLOT) -> Callable[[Any], Any]:
    """``fn`` in a process whose slots hold so many bytes: most arrays take several rounds."""

    def with_small_slots(comm: Any) -> Any:
        if comm.shares_memory and slot:
            from minidp.comm import device_memory

            device_memory.LARGEST_SLOT, device_memory.SMALLEST_SLOT = slot, slot // 2  # they grow once
        return fn(comm)

    return with_small_slots


def run(how: str, fn: Callable[[Any], Any], n: int, **options: Any) -> list[Any]:
    world, device, _ = SPAWN[how]
    return minidp.spawn(small(fn), n, world=world, timeout_s=20, device=device(**options))


@pytest.mark.parametrize(("how", "n"), [(how, n) for how in SPAWN for n in (1, 2, 4) if how != "places" or n == 4])
@pytest.mark.parametrize("case", device_cases.CASES, ids=lambda case: case.__name__)
def test_collective(how: str, case: Callable[[Communicator], None], n: int) -> None:
    run(how, case, n)


def long_ones(comm: Any) -> str:
    here, n = Here(comm), 300_001
    x, host = here.put(device_cases.noise(comm.rank, n, "float32")), device_cases.noise(comm.rank, n, "float32")
    for _ in range(2):
        comm.all_reduce(x)
        comm.all_reduce(host)
    here.check(x, host, "long")
    comm.broadcast(x[::2], 0)
    return str(comm)


@pytest.mark.parametrize("how", SPAWN)
def test_long_arrays_and_what_the_communicator_says_it_is(how: str) -> None:
    world, device, transport = SPAWN[how]
    for n in (1, 2):
        words = minidp.spawn(long_ones, n, world=world, device=device())
        assert words[0].endswith(f", {transport if world == 'virtual' or n > 1 else SPAWN['shared'][2]})")


# ── memory, meetings, counts ───────────────────────────────────────────────────────────────────────────


def shared_memory(comm: Any) -> None:
    p, r, device = comm.world_size, comm.rank, comm.device
    views = comm.allocate(1000 * r)  # rank 0 gives none
    assert [view.nbytes for view in views] == [1000 * i for i in range(p)]
    assert all(device.is_here(view) and not view.any() for view in views)
    comm.barrier()
    for meet in (
        comm.barrier,
        lambda: comm.all_gather_int(r),
        lambda: comm.all_gather_int(r, async_op=True).wait(),
    ):
        views[r][...] = views[r] + np.uint8(r + 1)
        before = device.recorded, device.waited
        meet()
        if p > 1 and comm.shares_memory:
            assert (device.recorded - before[0], device.waited - before[1]) == (1, p - 1)
        seen = [view.get() for view in views]
        comm.barrier()
        assert all((each == each[:1]).all() for each in seen)
        views[r][...] = np.uint8(0)
        assert [each[0] for each in seen[1:]] == list(range(2, p + 1))


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("how", ["shared", "places", "virtual"])
def test_memory_that_all_see_and_events_at_every_meeting(how: str, n: int) -> None:
    run(how, shared_memory, n)


def no_memory(comm: Any) -> tuple[bool, str]:
    said = told(lambda: comm.allocate(8))
    comm.barrier()
    return comm.shares_memory, said


def test_without_order_there_is_no_shared_memory() -> None:
    told_all = run("staged", no_memory, 2)
    assert told_all[0] == told_all[1]
    assert not told_all[0][0]
    assert told_all[0][1].startswith("MemoryError: allocate: arrays travel by host memory here")


def counted(comm: Any) -> None:
    here, p, r = Here(comm), comm.world_size, comm.rank
    comm.all_reduce(here.put(np.ones(24 * p)))  # slots have grown, of which ranks tell each other
    calls = {
        "all_reduce": lambda x: comm.all_reduce(x),
        "max": lambda x: comm.all_reduce(x, MAX, async_op=True).wait(),
        "ring": lambda x: comm.all_reduce(x, algorithm="ring"),
        "reduce_scatter": lambda x: comm.reduce_scatter(x[: len(x) // p], x.copy()),
        "all_gather": lambda x: comm.all_gather(x, x[: len(x) // p].copy()),
        "broadcast": lambda x: comm.broadcast(x, p - 1),
        "reduce": lambda x: comm.reduce(x, p - 1),
        "gather": lambda x: comm.gather(x, 0),
        "all_to_all": lambda x: comm.all_to_all(x.reshape(p, -1).copy(), x.reshape(p, -1)),
        "send": lambda x: comm.recv(x, (r - 1) % p, comm.send(x, (r + 1) % p) or 0),
    }
    for name, call in calls.items():
        counts = []
        for x in (np.ones(24 * p), here.put(np.ones(24 * p))):
            comm.barrier()  # what arrives is counted when it does: nothing of the call before or after
            t = comm.traffic
            before = t.bytes_sent, t.bytes_received, t.messages_sent
            call(x)
            comm.barrier()
            counts.append((t.bytes_sent - before[0], t.bytes_received - before[1], t.messages_sent - before[2]))
        assert counts[0] == counts[1], (name, counts)


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("how", SPAWN)
def test_traffic_is_the_hosts(how: str, n: int) -> None:
    run(how, counted, n)


# ── what fails on one rank ─────────────────────────────────────────────────────────────────────────────


def transport_of(comm: Any) -> str:
    x = comm.device.asarray(np.ones(3))
    comm.all_reduce(x)
    assert (x.get() == comm.world_size).all()
    return str(comm).rpartition(", ")[2]


@pytest.mark.parametrize("what", ["share", "open", "new_event", "open_event"])
@pytest.mark.parametrize("error", [OSError, RuntimeError, MemoryError])
def test_if_one_rank_cant_share_all_go_through_the_host(what: str, error: type[Exception]) -> None:
    assert run("shared", transport_of, 3, fails={what: (1, error("refused"))}) == ["host memory)"] * 3


def no_room(comm: Any) -> list[str]:
    if comm.rank == 1:
        comm.device.fails["share"] = (1, MemoryError("7 bytes are needed"))
    x = comm.device.asarray(np.ones(3))
    said = [told(lambda: comm.allocate(8)), told(lambda: comm.all_reduce(x)), told(lambda: comm.all_reduce(x))]
    comm.device.fails.clear()
    comm.all_reduce(x)
    comm.device.fails["share"] = (comm.rank, MemoryError("6 bytes are needed"))
    long = comm.device.asarray(np.ones(8))  # the slots, of 32 bytes, should grow
    said.append(told(lambda: comm.all_reduce(long)))
    comm.all_reduce(x)
    assert (x.get() == comm.world_size**2).all()
    return said


def test_no_room_on_one_rank_is_told_on_all_and_the_next_try_works() -> None:
    want = ["MemoryError: rank 1: 7 bytes are needed"] * 3 + ["MemoryError: rank 0: 6 bytes are needed"]
    assert run("shared", no_room, 3) == [want] * 3


# ── what ranks disagree about, who dies, who leaves ────────────────────────────────────────────────────

ONES = partial(np.ones, 6)
DISAGREE: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]] = {
    "shape": (lambda c, d: c.all_reduce(d(ONES())), lambda c, d: c.all_reduce(d(np.ones(7)))),
    "dtype": (lambda c, d: c.all_reduce(d(ONES())), lambda c, d: c.all_reduce(d(ONES(np.float32)))),
    "kind": (lambda c, d: c.all_reduce(d(ONES())), lambda c, d: c.all_reduce(d(ONES(complex)))),
    "op": (lambda c, d: c.all_reduce(d(ONES())), lambda c, d: c.all_reduce(d(ONES()), MAX)),
    "algorithm": (lambda c, d: c.all_reduce(d(ONES())), lambda c, d: c.all_reduce(d(ONES()), algorithm="ring")),
    "call": (lambda c, d: c.all_reduce(d(ONES())), lambda c, d: c.broadcast(d(ONES()))),
    "root": (lambda c, d: c.broadcast(d(ONES()), 0), lambda c, d: c.broadcast(d(ONES()), 1)),
    "barrier": (lambda c, d: c.all_gather(d(np.ones(12)), d(ONES())), lambda c, d: c.barrier()),
    "empty": (lambda c, d: c.all_reduce(d(np.ones(0))), lambda c, d: c.all_reduce(d(ONES()))),
    "later": (
        lambda c, d: c.all_reduce(d(ONES()), async_op=True).wait(),
        lambda c, d: c.all_reduce(d(np.ones(7)), async_op=True).wait(),
    ),
}


@pytest.mark.parametrize("how", ["shared", "staged", "virtual"])
def test_disagreement_is_told_on_all_ranks(how: str) -> None:
    for calls in DISAGREE.values():

        def differ(comm: Any, calls: Any = calls) -> str:
            return told(lambda: calls[comm.rank > 0](comm, comm.device.asarray))

        try:
            said = run(how, differ, 2)
        except minidp.CollectiveMismatch as error:
            said = [str(error)] * 2
        assert "CollectiveMismatch" in said[0] or "disagree" in said[0], said
        assert said[0] == said[1]


def host_and_device(comm: Any) -> tuple[str, float]:
    x = ONES() if comm.rank else comm.device.asarray(ONES())
    said = told(lambda: comm.all_reduce(x))
    return said, float(comm.device.xp.asnumpy(x)[0] if comm.device.is_here(x) else x[0])


def test_one_rank_with_an_array_of_the_host() -> None:
    said = run("shared", host_and_device, 2)
    assert all(each.startswith("CollectiveMismatch") and "on the device" in each for each, _ in said)
    for how in ("staged", "virtual"):  # there all arrays are the host's in the end
        assert run(how, host_and_device, 2) == [("nothing", 2.0)] * 2


def killed(comm: Any, folder: str) -> None:
    x = comm.device.asarray(np.ones(100))
    for step in range(10_000):
        if comm.rank == 1 and step == 20:
            Path(folder, "dead").write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            comm.all_reduce(x, MAX)
        except minidp.RankFailed as error:
            Path(folder, str(comm.rank)).write_text(f"{time.monotonic()} {error.rank}")
            raise


@pytest.mark.parametrize("how", ["shared", "staged"])
def test_a_dead_rank_is_named_at_once(how: str, tmp_path: Path) -> None:
    with nothing_is_left(), pytest.raises(minidp.RankFailed, match="rank 1 of 3 was killed by SIGKILL"):
        run(how, partial(killed, folder=str(tmp_path)), 3)
    died = float((tmp_path / "dead").read_text())
    for rank in (0, 2):
        noticed, who = (tmp_path / str(rank)).read_text().split()
        assert float(noticed) - died < NOTICE_S
        assert who == "1"


def leaves_early(comm: Any) -> None:
    x = comm.device.asarray(np.ones(100))
    for _ in range(5 - (comm.rank == 2)):
        comm.all_reduce(x)


@pytest.mark.parametrize("how", ["shared", "staged", "virtual"])
def test_a_rank_that_returns_early_is_told_of(how: str) -> None:
    with pytest.raises(minidp.RankFailed, match="rank 2 returned"):
        run(how, leaves_early, 3)
