"""``--until``: only train, to an accuracy. How long does it take?"""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import dataclass

from rich.console import Console

import minidp
from minidp.demo import report
from minidp.demo.train import Job, Result, train
from minidp.demo.words import number, write


@dataclass(frozen=True)
class Reached:
    """How far ``--until`` came, as ``--json`` writes it. Times in seconds: of training alone, and of all."""

    model: str
    dataset: str
    world: str
    device: str
    workers: int
    compress: str | None
    until: float
    reached: bool
    test_accuracy: float
    epochs: int
    steps: int
    training_s: float
    whole_s: float

    @classmethod
    def of(cls, result: Result, args: Namespace, whole_s: float) -> Reached:
        until = args.until / 100
        return cls(
            model=args.task.model,
            dataset=args.task.dataset,
            world=args.world,
            device=args.device.name,
            workers=args.workers,
            compress=args.compress,
            until=until,
            reached=result.accuracy >= until,
            test_accuracy=result.accuracy,
            epochs=len(result.epoch_s),
            steps=result.steps,
            training_s=sum(result.epoch_s),
            whole_s=whole_s,
        )


def show(console: Console, found: Reached) -> None:
    workers = number(found.workers, "worker")
    verdict = "[bold]Reached[/]" if found.reached else f"[yellow]Not reached ({100 * found.until:g}%)[/]"
    clock = "" if found.world == "process" else " on the virtual clock"
    whole = f", {found.whole_s:.1f} s with start, data and tests" if found.world == "process" else ""
    console.print(
        f"{verdict}: test accuracy [bold]{found.test_accuracy:.2%}[/] after "
        f"{number(found.epochs, 'epoch')}, {found.steps} steps.\n"
        f"{workers} trained for [bold]{found.training_s:.1f} s[/]{clock} "
        f"({found.steps / found.training_s:.1f} steps/s){whole}.",
        highlight=False,
    )


def reach(console: Console, args: Namespace, job: Job) -> int:
    """Train until then, and say how it went; 1 if the accuracy has not been reached."""
    assert job.until is not None
    start = time.perf_counter()
    if args.cluster is None:
        result = minidp.spawn(train, args.workers, job, device=args.device, blas_threads=1)[0]
    else:
        result = minidp.spawn(train, args.workers, job, world="virtual", device=args.device, cluster=args.cluster)[
            0
        ]
    found = Reached.of(result, args, time.perf_counter() - start)
    show(console, found)
    if job.task.model == "transformer":
        report.show_writing(console, result.state)
    write(console, args.json, found)
    return int(not found.reached)
