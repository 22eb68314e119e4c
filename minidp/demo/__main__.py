"""``python -m minidp.demo``: train on digits with one worker and with N, and compare speed and result."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from pathlib import Path

from rich.console import Console

import minidp
from minidp import parallel, trace
from minidp.demo import report
from minidp.demo.train import DEFAULT_LR, OPTIMIZERS, Job, Result, train
from minidp.launch import cores

ROUNDS = 2  # 1 worker, N workers, 1 worker, N workers: a busy moment of the machine hits both
WEAK_EPOCHS = 6


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minidp.demo",
        description="Train the same model on real handwritten digits with 1 worker and with N worker processes: "
        "how much faster are N, what do they send, and do they end at the same parameters?",
    )
    add = parser.add_argument
    add(
        "--workers",
        type=int,
        default=cores(),
        help="N, worker processes (default: the cores, %(default)s)",
    )
    add("--epochs", type=int, default=20, help="passes over the training data (default: %(default)s)")
    add(
        "--global-batch-size",
        type=int,
        default=256,
        help="B, samples a step over all workers (default: %(default)s)",
    )
    add("--lr", type=float, help="learning rate η (default: depends on the optimizer)")
    add("--optimizer", choices=OPTIMIZERS, default="momentum", help="update rule (default: %(default)s)")
    add(
        "--naive",
        action="store_true",
        help="the literal version: replicas, and a message a parameter through queues",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a Chrome trace of all ranks to FILE; ui.perfetto.dev opens it",
    )
    args = parser.parse_args(argv)
    for name in ("workers", "epochs", "global_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr is not None and not 0 < args.lr < math.inf:
        parser.error("--lr must be positive and finite")
    for name, path in (("json", args.json), ("trace", args.trace)):  # now, not after the training
        if path is not None and path.is_dir():
            parser.error(f"--{name} {path}: this is a folder, give a file")
        if path is not None and not path.parent.is_dir():
            parser.error(f"--{name} {path}: there is no folder {path.parent}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    console = Console()
    logging.getLogger("minidp.launch").setLevel(logging.ERROR)  # the demo says itself what there is to say
    lr = DEFAULT_LR[args.optimizer] if args.lr is None else args.lr
    job = Job(args.epochs, args.global_batch_size, args.optimizer, lr, args.naive, record=args.trace is not None)
    weak_job = Job(
        min(args.epochs, WEAK_EPOCHS),
        args.workers * args.global_batch_size,
        args.optimizer,
        lr,
        args.naive,
        args.workers,
    )
    report.introduce(console, job, args.workers, cores())

    def run(workers: int, job: Job) -> list[Result]:
        return minidp.spawn(train, workers, job, blas_threads=1)

    one: list[Result] = []
    many: list[Result] = []
    events: list[trace.Event] = []
    try:
        for _ in range(ROUNDS):
            one.append(run(1, job)[0])
            results = run(args.workers, job)
            many.append(results[0])
            events = [event for result in results for event in result.events]
        weak = run(args.workers, weak_job)[0]
    except minidp.RankFailed as failed:
        if not isinstance(failed.__cause__, parallel.NonFiniteGradient):
            raise
        error = failed.__cause__
        console.print(f"The training diverged at step {error.step}: try a smaller --lr than {lr:g}.\n{error}")
        return 1
    result = report.outcome(job, args.workers, cores(), one, many, weak)
    report.show(console, result)
    if args.json:
        args.json.write_text(json.dumps(report.as_dict(result), indent=2) + "\n")
        console.print(f"Figures: {args.json}")
    if args.trace:
        trace.write_chrome(args.trace, events)
        console.print(f"Trace of all ranks: {args.trace} (open it at https://ui.perfetto.dev)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
