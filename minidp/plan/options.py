"""The plan's options, checked before anything is timed."""

from __future__ import annotations

import argparse
import math
import os
from importlib.util import find_spec
from pathlib import Path

from minidp.plan import mesh_options
from minidp.plan.study import Job
from minidp.sim import Cluster, FatTree

MOST_RANKS = 100_000
MOST_IN_A_RING = 2048  # 10 s; the time grows with the square, for messages hop along up to half of the ring
MOST_PARAMS = 1e15  # bytes are counted in int64
MOST_LAYERS = 10_000
PICTURES = (".png", ".svg", ".pdf")
NEEDED = ("--params", "--flops-per-sample")  # unless --transformer describes the model


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, ``args.job`` and ``args.cluster`` made of them. A bad one ends the program with status 2.

    With --transformer there is no job: `args` has all that meshes need.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    mesh_options.check(parser, args, _given(argv))
    for option, path in (("--json", args.json), ("--plot", args.plot)):  # now, not when all is computed
        if path is not None and (path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK)):
            parser.error(f"{option} {path}: give a file in a folder that is there and may be written to")
    if args.plot is not None and args.plot.suffix.lower() not in PICTURES:
        parser.error(f"--plot {args.plot}: give a name that ends in {', '.join(PICTURES)}")
    if args.plot is not None and find_spec("matplotlib") is None:
        parser.error("--plot draws with matplotlib, which is missing: pip install matplotlib")
    if args.transformer is None:
        missing = [option for option in NEEDED if getattr(args, option[2:].replace("-", "_")) is None]
        if missing:
            parser.error(f"the following arguments are required: {', '.join(missing)}")
    if args.params is not None and args.layers > args.params:
        parser.error(f"--layers {args.layers}: give at most one layer a parameter, {args.params:g} here")
    if args.topology != "fat_tree" and (args.leaf or args.oversubscription):
        parser.error("--leaf and --oversubscription describe a fat tree: give --topology fat_tree too")
    if args.topology == "ring" and args.ranks[-1] > MOST_IN_A_RING:
        parser.error(f"--topology ring: give at most {MOST_IN_A_RING:,} ranks, or another topology")
    leaf = args.leaf or 8
    tree = FatTree(leaf, args.oversubscription or 1)
    args.cluster = Cluster(
        nodes=2 if args.topology != "fat_tree" else leaf,  # `study` takes as many as it needs
        flops=args.flops,
        memory_bytes_per_s=args.memory,
        latency_s=args.latency,
        bandwidth_bytes_per_s=args.bandwidth,
        ranks_per_node=args.ranks_per_node,
        topology=tree if args.topology == "fat_tree" else args.topology,
        jitter=args.jitter,
    )
    if args.transformer is not None:
        args.cluster = mesh_options.cluster_for(args, args.cluster)
        return args
    args.job = Job(
        params=args.params,
        flops_per_sample=args.flops_per_sample,
        layers=args.layers,
        batch=args.batch or 1,
        global_batch=args.global_batch,
        gradient_bytes=args.gradient_bytes,
        bucket_mb=args.bucket_mb,
    )
    return args


def _given(argv: list[str] | None) -> set[str]:
    """The names of the options that were given."""
    parser = _parser()
    nothing = parser.parse_args(argv)
    parser.set_defaults(**dict.fromkeys(vars(nothing)))
    return {name for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m minidp.plan",
        description="How long does a step of synchronous data parallelism take on that many ranks, how well does "
        "it scale, and from where on do more ranks no longer pay? Timed on a virtual clock, without the machines.",
    )
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--params", type=params, metavar="N", help="parameters, as 7e9")
    add("--flops-per-sample", type=positive, metavar="F", help="forward and backward, as 4.2e13")
    add("--layers", type=layers, default=32, metavar="N", help="of equal size (default: %(default)s)")
    add(
        "--gradient-bytes",
        type=int,
        choices=(1, 2, 4, 8),
        default=4,
        help="of an element as it travels; 2: half precision (default: %(default)s)",
    )
    add(
        "--bucket-mb",
        type=positive,
        default=25,
        metavar="MB",
        help="of gradients that leave together, at least a layer (default: %(default)s)",
    )
    work = model.add_mutually_exclusive_group()
    work.add_argument("--batch", type=count, metavar="B", help="samples a rank: weak scaling (default: 1)")
    work.add_argument("--global-batch", type=count, metavar="B", help="samples of all ranks: strong scaling")
    add = parser.add_argument_group("machines").add_argument
    add("--ranks", type=ranks, required=True, metavar="A..B", help="doubling from A to B, or a list as 8,12,100")
    add("--flops", type=positive, default=1e14, metavar="F", help="a second, that a rank reaches (default: 1e14)")
    add("--memory", type=positive, metavar="B", help="bytes a second, for the update of w (default: it is free)")
    add(
        "--bandwidth",
        type=positive,
        default=2.5e10,
        metavar="B",
        help="bytes a second of a node (default: 2.5e10)",
    )
    add("--latency", type=not_negative, default=5e-6, metavar="S", help="seconds of a message (default: 5e-6)")
    add("--ranks-per-node", type=count, default=1, metavar="N", help="that share its port (default: %(default)s)")
    add(
        "--topology",
        choices=("switch", "ring", "fat_tree"),
        default="switch",
        help="how nodes are wired (default: %(default)s)",
    )
    add("--leaf", type=leaf, metavar="N", help="nodes in a group of the fat tree (default: 8)")
    add("--oversubscription", type=at_least_1, metavar="X", help="of its uplinks (default: 1)")
    add(
        "--jitter",
        type=not_negative,
        default=0.0,
        metavar="X",
        help="spread of computing times, as 0.1; then 20 steps are averaged",
    )
    mesh_options.add_options(parser, count, positive, not_negative)
    add = parser.add_argument_group("output").add_argument
    add(
        "--worth",
        type=positive,
        default=0.5,
        metavar="X",
        help="an added rank pays if it gives at least this part of what one before it gave (default: %(default)s)",
    )
    add("--plot", type=Path, metavar="FILE", help=f"draw it: a {', '.join(PICTURES)}")
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    return parser


# --- types: what argparse calls with the text of an option ------------------------------------------------


def ranks(text: str) -> list[int]:
    """``8..64``: 8, 16, 32, 64 (and the end, if doubling misses it); or ``8,12,100``. Ascending, each once."""
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
    """Within what no product or quotient of a few of them can overflow."""
    value = _number(text)
    if not 1e-30 <= value <= 1e30:
        raise argparse.ArgumentTypeError(f"{text!r}: give a positive number, 1e-30 to 1e30")
    return value


def not_negative(text: str) -> float:
    return 0.0 if _number(text) == 0 else positive(text)


def at_least_1(text: str) -> float:
    if not _number(text) >= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of at least 1")
    return positive(text)


def count(text: str, most: float = 1e30) -> int:
    """A whole number from 1 on; 1e6 is one, too."""
    value = _number(text)
    if not 1 <= value <= most or value != int(value):
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, 1 to {most:g}")
    return int(value)


def params(text: str) -> int:
    return count(text, MOST_PARAMS)


def layers(text: str) -> int:
    return count(text, MOST_LAYERS)


def leaf(text: str) -> int:
    return count(text, MOST_RANKS)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
