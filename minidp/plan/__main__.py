"""``python -m minidp.plan --params 7e9 --flops-per-sample 4.2e13 --ranks 8..16384``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from minidp.plan import report
from minidp.plan.study import Job, study
from minidp.sim import Cluster, FatTree

MOST_RANKS = 100_000


def ranks(text: str) -> list[int]:
    """``8..64``: 8, 16, 32, 64 (and the end, if doubling misses it); or ``8,12,100``."""
    try:
        if ".." in text:
            low, high = (int(part) for part in text.split(".."))
            found = [low << i for i in range(max(0, high).bit_length()) if 0 < low << i <= high]
            found += [high] * (bool(found) and found[-1] != high)
        else:
            found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1 or found[-1] > MOST_RANKS:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a range as 8..16384, or a list as 8,12,100, of 1 to {MOST_RANKS:,} ranks"
        )
    return found


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive number")
    return value


def count(text: str) -> int:
    if positive(text) != int(positive(text)):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number")
    return int(float(text))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m minidp.plan",
        description="How long does a step of synchronous data parallelism take on that many ranks, how well does "
        "it scale, and from where on do more ranks no longer pay? Timed on a virtual clock, without the machines.",
    )
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--params", type=positive, required=True, metavar="N", help="parameters, as 7e9")
    add("--flops-per-sample", type=positive, required=True, metavar="F", help="forward and backward, as 4.2e13")
    add("--layers", type=count, default=32, metavar="N", help="of equal size (default: %(default)s)")
    add("--gradient-bytes", type=count, default=4, metavar="B", help="2 for half precision (default: %(default)s)")
    add("--bucket-mb", type=positive, default=25, metavar="MB", help="of gradients (default: %(default)s)")
    work = model.add_mutually_exclusive_group()
    work.add_argument(
        "--batch",
        type=positive,
        default=1,
        metavar="B",
        help="samples a rank: weak scaling (default: %(default)s)",
    )
    work.add_argument(
        "--global-batch", type=count, metavar="B", help="samples a step over all ranks: strong scaling"
    )
    add = parser.add_argument_group("machines").add_argument
    add("--ranks", type=ranks, required=True, metavar="A..B", help="doubling from A to B, or a list as 8,12,100")
    add("--flops", type=positive, default=1e14, metavar="F", help="a second, that a rank reaches (default: 1e14)")
    add("--memory", type=positive, metavar="B", help="bytes a second, for the update of w (default: free)")
    add(
        "--bandwidth",
        type=positive,
        default=2.5e10,
        metavar="B",
        help="bytes a second, of a node (default: 2.5e10)",
    )
    add("--latency", type=float, default=5e-6, metavar="S", help="of a message, in seconds (default: 5e-6)")
    add("--ranks-per-node", type=count, default=1, metavar="N", help="that share its port (default: %(default)s)")
    add("--topology", choices=("switch", "ring", "fat_tree"), default="switch", help="default: %(default)s")
    add("--leaf", type=count, default=8, metavar="N", help="nodes in a group of a fat tree (default: %(default)s)")
    add("--oversubscription", type=positive, default=1, metavar="X", help="of its uplinks (default: %(default)s)")
    add(
        "--jitter",
        type=float,
        default=0.0,
        metavar="X",
        help="spread of computing times; then 20 steps are averaged",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--worth",
        type=positive,
        default=0.5,
        metavar="X",
        help="gain from which a rank pays (default: %(default)s)",
    )
    add("--plot", type=Path, metavar="FILE", help="draw it: a .png, .svg or .pdf")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    args = parser.parse_args(argv)
    for name, path in (("json", args.json), ("plot", args.plot)):  # now, not at the end
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name} {path}: give a file in a folder that is there")
    try:
        args.cluster = Cluster(
            nodes=2 if args.topology != "fat_tree" else args.leaf,
            flops=args.flops,
            memory_bytes_per_s=args.memory,
            latency_s=args.latency,
            bandwidth_bytes_per_s=args.bandwidth,
            ranks_per_node=args.ranks_per_node,
            topology=args.topology if args.topology != "fat_tree" else FatTree(args.leaf, args.oversubscription),
            jitter=args.jitter,
        )
    except ValueError as error:
        parser.error(str(error))
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    job = Job(
        args.params,
        args.flops_per_sample,
        args.layers,
        args.batch,
        args.global_batch,
        args.gradient_bytes,
        args.bucket_mb,
    )
    console = Console()
    report.introduce(console, job, args.cluster)
    points = study(job, args.cluster, args.ranks, steps=20 if args.jitter else 1)
    report.show(console, points, args.worth)
    if args.plot:
        title = f"{report.number(job.params)} parameters, data parallel"
        report.plot(points, args.worth, args.plot, title)
        console.print(f"Picture: {args.plot}", highlight=False)
    if args.json:
        args.json.write_text(json.dumps([asdict(point) for point in points], indent=2) + "\n")
        console.print(f"Figures: {args.json}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
