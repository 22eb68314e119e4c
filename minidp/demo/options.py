"""The demo's options, checked before anything runs."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from minidp.backend import Device, get_device
from minidp.demo import compress_options, hybrid_options, strategy_options
from minidp.demo.tasks import FITTING, MODELS, Task
from minidp.demo.train import DEFAULT_LR, OPTIMIZERS
from minidp.launch import cores
from minidp.parallel.checkpoint_files import files, updates_of
from minidp.parallel.micro_shards import leaves_of
from minidp.sim import Cluster
from minidp.sim.topology import NAMES
from minidp.trace.page import can_draw

# Of the virtual world alone, with their defaults there.
_CLUSTER: dict[str, Any] = {
    "straggler": [],
    "flops": 1e10,
    "bandwidth": 1.25e9,
    "latency": 5e-6,
    "jitter": 0.0,
    "topology": "switch",
    "ranks_per_node": 1,
}
PICTURES = (".png", ".svg", ".pdf", ".html")
MOST_EPOCHS = 30  # with --until
_OP_OVERHEAD_S = 2e-6  # of a small array operation, as on a usual processor


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; ``args.cluster`` is the Cluster of a virtual world, else None."""
    parser = argparse.ArgumentParser(
        prog="python -m minidp.demo",
        description="Train the same model with 1 worker and with N, on real handwritten digits unless told "
        "otherwise: how much faster are N, what do they send, and do they end at the same parameters? With worker "
        "processes on this machine, or on a virtual cluster of any size.",
        epilog="Defaults: "
        + "; ".join(_usual(dataset, model) for dataset in FITTING for model in FITTING[dataset])
        + ".",
    )
    add = parser.add_argument
    add("--workers", type=int, help=f"N, the workers (default: the cores, {cores()})")
    add(
        "--model", choices=MODELS, help="an MLP, a small CNN, or a transformer that learns to write (default: mlp)"
    )
    add(
        "--dataset",
        choices=FITTING,
        help="handwritten digits or pictures of clothes for mlp and cnn, a play for the transformer (default: "
        "digits, or text)",
    )
    add(
        "--epochs",
        type=int,
        help="passes over the training data (default: see below; with --strategy twice as many of the digits)",
    )
    add("--global-batch-size", type=int, help="B, samples a step over all workers (default: see below)")
    add("--lr", type=float, help="learning rate η (default: see below)")
    add("--optimizer", choices=OPTIMIZERS, help="update rule (default: see below)")
    add(
        "--until",
        type=float,
        metavar="PERCENT",
        help="only train, with N workers, and end after the epoch that reaches this test accuracy: how long does "
        f"it take? (--epochs, here {MOST_EPOCHS} by default, is the most)",
    )
    add(
        "--naive",
        action="store_true",
        help="the literal version: replicas, and a message a parameter",
    )
    add(
        "--micro-shards",
        type=int,
        metavar="V",
        help="cut each batch into V micro-shards, whatever N is: the same bits of w for every N that divides V, a "
        "power of two",
    )
    add(
        "--balance",
        action="store_true",
        help="measure each worker's speed, and give it samples in proportion (article 2.4)",
    )
    add("--save", type=Path, metavar="FOLDER", help="the N workers write a checkpoint to FOLDER after each epoch")
    add(
        "--resume",
        type=Path,
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="the N workers go on from the newest checkpoint of FOLDER, as if they had never stopped (without "
        "FOLDER: that of --save, which may be empty yet)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to FILE")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a Chrome trace of all ranks to FILE; ui.perfetto.dev opens it",
    )
    add(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw to FILE (.png, .svg, .pdf, .html): in the virtual world the timeline of two steps; with "
        "--strategy how loss falls with time, and staleness (hybrid: one step of a replica's stages); with "
        "--compress all accuracy against bytes and time",
    )
    add(
        "--report",
        type=Path,
        metavar="FILE",
        help="write one page to FILE (.html), which needs no other: table, curves of the loss, timeline, bytes, "
        "and where it was run",
    )
    add(
        "--world",
        choices=("process", "virtual"),
        help="(default: process; virtual for --strategy all and --compress all)",
    )
    add(
        "--device",
        type=_device,
        default="cpu",
        metavar="cpu|cuda|cuda:K",
        help="where models are trained: on the processor (default), on GPUs, worker after worker on one after the "
        "other, or all workers on GPU number K",
    )
    strategy_options.add_to(parser)
    hybrid_options.add_to(parser)
    compress_options.add_to(parser)
    add = parser.add_argument_group("the virtual cluster (--world virtual)").add_argument
    add(
        "--straggler",
        type=_straggler,
        action="append",
        metavar="NODE:FACTOR",
        help="that node computes FACTOR times slower; may be repeated (default: none; for --strategy all the last "
        "one, 5 times)",
    )
    add("--flops", type=float, help="a second, of each worker (default: 1e10)")
    add(
        "--bandwidth",
        type=float,
        help="bytes a second, of a node's port (default: 1.25e9; for --compress all 1.25e8)",
    )
    add("--latency", type=float, help="of a message, in seconds (default: 5e-6)")
    add("--jitter", type=float, help="spread of computing times (default: 0; with --strategy, but hybrid, 0.1)")
    add("--topology", choices=("switch", "ring", "fat_tree"), help="how nodes are wired (default: switch)")
    add("--ranks-per-node", type=int, help="workers that share a node's port (default: 1; hybrid: tp)")
    args = parser.parse_args(argv)
    compress_options.choose(parser, args)
    hybrid_options.choose(parser, args)
    strategy_options.choose(parser, args)
    _choose_task(parser, args)
    _check(parser, args)
    args.cluster = _cluster(parser, args)
    return args


def _choose_task(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """``args.task``, and what it makes the usual values of other options."""
    model, dataset = args.model, args.dataset
    dataset = dataset or ("text" if model == "transformer" else "digits")
    model = model or FITTING[dataset][0]
    if model not in FITTING[dataset]:
        fitting = [name for name, models in FITTING.items() if model in models]
        parser.error(f"--model {model} can't learn --dataset {dataset}: give it {' or '.join(fitting)}")
    args.task = task = Task(model, dataset)
    try:
        args.samples = len(task.load()[0])
    except (OSError, ValueError) as error:
        parser.error(f"--dataset {dataset}: {error}")
    usual = compress_options.usual(args, task)
    args.optimizer = args.optimizer or usual.optimizer
    if args.lr is None:
        args.lr = usual.lr if args.optimizer == usual.optimizer else DEFAULT_LR[args.optimizer]
    if args.epochs is None:
        args.epochs = usual.epochs if args.until is None else MOST_EPOCHS
        if args.compare and not task.large:
            args.epochs *= 2  # so that the slowest, too, comes to where all end
    if args.global_batch_size is None:
        args.global_batch_size = usual.global_batch_size


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("workers", "epochs", "global_batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.micro_shards is not None:
        if args.naive:
            parser.error("--micro-shards: the literal version (--naive) has none")
        if args.balance:
            parser.error("--micro-shards are cut alike for every N: they can't be shared by speed (--balance)")
        try:
            leaves_of(args.micro_shards, args.workers)
        except ValueError as error:
            parser.error(f"--{str(error).replace('_', '-', 1)}")
    if args.until is not None:
        if not 0 < args.until <= 100:
            parser.error("--until: give a test accuracy in percent, such as 90")
        given = [name for name in ("trace", "plot", "report") if getattr(args, name) is not None]
        if given:
            parser.error(f"--until only trains: without --{given[0]}")
    if not 0 < args.lr < math.inf:
        parser.error("--lr must be positive and finite")
    for name in ("json", "trace", "plot", "report"):  # now, not afterwards
        path = getattr(args, name)
        if path is not None and (problem := _unwritable(path)):
            parser.error(f"--{name} {path}: {problem}")
    if args.plot is not None and args.plot.suffix not in PICTURES:
        parser.error(f"--plot {args.plot}: give a name that ends in {', '.join(PICTURES)}")
    if args.report is not None and args.report.suffix != ".html":
        parser.error(f"--report {args.report}: give a name that ends in .html")
    if args.plot is not None or args.report is not None:
        try:
            can_draw()
        except ImportError as error:
            parser.error(f"--{'report' if args.plot is None else 'plot'}: {error}")
    if args.save is not None and args.save.exists() and not args.save.is_dir():
        parser.error(f"--save {args.save}: this is a file, give a folder")
    if args.resume is True:
        if args.save is None:
            parser.error("--resume: give a folder, or --save FOLDER as well")
        args.resume = args.save if args.save.is_dir() and files(args.save) else None
    if args.resume is not None:
        found = files(args.resume) if args.resume.is_dir() else []
        if not found:
            parser.error(f"--resume {args.resume}: there is no checkpoint; --save {args.resume} writes some")
        steps = args.epochs * -(-args.samples // args.global_batch_size)
        if updates_of(found[0]) >= steps:
            parser.error(f"--resume {args.resume}: all {steps} steps are made already: give more --epochs")
    nodes = [node for node, _ in args.straggler or ()]
    if len(set(nodes)) < len(nodes):
        parser.error("--straggler: a node is given twice")


def _unwritable(path: Path) -> str:
    """Why no file can be written there, in words; "" if one can. An existing one keeps what it has."""
    try:
        if path.is_dir():
            return "this is a folder, give a file"
        if not path.parent.is_dir():
            return f"there is no folder {path.parent}"
        if path.is_file():
            path.open("ab").close()
        elif not path.exists() and not path.is_symlink():  # a name too long, a file system that is read-only
            path.touch(exist_ok=False)
            path.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _cluster(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Cluster | None:
    given = [name for name in _CLUSTER if getattr(args, name) is not None]
    if args.world != "virtual":
        if given:
            parser.error(f"--{given[0].replace('_', '-')} describes a virtual cluster: add --world virtual")
        if args.plot is not None and not args.compare and not args.hybrid:
            parser.error("--plot draws the timeline of a virtual cluster: add --world virtual")
        return None
    of_kind = strategy_options.cluster(args) | hybrid_options.cluster(args) | compress_options.cluster(args)
    for name, default in (_CLUSTER | of_kind).items():
        if name not in given:
            setattr(args, name, default)
    if args.ranks_per_node < 1:
        parser.error("--ranks-per-node must be at least 1")
    try:
        cluster = Cluster(
            nodes=-(-args.workers // args.ranks_per_node),
            flops=args.flops,
            op_overhead_s=_OP_OVERHEAD_S,
            latency_s=args.latency,
            bandwidth_bytes_per_s=args.bandwidth,
            ranks_per_node=args.ranks_per_node,
            stragglers=dict(args.straggler),
            jitter=args.jitter,
        )
        # A straggler is a worker's node, so servers get theirs now. A fat tree has whole groups, used or not.
        nodes = -(-(args.workers + strategy_options.servers(args)) // args.ranks_per_node)
        return replace(cluster, nodes=NAMES[args.topology].room_for(nodes), topology=args.topology)
    except ValueError as error:
        parser.error(str(error))


def _usual(dataset: str, model: str) -> str:
    """The defaults of a task in words."""
    usual = Task(model, dataset).defaults
    return (
        f"{model} on {dataset}: {usual.epochs} epoch{'s' * (usual.epochs > 1)}, B = {usual.global_batch_size}, "
        f"{usual.optimizer}, η = {usual.lr:g}"
    )


def _device(text: str) -> Device:
    try:
        return get_device(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give cpu, cuda or cuda:K, such as cuda:0") from None


def _straggler(text: str) -> tuple[int, float]:
    try:
        node, factor = text.split(":")
        return int(node), float(factor)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give a node and how many times slower it is, as 3:5"
        ) from None
