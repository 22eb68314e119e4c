"""``python -m minidp.replay run.log``: run a recorded run again, with the same bits or with another rule."""

from __future__ import annotations

import argparse
import math
import sys
from itertools import pairwise
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minidp.backend import DeviceUnavailable
from minidp.comm import RankFailed
from minidp.comm.errors import in_words
from minidp.parallel.event_log import DamagedLog, RunLog, read
from minidp.parallel.wire import Op
from minidp.replay.rerun import DepartedFromLog, Met, NothingLate, Rerun, rerun, revised

TENTHS = 10
BEFORE = 5  # gradients shown before the one that is found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m minidp.replay",
        description="Run a recorded run with servers again, in one process: each server handles what workers "
        "send in the order of the log, so an asynchronous run comes out with the same bits. spawn(..., servers=M, "
        "record='run.log') writes such logs. A log holds the program: replay only logs that you trust.",
    )
    parser.add_argument("log", type=Path, help="the log of a run")
    parser.add_argument(
        "--what-if",
        metavar="RULE",
        help="another rule on the servers, same order of arrivals: dc-asgd, dc-asgd=λ, staleness-aware, lr=η",
    )
    parser.add_argument(
        "--until-loss-exceeds",
        type=float,
        metavar="X",
        help="stop at the first gradient whose loss is above X, and show it",
    )
    args = parser.parse_args(argv)
    console = Console()
    try:
        revise = None if args.what_if is None else revised(args.what_if)
    except ValueError as error:
        parser.error(f"--what-if {error}")
    if args.until_loss_exceeds is not None and math.isnan(args.until_loss_exceeds):
        parser.error("--until-loss-exceeds nan: give a number")
    try:
        log = read(args.log)
        _introduce(console, args.log, log)
        outcome = rerun(log, revise, args.until_loss_exceeds)
    except (OSError, DamagedLog, DepartedFromLog, NothingLate, DeviceUnavailable) as error:
        console.print(f"[red]{error}", soft_wrap=True, highlight=False)
        return 1
    except RankFailed as failed:
        console.print(f"[red]The program fails when it runs again: {failed}", soft_wrap=True, highlight=False)
        return 1
    for rank, raised in sorted(outcome.raised.items()):
        console.print(f"rank {rank} raised {in_words(raised)}", soft_wrap=True, highlight=False)
    if args.until_loss_exceeds is not None:
        return _show_found(console, outcome, args.until_loss_exceeds)
    if args.what_if is not None:
        _compare(console, log, outcome, args.what_if)
        return 0
    return _verify(console, log, outcome)


def _introduce(console: Console, path: Path, log: RunLog) -> None:
    events = sum(map(len, log.events))
    lost = sorted({event.worker for events in log.events for event in events if event.op == Op.LOST})
    console.print(
        f"[bold]{path.name}[/]: {log.workers} workers, {log.servers} server{'s' * (log.servers > 1)}, "
        f"{events} events, in the {log.facts['world']} world; minidp {log.facts['surroundings']['minidp']}",
        highlight=False,
        soft_wrap=True,
    )
    if lost:
        console.print(f"Died in this run: {', '.join(f'rank {rank}' for rank in lost)}.")
    if not log.whole or not log.ends:
        console.print("The run did not come to its end: the log is good up to where it stops.")


def _verify(console: Console, log: RunLog, outcome: Rerun) -> int:
    """Compare the servers' w with what the log says of it."""
    for (server, session), (version, sha) in sorted(outcome.ends.items()):
        then = log.ends.get((server, session))
        verdict = "[green]the same bits[/]" if then == (version, sha) else "[red]other bits than then[/]"
        if then is None:
            verdict = "nothing to compare with: the run did not come to its end"
        console.print(f"server {server}: {version} updates, w {sha[:12]}: {verdict}", highlight=False)
    same = all(outcome.ends.get(key) == end for key, end in log.ends.items())
    if not same:
        console.print(
            "The same order of arrivals, other bits: the program depends on something besides data, seeds and "
            "messages, or NumPy or BLAS is another one than then "
            f"({', '.join(f'{key} {value}' for key, value in log.facts['surroundings'].items())})."
        )
    return 0 if same else 1


def _compare(console: Console, log: RunLog, outcome: Rerun, what: str) -> None:
    """Losses then and now, a row a tenth of the run."""
    then = [event.loss for event in log.events[0] if event.op == Op.PUSH and event.samples]
    now = [met.event.loss for met in outcome.pushes if met.event.samples]
    table = Table("of all pushes", "staleness", "loss then", f"loss with {what}")
    for column in table.columns[1:]:
        column.justify = "right"
    late = [met.event.staleness for met in outcome.pushes if met.event.samples]
    edges = [len(now) * i // TENTHS for i in range(TENTHS + 1)]
    for i, (lo, hi) in enumerate(pairwise(edges)):
        if hi > lo:
            cells = (f"{_mean(late[lo:hi]):.2f}", f"{_mean(then[lo:hi]):.4f}", f"{_mean(now[lo:hi]):.4f}")
            table.add_row(f"{100 * i // TENTHS}–{100 * (i + 1) // TENTHS} %", *cells)
    console.print(table)
    console.print("Mean over the pushes that server 0 was given; the same order of arrivals, the same batches.")


def _show_found(console: Console, outcome: Rerun, limit: float) -> int:
    pushes, found = outcome.pushes, outcome.found
    if found is None:
        worst = max(pushes, key=lambda met: met.event.loss, default=None)
        highest = "" if worst is None else f" The highest is {worst.event.loss:.4f}, at event {worst.number}."
        console.print(f"No loss exceeds {limit:g}.{highest}")
        return 0
    event = found.event
    table = Table("event", "rank", "its step", "computed from", "met", "staleness", "loss", "|∇L|")
    for column in table.columns:
        column.justify = "right"
    steps: dict[int, int] = {}
    rows = []
    for met in pushes:
        worker = met.event.worker
        rows.append((met, steps.get(worker, 0)))
        steps[worker] = steps.get(worker, 0) + 1
    for met, step in rows[-BEFORE - 1 :]:
        table.add_row(*_row(met, step), style="bold red" if met is found else "")
    console.print(table)
    before = [met.event.loss for met in pushes[:-1] if met.event.worker == event.worker]
    history = f"; its loss before was {before[-1]:.4f}" if before else ""
    console.print(
        f"[bold]Event {found.number}[/]: rank {event.worker}'s gradient of its step {rows[-1][1]}, a mean over "
        f"{event.samples} samples, has the loss {event.loss:.4g}, above {limit:g}{history}. It was computed from "
        f"version {event.pulled} of w and meets version {event.version}: {event.staleness} updates late.",
        highlight=False,
    )
    return 0


def _row(met: Met, step: int) -> tuple[str, ...]:
    event = met.event
    return (
        str(met.number),
        str(event.worker),
        str(step),
        f"w {event.pulled}",
        f"w {event.version}",
        str(event.staleness),
        f"{event.loss:.4g}",
        f"{met.norm:.3g}",
    )


def _mean(values: list[float] | list[int]) -> float:
    return sum(values) / len(values) if values else math.nan


if __name__ == "__main__":
    sys.exit(main())
