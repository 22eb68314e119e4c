"""``micro-shards``: what the same bits for any N cost, next to one whole batch; one rank, in this process.

A rank of N has V/N micro-shards of its own. What it pays for are smaller matrix products, more calls, and adding
up its gradients: the time of V/N micro-shards over that of one, for the same batch of this rank.
"""

from __future__ import annotations

import os
from dataclasses import replace
from statistics import median

import threadpoolctl

from minidp.bench import measure
from minidp.bench.contest import Rounds
from minidp.bench.jobs import LARGE, SMALL, TINY, Training
from minidp.bench.machine import Neighbours
from minidp.bench.measure import ratio
from minidp.bench.peers.ours import strategy_of
from minidp.bench.report import Line, Report
from minidp.bench.screen import Screen
from minidp.comm import comm_self
from minidp.nn.functional import cross_entropy

JOBS = (SMALL, LARGE, replace(LARGE, batch=1024), TINY, replace(TINY, batch=256))
SHARDS = (2, 4, 8)
COLUMNS = {"us": ("µs a step", ",.1f")}
NOTES = (
    "One rank's step of DataParallel with micro_shards=V and N = 1, over that without: forward, backward, update.",
    "With N ranks it is the row of V/N: 8 micro-shards on 4 ranks cost each of them what 2 cost here.",
)


class Step:
    """A contender of `measure.compare`."""

    def __init__(self, job: Training, micro_shards: int | None) -> None:
        self.strategy = strategy_of(job, comm_self(), micro_shards=micro_shards)
        self.batch = job.batch_of(0)

    def burst(self, repeats: int, warm_up: int = 0) -> float:
        comm = self.strategy.comm
        for _ in range(warm_up):
            self._step()
        start = comm.now()
        for _ in range(repeats):
            self._step()
        return comm.now() - start

    def _step(self) -> None:
        self.strategy.forward_backward(*self.batch, cross_entropy)
        self.strategy.step()


def run(rounds: Rounds, screen: Screen) -> Report:
    report = Report("micro-shards", "one rank, one thread", rounds, COLUMNS, notes=NOTES)
    neighbours = Neighbours({os.getpid()})
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for job in JOBS:
            screen.phase(job.name, rounds.pairs * (1 + len(SHARDS)))
            contenders = {"whole batch": Step(job, None), **{f"V = {v}": Step(job, v) for v in SHARDS}}
            samples = measure.compare(contenders, rounds.pairs, rounds.burst_s, screen.tick)
            for who, seconds in samples.items():
                line = Line(job.name, who, {"us": median(seconds) * 1e6}, seconds)
                if who != "whole batch":
                    line = line.compared("V / whole", ratio(seconds, samples["whole batch"]))
                report.lines.append(line)
    report.others = neighbours.cores()
    return report
