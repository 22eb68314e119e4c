"""That a run leaves nothing behind: no process, no segment, no descriptor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import minidp
from minidp.bench.leftovers import children, descriptors, segments


@contextmanager
def nothing_is_left() -> Iterator[None]:
    minidp.spawn(lambda comm: None, 1)  # so that the fork server is there before we count
    before = children(), segments(), descriptors()
    yield
    deadline = time.monotonic() + 2
    while children() - before[0] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert children() <= before[0], "a process was left"
    assert segments() <= before[1], "a segment was left in /dev/shm"
    assert descriptors() <= before[2], "a descriptor was left open"
