"""Collectives by NCCL, with a fake of CuPy's binding under them: who asks for what, in which stream."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.comm import AVG, MAX, SUM
from tests import device_cases
from tests.device_cases import Here
from tests.fake_nccl import NcclDouble
from tests.leftovers import nothing_is_left
from tests.told import told


def run(fn: Callable[[Any], Any], n: int) -> list[Any]:
    return minidp.spawn(fn, n, device=NcclDouble(), timeout_s=20)


def in_any_order_of_sums(comm: Any) -> None:
    device_cases.all_reduce(comm, exact=False)


CASES = (in_any_order_of_sums, *(case for case in device_cases.CASES if case is not device_cases.all_reduce))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_collective(case: Callable[[Any], None], n: int) -> None:
    run(case, n)


def same_bits(comm: Any) -> list[bytes]:
    here, bits = Here(comm), []
    for dtype in ("float16", "float32", "float64"):
        x = here.put(device_cases.noise(comm.rank, 100, dtype))
        comm.all_reduce(x, AVG)
        want = device_cases.reduced(comm.world_size, 100, dtype, AVG, device_cases.noise)
        assert np.allclose(x.get(), want, rtol=1e-2 if dtype == "float16" else 1e-5)
        bits.append(x.get().tobytes())
    half = here.put(np.full(64, 1.0 if comm.rank else 2048.0, np.float16))  # 2048 + 1 is 2048 in float16
    work = comm.all_reduce(half, async_op=True)
    assert (half.get() == (1.0 if comm.rank else 2048.0)).all(), "goes on in float32 elsewhere"
    work.wait()
    here.check(half, np.full(64, 2048 + comm.world_size - 1, np.float16), "half precision")
    return bits


def test_sums_have_the_same_bits_on_all_ranks_and_half_precision_is_added_in_single() -> None:
    bits = run(same_bits, 4)
    assert all(each == bits[0] for each in bits)


def asynchronous(comm: Any) -> None:
    """A result is there once it was waited for, and not before; works of one stream come one after the other."""
    here, p, r = Here(comm), comm.world_size, comm.rank
    x, out = here.put(np.full(5, r + 1.0)), here.put(np.zeros((p, 5)))
    ones = np.full(5, p * (p + 1) / 2)
    first = comm.all_reduce(x, async_op=True)
    assert not np.isin(x.get(), (r + 1.0, ones[0])).any(), "this fake shows what is not joined"
    second = comm.all_gather(out, x, async_op=True)  # of the result, which nobody has waited for yet
    comm.barrier()
    second.wait()
    here.check(out, np.tile(ones, (p, 1)), "second")
    here.check(x, ones, "the first came before it")
    first.wait()
    first.wait()
    comm.all_reduce(x)  # does not go on before it is joined
    here.check(x, ones * p, "waits by itself")


def test_what_was_not_waited_for_is_not_there() -> None:
    run(asynchronous, 2)


def dropped(comm: Any) -> None:
    """Arrays that only NCCL still works on stay: the pool would give their memory to the next who asks."""
    here, p = Here(comm), comm.world_size
    x = here.put(np.ones((4, 2 * p)))
    works = [
        comm.reduce_scatter(here.put(np.zeros(4)), x[:, ::2], async_op=True),  # a copy without gaps goes
        comm.all_gather(here.put(np.zeros(4 * p)), x[:, 0], async_op=True),
        comm.all_reduce(here.put(np.ones(7)), MAX, async_op=True),
        comm.all_reduce(here.put(np.ones(7, np.float16)), MAX, async_op=True),
        comm.broadcast(here.put(np.ones(7)), 0, async_op=True),
    ]
    del works[2:]
    gc.collect()
    for work in works:
        work.wait()
    assert not comm.transport._lane._held


def test_arrays_live_as_long_as_nccl_works_on_them() -> None:
    run(dropped, 2)


def calls_of(comm: Any) -> None:
    """NCCL is found when it is first needed, by each group for itself, and left behind without waiting."""
    from tests import fake_nccl

    here, calls, p, r = Here(comm), fake_nccl.calls, comm.world_size, comm.rank
    half, unused = comm.split(r % 2), comm.duplicate("unused")
    comm.barrier()
    comm.all_reduce(np.ones(3))
    for x in (np.ones(3, bool), np.ones(3, complex)):
        comm.all_reduce(here.put(x))
    comm.all_reduce(here.put(np.ones(3)), SUM, "ring")
    comm.reduce(here.put(np.ones(3)))
    assert calls == [], "what NCCL does not know goes another way"
    half.all_reduce(here.put(np.ones(3)))
    comm.all_gather(here.put(np.ones(p)), here.put(np.ones(1)))
    comm.all_reduce(here.put(np.ones(0)))
    mine = [["get_unique_id"] * (half.rank == 0), ["get_unique_id"] * (r == 0)]
    assert calls == [*mine[0], f"init {p // 2}", "allReduce", *mine[1], f"init {p}", "allGather"]
    said = [
        told(lambda: comm.all_reduce(here.put(np.ones(3 + r)))),
        told(lambda: comm.all_reduce(here.put(np.ones(3, np.float32 if r else np.float16)))),
        told(lambda: comm.all_reduce(here.put(np.ones(3)) if r else np.ones(3))),
    ]
    assert all(each.startswith("CollectiveMismatch") for each in said), said
    assert calls[-1] == "allGather", "nobody enters NCCL in vain"
    assert told(lambda: comm.allocate(8)).startswith("MemoryError: allocate: arrays travel by NCCL here")
    assert (comm.shares_memory, unused.shares_memory, half.shares_memory) == (False, False, False)
    comm.close()
    assert calls[-2:] == ["abort", "abort"]


def test_when_nccl_is_called_and_what_it_is_not_asked_for() -> None:
    run(calls_of, 4)


def counted(comm: Any) -> None:
    here, p, t = Here(comm), comm.world_size, comm.traffic
    comm.all_reduce(here.put(np.ones(1)))  # the meeting place has been told
    for call, sent, received in (
        (lambda x: comm.all_reduce(x), 2 * (p - 1) * 8 * 24 // p, 2 * (p - 1) * 8 * 24 // p),
        (lambda x: comm.reduce_scatter(x[: 24 // p].copy(), x), (p - 1) * 8 * 24 // p, (p - 1) * 8 * 24 // p),
        (lambda x: comm.all_gather(here.put(np.ones(24 * p)), x), (p - 1) * 8 * 24, (p - 1) * 8 * 24),
        (lambda x: comm.broadcast(x), (p - 1) * 8 * 24 * (comm.rank == 0), 8 * 24 * (comm.rank > 0)),
    ):
        before = t.bytes_sent, t.bytes_received
        call(here.put(np.ones(24)))
        assert (t.bytes_sent - before[0], t.bytes_received - before[1]) == (sent, received)


def test_traffic() -> None:
    run(counted, 4)


def killed(comm: Any) -> None:
    x = comm.device.asarray(np.ones(9))
    for step in range(1000):
        if comm.rank == 1 and step == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.all_reduce(x, MAX, async_op=True)


def test_a_dead_rank_is_named() -> None:
    with nothing_is_left(), pytest.raises(minidp.RankFailed, match="rank 1 of 3 was killed by SIGKILL"):
        run(killed, 3)


def by_which_way(comm: Any) -> str:
    return str(comm).rpartition(", ")[2]


def test_nccl_is_for_ranks_with_a_device_each() -> None:
    assert run(by_which_way, 2) == ["NCCL)"] * 2
    assert run(by_which_way, 1) == ["memory of the device that all ranks see)"]
    device = NcclDouble()
    device.places = 2  # for three ranks
    assert minidp.spawn(by_which_way, 3, device=device) == ["memory of the device that all ranks see)"] * 3
