"""The options of ``--strategy hybrid``: the mesh, and how batches go through its stages."""

from __future__ import annotations

import argparse
import math
from typing import Any

from minidp.parallel.pipeline_schedules import SCHEDULES

HYBRID = "hybrid"
HIDDEN = (512, 512, 512)  # of the MLP: two pairs of layers, so that tp has something to cut on each of two stages
_AXES = "dp", "tp", "pp"
_OWN = (*_AXES, "micro_batches", "schedule")
_USUAL = {"dp": 2, "tp": 2, "pp": 1}


def add_to(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        f"the model shared out, too (--strategy {HYBRID})",
        "dp × tp × pp workers: replicas, each layer cut into parts, and the layers into stages. What does each "
        "hold and send, and do all together end where one worker does?",
    ).add_argument
    add(
        "--dp",
        type=int,
        help="replicas: data parallel (default: 2; or what --workers leaves, or 1, if --tp or --pp is given)",
    )
    add("--tp", type=int, help="parts of each layer: tensor parallel (default: 2; 1 if --dp or --pp is given)")
    add("--pp", type=int, help="stages: pipeline parallel (default: 1)")
    add("--micro-batches", type=int, metavar="M", help="pieces of a replica's batch (default: 4 a stage, or 1)")
    add("--schedule", choices=SCHEDULES, help="in which order stages take them (default: 1f1b)")


def choose(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Check, and fill in; ``args.hybrid``: whether it is asked for. ``args.workers`` then is dp · tp · pp."""
    args.hybrid = args.strategy == HYBRID
    given = [name for name in _OWN if getattr(args, name) is not None]
    if not args.hybrid:
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is of --strategy {HYBRID}: give that as well")
        return
    for name in (*_AXES, "micro_batches"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.compress is not None:
        parser.error(f"--compress: the demo of --strategy {HYBRID} sends gradients as they are")
    if not any(getattr(args, name) is not None for name in _AXES) and args.workers in (None, 4):
        args.dp, args.tp, args.pp = _USUAL["dp"], _USUAL["tp"], _USUAL["pp"]
    args.tp, args.pp = args.tp or 1, args.pp or 1
    rest, workers = args.tp * args.pp, args.workers
    if args.dp is None:
        if workers is not None and workers % rest:
            fits = ", ".join(str(n) for n in range(1, workers + 1) if workers % n == 0)
            parser.error(
                f"--workers {workers} can't be replicas of tp={args.tp} × pp={args.pp} = {rest} workers each: "
                f"tp · pp may be {fits}"
            )
        args.dp = (workers or rest) // rest
    if workers is not None and workers != args.dp * rest:
        parser.error(
            f"--workers {workers}, but dp={args.dp} × tp={args.tp} × pp={args.pp} = {args.dp * rest}: leave "
            "--workers out"
        )
    args.workers = math.prod((args.dp, args.tp, args.pp))


def cluster(args: argparse.Namespace) -> dict[str, Any]:
    """What the virtual cluster is by default: the parts of a layer share a node, for they talk in each layer."""
    return {"ranks_per_node": args.tp} if args.hybrid else {}
