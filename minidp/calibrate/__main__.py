"""``python -m minidp.calibrate``: JSON to standard output, and nothing else there."""

from __future__ import annotations

import argparse
import json
import sys

import minidp
from minidp.calibrate import probes
from minidp.launch import cores

DESCRIPTION = """\
Times training steps of a few small models on this machine, with 1 worker and with 2, and counts what each step
computes. The result, JSON, is what minidp.sim.calibrate() turns into a Cluster for the virtual world."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and print. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m minidp.calibrate", description=DESCRIPTION)
    parser.add_argument(
        "--seconds",
        type=_seconds,
        default=probes.SECONDS,
        metavar="S",
        help="how long to measure, besides 1.5 s to start and warm up; default %(default)s",
    )
    parser.add_argument(
        "--workers",
        type=int,
        choices=(1, 2),
        default=min(2, cores()),
        help="1: leave out the steps with 2 workers; default 2, or 1 where there is one core (here: %(default)s)",
    )
    options = parser.parse_args(arguments)
    measured = minidp.spawn(probes.measure, options.workers, options.seconds, blas_threads=1, progress=False)[0]
    report = {"cores": cores(), "workers": options.workers, "seconds": options.seconds, **measured}
    json.dump(report, sys.stdout, indent=1)
    sys.stdout.write("\n")
    return 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 600:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time to measure for: give seconds, more than 0, up to 600"
        )
    return seconds


if __name__ == "__main__":
    sys.exit(main())
