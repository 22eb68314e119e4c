"""What the demo says: before the runs, what will happen; after them, a table and what it means."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from minidp import data, nn
from minidp.demo import compression_report, compressors
from minidp.demo.tasks import Task
from minidp.demo.train import Job, Result
from minidp.demo.words import in_bytes, number, seconds
from minidp.sim import Cluster
from minidp.trace import Event, as_text

LANES = 8  # of a timeline in the terminal
ALIKE = 0.05  # relative, of losses after steps that rounding has driven apart
WRITTEN, PROMPT = 500, "Ham.\n"  # characters that a transformer writes, and what it goes on from


@dataclass(frozen=True)
class Outcome:
    """The demo's figures, as ``--json`` writes them. Times are medians over epochs of all rounds.

    ``predicted_…`` are those of a timing-only run: on this machine as it was calibrated just before, or on the
    virtual cluster. None where it can't tell (balanced shares, GPUs).
    """

    model: str
    dataset: str
    world: str
    device: str
    workers: int
    cores: int
    global_batch_size: int
    epochs: int
    optimizer: str
    lr: float
    lr_workers: float
    strategy: str
    compress: str | None
    steps: int
    steps_per_s_one_worker: float
    steps_per_s: float
    speedup_strong: float
    speedup_weak: float
    step_s_one_worker: float
    step_s: float
    predicted_step_s_one_worker: float | None
    predicted_step_s: float | None
    bytes_per_step: float
    bytes_per_step_float32: float
    """What they would have sent without ``compress``."""
    loss_one_worker: float
    loss: float
    test_accuracy_one_worker: float
    test_accuracy: float
    relative_difference: float
    shares: tuple[float, ...] | None
    """Each worker's part of a batch, if they were balanced."""
    micro_shards: int | None
    resumed_at: int | None
    """The steps that a checkpoint of the workers had; ``steps`` are those made after it."""
    sha256: dict[int, str] = field(default_factory=dict)
    """Of w after a few updates with micro-shards, by number of workers: all the same. Not with ``compress``."""


def steps_per_s(results: list[Result]) -> float:
    """Steps a second, by the median epoch."""
    per_epoch = results[0].steps / len(results[0].epoch_s)
    return per_epoch / median(s for result in results for s in result.epoch_s)


def step_s(results: list[Result]) -> float:
    """Seconds of a step, by the median epoch."""
    return 1 / steps_per_s(results)


def relative_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """max|Δw| / max|w|."""
    return float(max(np.abs(a[k] - b[k]).max() for k in a) / max(np.abs(a[k]).max() for k in a))


def outcome(
    world: str,
    device: str,
    job: Job,
    workers: int,
    cores: int,
    one: list[Result],
    many: list[Result],
    speedup_weak: float,
    predicted: tuple[float | None, float | None],
) -> Outcome:
    single, several = steps_per_s(one), steps_per_s(many)
    return Outcome(
        model=job.task.model,
        dataset=job.task.dataset,
        world=world,
        device=device,
        workers=workers,
        cores=cores,
        global_batch_size=job.global_batch_size,
        epochs=job.epochs,
        optimizer=job.optimizer,
        lr=job.lr,
        lr_workers=job.lr_workers,
        strategy="NaiveDataParallel" if job.naive else "DataParallel",
        compress=job.compress,
        steps=many[0].steps,
        steps_per_s_one_worker=single,
        steps_per_s=several,
        speedup_strong=several / single,
        speedup_weak=speedup_weak,
        step_s_one_worker=step_s(one),
        step_s=step_s(many),
        predicted_step_s_one_worker=predicted[0],
        predicted_step_s=predicted[1],
        bytes_per_step=many[0].bytes_per_step,
        bytes_per_step_float32=compressors.float32_bytes(job.task, workers),
        loss_one_worker=one[0].loss,
        loss=many[0].loss,
        test_accuracy_one_worker=one[0].accuracy,
        test_accuracy=many[0].accuracy,
        relative_difference=relative_difference(one[0].state, many[0].state),
        shares=many[0].shares,
        micro_shards=job.micro_shards,
        resumed_at=many[0].resumed_at,
    )


def introduce(
    console: Console, job: Job, workers: int, cores: int, cluster: Cluster | None, place: str = ""
) -> None:
    shares = " + ".join(f"n_{i}" for i in range(1, min(workers, 3) + 1)) + (" + …" if workers > 3 else "")
    question = f"do {number(workers, 'worker')} equal one, and how much faster?"
    if job.until is not None:
        question = f"how long do {number(workers, 'worker')} take to {100 * job.until:g}% test accuracy?"
    elif job.compress is not None:
        question = f"{number(workers, 'worker')}, gradients as {job.compress}: what is saved, and what is lost?"
    mean, gap = "∇L = Σ n_i ∇L_i / Σ n_i", "   "
    if job.compress is not None:
        mean, gap = "∇L ≈ Σ compress(n_i ∇L_i / Σ n_i)", "\n        "
    rule = "w ← w − η ∇L" if job.optimizer in ("sgd", "momentum") else job.optimizer.capitalize()
    console.print(
        f"[bold]minidp[/]: {question}\n\n{material(job)}"
        f"  step  B = {job.global_batch_size} samples are cut into {shares} = B; worker i computes\n"
        "        ∇L_i on its own n_i samples; then, all together,\n"
        f"        [bold]{mean}[/]{gap}and   [bold]{rule}[/]   ({rate(job)})\n",
        highlight=False,
    )
    if job.compress is not None:
        console.print(compression_report.sent(job), highlight=False, markup=False)
    if place:
        console.print(place, highlight=False, markup=False)
    if cluster is not None:
        console.print(describe(cluster), highlight=False)
    elif workers > cores:
        console.print(
            f"  [yellow]{workers} workers on {cores} core{'s' * (cores > 1)} take turns: same result, but do not "
            "expect a speed-up.[/]\n",
            highlight=False,
        )


def material(job: Job) -> str:
    """Two lines: D and w."""
    samples, model = job.task.describe()
    return f"  D     {samples}\n  w     {model}\n"


def rate(job: Job) -> str:
    return f"η = {job.lr:g}" + (", momentum 0.9" if job.optimizer == "momentum" else "")


def describe(cluster: Cluster) -> str:
    slow = ", ".join(f"node {node} {factor:g} times slower" for node, factor in cluster.stragglers.items())
    return (
        f"  on    a virtual cluster: {cluster.nodes} nodes of {cluster.flops / 1e9:g} GFLOP/s"
        + (f", {cluster.ranks_per_node} workers each" if cluster.ranks_per_node > 1 else "")
        + (f"; {slow}" if slow else "")
        + f"\n        messages take {cluster.latency_s * 1e6:g} µs "
        + f"+ n / ({cluster.bandwidth_bytes_per_s / 1e9:g} GB/s)\n"
    )


def show(console: Console, result: Outcome, task: Task) -> None:
    threads = f"on {result.device}" if result.device != "cpu" else "one BLAS thread a worker"
    if result.world == "virtual":
        threads = "on the virtual clock"
    more = "" if result.resumed_at is None else "more "
    table = Table(
        title=f"{number(result.steps, f'{more}step')}, {number(result.epochs, 'epoch')}, {threads}",
        title_style="bold",
    )
    table.add_column("")
    table.add_column("1 worker", justify="right")
    table.add_column(number(result.workers, "worker"), justify="right", style="bold")
    predicted_by = "predicted, by calibration" if result.world == "process" else "predicted, by a timing-only run"
    rows: list[tuple[str, str, str]] = [
        ("steps / s", f"{result.steps_per_s_one_worker:.1f}", f"{result.steps_per_s:.1f}"),
        ("a step takes", seconds(result.step_s_one_worker), seconds(result.step_s)),
        (predicted_by, seconds(result.predicted_step_s_one_worker), seconds(result.predicted_step_s)),
        ("speed-up, strong (same B)", "1", f"{result.speedup_strong:.2f}"),
        (f"speed-up, weak (B and D × {result.workers})", "1", f"{result.speedup_weak:.2f}"),
        ("sent by a worker in a step", "0 B", in_bytes(result.bytes_per_step)),
        ("training loss L(w)", f"{result.loss_one_worker:.5f}", f"{result.loss:.5f}"),
        ("test accuracy", f"{result.test_accuracy_one_worker:.1%}", f"{result.test_accuracy:.1%}"),
        ("max|Δw| / max|w|", "0", f"{result.relative_difference:.1e}"),
    ]
    if (result.predicted_step_s_one_worker, result.predicted_step_s) == (None, None):
        del rows[2]
    if result.compress is not None:
        rows.insert(
            rows.index(next(row for row in rows if row[0].startswith("sent"))) + 1,
            ("without compression, float32", "0 B", in_bytes(result.bytes_per_step_float32)),
        )
    if result.shares is not None:
        least, most = min(result.shares), max(result.shares)
        rows.insert(1, ("share of a batch, least … most", "100%", f"{least:.1%} … {most:.1%}"))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(explain(result, task.classes), highlight=False)


def explain(result: Outcome, classes: int) -> str:
    """What the figures mean; the model guesses among so many ``classes``."""
    workers = number(result.workers, "worker")
    chance = math.log(classes)  # the loss of guessing
    if result.compress is not None:
        same = compression_report.compressed(result, chance)
    elif not max(result.loss, result.loss_one_worker) < chance:
        same = f"[yellow]Neither learnt: η = {result.lr:g} is too large, so rounding grows with each step.[/]"
    elif result.micro_shards is not None and result.relative_difference == 0:
        same = f"{workers} and one end at the same w, to the last bit."
    elif result.relative_difference < 1e-3 and result.micro_shards is None:
        same = f"{workers} and one end at the same w, but for float32's rounding of sums."
    elif abs(result.loss / result.loss_one_worker - 1) < ALIKE and result.micro_shards is None:
        same = (
            f"{workers} and one began at the same w; float32's rounding of sums has grown with each of "
            f"{result.steps} steps.\nThe losses still are alike; and with --micro-shards 8 not a bit of w differs."
        )
    else:
        same = "[red]The two ended at different w: this should not happen; please report it.[/]"
    if result.speedup_strong > 1:
        faster = f"The same {number(result.steps, 'step')} took 1/{result.speedup_strong:.2f} of the time."
    elif result.device != "cpu":
        faster = (
            "It was not faster: who shares a GPU shares its time, and a small model is done before all is said."
        )
    else:
        faster = "It was not faster: no core for each worker, or a busy machine."
    if result.resumed_at is not None:
        same += f"\nThe {workers} went on from step {result.resumed_at}; the one was never interrupted."
        faster = ""  # of a part of the steps no speed-up can be told
    else:
        faster += "\nStrong: the same work, cut into N parts. Weak: N times the work."
    if result.compress is not None:
        where = f"\n\n{compression_report.WHERE}" * (result.world == "process")
        return f"\n{same}\n{faster}".rstrip() + where
    if faster:
        faster = f"\n{faster}\nThe mean is weighted by n_i, so every N and every cut gives the same ∇L."
    return f"\n{same}{faster}\n\n{identical(result.sha256)}"


def identical(sha256: dict[int, str]) -> str:
    """``N=1, 2, 4: identical sha256 …``: what micro-shards promise, tried."""
    if len(set(sha256.values())) == 1:
        return (
            f"[bold]N={', '.join(map(str, sha256))}: identical sha256 {next(iter(sha256.values()))[:16]}…[/]\n"
            "A few updates with micro_shards, which fixes the order of every sum: not a bit depends on N."
        )
    found = ", ".join(f"N={workers} {digest[:16]}…" for workers, digest in sha256.items())
    return f"[red]With micro-shards the bits of w differ: {found}. This should not happen; please report it.[/]"


def interesting(workers: int, cluster: Cluster | None) -> set[int]:
    """The ranks of a timeline that one can take in at a glance: stragglers, then the first."""
    slow = [rank for rank in range(workers) if cluster and cluster.slowness(rank) > 1]
    return set(list(dict.fromkeys([*slow, *range(workers)]))[:LANES])


def last_steps(events: list[Event], count: int, forwards: int = 1) -> list[Event]:
    """The events of the last steps, each of so many ``forwards``: from when the first rank begins them."""
    begun: dict[int, list[float]] = {}
    for event in events:
        if event.name == "forward":
            begun.setdefault(event.rank, []).append(event.start_s)
    start = min(times[-count * forwards :][0] for times in begun.values())
    return [event for event in events if event.start_s >= start]


def show_timeline(console: Console, events: list[Event], cluster: Cluster, forwards: int) -> None:
    workers = 1 + max(event.rank for event in events)
    ranks = interesting(workers, cluster)
    window = [event for event in last_steps(events, 1, forwards) if event.rank in ranks]
    more = f", {len(ranks)} of {workers} workers" if len(ranks) < workers else ""
    console.print(f"\n[bold]The last step[/]{more}\n", highlight=False)
    console.print(as_text(window, width=min(64, console.width - 16)), highlight=False, markup=False)


def show_writing(console: Console, state: dict[str, np.ndarray]) -> None:
    """What the transformer writes by itself, with the workers' w."""
    train_set, _ = data.load_text()
    model = nn.GPT(len(train_set.vocabulary))
    model.load_state_dict(state)
    written = model.generate(train_set.encode(PROMPT), WRITTEN, temperature=0.8)
    console.print(f"\n[bold]It writes[/], from {PROMPT.strip()!r} on, a character at a time:\n", highlight=False)
    console.print(train_set.decode(written), style="italic", highlight=False, markup=False)
