"""The plan's options for meshes of a transformer: what is added to the parser, and what is checked."""

from __future__ import annotations

import argparse
from dataclasses import fields, replace
from typing import Any

from minidp.parallel.pipeline_schedules import SCHEDULES
from minidp.plan.axes import Mesh
from minidp.plan.mesh_step import OPTIMIZERS
from minidp.plan.transformer import Transformer
from minidp.sim import Cluster

MOST_RANKS = 2048  # half a minute; numbers that are no powers of two take longest
MOST_IN_A_RING = 128  # 10 s
MOST_MICRO_BATCHES = 512
MOST_LAYERS = 256  # 1 s to share them out over as many stages
MOST = 10**9  # of any size of a model: products stay in int64
SIZES = tuple(field.name for field in fields(Transformer))
# Of the other plan: what nobody would look at.
OTHERS = ("params", "flops_per_sample", "layers", "batch", "gradient_bytes", "jitter", "worth", "plot")


def add_options(parser: argparse.ArgumentParser, count: Any, positive: Any, not_negative: Any) -> None:
    """The group of options that say something only with --transformer; the types are those of `options`."""
    add = parser.add_argument_group(
        "meshes",
        "Instead of --params: which dp × tp × pp serves a transformer best? --ranks is one number then, and "
        "--global-batch is needed.",
    ).add_argument
    add(
        "--transformer",
        type=transformer,
        metavar="SIZES",
        help=f"a GPT, samples of context tokens, of which there are vocab: {example()}",
    )
    add("--meshes", type=meshes, metavar="M", help="all, or a list as 8x8x1,16x4x1: dp x tp x pp (default: all)")
    add("--micro-batches", type=count, metavar="M", help="that a replica's batch is cut into (default: 8)")
    add("--schedule", choices=tuple(SCHEDULES), help="of the pipeline (default: 1f1b)")
    add("--optimizer", choices=tuple(OPTIMIZERS), help="whose state takes memory (default: adam)")
    add("--element-bytes", type=int, choices=(2, 4, 8), help="of everything in memory and sent (default: 4)")
    add("--memory-per-rank", type=positive, metavar="B", help="bytes: what needs more is ranked last, and marked")
    add(
        "--local-bandwidth",
        type=positive,
        metavar="B",
        help="bytes a second between ranks of a node (default: 3e11, as of fast links between GPUs)",
    )
    add("--local-latency", type=not_negative, metavar="S", help="seconds of a message there (default: --latency)")
    add("--top", type=count, metavar="N", help="meshes to show (default: 10)")


DEFAULTS: dict[str, Any] = {
    "meshes": "all",
    "micro_batches": 8,
    "schedule": "1f1b",
    "optimizer": "adam",
    "element_bytes": 4,
    "memory_per_rank": None,
    "local_bandwidth": 3e11,
    "local_latency": None,
    "top": 10,
}


def check(parser: argparse.ArgumentParser, args: argparse.Namespace, given: set[str]) -> None:
    """See that options go together, and fill in defaults. ``given``: the names of those that were given."""
    if args.transformer is None:
        wrong = sorted(given & set(DEFAULTS))
        if wrong:
            parser.error(f"{_option(wrong[0])} describes meshes of a transformer: give --transformer too")
        return
    wrong = [name for name in OTHERS if name in given]
    if wrong:
        parser.error(f"{_option(wrong[0])} does not go with --transformer, which plans meshes: leave one away")
    if len(args.ranks) != 1:
        parser.error(f"--ranks: give one number with --transformer, not {len(args.ranks)}")
    (ranks,) = args.ranks
    most = MOST_IN_A_RING if args.topology == "ring" else MOST_RANKS
    if ranks > most:
        where = " in a ring" if args.topology == "ring" else ""
        parser.error(f"--ranks {ranks}: give at most {most:,}{where} with --transformer")
    if args.global_batch is None:
        parser.error("--transformer needs --global-batch, the samples of a step of all ranks")
    for name, value in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.micro_batches > MOST_MICRO_BATCHES:
        parser.error(f"--micro-batches {args.micro_batches}: give at most {MOST_MICRO_BATCHES}")
    if args.meshes == "all":
        args.meshes = None
    for mesh in args.meshes or ():
        product = mesh.dp * mesh.tp * mesh.pp
        if product != ranks:
            parser.error(
                f"--meshes {mesh}: {mesh.dp} × {mesh.tp} × {mesh.pp} is {product} ranks, and --ranks {ranks}"
            )


def cluster_for(args: argparse.Namespace, cluster: Cluster) -> Cluster:
    """The cluster of the other options, with as many nodes as the ranks need, and what is inside of them."""
    nodes = -(-args.ranks[0] // cluster.ranks_per_node)
    return replace(
        cluster,
        nodes=cluster.topology.room_for(nodes),  # type: ignore[union-attr]
        local_latency_s=cluster.latency_s if args.local_latency is None else args.local_latency,
        local_bandwidth_bytes_per_s=args.local_bandwidth,
    )


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


# --- types ------------------------------------------------------------------------------------------------


def example() -> str:
    return "layers=24,embed=2048,heads=16,context=1024,vocab=50304"


def transformer(text: str) -> Transformer:
    """``layers=24,embed=2048,…``: all sizes, each once, in any order."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        name = name.strip()
        if name not in SIZES or name in sizes:
            what = "twice" if name in sizes else f"unknown; there are {', '.join(SIZES)}"
            raise argparse.ArgumentTypeError(f"{name!r} is {what}: give it as {example()}")
        try:
            value = float(number)
        except ValueError:
            value = 0
        if not 1 <= value <= MOST or value != int(value):
            raise argparse.ArgumentTypeError(f"{name}={number.strip()}: give a whole number, 1 to {MOST:g}")
        sizes[name] = int(value)
    missing = [name for name in SIZES if name not in sizes]
    if missing:
        raise argparse.ArgumentTypeError(f"{', '.join(missing)} missing: give it as {example()}")
    if sizes["layers"] > MOST_LAYERS:
        raise argparse.ArgumentTypeError(f"layers={sizes['layers']}: give at most {MOST_LAYERS}")
    try:
        return Transformer(**sizes)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def meshes(text: str) -> list[Mesh] | str:
    """``8x8x1,16x4x1``, each once; or ``all``."""
    if text.strip() == "all":
        return "all"
    found: list[Mesh] = []
    for part in text.replace("×", "x").split(","):
        try:
            mesh = Mesh(*(int(size) for size in part.split("x")))
        except (ValueError, TypeError):
            mesh = Mesh(0, 0, 0)
        if min(mesh) < 1:
            raise argparse.ArgumentTypeError(f"{part!r}: give dp x tp x pp as 8x8x1, a list of these, or all")
        if mesh not in found:
            found.append(mesh)
    return found
