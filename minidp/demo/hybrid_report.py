"""What ``--strategy hybrid`` says: who sits where; then what each holds, sends and waits for, and that w is the
same."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from minidp.demo.places import place
from minidp.demo.report import describe, material, rate
from minidp.demo.train import Job
from minidp.demo.words import in_bytes, number, seconds
from minidp.launch import cores
from minidp.trace import Event, as_text

if TYPE_CHECKING:
    from minidp.demo.hybrid import Outcome, Part, Plan

EXACT = 1e-10  # relative: what is left in float64 is rounding
MOST_ROWS = 8  # replicas that are drawn


def introduce(console: Console, args: Namespace, job: Job, plan: Plan) -> None:
    workers = plan.dp * plan.tp * plan.pp
    console.print(
        f"[bold]minidp[/]: one model on {plan.dp} × {plan.tp} × {plan.pp} workers (dp × tp × pp): who holds what, "
        f"and is it the model of one?\n\n{material(job).replace(', on every worker', '')}"
        f"  step  B = {job.global_batch_size} samples are cut over {number(plan.dp, 'replica')}; {rate(job)}\n",
        highlight=False,
    )
    if where := place(args):
        console.print(where, highlight=False, markup=False)
    if args.cluster is not None:
        console.print(describe(args.cluster), highlight=False)
    elif workers > cores():
        console.print(
            f"  [yellow]{workers} workers on {number(cores(), 'core')} take turns: same result, but timings mean "
            "nothing.[/]\n",
            highlight=False,
        )


def show(console: Console, outcome: Outcome, parts: Sequence[Part]) -> None:
    console.print(picture(outcome, parts))
    console.print(figures(outcome))
    console.print(explain(outcome), highlight=False)


def picture(outcome: Outcome, parts: Sequence[Part]) -> Table:
    """The mesh: a row a replica, a column a stage, in it the ranks that have a part each."""
    table = Table(title="Which rank sits where", title_style="bold")
    table.add_column("")
    for stage in range(outcome.pp):
        layers = parts[stage * outcome.tp].layers
        begin, end = layers[0].split(" … ")[0], layers[-1].split(" … ")[-1]
        named = begin if begin == end else f"{begin} to {end}"
        named = f"layers {named}" if begin.isdigit() else named
        cut = f", in {outcome.tp} parts" if outcome.tp > 1 else ""
        held = parts[stage * outcome.tp].parameters
        head = f"stage {stage}" if outcome.pp > 1 else "the whole model"
        table.add_column(f"{head}{cut}\n[not bold dim]{named}\n{held:,} parameters a rank[/]", justify="center")
    for replica in range(min(outcome.dp, MOST_ROWS)):
        cells = []
        for stage in range(outcome.pp):
            first = (replica * outcome.pp + stage) * outcome.tp
            cells.append("  ".join(f"rank {rank}" for rank in range(first, first + outcome.tp)))
        table.add_row(f"replica {replica}", *cells)
    if outcome.dp > MOST_ROWS:
        table.add_row(f"and {outcome.dp - MOST_ROWS} more", *[""] * outcome.pp)
    return table


def figures(outcome: Outcome) -> Table:
    clock = "on the virtual clock" if outcome.world == "virtual" else "one BLAS thread a worker"
    ranks = outcome.dp * outcome.tp * outcome.pp
    table = Table(title=f"{outcome.steps} steps, {number(outcome.epochs, 'epoch')}, {clock}", title_style="bold")
    table.add_column("")
    table.add_column("1 worker", justify="right")
    table.add_column(number(ranks, "worker"), justify="right", style="bold")
    one, many = outcome.memory_one_worker, outcome.memory
    rows = [
        ("parameters that a rank computes with", f"{outcome.parameters_one_worker:,}", f"{outcome.parameters:,}"),
        ("memory a rank: w", in_bytes(one["parameters"]), in_bytes(many["parameters"])),
        ("                gradients", in_bytes(one["gradients"]), in_bytes(many["gradients"])),
        ("                optimizer's state", in_bytes(one["optimizer"]), in_bytes(many["optimizer"])),
    ]
    if outcome.pp > 1:
        kept = f"{outcome.most_activations} of {outcome.micro_batches}"
        rows.append(("micro-batches kept at a time, at most", "1 of 1", kept))
    names = {"dp": "gradients, along dp", "tp": "activations, along tp", "pp": "activations, along pp"}
    for axis, name in names.items():
        if getattr(outcome, axis) > 1:
            rows.append((f"sent in a step: {name}", "0 B", in_bytes(outcome.bytes_per_step[axis])))
    if outcome.idle_share is not None and outcome.idle_share_formula is not None:
        rows.append(("waiting for other stages", "0%", f"{outcome.idle_share:.0%}"))
        rows.append(("  (p − 1)/(m + p − 1), stages alike", "0%", f"{outcome.idle_share_formula:.0%}"))
    rows += [
        ("steps / s", f"{outcome.steps_per_s_one_worker:.1f}", f"{outcome.steps_per_s:.1f}"),
        ("a step takes", seconds(1 / outcome.steps_per_s_one_worker), seconds(1 / outcome.steps_per_s)),
        ("training loss L(w)", f"{outcome.loss_one_worker:.5f}", f"{outcome.loss:.5f}"),
        ("test accuracy", f"{outcome.test_accuracy_one_worker:.1%}", f"{outcome.test_accuracy:.1%}"),
        ("max|Δw| / max|w|", "0", f"{outcome.relative_difference:.1e}"),
        ("the same after 10 steps in float64", "0", f"{outcome.relative_difference_float64:.1e}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def explain(outcome: Outcome) -> str:
    if outcome.relative_difference_float64 < EXACT:
        same = (
            "All together they are the one model: in float64 w is the same but for the last digits. In float32 "
            f"rounding is larger, and has grown with each of {outcome.steps} steps."
        )
    else:
        same = "[red]They ended at another w than one worker: this should not happen; please report it.[/]"
    lines = ["", same]
    if outcome.world == "process" and outcome.dp > 1:
        lines.append("Memory is a mean: on one machine replicas share w and state, in two buffers each.")
    if outcome.tp > 1:
        lines.append("Along tp each layer waits for the others' parts, so these ranks belong into one node.")
    if outcome.pp > 1:
        lines.append("More micro-batches leave stages less to wait for, and make each product smaller.")
    return "\n".join(lines)


def one_step(events: Sequence[Event], plan: Plan) -> list[Event]:
    """The last step of replica 0, one rank of each stage."""
    ranks = [stage * plan.tp for stage in range(plan.pp)]
    of_ranks = [event for event in events if event.rank in ranks]
    first = "F0" if plan.pp > 1 else "forward"
    begun = [event.start_s for event in of_ranks if event.rank == 0 and event.name == first]
    return [event for event in of_ranks if event.start_s >= begun[-1]]


def show_timeline(console: Console, events: Sequence[Event], plan: Plan) -> None:
    console.print("\n[bold]The last step[/] of a replica, one rank of each stage\n", highlight=False)
    text = as_text(one_step(events, plan), width=min(64, console.width - 16))
    console.print(text, highlight=False, markup=False)
