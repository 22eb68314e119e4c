"""``--strategy``: one beside synchronous training, or all of them, for the same time on the same machines."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from dataclasses import dataclass

from rich.console import Console

import minidp
from minidp.demo import comparison_report, page
from minidp.demo.places import place
from minidp.demo.strategies import ALL, TARGET, WAYS, Knobs
from minidp.demo.train import Job
from minidp.demo.trial import Part, Point, Trial, train_for
from minidp.demo.words import told, write
from minidp.trace import Event
from minidp.trace.curves import plot_curves

# Copies of rank 0's model in the time of a run. In processes each costs it the time to copy all parameters.
POINTS = {"virtual": 100, "process": 20}


@dataclass(frozen=True)
class Figures:
    """What one strategy did. Per worker: ``steps``. Of all workers' gradients: staleness.

    ``curve`` is of rank 0's own model, ``target_s`` the first time at which that knew ``target_accuracy`` of the
    test data; ``loss`` and ``test_accuracy`` are of the final model.
    """

    strategy: str
    lr: float
    steps: list[int]
    epochs: float
    seconds: float
    samples_per_s: float
    speed_vs_sync: float
    staleness_mean: float
    staleness_max: int
    staleness_counts: dict[int, int]
    loss: float
    test_accuracy: float
    target_s: float | None
    bytes_per_step: float
    lost_updates: float
    """The part of all written elements that was overwritten unread."""
    curve: list[Point]


@dataclass(frozen=True)
class Comparison:
    """All that ``--json`` writes. Each strategy but the first, sync, trained for ``limit_s``."""

    model: str
    dataset: str
    world: str
    device: str
    workers: int
    servers: int
    staleness_bound: int
    sync_every: int
    global_batch_size: int
    epochs: int
    optimizer: str
    lr: float
    stragglers: dict[int, float]
    jitter: float
    most_speed_vs_sync: float | None
    """By the workers' speeds, if only computing took time and nobody waited; None: they are not known."""
    target_accuracy: float
    limit_s: float
    strategies: list[Figures]


def compare(console: Console, args: Namespace, job: Job) -> int:
    names = list(WAYS) if args.strategy == ALL else ["sync", args.strategy]
    comparison_report.introduce(console, args, job, names, place(args))
    events: dict[str, list[Event]] = {}
    result = _run_all(args, job, names, events)
    comparison_report.show(console, result)
    if args.plot or args.report:
        curves = plot_curves(
            {run.strategy: [(point.time_s, point.loss) for point in run.curve] for run in result.strategies},
            {run.strategy: run.staleness_counts for run in result.strategies if WAYS[run.strategy].stale},
            args.plot,
            title=comparison_report.title(result),
            clock="virtual time" if args.cluster else "time",
            names=list(WAYS),
        )
        if args.report:
            page.of_strategies(console, args, result, curves, events)
        if args.plot:
            told(console, "Picture", args.plot)
    write(console, args.json, result)
    return 0


def _run_all(args: Namespace, job: Job, names: list[str], events: dict[str, list[Event]]) -> Comparison:
    """``events``: for a report, the last ones of each strategy are put there."""
    knobs = Knobs(args.staleness, args.sync_every, count_lost=args.world == "virtual")
    found: list[Figures] = []
    for name in names:
        # All have the time that sync needs for its epochs: it comes first.
        trial = Trial(job, name, knobs, found[0].seconds if found else None, POINTS[args.world], bool(args.report))
        parts = minidp.spawn(
            train_for,
            args.workers,
            trial,
            servers=args.servers if WAYS[name].served else 0,
            world=args.world,
            device=args.device,
            cluster=args.cluster,
            blas_threads=1,
        )
        events[name] = [event for part in parts for event in part.events]
        found.append(_figures(trial, parts, found[0].samples_per_s if found else None))
    return Comparison(
        model=job.task.model,
        dataset=job.task.dataset,
        world=args.world,
        device=args.device.name,
        workers=args.workers,
        servers=args.servers,
        staleness_bound=args.staleness,
        sync_every=args.sync_every,
        global_batch_size=job.global_batch_size,
        epochs=job.epochs,
        optimizer=job.optimizer,
        lr=job.lr,
        stragglers={} if args.cluster is None else dict(args.cluster.stragglers),
        jitter=0.0 if args.cluster is None else args.cluster.jitter,
        most_speed_vs_sync=_most(args),
        target_accuracy=TARGET,
        limit_s=found[0].seconds,
        strategies=found,
    )


def _most(args: Namespace) -> float | None:
    """Σ speeds / N / the slowest one."""
    if args.cluster is None:
        return None
    slowness = [args.cluster.slowness(rank) for rank in range(args.workers)]
    return float(sum(max(slowness) / each for each in slowness) / args.workers)


def _figures(trial: Trial, parts: list[Part], of_sync: float | None) -> Figures:
    # Each by its own time: a slow worker ends its last step after the others have ended theirs.
    rate = sum(part.samples / part.seconds for part in parts)
    late = sum((part.staleness for part in parts), Counter[int]())
    first, curve = parts[0], parts[0].points
    return Figures(
        strategy=trial.strategy,
        lr=WAYS[trial.strategy].lr(trial.job.lr, len(parts)),
        steps=[part.steps for part in parts],
        epochs=sum(part.samples for part in parts) / first.train_samples,
        seconds=max(part.seconds for part in parts),
        samples_per_s=rate,
        speed_vs_sync=rate / (of_sync or rate),
        staleness_mean=sum(tau * times for tau, times in late.items()) / max(1, late.total()),
        staleness_max=max(late, default=0),
        staleness_counts=dict(sorted(late.items())),
        loss=first.loss,
        test_accuracy=first.accuracy,
        target_s=next((point.time_s for point in curve if point.test_accuracy >= TARGET), None),
        bytes_per_step=sum(part.bytes_sent for part in parts) / sum(part.steps for part in parts),
        lost_updates=first.lost,
        curve=curve,
    )
