"""``--compress all``: the same training with each compressor, on the same virtual cluster."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, replace
from statistics import fmean

from rich.console import Console

import minidp
from minidp import compress
from minidp.demo import compressors, page, survey_report
from minidp.demo.places import place
from minidp.demo.predict import predicted_step_s
from minidp.demo.train import Job, Result, train
from minidp.demo.words import told, write
from minidp.sim import Cluster
from minidp.trace.pareto import Choice, front, plot_pareto

SEEDS = 3
SPECS: dict[str, str | None] = {compressors.FLOAT32: None} | {spec: spec for spec in compress.EXAMPLES}
"""By the name in tables. The first is the usual DataParallel, by which all others are measured."""


@dataclass(frozen=True)
class Figures:
    """What came of one compressor: means over seeds. Bytes are those that a rank sends."""

    compressor: str
    lr: float
    bytes_per_step: float
    times_less: float
    """Than float32, as the next three."""
    seconds: float
    """Of all steps, on the virtual clock."""
    times_faster: float
    test_accuracy: float
    points: float
    test_accuracies: list[float]
    """Of each seed."""
    loss: float


@dataclass(frozen=True)
class Survey:
    """All that ``--json`` writes. ``front_…``: who is on the Pareto front, from the cheapest on."""

    model: str
    dataset: str
    workers: int
    global_batch_size: int
    epochs: int
    steps: int
    optimizer: str
    lr: float
    seeds: int
    test_samples: int
    bandwidth_bytes_per_s: float
    latency_s: float
    parameter_arrays: int
    computing_s: float
    """Of float32's seconds those that a network without latency and of any bandwidth would leave."""
    front_bytes: list[str]
    front_seconds: list[str]
    compressors: list[Figures]


def compare(console: Console, args: Namespace, job: Job) -> int:
    survey_report.introduce(console, job, args.workers, args.cluster, SEEDS, list(SPECS), place(args))
    result = _run_all(console, args, job)
    survey_report.show(console, result)
    if args.plot or args.report:
        figure = plot_pareto(
            [
                Choice(
                    each.compressor,
                    (each.bytes_per_step, each.seconds),
                    each.test_accuracy,
                    compressors.kind(each.compressor),
                    each.compressor.endswith("+ef"),
                )
                for each in result.compressors
            ],
            args.plot,
            title=survey_report.title(result),
            solid=("with error feedback", "without"),
        )
        if args.report:
            page.of_compressors(console, args, result, figure)
        if args.plot:
            told(console, "Picture", args.plot)
    write(console, args.json, result)
    return 0


def _run_all(console: Console, args: Namespace, job: Job) -> Survey:
    runs: dict[str, list[Result]] = {}
    with console.status("") as status:  # a minute without a word would be long
        for name, spec in SPECS.items():
            runs[name] = []
            for seed in range(SEEDS):
                status.update(f"{name}, seed {seed + 1} of {SEEDS}")
                one = replace(job, compress=spec, seed=seed)
                results = minidp.spawn(
                    train, args.workers, one, world="virtual", device=args.device, cluster=args.cluster
                )
                runs[name].append(results[0])
    base = _figures(job, compressors.FLOAT32, runs[compressors.FLOAT32], None)
    found = [_figures(job, name, results, base) for name, results in runs.items()]
    steps = runs[compressors.FLOAT32][0].steps
    cluster: Cluster = args.cluster
    free = replace(cluster, latency_s=0.0, bandwidth_bytes_per_s=1e30)
    return Survey(
        model=job.task.model,
        dataset=job.task.dataset,
        workers=args.workers,
        global_batch_size=job.global_batch_size,
        epochs=job.epochs,
        steps=steps,
        optimizer=job.optimizer,
        lr=job.lr,
        seeds=SEEDS,
        test_samples=len(job.task.load()[1]),
        bandwidth_bytes_per_s=cluster.bandwidth_bytes_per_s,
        latency_s=cluster.latency_s,
        parameter_arrays=len(list(job.task.build().parameters())),
        computing_s=steps * predicted_step_s(job, args.workers, free),
        front_bytes=_front({each.compressor: (each.bytes_per_step, each.test_accuracy) for each in found}),
        front_seconds=_front({each.compressor: (each.seconds, each.test_accuracy) for each in found}),
        compressors=found,
    )


def _front(points: dict[str, tuple[float, float]]) -> list[str]:
    names = list(points)
    return [names[at] for at in front(list(points.values()))]


def _figures(job: Job, name: str, results: list[Result], base: Figures | None) -> Figures:
    """Of one compressor, beside float32; None: it is this."""
    sent = fmean(result.bytes_per_step for result in results)
    seconds = fmean(sum(result.epoch_s) for result in results)
    accuracies = [float(result.accuracy) for result in results]
    accuracy = fmean(accuracies)
    return Figures(
        compressor=name,
        lr=compressors.rate(job.lr, job.optimizer, SPECS[name]),
        bytes_per_step=sent,
        times_less=base.bytes_per_step / sent if base else 1.0,
        seconds=seconds,
        times_faster=base.seconds / seconds if base else 1.0,
        test_accuracy=accuracy,
        points=100 * (accuracy - base.test_accuracy) if base else 0.0,
        test_accuracies=accuracies,
        loss=fmean(result.loss for result in results),
    )
