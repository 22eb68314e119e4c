"""``ps``, second part: what waiting costs. Samples in virtual seconds, of workers that are not equally fast.

Real training in the virtual world: the digits MLP on 4 workers, one server on a node of its own. Nothing here is
measured: two runs are equal to the bit.

The law, from the bound of Ho et al. (NIPS 2013): nobody is more than s steps ahead of the slowest. So one who is
always slowest sets the pace of all, as with s = 0: the others get ahead by (N − 1)·s pushes, once, and no farther.
Only against workers that are slow now and then does a bound help for good.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

from minidp import data, optim, parallel
from minidp.bench.jobs import LEARNING_RATE, TINY
from minidp.bench.measure import Bar, Figure
from minidp.bench.peers.ours import model_of
from minidp.bench.report import Line
from minidp.bench.screen import Screen
from minidp.bench.virtual import spawned
from minidp.comm import Communicator
from minidp.nn.functional import cross_entropy
from minidp.sim import Cluster

WORKERS, S = 4, 2
SLOWNESS, JITTER = 5.0, 0.5
ASYNCHRONOUS = Bar(3)  # of the issue; what follows are laws
GAINS, EQUAL = Bar(1), Bar(0.99, most=1.01)
LATE: dict[str, int | None] = {f"SSP s={S}": S, "asynchronous": None}
ROOMS = {
    f"{WORKERS} workers, one {SLOWNESS:g}× slower": Cluster(
        nodes=WORKERS + 1, flops=1e9, stragglers={WORKERS - 1: SLOWNESS}
    ),
    f"{WORKERS} workers, jitter {JITTER:g}": Cluster(nodes=WORKERS + 1, flops=1e9, jitter=JITTER),
}

COLUMNS = {
    "samples_per_s": ("samples/s", ",.0f"),
    "predicted": ("law", ",.0f"),
    "found": ("found", ",.0f"),
}
NOTES = (
    f"{WORKERS} workers: one run in the virtual world, exact. Digits, {TINY.name} a worker, 1 GFLOP/s, 10 Gbit/s, "
    "1 server; samples in a virtual second, while synchronous training makes its steps.",
    f"jitter: all are equally fast in the mean, each step takes exp({JITTER:g}·z − {JITTER:g}²/2) times as long.",
    "law: behind a straggler that stays slow, SSP gives the others a head start of (N − 1)·s pushes, once; from "
    "then on all go at its pace (long run: the second half of its steps), which is that of synchronous training.",
)


@dataclass(frozen=True)
class Work:
    """How much is trained: ``steps`` synchronous ones; the others do as much as they can in their time."""

    steps: int


FULL, QUICK = Work(200), Work(8)


class Trained(NamedTuple):
    """What a worker has done.

    Args:
        ends: when each of its steps ended, in virtual seconds from the common start.
        samples: in each of them.
        pushes: of all workers, that the server has counted when this one had ended its last step.
    """

    ends: list[float]
    samples: list[int]
    pushes: int

    def between(self, start_s: float, end_s: float) -> int:
        """Samples in steps that ended after ``start_s`` and not after ``end_s``."""
        return sum(n for end, n in zip(self.ends, self.samples) if start_s < end <= end_s)


def _train(comm: Communicator, staleness: int | None, until_s: float, most: int) -> Trained:
    """Until that time has come or that many steps are made."""
    train_set, _ = data.load_digits()
    model = model_of(TINY)
    rule = optim.SGD(model.parameters(), lr=LEARNING_RATE)
    strategy = parallel.ParameterServer(model, rule, comm, staleness=staleness)
    loader = data.DataLoader(train_set, batch_size=TINY.batch, shard=strategy.shard, shuffle=True, seed=0)
    batches = (batch for epoch in count() for batch in loader.epoch(epoch))
    ends: list[float] = []
    samples: list[int] = []
    comm.barrier()
    start = comm.now()
    while len(ends) < most and (not ends or ends[-1] < until_s):
        x, y = next(batches)
        strategy.forward_backward(x, y, cross_entropy)
        strategy.step()
        ends.append(comm.now() - start)
        samples.append(len(x))
    (server,) = strategy.servers()
    return Trained(ends, samples, server.version)


def trained(cluster: Cluster, staleness: int | None, until_s: float, most: int = sys.maxsize) -> list[Trained]:
    """What each worker did."""
    return spawned(_train, WORKERS, staleness, until_s, most, servers=1, cluster=cluster)


def run(screen: Screen, work: Work = FULL) -> list[Line]:
    """A line for each rule in each room, and two for the law."""
    lines = []
    screen.phase("virtual workers", len(ROOMS) * (1 + len(LATE)))
    for job, cluster in ROOMS.items():
        together = trained(cluster, 0, math.inf, work.steps)
        until_s = max(worker.ends[-1] for worker in together)
        base = _rate(together, 0, until_s)
        lines.append(_line(job, "synchronous", base))
        screen.tick()
        for who, s in LATE.items():
            workers = trained(cluster, s, until_s)
            rate = _rate(workers, 0, until_s)
            bar = ASYNCHRONOUS if s is None and cluster.stragglers else GAINS
            lines.append(_line(job, who, rate).compared("/ synchronous", Figure.of([rate / base], bar)))
            if s is not None and cluster.stragglers:
                lines += law(job, who, s, workers, base)
            screen.tick()
    return lines


def law(job: str, who: str, s: int, workers: list[Trained], base: float) -> list[Line]:
    """Behind a straggler, the last worker: how far the others get ahead, and the pace of all in the long run."""
    slow = workers[-1]
    steps = len(slow.ends)
    ahead, predicted = slow.pushes - WORKERS * steps, (WORKERS - 1) * s
    rate = _rate(workers, slow.ends[steps // 2 - 1], slow.ends[-1])
    start = Line(job, f"{who}, head start", {"predicted": predicted, "found": ahead}, ())
    pace = Line(job, f"{who}, long run", {"samples_per_s": rate, "predicted": base, "found": rate}, ())
    return [
        start.compared("found / law", Figure.of([ahead / predicted], EQUAL)),
        pace.compared("found / law", Figure.of([rate / base], EQUAL)),
    ]


def _rate(workers: list[Trained], start_s: float, end_s: float) -> float:
    """Samples a second, of all workers."""
    return sum(worker.between(start_s, end_s) for worker in workers) / (end_s - start_s)


def _line(job: str, who: str, rate: float) -> Line:
    return Line(job, who, {"samples_per_s": rate}, [1 / rate])
