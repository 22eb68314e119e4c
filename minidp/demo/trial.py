"""One strategy on trial, on every rank: train until a number of steps or a time is reached, then look back.

Rank 0 puts copies of its model aside as it trains, and looks at them afterwards: so that testing, which would take
longer than training, costs the clock nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from minidp import data, trace
from minidp.comm import Communicator, ReduceOp
from minidp.demo.strategies import WAYS, Knobs
from minidp.demo.train import OPTIMIZERS, Job, evaluate, tally
from minidp.nn import functional as F

LAST_EVENTS = 300  # of a rank that are kept: of many steps, also where a slow one makes two
LOOKED_AT = 2000  # samples by which copies are judged; the digits are fewer


@dataclass(frozen=True)
class Trial:
    """``strategy`` of `WAYS`, for ``seconds`` by the run's clock; None: for the job's epochs."""

    job: Job
    strategy: str
    knobs: Knobs
    seconds: float | None
    points: int
    """So many copies of rank 0's model are put aside, besides the first."""
    record: bool = False
    """Bring the last events home."""


@dataclass(frozen=True)
class Point:
    """Rank 0's model at a moment: loss on the training data, accuracy on the test data."""

    time_s: float
    loss: float
    test_accuracy: float


@dataclass
class Part:
    """What one rank brings home. ``loss`` and ``accuracy`` are of the final model, the same on all ranks."""

    steps: int
    samples: int
    train_samples: int
    """|D|: of how many there are."""
    seconds: float
    bytes_sent: float
    loss: float
    accuracy: float
    staleness: Counter[int] = field(default_factory=Counter)
    """τ → gradients of this rank that were τ updates late, on all servers."""
    lost: float = 0.0
    """Of all ranks' writes to a shared w, the part that was overwritten unread."""
    points: list[Point] = field(default_factory=list)
    events: list[trace.Event] = field(default_factory=list)


def train_for(comm: Communicator, trial: Trial) -> Part:
    way, job = WAYS[trial.strategy], trial.job
    model = job.task.build()
    optimizer = OPTIMIZERS[job.optimizer](model.parameters(), lr=way.lr(job.lr, comm.world_size))
    strategy = way.build(model, optimizer, comm, trial.knobs)
    train_set, test_set = job.load()
    loader = data.DataLoader(
        train_set, global_batch_size=job.global_batch_size, shard=strategy.shard, shuffle=True, seed=0
    )
    end = _End(comm, trial, len(loader))
    album: list[tuple[float, dict[str, np.ndarray]]] = []
    samples, seconds = 0, 0.0
    if comm.rank == 0:
        album.append((0.0, model.state_dict()))
    recorder = trace.Recorder(comm.rank, comm.now)
    comm.barrier()
    start = comm.now()
    for x, y in _endless(loader):
        with trace.recording(recorder) if trial.record else nullcontext():
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
        del recorder.events[:-LAST_EVENTS]
        comm.device.synchronize()  # the clock tells of what is done, not of what was asked for
        samples += len(x)
        seconds = comm.now() - start
        if comm.rank == 0 and end.part(strategy.updates, seconds) * trial.points >= len(album):
            album.append((seconds, model.state_dict()))
        if end.reached(strategy.updates, seconds):
            break
    metrics = strategy.metrics
    model = job.task.build()
    model.load_state_dict(strategy.state_dict())  # of all workers that have arrived: here nobody is waited for
    loss, _, seen = evaluate(comm, model, train_set, strategy.shard)
    _, correct, tested = evaluate(comm, model, test_set, strategy.shard)
    return Part(
        steps=strategy.updates,
        samples=samples,
        train_samples=len(train_set),
        seconds=seconds,
        bytes_sent=metrics["bytes_sent"],
        loss=loss / seen,
        accuracy=correct / tested,
        staleness=Counter(strategy.staleness_counts),
        lost=metrics.get("lost_updates", 0) / max(1, metrics.get("updates_written", 1)),
        events=recorder.events,
        points=[_look(trial, moment, state, train_set, test_set) for moment, state in album],
    )


def _endless(loader: data.DataLoader) -> Iterator[Any]:
    """Epoch after epoch: who is faster than others sees its data more often."""
    for epoch in count():
        yield from loader.epoch(epoch)


class _End:
    """When a rank's trial is over. Those that must make the same number of steps agree about that: now and then,
    the oftener the nearer the end is, so that it comes on time and finding it costs next to none."""

    def __init__(self, comm: Communicator, trial: Trial, epoch_steps: int) -> None:
        self._comm, self._seconds = comm, trial.seconds
        self._steps = trial.job.epochs * epoch_steps
        self._agree = WAYS[trial.strategy].in_step
        self._ask_at = 1

    def part(self, steps: int, seconds: float) -> float:
        """What of the trial has been, from 0 to 1."""
        return steps / self._steps if self._seconds is None else seconds / self._seconds

    def reached(self, steps: int, seconds: float) -> bool:
        if self._seconds is None or not self._agree:
            return self.part(steps, seconds) >= 1
        if steps < self._ask_at:
            return False
        latest = np.array([seconds])
        self._comm.all_reduce(latest, ReduceOp.MAX)
        left = steps * (self._seconds / float(latest[0]) - 1)  # steps, at the pace until now
        self._ask_at = steps + max(1, int(left / 2))
        return left <= 0


def _look(
    trial: Trial,
    moment: float,
    state: dict[str, np.ndarray],
    train_set: data.ArrayDataset,
    test_set: data.ArrayDataset,
) -> Point:
    model = trial.job.task.build()
    model.load_state_dict(state)
    loss, _, seen = tally(model, _first(train_set))
    _, correct, tested = tally(model, _first(test_set))
    return Point(moment, float(loss / seen), float(correct / tested))


def _first(dataset: data.ArrayDataset) -> data.ArrayDataset:
    return data.ArrayDataset(*(array[:LOOKED_AT] for array in dataset.arrays))
