"""``python -m minidp.demo``: train on digits with one worker and with N, and compare speed and result."""

from __future__ import annotations

import logging
import shlex
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from rich.console import Console

import minidp
from minidp import parallel, trace
from minidp.backend import Device, DeviceUnavailable
from minidp.demo import compare, compare_compressors, goal, hybrid, page, report
from minidp.demo.curve import Moment
from minidp.demo.hybrid_options import HIDDEN
from minidp.demo.options import parse
from minidp.demo.places import place
from minidp.demo.predict import predicted_step_s
from minidp.demo.train import Job, Result, fingerprint, train
from minidp.demo.words import number, told, write, write_trace
from minidp.launch import cores
from minidp.sim import Cluster, calibrate

ROUNDS = 2  # 1 worker, N workers, 1 worker, N workers: a busy moment of the machine hits both
WEAK_EPOCHS = 6
MICRO_SHARDS, FEW_UPDATES = 8, 20  # of the runs that end the demo, to compare bits
CALIBRATION_S = 2.0  # a bar in the picture of a demo, not a measurement to publish


class Runs(NamedTuple):
    """What all runs together brought home."""

    result: report.Outcome
    events: list[trace.Event]
    """Of all of the workers' ranks."""
    state: dict[str, np.ndarray]
    """The workers' w."""
    curves: dict[str, list[Moment]]
    """How the loss fell, if that is reported."""


def main(argv: list[str] | None = None, device: Device | None = None) -> int:
    """Run the demo; the exit status. ``device``: another than ``--device`` names."""
    args = parse(argv)
    args.device = device or args.device
    args.command = shlex.join(["python", "-m", "minidp.demo", *(sys.argv[1:] if argv is None else argv)])
    try:
        args.device.check()
        with _only_errors("minidp.launch", "minidp.sim"):  # the demo says itself what there is to say
            return _run(args)
    except DeviceUnavailable as error:
        unavailable = error
    except minidp.RankFailed as failed:
        if not isinstance(failed.__cause__, DeviceUnavailable):
            raise
        unavailable = failed.__cause__
    sys.stderr.write(without_device(unavailable, sys.argv[1:] if argv is None else argv) + "\n")
    return 2


def without_device(error: DeviceUnavailable, argv: list[str]) -> str:
    """One sentence: why there is no such device, and the command that does the same without."""
    words = " ".join(error.reason.split()).rstrip(".")
    given, rest = iter(argv), ["python", "-m", "minidp.demo"]
    for option in given:
        name, equals, _ = option.partition("=")
        if len(name) < len("--de") or not "--device".startswith(name):  # argparse takes beginnings of names, too
            rest.append(option)
        elif not equals:
            next(given)
    return f"minidp.demo: {words.replace('. ', '; ')}; on the processor it is: {shlex.join(rest)}"


@contextmanager
def _only_errors(*names: str) -> Iterator[None]:
    """Within the block these loggers tell of errors only."""
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def _run(args: Namespace) -> int:
    console = page.Telling() if args.report else Console()
    job = Job(
        args.epochs,
        args.global_batch_size,
        args.optimizer,
        args.lr,
        args.naive,
        task=args.task,
        balance=args.balance,
        micro_shards=args.micro_shards,
        save=args.save,
        resume=args.resume,
        until=None if args.until is None else args.until / 100,
        compress=None if args.survey else args.compress,
        curve=args.report is not None,
    )
    if args.cluster is not None:
        # A small model, so that talking is seen beside computing; every rank's real gradients are computed here.
        job = replace(job, task=replace(args.task, hidden=(128,)))
    try:
        if args.hybrid:
            return hybrid.run(console, args, replace(job, task=replace(args.task, hidden=HIDDEN)))
        if args.compare:
            return compare.compare(console, args, job)
        if args.survey:
            return compare_compressors.compare(console, args, job)
        report.introduce(console, job, args.workers, cores(), args.cluster, place(args))
        if job.until is not None:
            return goal.reach(console, args, job)
        result, events, state, curves = (in_processes if args.cluster is None else virtually)(args, job)
        if job.compress is None:
            result = replace(result, sha256=fingerprints(args, job))
    except minidp.RankFailed as failed:
        if not isinstance(failed.__cause__, parallel.NonFiniteGradient):
            raise
        error = failed.__cause__
        console.print(f"The training diverged at step {error.step}: try a smaller --lr than {job.lr:g}.\n{error}")
        return 1
    report.show(console, result, job.task)
    if job.task.model == "transformer":
        report.show_writing(console, state)
    forwards = (job.micro_shards or args.workers) // args.workers  # of a worker in a step
    if args.report:
        page.of_training(console, args, result, curves, report.last_steps(events, 2, forwards))
    if args.cluster is not None:
        report.show_timeline(console, events, args.cluster, forwards)
    if args.plot:
        ranks = report.interesting(args.workers, args.cluster)
        window = [event for event in report.last_steps(events, 2, forwards) if event.rank in ranks]
        trace.plot_timeline(window, args.plot, title=f"Two steps of {args.workers} workers")
        told(console, "Timeline", args.plot)
    write(console, args.json, result)
    write_trace(console, args.trace, events)
    return 0


def in_processes(args: Namespace, job: Job) -> Runs:
    """Timed on this machine, beside what its calibration predicts; of GPUs there is none."""
    predicted: tuple[float | None, float | None] = None, None
    if args.device.on_host:
        predicted = predict(args, job, replace(calibrate(CALIBRATION_S), nodes=max(2, args.workers)))

    def run(workers: int, job: Job) -> list[Result]:
        return minidp.spawn(train, workers, job, device=args.device, blas_threads=1)

    one: list[Result] = []
    many: list[Result] = []
    # With checkpoints a second round would go on from the first one's end.
    for _ in range(1 if job.save or job.resume or job.task.large else ROUNDS):
        one.append(run(1, job.alone())[0])
        results = run(args.workers, replace(job, record=bool(args.trace or args.report)))
        many.append(results[0])
    copies, epochs = args.workers, min(args.epochs, 1 if job.task.large else WEAK_EPOCHS)
    weak_job = replace(
        job.alone(),
        copies=copies,
        global_batch_size=copies * job.global_batch_size,
        epochs=epochs,
        compress=job.compress,
    )
    weak = run(args.workers, weak_job)[0]
    speedup_weak = args.workers * report.steps_per_s([weak]) / report.steps_per_s(one)
    outcome = report.outcome(
        "process", args.device.name, job, args.workers, cores(), one, many, speedup_weak, predicted
    )
    return Runs(
        outcome, [event for result in results for event in result.events], many[0].state, _curves(args, one, many)
    )


def virtually(args: Namespace, job: Job) -> Runs:
    """Timed on the virtual clock, where one run is as good as many."""
    cluster: Cluster = args.cluster

    def run(workers: int, job: Job, cluster: Cluster = cluster) -> list[Result]:
        return minidp.spawn(train, workers, job, world="virtual", device=args.device, cluster=cluster)

    one = run(1, job.alone(), _alone(cluster))
    many = run(args.workers, replace(job, record=True))
    weak_job = replace(job, global_batch_size=args.workers * job.global_batch_size, copies=args.workers)
    weak_s = _predicted(weak_job, args.workers, cluster)
    if weak_s is None:
        once = replace(weak_job, epochs=1, save=None, resume=None)
        weak_s = report.step_s(run(args.workers, once))
    speedup_weak = args.workers * report.step_s(one) / weak_s
    predicted = predict(args, job, cluster)
    outcome = report.outcome(
        "virtual", args.device.name, job, args.workers, cores(), one, many[:1], speedup_weak, predicted
    )
    return Runs(
        outcome, [event for result in many for event in result.events], many[0].state, _curves(args, one, many)
    )


def _curves(args: Namespace, one: list[Result], many: list[Result]) -> dict[str, list[Moment]]:
    return {"1 worker": one[0].curve, number(args.workers, "worker"): many[0].curve}


def fingerprints(args: Namespace, job: Job) -> dict[int, str]:
    """What a few updates with micro-shards end at, with 1, 2 and 4 workers."""
    shards = job.micro_shards or MICRO_SHARDS
    job = replace(job.alone(), naive=False, micro_shards=shards)
    updates = FEW_UPDATES if job.task.model == "mlp" else FEW_UPDATES // 4
    return {
        workers: minidp.spawn(
            fingerprint, workers, job, updates, world=args.world, device=args.device, progress=False
        )[0]
        for workers in (1, 2, 4)
        if shards % workers == 0
    }


def predict(args: Namespace, job: Job, cluster: Cluster) -> tuple[float, float | None]:
    """Seconds of a step by a timing-only run: of one worker, and of all.

    None for what it can't foretell: balanced shares, and messages through queues, which calibration does not time;
    nor payloads whose sizes others decide.
    """
    one = predicted_step_s(job.alone(), 1, _alone(cluster))
    through_queues = job.naive or job.compress is not None
    unknown = job.balance or (through_queues and args.cluster is None)
    return one, None if unknown else _predicted(job, args.workers, cluster)


def _predicted(job: Job, workers: int, cluster: Cluster) -> float | None:
    if job.compress is None:
        return predicted_step_s(job, workers, cluster)
    try:
        return predicted_step_s(job, workers, cluster)
    except NotImplementedError:  # a rehearsal has no peers to send it payloads
        return None


def _alone(cluster: Cluster) -> Cluster:
    """What one worker by itself runs on: an ordinary node."""
    return replace(cluster, nodes=1, topology="switch", stragglers={})


if __name__ == "__main__":
    sys.exit(main())
