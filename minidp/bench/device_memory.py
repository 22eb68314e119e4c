"""``allreduce --device cuda``: how near memory-bound work comes to what a GPU's memory can do.

All on one GPU, timed by its events. The yardstick is a copy of the same size, read and written. What is compared
is bytes that have to be read and written, a second: of the update rules those of w, g and the state; of an
all-reduce of ranks that share the GPU those that ``comm/device_memory.py`` says.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy as np

import minidp
from minidp import nn, optim
from minidp.bench.contest import Rounds
from minidp.bench.jobs import human_bytes
from minidp.bench.measure import PROPER_PAIRS, Bar, ratio
from minidp.bench.report import Line, Report
from minidp.bench.screen import Screen
from minidp.comm import Communicator

NBYTES, RANKS = 256 * 2**20, 2
RULES = Bar(0.8)
ALL_REDUCE = Bar(0.6)
COLUMNS = {"us": ("µs", ",.1f"), "gb_per_s": ("GB/s", ",.0f")}
NOTES = (
    "GB/s: bytes that must be read and written, over the GPU's time. Both ranks' count: they share its memory.",
)
REPEATS = 10


def run(rounds: Rounds, screen: Screen, nbytes: int = NBYTES, device: Any = "cuda") -> Report:
    report = Report("allreduce --device cuda", "memory of one GPU", rounds, COLUMNS, notes=NOTES)
    screen.phase("update rules", 1)
    copy, *rules = minidp.spawn(_rules, 1, nbytes, rounds.pairs, device=device, progress=False)[0]
    screen.phase(f"all-reduce of {RANKS} ranks", 1)
    reduces, transport = minidp.spawn(_all_reduce, RANKS, nbytes, rounds.pairs, device=device, progress=False)[0]
    size = human_bytes(nbytes)
    report.lines.append(_line(f"copy, {size}", "", 2 * nbytes, copy))
    for name, arrays, samples in rules:
        line = _line(f"update, {size} of weights", name, arrays * nbytes, samples)
        speed = ratio([arrays / s for s in samples], [2 / s for s in copy], RULES)
        report.lines.append(line.compared("of copy's GB/s", speed))
    moved = RANKS * (RANKS + 3)  # copied into the slot, all slots read, the sum written: by each rank
    line = _line(f"all-reduce, {size}, {RANKS} ranks", transport, moved * nbytes, reduces)
    report.lines.append(
        line.compared("of copy's GB/s", ratio([moved / s for s in reduces], [2 / s for s in copy], ALL_REDUCE))
    )
    return report


def _line(job: str, who: str, nbytes: int, samples: list[float]) -> Line:
    seconds = median(samples)
    return Line(job, who, {"us": seconds * 1e6, "gb_per_s": nbytes / seconds / 1e9}, samples)


def _rules(comm: Communicator, nbytes: int, rounds: int) -> list[Any]:
    """Seconds of a copy in each round, and for each rule (name, arrays that it reads and writes, seconds)."""
    xp, n = comm.device.xp, nbytes // 4
    w, g = xp.zeros(n, np.float32), xp.zeros(n, np.float32)
    state = {name: xp.zeros(n, np.float32) for name in ("momentum_buffer", "exp_avg", "exp_avg_sq")}
    lone = [nn.Parameter(np.zeros(1, np.float32))]
    calls: dict[str, tuple[int, Callable[[], object]]] = {}
    for rule in (optim.SGD(lone, lr=0.1, momentum=0.9), optim.Adam(lone, lr=0.1)):
        update = partial(rule.update, w, g, state, w, state, lr=0.1, t=0, hyper=rule.hyper(0, 0), scratch=(g,))
        calls[type(rule).__name__] = 3 + 2 * len(rule.slots), update
    copies: list[float] = []
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(max(1, min(rounds, PROPER_PAIRS))):
        copies.append(_seconds(comm, lambda: g.__setitem__(..., w)))
        for name, (_, call) in calls.items():
            samples[name].append(_seconds(comm, call))
    return [copies, *((name, arrays, samples[name]) for name, (arrays, _) in calls.items())]


def _all_reduce(comm: Communicator, nbytes: int, rounds: int) -> tuple[list[float], str]:
    x = comm.device.xp.zeros(nbytes // 4, np.float32)
    samples = [_seconds(comm, lambda: comm.all_reduce(x)) for _ in range(max(1, min(rounds, PROPER_PAIRS)))]
    return samples, comm.transport.name  # type: ignore[attr-defined]


def _seconds(comm: Communicator, call: Callable[[], object]) -> float:
    """The device's time of one of ten calls, after two that don't count."""
    clock = comm.device.clock(time.perf_counter) or _HostClock()
    call(), call()
    comm.barrier()
    start = clock.mark()
    for _ in range(REPEATS):
        call()
    end = clock.mark()
    seconds: float = (clock.seconds(end) - clock.seconds(start)) / REPEATS
    return seconds


class _HostClock:
    """For doubles of a device, which compute at once."""

    mark = staticmethod(time.perf_counter)

    def seconds(self, mark: float) -> float:
        return mark
