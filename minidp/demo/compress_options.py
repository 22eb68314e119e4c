"""The options of ``--compress``: what they are, what they change in others, and what does not go together."""

from __future__ import annotations

import argparse
from typing import Any

from minidp import compress
from minidp.demo.strategies import ALL
from minidp.demo.tasks import Defaults, Task

_WORKERS, _BANDWIDTH = 4, 1.25e8  # of the cluster that --compress all is shown on: a network of 1 Gb/s
# 315 steps, in which float32 comes to 95 % of the digits. Fewer, larger steps leave error feedback no time to give
# back what it holds; with momentum, too, what comes late is less welcome.
_DIGITS = Defaults("sgd", 0.2, 32, 7)
_ONE_ONLY = ("naive", "micro_shards", "balance", "save", "resume", "until", "trace", "strategy")


def add_to(parser: argparse.ArgumentParser) -> None:
    parser.add_argument_group(
        "smaller gradients (--compress)",
        "N workers whose gradients are compressed, beside one worker; or all compressors beside each other, on a "
        "virtual cluster: who sends how much, and who learns how well?",
    ).add_argument(
        "--compress",
        metavar="SPEC",
        help=f"what gradients travel as, such as {', '.join(compress.EXAMPLES[1:])}: a trailing +ef adds error "
        "feedback; all: each of these, 3 times, on a virtual network of 1 Gb/s",
    )


def choose(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check, and fill in what depends on it. ``args.survey``: whether all compressors are compared."""
    args.survey = args.compress == ALL
    if args.compress is None:
        return
    if args.survey:
        _check_survey(parser, args)
        args.world = "virtual"
        args.workers = _WORKERS if args.workers is None else args.workers
        return
    try:
        compress.get(args.compress)
    except ValueError as error:
        parser.error(f"--{str(error).replace('=', ' ', 1)}; or {ALL}, to compare them")
    if args.naive:
        parser.error("--compress: the literal version (--naive) sends gradients as they are")
    if args.micro_shards is not None:
        parser.error("--micro-shards is for exact bits, which no compressor keeps: leave one out")
    if args.strategy not in (None, "sync"):
        parser.error(f"--compress is of synchronous training: leave it out, or --strategy {args.strategy}")


def _check_survey(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    given = [name for name in _ONE_ONLY if getattr(args, name) not in (None, False)]
    if given:
        parser.error(
            f"--compress all trains again and again, to compare: leave --{given[0].replace('_', '-')} out, or "
            "give one compressor"
        )
    if args.world == "process":
        parser.error(
            "--compress all is timed on a virtual cluster, whose network is known: without --world process"
        )
    if args.workers == 1:
        parser.error("--compress all compares what workers send each other: give --workers 2 or more")


def usual(args: argparse.Namespace, task: Task) -> Defaults:
    """How the task is trained where the options say nothing."""
    return _DIGITS if args.survey and (task.model, task.dataset) == ("mlp", "digits") else task.defaults


def cluster(args: argparse.Namespace) -> dict[str, Any]:
    """What the virtual cluster is by default, where that depends on ``--compress``."""
    return {"bandwidth": _BANDWIDTH} if args.survey else {}
