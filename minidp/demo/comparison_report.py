"""What ``--strategy`` says: what will be compared; then a table, and why the figures are as they are."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from minidp.demo import report
from minidp.demo.strategies import ALL, WAYS
from minidp.demo.train import Job
from minidp.demo.words import in_bytes, listed, number, seconds
from minidp.launch import cores

if TYPE_CHECKING:
    from minidp.demo.compare import Comparison, Figures


def introduce(console: Console, args: Namespace, job: Job, names: list[str], place: str = "") -> None:
    workers = number(args.workers, "worker")
    served = any(WAYS[name].served for name in names)
    servers = f" and {number(args.servers, 'server')}" if served else ""
    what = "who waits for whom?" if args.strategy == ALL else f"{args.strategy} beside synchronous training"
    stale = [name for name in names if WAYS[name].stale]
    console.print(
        f"[bold]minidp[/]: {workers}{servers}, {what}\n\n{report.material(job)}"
        f"  step  of each worker: B/N = {job.global_batch_size}/{args.workers} samples; {report.rate(job)}",
        highlight=False,
    )
    if stale:
        lr = WAYS[stale[0]].lr(job.lr, args.workers)
        console.print(
            f"        {listed(stale)}: η/N = {lr:g}, since N workers' gradients are N\n"
            "        updates there, which move w N times as far as one synchronous step",
            highlight=False,
        )
    console.print()
    if place:
        console.print(place, highlight=False, markup=False)
    if args.cluster is not None:
        varies = f"        computing times vary: jitter {args.cluster.jitter:g}\n" * (args.cluster.jitter > 0)
        console.print(report.describe(args.cluster) + varies, highlight=False)
    elif args.workers + args.servers * served > cores():
        console.print(f"  [yellow]{workers}{servers} on {cores()} cores take turns.[/]\n", highlight=False)
    for name in names:
        way = WAYS[name]
        title = way.title.replace(" s steps", f" {args.staleness} steps").replace(" H ", f" {args.sync_every} ")
        console.print(f"  [bold]{name:{1 + max(map(len, names))}}[/] {title}", highlight=False)
    console.print()


def title(result: Comparison) -> str:
    workers = number(result.workers, "worker")
    if any(WAYS[each.strategy].served for each in result.strategies):
        workers += f", {number(result.servers, 'server')}"
    return f"{workers}; {slow}" if (slow := _slow_ones(result)) else workers


def _slow_ones(result: Comparison) -> str:
    return ", ".join(f"node {node} is {factor:g} times slower" for node, factor in result.stragglers.items())


def show(console: Console, result: Comparison) -> None:
    clock = "on the virtual clock" if result.world == "virtual" else "one BLAS thread a worker"
    table = Table(title=f"{seconds(result.limit_s)} of training, {clock}", title_style="bold")
    target = f"{100 * result.target_accuracy:g}%"
    table.add_column("")
    for header in (
        "samples\n/ s",
        "× sync",
        "staleness\n(most)",
        "loss\nL(w)",
        "test\nacc.",
        f"{target}\nafter",
        "sent in\na step",
    ):
        table.add_column(header, justify="right")
    for each in result.strategies:
        table.add_row(
            each.strategy,
            f"{each.samples_per_s:,.0f}",
            f"{each.speed_vs_sync:.2f}",
            f"{each.staleness_mean:.1f} ({each.staleness_max})",
            f"{each.loss:.4f}",
            f"{each.test_accuracy:.1%}",
            seconds(each.target_s),
            in_bytes(each.bytes_per_step),
        )
    console.print(table)
    for note in explain(result):
        console.print(f"\n{note}", highlight=False, markup=False)


def explain(result: Comparison) -> Iterator[str]:
    """Why the figures are as they are, a paragraph each."""
    by_name = {each.strategy: each for each in result.strategies}
    made = number(result.epochs, "epoch")
    epochs = ", ".join(f"{each.strategy} {each.epochs:.0f}" for each in result.strategies)
    yield (
        f"sync made {made}; all others trained until the clock read as much, and whoever is faster saw the data "
        f"more often. So all columns are of the same time, and epochs differ: {epochs}."
    )
    yield _waits(result, by_name)
    if any(WAYS[name].stale for name in by_name):
        yield (
            "Staleness: how many updates others have made between the w that a gradient is of and the w that it "
            f"changes. Where nobody waits it is up to N − 1 = {result.workers - 1} in the mean: while a worker "
            "computes, the others make as many. A slow worker's gradients are the latest."
        )
    if "hogwild" in by_name and result.world == "virtual":
        yield (
            "hogwild needs memory that all workers share, so its row is of one machine: no message takes time, "
            f"and sent is what peers read. {by_name['hogwild'].lost_updates:.1%} of what its workers wrote was "
            "overwritten unread."
        )
    yield (
        f"{100 * result.target_accuracy:g}% after: the first time at which rank 0's own w, what it last received "
        f"or made, knew as many of the test data; looked at {len(by_name['sync'].curve) - 1} times, after the "
        "run. Loss and test accuracy are of the w at the end. Sent: by a worker, gradients and parameters."
    )


def _waits(result: Comparison, by_name: dict[str, Figures]) -> str:
    bound = [name for name in by_name if WAYS[name].in_step]
    free = [name for name in by_name if WAYS[name].free]
    slow = _slow_ones(result)
    text = f"Who waits: {listed(bound)} wait{'s' * (len(bound) == 1)} for the slowest worker"
    text += f" ({slow})" * bool(slow)
    if "local" in by_name:
        text += f", local every {result.sync_every} steps"
    if "ssp" in by_name:
        text += f"; so does ssp, as soon as it is {result.staleness_bound} steps ahead"
    text += "."
    if free:
        gains = listed([f"{by_name[name].speed_vs_sync:.1f}" for name in free])
        text += f" {listed(free)} wait{'s' * (len(free) == 1)} for nobody: {gains} times the samples of sync."
        if slow:
            most = f"{result.most_speed_vs_sync:.3g} times"
            text += f" Were computing all that takes time, and steady, it would be {most}."
    if not slow:
        text += " No worker is slower than others on purpose, so there is little to wait for."
    if result.world == "process" and any(WAYS[name].served for name in by_name):
        text += " Servers are processes on this machine, too, and take cores' time."
    return text
