"""Mutation check: no entry of an all-reduce can be dropped or changed without somebody noticing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from minidp.comm.schedules import ALL_REDUCE, Schedule, chunk_bounds, simulate


def corruptions(schedule):
    """Every schedule that differs in one field of one entry, or lacks one."""
    for i, t in enumerate(schedule.transfers):
        before, after = schedule.transfers[:i], schedule.transfers[i + 1 :]
        yield "dropped", t, (*before, *after)
        ranks, chunks = range(-1, schedule.world_size + 1), range(-1, schedule.chunks + 1)
        changed = itertools.chain(
            (t._replace(src=r) for r in ranks),
            (t._replace(dst=r) for r in ranks),
            (t._replace(chunk=c) for c in chunks),
            (t._replace(op=op) for op in ("reduce", "copy", "add")),
        )
        for other in changed:
            if other != t:
                yield other, t, (*before, other, *after)


def results(schedule, arrays):
    return [a.tobytes() for a in simulate(schedule, arrays)]


def traffic(schedule):
    sizes = [hi - lo for lo, hi in chunk_bounds(2 * schedule.world_size + 1, schedule.chunks)]
    moved = np.zeros((2, schedule.world_size), int)  # (sent, received) x rank
    for t in schedule.transfers:
        moved[0, t.src] += sizes[t.chunk]
        moved[1, t.dst] += sizes[t.chunk]
    return moved.tolist()


@pytest.mark.parametrize("p", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ALL_REDUCE)
def test_a_corrupted_entry_is_noticed(name, p):
    """Dropping an entry, or another chunk or op, spoils somebody's sum or is refused. Another source or
    destination may happen to be as good (a copy can come from any rank that has the sum): then it shows in
    the bytes that ranks send and receive."""
    schedule = ALL_REDUCE[name](p)
    arrays = list(np.random.default_rng(p).integers(1, 1001, (p, 2 * p + 1)))
    good, tried = results(schedule, arrays), 0
    for what, entry, transfers in corruptions(schedule):
        tried += 1
        try:
            corrupted = Schedule(name, p, schedule.chunks, transfers)
        except ValueError:
            continue
        noticed = results(corrupted, arrays) != good
        if what != "dropped" and (what.src, what.dst) != (entry.src, entry.dst):
            noticed = noticed or traffic(corrupted) != traffic(schedule)
        assert noticed, f"{entry} → {what} changed nothing"
    assert tried >= 4 * len(schedule.transfers)
