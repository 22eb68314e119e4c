"""The plan of meshes in words and numbers: what is asked, a table, the best one, and those that can't be."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from minidp.plan.axes import Mesh
from minidp.plan.meshes import Impossible, MeshPoint
from minidp.plan.report import bar, network, number, plural, print_facts, quantity, rounded, seconds

_WIDE = 112  # columns, from which on there is room for bars and for what memory consists of
_REASONS = 6  # to print
_TOO_MUCH = "✗"
_LEGEND = {
    "efficiency": "of an ideal machine, whose ranks share the FLOPs and never wait",
    "compute": "computing, and the update; with the next three it makes a step",
    "tensor": "all-reduces of activations along tp",
    "idle": "waiting for other stages of the pipeline, and for their messages",
    "data": "all-reduces of gradients along dp that backward does not hide",
    "memory": "of the fullest rank: parameters, gradients, optimizer's state, activations",
}


def introduce(console: Console, args: argparse.Namespace) -> None:
    """Print what is asked."""
    model, cluster, ranks = args.transformer, args.cluster, args.ranks[0]
    per_node = f", {cluster.ranks_per_node} to a node" if cluster.ranks_per_node > 1 else ""
    speed = f", memory {quantity(cluster.memory_bytes_per_s)}B/s" if cluster.memory_bytes_per_s else ""
    memory = f", {amount(args.memory_per_rank)} of memory" if args.memory_per_rank else ""
    inside = ""
    if cluster.ranks_per_node > 1:
        inside = (
            f"; inside a node α = {seconds(cluster.local_latency_s)}, "
            f"1/β = {quantity(cluster.local_bandwidth_bytes_per_s)}B/s a rank"
        )
    console.print("[bold]minidp[/]: a step of a transformer on each mesh dp×tp×pp, on a virtual clock\n")
    print_facts(
        console,
        {
            "model": f"{plural(model.layers, 'layer')}, {model.embed:,} features, {plural(model.heads, 'head')}, "
            f"vocabulary {model.vocab:,}: {number(model.parameters)} parameters, {quantity(model.flops())}FLOPs a "
            f"sample of {plural(model.context, 'token')}",
            "work": f"{plural(args.global_batch, 'sample')} a step, {micro_batches(args.micro_batches)} a "
            f"replica, {args.schedule}; {args.optimizer}, {args.element_bytes} bytes an element",
            "ranks": f"{ranks:,}, {quantity(cluster.flops)}FLOP/s each{speed}{memory}{per_node}",
            "network": network(cluster) + inside,
        },
    )


def show(
    console: Console, points: Sequence[MeshPoint], impossible: Sequence[Impossible], args: argparse.Namespace
) -> None:
    """Print the table, the best mesh, those that can't be, and what the columns mean. Fits 80 columns."""
    if points:
        roomy = console.options.update(max_width=1000)
        for padding in (2, 1):
            table = _table(points[: args.top], console.width >= _WIDE, padding)
            if console.measure(table, options=roomy).maximum <= console.width:
                break
        console.print(table)
        if len(points) > args.top:
            console.print(f"… and {len(points) - args.top} more: --top {len(points)} shows all")
        console.print()
    console.print(verdict(points, args.memory_per_rank) + "\n")
    if impossible:
        _explain(console, impossible)
    if points:
        legend = dict(_LEGEND)
        if not all(point.fits for point in points[: args.top]):
            legend["memory"] += f"; {_TOO_MUCH} more than a rank has"
        print_facts(console, legend)


def _table(points: Sequence[MeshPoint], wide: bool, padding: int) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, padding, 0, 0))
    for name in ("dp×tp×pp", "step", "samples/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("efficiency", justify="left" if wide else "right", no_wrap=True)
    for name in ("compute", "tensor", "idle", "data"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("weights", "activations") if wide else ():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("memory", justify="right", no_wrap=True)
    marks = any(not point.fits for point in points)
    for i, point in enumerate(points):
        parts = (point.compute_s, point.tensor_s, point.idle_s, point.data_s)
        held = point.memory_bytes - point.activation_bytes
        mark = ("  " if point.fits else f" {_TOO_MUCH}") * marks
        table.add_row(
            str(point.mesh),
            seconds(point.step_s),
            rounded(point.samples_per_s, 4),
            f"{bar(point.efficiency)} {point.efficiency:6.1%}" if wide else f"{point.efficiency:.1%}",
            *(f"{share / point.step_s:.0%}" if share else "–" for share in parts),
            *((amount(held), amount(point.activation_bytes)) if wide else ()),
            amount(point.memory_bytes) + mark,
            style="yellow" if not point.fits else "bold" if i == 0 else "",
        )
    return table


def verdict(points: Sequence[MeshPoint], memory: float | None) -> str:
    """The best mesh, in words (rich's markup)."""
    if not points:
        return "[bold]None of these meshes can be.[/]"
    best = points[0]
    if not best.fits:
        least = min(points, key=lambda point: point.memory_bytes)
        return (
            f"[bold]No mesh fits into {amount(memory or 0)} a rank.[/] {least.mesh} needs the least, "
            f"{amount(least.memory_bytes)}: give it more ranks, smaller micro-batches or a smaller model."
        )
    return f"[bold]{best.mesh} is the fastest[/]: {layout(best)}. A rank holds {needs(best)}."


def layout(point: MeshPoint) -> str:
    """How the model lies on the ranks: ``8 replicas of the model, each in 2 stages of 11 to 13 layers``."""
    each = "each " if point.dp > 1 else ""
    if point.pp == 1:
        inside = f"{each}with its layers cut over {point.tp} ranks" if point.tp > 1 else f"{each}on one rank"
    else:
        blocks = sorted({*point.stages})
        many = str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
        stages = f"{point.pp} stages of {many} layer{'s' * (blocks[-1] > 1)}"
        inside = f"{each}in {stages}" + (f", each cut over {point.tp} ranks" if point.tp > 1 else "")
    return f"{plural(point.dp, 'replica')} of the model, {inside}"


def needs(point: MeshPoint) -> str:
    state = f", optimizer's state {amount(point.state_bytes)}" if point.state_bytes else ""
    return (
        f"{amount(point.memory_bytes)}: parameters {amount(point.parameter_bytes)}, gradients "
        f"{amount(point.gradient_bytes)}{state}, activations {amount(point.activation_bytes)}"
    )


def micro_batches(n: int) -> str:
    return f"{n:,} micro-batch{'es' * (n != 1)}"


def _explain(console: Console, impossible: Sequence[Impossible]) -> None:
    """A line for each reason."""
    count = sum(len(each.meshes) for each in impossible)
    console.print(f"{count:,} mesh{'es' * (count != 1)} can't be:")
    reasons = sorted(impossible, key=lambda each: -len(each.meshes))
    shown = reasons if len(reasons) <= _REASONS else reasons[: _REASONS - 1]
    print_facts(console, {_names(each.meshes): each.reason for each in shown}, end=len(shown) == len(reasons))
    if len(shown) < len(reasons):
        rest = sum(len(each.meshes) for each in reasons[len(shown) :])
        console.print(f"  … and {rest} more, for {len(reasons) - len(shown)} more reasons of these kinds\n")


def _names(meshes: Sequence[Mesh]) -> str:
    return str(meshes[0]) + (f" and {len(meshes) - 1} more" if len(meshes) > 1 else "")


def amount(nbytes: float) -> str:
    """12.3 GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if nbytes >= 0.9995 * unit:
            return f"{rounded(nbytes / unit)} {name}"
    return f"{nbytes:.0f} B"


def figures(
    points: Sequence[MeshPoint], impossible: Sequence[Impossible], args: argparse.Namespace
) -> dict[str, Any]:
    """For --json."""
    names = ("global_batch", "micro_batches", "schedule", "optimizer", "element_bytes", "memory_per_rank")
    return {
        "transformer": {**asdict(args.transformer), "parameters": args.transformer.parameters},
        "ranks": args.ranks[0],
        **{name: getattr(args, name) for name in names},
        "points": [{**asdict(point), "memory_bytes": point.memory_bytes} for point in points],
        "impossible": [
            {"meshes": [mesh._asdict() for mesh in each.meshes], "reason": each.reason} for each in impossible
        ],
    }
