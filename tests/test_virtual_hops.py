"""Messages that hop along a ring, and what an ended run leaves: each found by a review, held by a test since."""

from __future__ import annotations

import contextlib
import time
import weakref
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.comm import meeting
from minidp.sim import Cluster

pytestmark = pytest.mark.timeout(30)


def run(fn: Any, world_size: int, *args: Any, **options: Any) -> list[Any]:
    return minidp.spawn(fn, world_size, *args, world="virtual", **options)


def two_on_one_way(comm: Any) -> float:
    """0 → 2 hops over 1, which sends to 2 itself: its own message is first, for the other is still on its way."""
    x = np.zeros(0)
    if comm.rank < 2:
        comm.send(x, 2)
    if comm.rank == 2:
        comm.recv(x, 1)
    return comm.now()


def test_a_message_waits_for_a_link_only_when_it_is_there() -> None:
    assert run(two_on_one_way, 5, cluster=Cluster(5, latency_s=1.0, topology="ring"))[2] == 1.0


def direct(comm: Any) -> float:
    comm.all_reduce(np.ones(10, np.float32), algorithm="direct")
    return comm.now()


def test_large_rings_take_the_time_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """As waves, where a rank sends several messages in a step, they once took 15 times as long."""
    cluster = Cluster(66, topology="ring")
    large = run(direct, 66, cluster=cluster)
    monkeypatch.setattr(meeting, "EVENTS_UP_TO", 1000)
    assert run(direct, 66, cluster=cluster) == large


def swallows(comm: Any) -> None:
    while comm.rank == 0:
        with contextlib.suppress(Exception):
            time.sleep(60)


def test_who_swallows_the_watchdog_is_ended_by_it() -> None:
    with pytest.raises(
        minidp.RankFailed, match=r"raised SystemExit: rank 0 has blocked outside of comm for 0\.3 s"
    ):
        run(swallows, 2, timeout_s=0.3)
    assert run(lambda comm: comm.rank, 2) == [0, 1]


def deferred(comm: Any) -> None:
    x = np.ones(10)
    meeting.watched.append(weakref.ref(x))  # type: ignore[attr-defined]
    work = comm.all_reduce(x, async_op=True)
    assert work is not None
    work.wait()


def test_arrays_of_deferred_works_end_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the collector comes: it counts objects, and they may be large."""
    refs: list[Any] = []
    monkeypatch.setattr(meeting, "watched", refs, raising=False)
    run(deferred, 3)
    assert len(refs) == 3
    assert all(ref() is None for ref in refs)
