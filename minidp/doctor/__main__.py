"""``python -m minidp.doctor``: a page for people, ``--json`` for programs, an exit status for both."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from minidp.doctor import probe, report
from minidp.doctor.facts import Machine
from minidp.doctor.host import look_at_host, look_at_software
from minidp.doctor.trials import try_worlds
from minidp.doctor.verdicts import cpu_works, cuda_works, verdicts

DESCRIPTION = """\
What this machine has, and what of minidp therefore works: each thing is tried, not guessed. GPUs are looked at in
processes of their own, with a time limit, so that a broken driver is a line of the page. The exit status is 0 if
training on the processor works: a machine without a GPU is healthy."""


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    console = Console(highlight=False)
    machine = examine(Console(stderr=True))
    if args.json == Path("-"):
        sys.stdout.write(as_json(machine))
    else:
        report.show(console, machine, verdicts(machine))
        if args.json is not None:
            args.json.write_text(as_json(machine))
            console.print(f"\nFacts: {args.json}", markup=False, soft_wrap=True)
    fine = cpu_works(machine) and (args.device == "cpu" or cuda_works(machine))
    return int(not fine)


def examine(console: Console) -> Machine:
    """Look at everything. Takes two seconds, with GPUs ten or twenty; a terminal is told what is tried."""
    with console.status("looking at the processor and the software") as status:
        host, software = look_at_host(), look_at_software()
        status.update("letting two ranks take a step, in each world")
        worlds = try_worlds()
        status.update(f"looking at GPUs, for at most {2 * probe.LIMIT_S:g} s")
        cuda = probe.look_at_cuda()
    return Machine(host, software, cuda, worlds)


def as_json(machine: Machine) -> str:
    facts: dict[str, Any] = {
        **asdict(machine),
        "works": {"cpu": cpu_works(machine), "cuda": cuda_works(machine)},
        "verdicts": [asdict(verdict) for verdict in verdicts(machine)],
    }
    return json.dumps(facts, indent=2) + "\n"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m minidp.doctor", description=DESCRIPTION)
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="what must work for exit status 0: the processor alone, or GPUs too (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="write all that was found to FILE; -: to standard output, and no page",
    )
    args = parser.parse_args(argv)
    path: Path | None = args.json
    if path not in (None, Path("-")) and not _writable(path):
        parser.error(f"--json {path}: give a file in a folder that is there and may be written to")
    return args


def _writable(path: Path) -> bool:
    return not path.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)


if __name__ == "__main__":
    sys.exit(main())
