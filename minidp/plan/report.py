"""The plan in words and numbers: what is asked, a table with bars, and the verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from minidp.plan.study import Job, Point, pays_up_to
from minidp.sim import Cluster, FatTree, Ring, Topology
from minidp.trace.lanes import time_unit

_BAR = 12  # characters of a perfect efficiency
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEGEND = {
    "waiting": "what computing does not hide, of a step",
    "efficiency": "speed-up over one rank, divided by the ranks",
    "gain": "what each added rank gives, as a part of what one before it gave",
}


def introduce(console: Console, job: Job, cluster: Cluster) -> None:
    """Print what is asked."""
    per_node = f", {cluster.ranks_per_node} to a node" if cluster.ranks_per_node > 1 else ""
    memory = f", memory {quantity(cluster.memory_bytes_per_s)}B/s" if cluster.memory_bytes_per_s else ""
    jitter = f"; times spread by {cluster.jitter:g}, 20 steps averaged" if cluster.jitter else ""
    layer_mb = job.layer_params * job.gradient_bytes / 2**20
    buckets = f"a layer, {rounded(layer_mb)}" if layer_mb >= job.bucket_mb else f"at most {job.bucket_mb:g}"
    console.print("[bold]minidp[/]: a step of synchronous data parallelism, on a virtual clock\n")
    print_facts(
        console,
        {
            "model": f"{number(job.params)} parameters, {plural(job.layers, 'layer')}, "
            f"{quantity(job.flops_per_sample)}FLOPs a sample",
            "work": f"{work(job)}: {job.scaling} scaling",
            "sends": f"gradients of {plural(job.gradient_bytes, 'byte')} an element, in buckets of {buckets} MB",
            "ranks": f"{quantity(cluster.flops)}FLOP/s each{memory}{per_node}{jitter}",
            "network": network(cluster),
        },
    )


def work(job: Job) -> str:
    """Samples of a step, in words."""
    if job.global_batch is not None:
        return f"{plural(job.global_batch, 'sample')} a step, shared equally"
    return f"{plural(job.batch, 'sample')} a rank and step"


def network(cluster: Cluster) -> str:
    """Between nodes, in words."""
    ports = f"α = {seconds(cluster.latency_s)}, 1/β = {quantity(cluster.bandwidth_bytes_per_s)}B/s a node"
    return f"{ports}, {_wiring(cluster.topology)}"


def _wiring(topology: str | Topology) -> str:
    if isinstance(topology, FatTree):
        nodes = plural(topology.leaf, "node")
        return f"fat tree of {nodes} a group, oversubscribed {topology.oversubscription:g} times"
    return "neighbours in a ring" if isinstance(topology, Ring) else "a flat switch"


def show(console: Console, points: Sequence[Point], worth: float) -> None:
    """Print the table, the verdict, and what the columns mean. Fits 80 columns."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("ranks", "step", "waiting", "samples/s", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("efficiency", no_wrap=True)
    table.add_column("gain", justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            f"{point.ranks:,}",
            seconds(point.step_s),
            seconds(max(0.0, point.waiting_s)),
            rounded(point.samples_per_s, 4),
            rounded(point.efficiency * point.ranks, 4),
            f"{bar(point.efficiency)} {point.efficiency:6.1%}",
            "" if point.gain is None else f"{max(point.gain, 0):.2f}",  # no "-0.00"
            style="" if point.gain is None or point.gain >= worth else "yellow",
        )
    console.print(table)
    console.print()
    if len(points) > 1:
        console.print(verdict(points, worth) + "\n")
    print_facts(console, {name: text for name, text in _LEGEND.items() if name != "gain" or len(points) > 1})


def verdict(points: Sequence[Point], worth: float) -> str:
    """Where adding ranks no longer pays, in words (rich's markup). ``points``: at least two."""
    limit = pays_up_to(points, worth)
    if limit is None:
        return f"[bold]Adding ranks pays up to {points[-1].ranks:,}[/], the most asked for, and maybe beyond."
    before = next(point for point in points if point.ranks == limit)
    after = next(point for point in points if point.ranks > limit)
    more, times = f"{after.ranks / limit:.3g}", f"{after.samples_per_s / before.samples_per_s:.3g}"
    if before is points[0]:
        pays = f"[bold]Adding to {plural(limit, 'rank')} does not pay:[/]"
    else:
        pays = f"[bold]Adding ranks pays up to {limit:,}.[/] Beyond,"
    return f"{pays} {more} times the ranks give {times} times the samples a second."


def print_facts(console: Console, facts: dict[str, str], end: bool = True) -> None:
    """Names, and what each is, in lines that fit; with an empty one at the ``end``."""
    indent = max(map(len, facts)) + 4
    for name, text in facts.items():
        lines = textwrap.wrap(text, max(20, console.width - indent))
        console.print(f"  {name}".ljust(indent) + ("\n" + " " * indent).join(lines), markup=False)
    if end:
        console.print()


# --- numbers ----------------------------------------------------------------------------------------------


def bar(share: float) -> str:
    """A bar of eighths of a character; a share of 1 fills it."""
    eighths = round(max(0.0, min(share, 1.0)) * _BAR * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + _EIGHTHS[rest] * (rest > 0)).ljust(_BAR)


def rounded(value: float, digits: int = 3) -> str:
    """That many significant digits, zeros at the end included, so that columns align; before the point
    all, up to 1e9.

    0.0123, 7.10, 12.3, 1,234, 1.23e+12.
    """
    if value == 0:
        return "0"
    scientific = f"{value:.{digits - 1}e}"
    exponent = int(scientific.partition("e")[2])  # after rounding: 9.999 is 10.0
    return f"{value:,.{max(0, digits - 1 - exponent)}f}" if -4 <= exponent < 9 else scientific


def seconds(value: float) -> str:
    """1.23 ms."""
    if value == 0:
        return "0"
    unit_s, unit = time_unit(value, digits=3)
    return f"{rounded(value / unit_s)} {unit}"


def number(value: float) -> str:
    """7 billion."""
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= 0.99995 * unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:,.0f}"


def quantity(value: float) -> str:
    """With SI's prefix: "84 T" for 84e12. A unit may follow."""
    for unit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.99995 * unit:
            return f"{value / unit:.4g} {letter}"
    return f"{value:.4g} "


def plural(n: int, word: str) -> str:
    """1 rank, 2 ranks."""
    return f"{n:,} {word}{'s' * (n != 1)}"
