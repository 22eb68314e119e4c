"""The command line of the bench."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rich.console import Console

from minidp.backend import DeviceUnavailable, get_device
from minidp.bench import (
    allreduce,
    compress,
    device_memory,
    fault_report,
    faults,
    hybrid,
    micro_shards,
    pace,
    ps,
    scaling,
    startup,
    step,
    step_cuda,
    virtual,
    whereabouts,
)
from minidp.bench.contest import Rounds
from minidp.bench.measure import PROPER_PAIRS
from minidp.bench.report import Report
from minidp.bench.screen import Screen
from minidp.bench.team import PeerFailed

BURST_S = 0.4
QUICK = Rounds(pairs=1, burst_s=0.03)
WIDTH = 120  # of tables, where nobody's terminal sets it

DESCRIPTION = """\
How fast minidp is, next to PyTorch, MPI and Ray on this machine.

All contestants are started first and wait, blocked. Then each in turn runs a burst of the same work:
ours, peer, ours, peer, … What is printed are medians over such rounds, ratios within a round, and beside
them the bars that the project has set itself. One BLAS thread in each process."""

EPILOG = """\
Peers are optional: python -m pip install torch==2.13.0 mpi4py mpich ray
Leave the machine alone meanwhile: two busy processes need two idle cores."""

BENCHES = {
    "allreduce": "sums of 2 ranks, 4 KB to 128 MB: ours, MPICH's, gloo's (2 minutes)",
    "step": "one training step in one thread: ours, PyTorch eager (1 minute)",
    "scaling": "2 workers against 1; PyTorch DDP, PyTorch + MPICH (2 minutes)",
    "startup": "import minidp over import numpy; a spawn until its function runs (20 s)",
    "micro-shards": "what the same bits for any N cost, next to one whole batch (1 minute)",
    "hybrid": "one batch on 2 workers: as samples, parts of layers, layers; sharded state (2 minutes)",
    "ps": "the parameter server: its exchange, ours and a Ray actor's; what waiting costs (2 minutes)",
    "compress": "gradients made smaller: how fast, how much, on which networks it pays (3 minutes)",
    "faults": "what goes wrong on purpose: who is told, how soon, what is left (1 minute for 200)",
    "whereabouts": "what it costs that every rank's place is always known (20 s)",
    "virtual": "the virtual world: messages/s, 1000 ranks train, 10 000 are timed, steps predicted (2 minutes)",
}

ON_DEVICES = {
    "step": "cuda: on one GPU, next to PyTorch eager there",
    "allreduce": "cuda: in memory of one GPU, next to a copy; and what update rules reach of it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one bench and print it. Returns the exit status; a missed bar is a finding, not a failure."""
    options = parser().parse_args(arguments)
    pairs = options.pairs or (QUICK.pairs if options.quick else PROPER_PAIRS)
    rounds = Rounds(pairs, options.burst or (QUICK.burst_s if options.quick else BURST_S))
    try:
        get_device(options.device).check()
    except DeviceUnavailable as reason:
        print(f"python -m minidp.bench {options.bench}: {reason}", file=sys.stderr)
        return 2
    # SIGTERM ends as Ctrl-C does: by an exception, so that every contestant's processes are ended on the way out.
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        with Screen() as screen:
            report = _run(options, rounds, screen)
    except PeerFailed as failure:
        print(f"python -m minidp.bench {options.bench}: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; all contestants have ended", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    report.print(console)
    if options.json:
        report.write(options.json)
    return int(isinstance(report, fault_report.FaultReport) and bool(report.problems))


def _run(options: argparse.Namespace, rounds: Rounds, screen: Screen) -> Report | fault_report.FaultReport:
    if options.bench == "faults":
        trials = options.trials or (len(faults.KINDS) if options.quick else 10 * len(faults.KINDS))
        screen.phase("faults", trials)
        return fault_report.FaultReport(faults.run(trials, options.seed, screen.tick), options.seed)
    if options.device == "cuda":
        return step_cuda.run(rounds, screen) if options.bench == "step" else device_memory.run(rounds, screen)
    if options.bench == "allreduce":
        sizes = options.sizes or (allreduce.QUICK_SIZES if options.quick else allreduce.SIZES)
        return allreduce.run(rounds, screen, sizes)
    if options.bench == "compress":
        return compress.run(rounds, screen, compress.QUICK if options.quick else compress.FULL)
    if options.bench == "ps":
        return ps.run(rounds, screen, *((ps.QUICK_SIZES, pace.QUICK) if options.quick else (ps.SIZES, pace.FULL)))
    if options.bench == "virtual":
        return virtual.run(rounds, screen, virtual.QUICK if options.quick else virtual.FULL)
    rooms = {
        "step": step,
        "scaling": scaling,
        "hybrid": hybrid,
        "startup": startup,
        "micro-shards": micro_shards,
        "whereabouts": whereabouts,
    }
    run: Callable[[Rounds, Screen], Report] = rooms[options.bench].run
    return run(rounds, screen)


def parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--pairs",
        type=_positive,
        metavar="N",
        help=f"rounds; default {PROPER_PAIRS}, the fewest that count; fewer are labelled a smoke run",
    )
    common.add_argument("--json", type=Path, metavar="FILE", help="write all figures and every sample to FILE")
    common.add_argument("--quick", action="store_true", help="one round of short bursts, only to see that it runs")
    common.add_argument(
        "--burst",
        type=_seconds,
        metavar="SECONDS",
        help=f"how long each contestant runs in each round; default {BURST_S:g} s",
    )
    form = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        "python -m minidp.bench", description=DESCRIPTION, epilog=EPILOG, formatter_class=form
    )
    benches = top.add_subparsers(dest="bench", required=True, metavar="{" + ",".join(BENCHES) + "}")
    for name, text in BENCHES.items():
        bench = benches.add_parser(
            name,
            help=text,
            description=f"{text}\n\n{DESCRIPTION}",
            epilog=EPILOG,
            parents=[common],
            formatter_class=form,
        )
        bench.set_defaults(device="cpu")
        if name in ON_DEVICES:
            bench.add_argument("--device", choices=("cpu", "cuda"), help=ON_DEVICES[name])
        if name == "faults":
            bench.add_argument(
                "--trials", type=_positive, metavar="N", help="faults, their kinds in turn; default 10 of each"
            )
            bench.add_argument("--seed", type=int, default=0, help="of their moments; default %(default)s")
        if name == "allreduce":
            bench.add_argument(
                "--sizes",
                type=_size,
                nargs="+",
                metavar="SIZE",
                help="bytes, with K or M for 1024 and 1024²; default 4K 16K 64K 256K 1M 4M 16M 128M",
            )
    return top


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of rounds: give 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 30:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length of a burst: give seconds, 30 at most")
    return seconds


def _size(text: str) -> int:
    digits, factor = text.upper().removesuffix("B"), 1
    for unit, value in (("K", 2**10), ("M", 2**20)):
        if digits.endswith(unit):
            digits, factor = digits[:-1], value
    nbytes = int(digits) * factor if digits.isdigit() else 0
    if nbytes < 4 or nbytes % 4:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size: give a multiple of 4 bytes, as in 4096, 64K or 16M"
        )
    return nbytes


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
