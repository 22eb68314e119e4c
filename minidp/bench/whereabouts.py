"""``whereabouts``: what it takes from a step that a rank's place is always known.

A thread of each worker looks a few times a second where the main thread is. To see so little at all, it looks here
``OFTENER`` times as often, and what that costs is divided by as much.
"""

from __future__ import annotations

import os
from statistics import median

import threadpoolctl

from minidp.bench import measure
from minidp.bench.contest import Rounds
from minidp.bench.jobs import SMALL, TINY, Training
from minidp.bench.machine import Neighbours
from minidp.bench.measure import Bar, Figure
from minidp.bench.micro_shards import Step
from minidp.bench.report import Line, Report
from minidp.bench.screen import Screen
from minidp.comm.board import Board
from minidp.comm.world import reserve_world
from minidp.launch.whereabouts import EVERY_S, Sampler

OFTENER = 25
BARS = {TINY: Bar(1, at_least=False)}  # percent of a step
COLUMNS = {"us": ("µs a step", ",.2f")}
NOTES = (
    f"watched: a thread looks every {EVERY_S / OFTENER * 1e3:g} ms where this one is, {OFTENER} times as often as "
    f"in a worker. % of a step: what that adds, divided by {OFTENER}.",
)


class Watched(Step):
    """A contender of `measure.compare`, beside whom a sampler runs."""

    def __init__(self, job: Training) -> None:
        super().__init__(job, None)
        self._arena = reserve_world(1)
        self._board = Board(self._arena, 1)

    def burst(self, repeats: int, warm_up: int = 0) -> float:
        sampler = Sampler(self._board, 0, EVERY_S / OFTENER)
        sampler.start()
        try:
            return super().burst(repeats, warm_up)
        finally:
            sampler.stop()

    def close(self) -> None:
        self._board.close()
        self._arena.close()


def run(rounds: Rounds, screen: Screen) -> Report:
    report = Report("whereabouts", "one process, one thread", rounds, COLUMNS, notes=NOTES)
    neighbours = Neighbours({os.getpid()})
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        for job in (TINY, SMALL):
            screen.phase(job.name, 2 * rounds.pairs)
            watched = Watched(job)
            try:
                contenders = {"watched": watched, "plain": Step(job, None)}
                samples = measure.compare(contenders, rounds.pairs, rounds.burst_s, screen.tick)
            finally:
                watched.close()
            for who, seconds in samples.items():
                line = Line(job.name, who, {"us": median(seconds) * 1e6}, seconds)
                if who == "watched":
                    more = [100 * (a / b - 1) / OFTENER for a, b in zip(seconds, samples["plain"])]
                    line = line.compared("% of a step", Figure.of(more, BARS.get(job)))
                report.lines.append(line)
    report.others = neighbours.cores()
    return report
