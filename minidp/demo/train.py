"""What the demo runs on every rank. The loop is the one of the README; around it, a clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from minidp import data, nn, no_grad, optim, parallel, trace
from minidp.comm import Communicator
from minidp.demo.compressors import rate
from minidp.demo.curve import Curve, Moment
from minidp.demo.tasks import Task
from minidp.nn import functional as F

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "sgd": optim.SGD,
    "momentum": partial(optim.SGD, momentum=0.9),
    "adam": optim.Adam,
    "adamw": optim.AdamW,
}
DEFAULT_LR = {"sgd": 0.1, "momentum": 0.05, "adam": 0.001, "adamw": 0.001}


@dataclass(frozen=True)
class Job:
    """One training run of the demo; ``copies`` of the data are for weak scaling (N times the data)."""

    epochs: int
    global_batch_size: int
    optimizer: str
    lr: float
    naive: bool
    copies: int = 1
    record: bool = False
    curve: bool = False
    """Look how the loss falls."""
    task: Task = field(default_factory=Task)
    balance: bool = False
    micro_shards: int | None = None
    save: Path | None = None
    """Where a checkpoint is written after each epoch."""
    resume: Path | None = None
    """A folder of checkpoints: go on from the newest."""
    until: float | None = None
    """End after the first epoch with this test accuracy."""
    compress: str | None = None
    """What the gradients of several workers travel as."""
    seed: int = 0
    """Of the first w, of the order of samples, and of compressors that round at random."""

    def alone(self) -> Job:
        """The same for who shares with nobody, and neither keeps nor uses checkpoints."""
        return replace(self, balance=False, save=None, resume=None, compress=None)

    @property
    def lr_workers(self) -> float:
        """η, which is another where gradients travel without their length."""
        return rate(self.lr, self.optimizer, self.compress)

    def load(self) -> tuple[data.ArrayDataset, data.ArrayDataset]:
        """(train, test), the former so many times over."""
        train_set, test_set = self.task.load()
        if self.copies > 1:
            train_set = data.ArrayDataset(*(np.concatenate([a] * self.copies) for a in train_set.arrays))
        return train_set, test_set

    def strategy(self, comm: Communicator) -> parallel.Strategy:
        """Model, optimizer and strategy: the same w everywhere."""
        model = self.task.build().initialize(self.seed)
        optimizer = OPTIMIZERS[self.optimizer](model.parameters(), lr=self.lr_workers)
        if self.naive:
            return parallel.NaiveDataParallel(model, optimizer, comm)
        return parallel.DataParallel(
            model, optimizer, comm, micro_shards=self.micro_shards, compress=self.compress
        )


@dataclass
class Result:
    """What one rank brings home."""

    steps: int
    epoch_s: list[float]
    loss: float
    accuracy: float
    bytes_per_step: float
    state: dict[str, np.ndarray]
    events: list[trace.Event] = field(default_factory=list)
    shares: tuple[float, ...] | None = None
    """With ``balance``: each rank's part of a batch."""
    resumed_at: int | None = None
    """The updates that had been made when this run went on."""
    curve: list[Moment] = field(default_factory=list)


def train(comm: Communicator, job: Job) -> Result:
    train_set, test_set = job.load()
    strategy = job.strategy(comm)
    weights = None
    if job.balance:
        weights = parallel.measure_speeds(strategy, *share(train_set, job, comm.world_size), F.cross_entropy)
    loader = data.DataLoader(
        train_set,
        global_batch_size=job.global_batch_size,
        shard=strategy.shard,
        shuffle=True,
        seed=job.seed,
        weights=weights,
    )
    resumed_at = None if job.resume is None else strategy.load(job.resume).updates
    first, step = loader.position(strategy.updates)
    recorder = trace.Recorder(comm.rank, comm.now, comm.device.clock(comm.now) if job.record else None)
    epoch_s, total, curve = [], len(loader) * job.epochs, Curve(comm, job.curve)
    comm.barrier()
    with trace.recording(recorder):
        for epoch in range(first, job.epochs):
            start = comm.now()
            for x, y in loader.epoch(epoch, step if epoch == first else 0):
                loss = strategy.forward_backward(x, y, F.cross_entropy)  # ∇L_i
                strategy.step()  # ∇L = Σ n_i ∇L_i / Σ n_i ;  w ← w − η ∇L ; sync
                curve.add(loss, y.size, strategy.updates)
            comm.device.synchronize()  # what was only asked for, is not done
            epoch_s.append(comm.now() - start)
            note = f"epoch {epoch + 1}, loss {float(loss):.3f}"
            if job.save is not None:
                strategy.save(job.save)
            comm.progress(strategy.updates, total, note)
            if job.until is not None:
                _, correct, count = evaluate(comm, strategy.model, test_set, strategy.shard)
                if comm.rank == 0:
                    print(f"{note}, test accuracy {correct / count:.2%}, {sum(epoch_s):.1f} s", flush=True)
                if correct / count >= job.until:
                    break
    loss_sum, seen = math.nan, 1.0
    if job.until is None:
        loss_sum, _, seen = evaluate(comm, strategy.model, train_set, strategy.shard)
        _, correct, count = evaluate(comm, strategy.model, test_set, strategy.shard)
    state = strategy.state_dict()  # collective: every rank calls it
    recorder.settle()
    return Result(
        steps=strategy.updates - (resumed_at or 0),
        epoch_s=epoch_s,
        loss=loss_sum / seen,
        accuracy=correct / count,
        bytes_per_step=strategy.metrics["bytes_sent"] / max(1, strategy.updates - (resumed_at or 0)),
        state=state if comm.rank == 0 else {},
        events=recorder.events if job.record else [],
        shares=tuple(weight / sum(weights) for weight in weights) if weights else None,
        resumed_at=resumed_at,
        curve=curve.moments(),
    )


def fingerprint(comm: Communicator, job: Job, updates: int) -> str:
    """The SHA-256 of w after a few updates: of all parameters, in the order of their names."""
    train_set, _ = job.load()
    strategy = job.strategy(comm)
    loader = data.DataLoader(
        train_set, global_batch_size=job.global_batch_size, shard=strategy.shard, shuffle=True, seed=job.seed
    )
    while strategy.updates < updates:
        epoch, step = divmod(strategy.updates, len(loader))
        for x, y in islice(loader.epoch(epoch, step), updates - strategy.updates):
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
    state = strategy.state_dict()
    return sha256(b"".join(state[name].tobytes() for name in sorted(state))).hexdigest()


def share(dataset: data.ArrayDataset, job: Job, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """As many samples as the fullest of so many workers gets in a step: (x, y)."""
    count = min(-(-min(job.global_batch_size, len(dataset)) // workers), len(dataset))
    x, y = dataset[:count]
    return x, y


def evaluate(
    comm: Communicator, model: nn.Module, dataset: data.ArrayDataset, shard: tuple[int, int]
) -> tuple[float, float, float]:
    """(sum of losses, correct, count) of labels. Each rank evaluates its shard, unpadded; sums are all-reduced."""
    found = tally(model, dataset, shard)
    comm.all_reduce(found)
    return float(found[0]), float(found[1]), float(found[2])


def tally(model: nn.Module, dataset: data.ArrayDataset, shard: tuple[int, int] = (0, 1)) -> np.ndarray:
    """[sum of losses, correct, count] of the labels of this shard."""
    found = np.zeros(3)
    loader = data.DataLoader(dataset, global_batch_size=256, shard=shard)
    model.eval()
    with no_grad():
        for x, y in loader.epoch(0):
            scores: Any = model(x)
            loss = float(F.cross_entropy(scores, y))
            found += [loss * y.size, (scores.numpy().argmax(axis=-1) == y).sum(), y.size]
    model.train()
    return found
