"""The plan as a table with bars, in words, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minidp.plan.study import Job, Point, pays_up_to
from minidp.sim import Cluster, FatTree, Ring

_BAR = 12  # characters of a perfect efficiency
_EIGHTHS = " ▏▎▍▌▋▊▉"


def introduce(console: Console, job: Job, cluster: Cluster) -> None:
    batch = (
        f"a batch of {job.global_batch:,} samples a step, cut into equal shares"
        if job.global_batch is not None
        else f"{job.batch:g} sample{'s' * (job.batch != 1)} a rank and step"
    )
    per_node = f", {cluster.ranks_per_node} ranks a node" if cluster.ranks_per_node > 1 else ""
    console.print(
        f"[bold]minidp[/]: synchronous data parallelism of {number(job.params)} parameters\n\n"
        f"  model    {quantity(job.flops_per_sample)}FLOPs a sample, {job.layers} layers\n"
        f"  sends    gradients of {job.gradient_bytes} bytes an element, in buckets of {job.bucket_mb:g} MB\n"
        f"  work     {batch}\n"
        f"  rank     {quantity(cluster.flops)}FLOP/s{per_node}\n"
        f"  network  α = {seconds(cluster.latency_s)}, 1/β = {quantity(cluster.bandwidth_bytes_per_s)}B/s a node, "
        f"{_wiring(cluster.topology)}\n",
        highlight=False,
    )


def _wiring(topology: object) -> str:
    if isinstance(topology, FatTree):
        return f"fat tree of {topology.leaf} nodes a group, oversubscribed {topology.oversubscription:g} times"
    return "neighbours in a ring" if isinstance(topology, Ring) else "a flat switch"


def show(console: Console, points: Sequence[Point], worth: float) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("ranks", "step", "waiting", "samples / s", "speed-up"):
        table.add_column(name, justify="right")
    table.add_column("efficiency", no_wrap=True, min_width=_BAR + 7)
    table.add_column("gain", justify="right")
    for point in points:
        gain = "" if point.gain is None else f"{max(point.gain, 0):.2f}"  # no "-0.00"
        style = "" if point.gain is None or point.gain >= worth else "yellow"
        table.add_row(
            f"{point.ranks:,}",
            seconds(point.step_s),
            seconds(point.waiting_s) if point.waiting_s > 0 else "0",
            f"{point.samples_per_s:,.4g}",
            f"{point.efficiency * point.ranks:,.4g}",
            f"{bar(point.efficiency)} {point.efficiency:6.1%}",
            gain,
            style=style,
        )
    console.print(table)
    console.print("\n" + verdict(points, worth), highlight=False)


def verdict(points: Sequence[Point], worth: float) -> str:
    """Where adding ranks no longer pays, in words."""
    explained = "gain: samples a second that an added rank gives, as a part of what one before it gave."
    limit = pays_up_to(points, worth)
    if len(points) < 2:
        return explained
    if limit is None:
        most = points[-1].ranks
        text = f"[bold]Adding ranks pays up to {most:,}[/], and maybe beyond: no gain is below {worth:g}."
        return f"{text}\n{explained}"
    after = next(point for point in points if point.ranks > limit)
    before = next(point for point in points if point.ranks == limit)
    times = after.samples_per_s / before.samples_per_s
    return (
        f"[bold]Adding ranks pays up to {limit:,}.[/] Beyond, {after.ranks / limit:g} times the ranks give only "
        f"{times:.2f} times the samples a second.\n{explained}"
    )


def plot(points: Sequence[Point], worth: float, path: Path, title: str) -> None:
    """Samples a second beside the ideal, and what a step consists of. ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot draws with matplotlib, which is missing: pip install matplotlib") from error

    ranks = [point.ranks for point in points]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title, size=12, weight="bold", x=0.01, ha="left", parse_math=False)
    rate, step = figure.subplots(1, 2)
    ideal = [point.samples_per_s / point.efficiency for point in points]
    rate.plot(ranks, ideal, color="#999999", linestyle="--", label="if nobody waited")
    rate.plot(
        ranks, [point.samples_per_s for point in points], color="#0072B2", marker="o", label="samples a second"
    )
    limit = pays_up_to(points, worth)
    if limit is not None:
        rate.axvline(limit, color="#D55E00", linewidth=1, label=f"pays up to {limit:,} ranks")
    rate.set(xscale="log", yscale="log", xlabel="ranks", ylabel="samples a second")
    rate.legend(frameon=False)
    places = range(len(points))
    compute = [point.compute_s / point.step_s for point in points]
    step.bar(places, compute, color="#0072B2", label="computing", width=0.8)
    waiting = [max(0.0, point.waiting_s) / point.step_s for point in points]
    step.bar(places, waiting, bottom=compute, color="#E69F00", label="waiting for gradients", width=0.8)
    for place, point in enumerate(points):
        step.text(place, 1.01, seconds(point.step_s), size=8, ha="center", va="bottom", rotation=45)
    step.set_xticks(places, [f"{p:,}" for p in ranks], rotation=45, ha="right")
    step.set(xlabel="ranks", ylabel="share of a step")
    step.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    step.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1.12), ncols=2, borderaxespad=0)
    for axes in (rate, step):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#E8E8E8", linewidth=0.8)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def bar(share: float) -> str:
    """A bar of eighths of a character; `share` 1 fills it."""
    eighths = round(max(0.0, min(share, 1.0)) * _BAR * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + _EIGHTHS[rest] * (rest > 0)).ljust(_BAR)


def seconds(value: float) -> str:
    """1.23 ms."""
    for unit_s, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= 0.9995 * unit_s:
            return f"{value / unit_s:.3g} {unit}" if value < 1000 * unit_s else f"{value:,.0f} s"
    return f"{value * 1e9:.3g} ns"


def number(value: float) -> str:
    """7 billion."""
    for unit, name in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:,.0f}"


def quantity(value: float) -> str:
    """With SI's prefix: 84 T for 84e12. A unit may follow."""
    for unit, letter in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.4g} {letter}"
    return f"{value:g} "
