"""What ``--strategy hybrid`` says: who sits where; then what each holds, sends and waits for, and that w is the
same."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from minidp.demo.places import place
from minidp.demo.report import LANES, describe, material, rate
from minidp.demo.train import Job
from minidp.demo.words import in_bytes, number, seconds
from minidp.launch import cores
from minidp.trace import Event, as_text

if TYPE_CHECKING:
    from minidp.demo.hybrid import Plan
    from minidp.demo.hybrid_outcome import Outcome, Seat

EXACT = 1e-10  # relative: what is left in float64 is rounding
DRIFTED = 1e-5  # relative, in float32: more than last digits
BORDER = 3  # of a table's column


def introduce(console: Console, args: Namespace, job: Job, plan: Plan) -> None:
    workers = plan.dp * plan.tp * plan.pp
    each = f", {-(-job.global_batch_size // plan.dp)} a replica" * (plan.dp > 1)
    console.print(
        f"[bold]minidp[/]: one model on a mesh of {number(workers, 'worker')}: who holds what, and is it still "
        f"one?\n\n{material(job).replace(', on every worker', '')}"
        f"  mesh  {number(plan.dp, 'replica')} (dp) × {number(plan.tp, 'part')} of each layer (tp) × "
        f"{number(plan.pp, 'stage')} of layers (pp)\n"
        f"  step  B = {job.global_batch_size} samples{each}; {rate(job)}\n",
        highlight=False,
    )
    if where := place(args):
        console.print(where, highlight=False, markup=False)
    if args.cluster is not None:
        near = "        those of one node reach each other at no cost\n" * (args.cluster.ranks_per_node > 1)
        console.print(describe(args.cluster) + near, highlight=False)
    elif workers > cores():
        console.print(
            f"  [yellow]{workers} workers on {number(cores(), 'core')} take turns: same result, but timings mean "
            "nothing.[/]\n",
            highlight=False,
        )


def show(console: Console, outcome: Outcome, classes: int) -> None:
    """The model guesses among so many ``classes``."""
    console.print(picture(outcome, console.width))
    console.print()
    console.print(figures(outcome))
    console.print(explain(outcome, classes), highlight=False)


def picture(outcome: Outcome, width: int) -> Table:
    """The mesh: a row a stage, a column a replica, in it the ranks that have a part of the stage each."""
    tp, pp = outcome.tp, outcome.pp
    first = outcome.ranks[: tp * pp : tp]  # of each stage, in replica 0
    held = [
        ("stage", [str(seat.pp) for seat in first]),
        ("layers", [_layers(seat) for seat in first]),
        ("parameters\na rank", [f"{seat.parameters:,}" for seat in first]),
    ]
    of = [outcome.ranks[at : at + tp * pp] for at in range(0, len(outcome.ranks), tp * pp)]
    seats = [(f"replica {i}{_nodes(ranks)}", _ranks(ranks, tp)) for i, ranks in enumerate(of)]
    room = width - 1 - _width(held)
    if _width(seats) > room:
        room -= len("more") + BORDER
        fit = max(1, next(n for n in range(len(seats), -1, -1) if _width(seats[:n]) <= room))
        if fit < len(seats):
            seats = [*seats[:fit], (f"{len(seats) - fit}\nmore", ["…"] * pp)]
    parts = f", each layer in {tp} parts" * (tp > 1)
    table = Table(title=f"Which rank sits where{parts}", title_style="bold")
    for head, cells in held:
        table.add_column(head, justify="right" if cells[0][0].isdigit() and head != "layers" else "left")
    for head, _ in seats:
        table.add_column(head, justify="center", style="bold")
    for row in zip(*(cells for _, cells in (*held, *seats)), strict=True):
        table.add_row(*row)
    return table


def _width(columns: Sequence[tuple[str, list[str]]]) -> int:
    return sum(
        BORDER + max(len(line) for text in (head, *cells) for line in text.split("\n")) for head, cells in columns
    )


def _layers(seat: Seat) -> str:
    """``0 to 2``."""
    begin, end = seat.layers[0].split(" … ")[0], seat.layers[-1].split(" … ")[-1]
    return begin if begin == end else f"{begin} to {end}"


def _ranks(seats: Sequence[Seat], tp: int) -> list[str]:
    """Those of each stage: ``rank 0``, ``ranks 0, 1`` or ``ranks 0 … 3``."""
    stages = [seats[at : at + tp] for at in range(0, len(seats), tp)]
    between = ", " if tp == 2 else " … "
    return [
        f"ranks {stage[0].rank}{between}{stage[-1].rank}" if tp > 1 else f"rank {stage[0].rank}"
        for stage in stages
    ]


def _nodes(seats: Sequence[Seat]) -> str:
    lo, hi = seats[0].node, seats[-1].node
    if lo is None or hi is None:
        return ""
    return f"\nnode {lo}" if lo == hi else f"\nnodes {lo}{', ' if hi == lo + 1 else ' … '}{hi}"


def figures(outcome: Outcome) -> Table:
    clock = "on the virtual clock" if outcome.world == "virtual" else "one BLAS thread a worker"
    ranks = len(outcome.ranks)
    table = Table(title=f"{outcome.steps} steps, {number(outcome.epochs, 'epoch')}, {clock}", title_style="bold")
    table.add_column("")
    table.add_column("1 worker", justify="right")
    table.add_column(number(ranks, "worker"), justify="right", style="bold")
    alone, many = outcome.memory_one_worker, outcome.memory

    def section(head: str, *rows: tuple[str, str, str]) -> None:
        if head and rows:
            table.add_row(head, "", "")
        for name, of_one, of_many in rows:
            table.add_row(f"  {name}" if head else name, of_one, of_many)
        table.add_section()

    kept = [
        (
            "micro-batches' activations, at most",
            "1 of 1",
            f"{outcome.most_activations} of {outcome.micro_batches}",
        )
    ]
    names = {"dp": "gradients, along dp", "tp": "activations, along tp", "pp": "activations, along pp"}
    section(
        "memory of a rank, the mean",
        ("parameters w", in_bytes(alone["parameters"]), in_bytes(many["parameters"])),
        ("gradients", in_bytes(alone["gradients"]), in_bytes(many["gradients"])),
        ("optimizer's state", in_bytes(alone["optimizer"]), in_bytes(many["optimizer"])),
        *(kept if outcome.pp > 1 else []),
    )
    section(
        "sent by a rank in a step, at most",
        *(
            (name, "0 B", in_bytes(outcome.bytes_per_step[axis]))
            for axis, name in names.items()
            if getattr(outcome, axis) > 1
        ),
    )
    if outcome.idle_share is not None and outcome.idle_share_formula is not None:
        section(
            "idle, waiting for other stages",
            ("measured, all stages together", "0%", f"{outcome.idle_share:.1%}"),
            ("(p − 1)/(m + p − 1), stages alike", "0%", f"{outcome.idle_share_formula:.1%}"),
        )
    turns = f", {ranks} on {number(outcome.cores, 'core')}" * _turns(outcome)
    section(
        "",
        (f"steps / s{turns}", f"{outcome.steps_per_s_one_worker:.1f}", f"{outcome.steps_per_s:.1f}"),
        ("a step takes", seconds(1 / outcome.steps_per_s_one_worker), seconds(1 / outcome.steps_per_s)),
    )
    section(
        "",
        ("training loss L(w)", f"{outcome.loss_one_worker:.5f}", f"{outcome.loss:.5f}"),
        ("test accuracy", f"{outcome.test_accuracy_one_worker:.1%}", f"{outcome.test_accuracy:.1%}"),
    )
    few = number(outcome.few_steps, "step")
    section(
        "max|Δw| / max|w|",
        (f"after {few} in float64", "0", f"{outcome.relative_difference_float64:.1e}"),
        (f"after {few} in float32", "0", f"{outcome.relative_difference_float32:.1e}"),
        (f"after {number(outcome.steps, 'step')} in float32", "0", f"{outcome.relative_difference:.1e}"),
    )
    return table


def _turns(outcome: Outcome) -> bool:
    """Whether there are more workers than cores, so that timings mean nothing."""
    return outcome.world == "process" and len(outcome.ranks) > outcome.cores


def explain(outcome: Outcome, classes: int) -> str:
    """What the figures mean, a line each; guessing has the loss ln ``classes``."""
    ranks = number(len(outcome.ranks), "worker")
    lines = [""]
    if not outcome.relative_difference_float64 < EXACT:
        lines.append(f"[red]The {ranks} ended at another w than one: this should not happen; please report it.[/]")
    elif len(outcome.ranks) > 1:
        lines.append(
            f"The {ranks} together are the one model: they add the same numbers in another order, so last digits "
            "differ, those of float64 or of float32."
        )
        if outcome.relative_difference > DRIFTED:
            apart = abs(outcome.loss / outcome.loss_one_worker - 1)
            lines.append(
                f"Then {_why(outcome)}, and from there the two drift apart: in {outcome.steps} steps by "
                f"{outcome.relative_difference:.1e} of w, but by {apart:.0e} of the loss."
            )
    if not max(outcome.loss, outcome.loss_one_worker) < math.log(classes):
        lines.append(f"[yellow]Neither learnt more than to guess: try another η than {outcome.lr:g}.[/]")
    if outcome.world == "process" and outcome.dp > 1:
        lines.append("Replicas on one machine share w and state, in two buffers; the mean counts these once.")
    if outcome.tp > 1:
        lines.append("Along tp each layer waits for the others' parts: these ranks belong into one node.")
    if outcome.pp > 1:
        lines.append("More micro-batches leave stages less to wait for, but make each product smaller.")
    return "\n".join(lines)


def _why(outcome: Outcome) -> str:
    """What makes much of a last digit."""
    if outcome.optimizer.startswith("adam"):
        return "Adam makes whole steps of gradients that are 0 but for rounding"
    if outcome.model == "transformer":
        return "each step makes more of last digits"
    return "a last digit decides on which side of 0 a ReLU's input falls"


def one_step(events: Sequence[Event], plan: Plan) -> list[Event]:
    """The last whole step of replica 0, from the moment at which its first rank begins it: one rank of each
    stage, or all where there is one stage. An epoch's very last batch may be a short one, so it is left out."""
    ranks = range(0, plan.pp * plan.tp, plan.tp) if plan.pp > 1 else range(min(plan.tp, LANES))
    of_ranks = [event for event in events if event.rank in ranks]
    first = "F0" if plan.pp > 1 else "forward"
    begun = [event.start_s for event in of_ranks if event.rank == 0 and event.name == first]
    start, end = begun[-2:] if len(begun) > 1 else (begun[0], math.inf)
    return [
        event._replace(start_s=max(start, event.start_s), end_s=min(end, event.end_s))
        for event in of_ranks
        if event.start_s < end and event.end_s > start
    ]


def show_timeline(console: Console, events: Sequence[Event], plan: Plan) -> None:
    console.print("\n[bold]One step[/] of a replica, one rank of each stage\n", highlight=False)
    text = as_text(one_step(events, plan), width=min(64, console.width - 16))
    console.print(text, highlight=False, markup=False)


def title(outcome: Outcome) -> str:
    """Of the picture of a step."""
    if outcome.pp == 1:
        return f"One step of a replica: {number(outcome.tp, 'part')} of each layer"
    micro_batches = f"{outcome.micro_batches} micro-batch{'es' * (outcome.micro_batches > 1)}"
    return f"One step of a replica: {outcome.pp} stages, {micro_batches}, {outcome.schedule}"
