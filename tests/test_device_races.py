"""Do the events order what ranks do to each other's memory? On a GPU nothing else does.

Each rank's trace of a long mixture of collectives is looked through for two accesses to the same bytes that may
happen at once.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.comm import AVG, MAX, SUM
from tests.strict_device import Access, StrictDevice, races

SLOT = 64  # bytes: so that most collectives take several rounds


def mixture(comm: Any, seed: int, break_it: str) -> list[Access]:
    """Collectives in an order that all ranks draw alike, in the world, in groups of two and in a duplicate."""
    from minidp.comm import device_memory

    device_memory.LARGEST_SLOT, device_memory.SMALLEST_SLOT = SLOT, SLOT // 4  # they grow on the way, too
    BREAK[break_it](device_memory)
    device, r = comm.device, comm.rank
    groups = [comm, comm.split(r % 2, -r), comm.split(r // 2), comm.duplicate("again")]
    views = comm.allocate(40)
    rng, waiting = np.random.default_rng(seed), []
    for step in range(100):
        group = groups[rng.integers(len(groups))]
        n, members = int(rng.integers(0, 40)), group.world_size
        x = device.xp.full(n, float(r + 1), np.float64 if step % 3 else np.float16)
        whole = device.xp.zeros((members, n), x.dtype)
        root, async_op, kind = int(rng.integers(members)), bool(rng.integers(2)), int(rng.integers(7))
        if kind == 0:
            work = group.all_reduce(x, (SUM, AVG, MAX)[step % 3], async_op=async_op)
        elif kind == 1:
            work = group.all_gather(whole, x, async_op=async_op)
        elif kind == 2:
            work = group.reduce_scatter(x, whole, async_op=async_op)
        elif kind == 3:
            work = group.broadcast(x, root, async_op=async_op)
        elif kind == 4:  # memory of their own: each writes its part, and after a barrier reads the others'
            views[r][...] = np.uint8(step)
            comm.all_gather_int(step)
            seen = [device.xp.add(view, view).get() for view in views]
            assert all((each == seen[0]).all() for each in seen)
            comm.all_reduce(views[r][:8], MAX, async_op=True)  # which is done before the next meeting's end
            comm.barrier() if step % 2 else comm.all_gather_int(step)
            assert all(device.xp.add(view[:1], view[:1]).get()[0] == 2 * step for view in views)
            work = comm.barrier()
        elif kind == 5:
            work = group.reduce(x, root)
        else:
            work = group.all_gather_int(step, async_op=True)
        if work is not None:
            waiting.append(work)
        if len(waiting) > 3:
            waiting.pop(int(rng.integers(len(waiting)))).wait()
    for work in waiting:
        work.wait()
    comm.barrier()
    return list(device.log)


def _nobody_waits(module: Any) -> None:
    module.Peers.met = lambda self: None


def _waits_for_the_next_only(module: Any) -> None:
    def met(self: Any) -> None:
        self.device.wait(self.events[(self.rank + 1) % len(self.events)])

    module.Peers.met = met


def _one_set_of_slots(module: Any) -> None:
    class Same(module.SharedMemory):
        _parity = property(lambda self: 0, lambda self, value: None)

    module.SharedMemory._parity = Same._parity


def _records_late(module: Any) -> None:
    meeting, met = module.Peers.meeting, module.Peers.met
    module.Peers.meeting = lambda self: None

    def late(self: Any) -> None:
        meeting(self)
        self.device.recorded -= 1  # what is waited for is the record before
        met(self)
        self.device.recorded += 1

    module.Peers.met = late


BREAK = {
    "": lambda module: None,
    "nobody waits": _nobody_waits,
    "waits for the next only": _waits_for_the_next_only,
    "one set of slots": _one_set_of_slots,
    "records late": _records_late,
}


@pytest.mark.parametrize("seed", [0, 1])
def test_events_order_all_that_ranks_do_to_shared_memory(seed: int) -> None:
    logs = minidp.spawn(mixture, 4, seed, "", device=StrictDevice(trace=True), timeout_s=20)
    kinds = Counter(entry.kind for entry in logs[0])
    assert kinds["read"] > 200
    assert kinds["wait"] > kinds["record"] > 100
    assert races(logs) == []


@pytest.mark.parametrize("how", [how for how in BREAK if how])
def test_a_mistake_in_the_order_is_seen(how: str) -> None:
    logs = minidp.spawn(mixture, 4, 0, how, device=StrictDevice(trace=True), timeout_s=20)
    assert races(logs) != []
