"""``startup``: what ``import minidp`` adds to ``import numpy``, and how soon a spawned function runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from minidp.bench.contest import Rounds
from minidp.bench.measure import Bar, Figure
from minidp.bench.report import Line, Report
from minidp.bench.screen import Screen
from minidp.launch import blas

LIMIT = Bar(60, at_least=False)
COLUMNS = {"ms": ("ms", ".1f")}
NOTES = (
    "import: each in a fresh interpreter, files in the page cache; alternating, differences within a round.",
    "`import minidp` loads its rooms on first use; the row below it is all that a training script loads.",
    "spawn: from the call in the parent until the function runs in the last of 2 workers, in a fresh interpreter.",
)

_TIMED = "import time; start = time.perf_counter(); {}; print(time.perf_counter() - start)"
IMPORTS = {
    "import numpy": "import numpy",
    "import minidp": "import numpy, minidp",
    "all that trains": "import numpy, minidp; from minidp import data, nn, optim, parallel; minidp.spawn",
}
_SPAWNS = "import json; from minidp.bench.startup import spawn_times; print(json.dumps(spawn_times()))"


def run(rounds: Rounds, screen: Screen) -> Report:
    report = Report("startup", "start-up times", rounds, COLUMNS, notes=NOTES)
    screen.phase("startup", rounds.pairs * (len(IMPORTS) + 1))
    samples: dict[str, list[float]] = {name: [] for name in IMPORTS}
    spawns: list[list[float]] = []
    for _ in range(rounds.pairs):
        for name, statements in IMPORTS.items():
            samples[name].append(fresh_interpreter(_TIMED.format(statements)))
            screen.tick()
        spawns.append(fresh_interpreter(_SPAWNS))
        screen.tick()
    numpy_s = samples["import numpy"]
    for name, seconds in samples.items():
        line = Line("import", name, {"ms": median(seconds) * 1e3}, seconds)
        if seconds is not numpy_s:
            over = [(ours - base) * 1e3 for ours, base in zip(seconds, numpy_s)]
            line = line.compared("ms over numpy", Figure.of(over, LIMIT if name == "import minidp" else None))
        report.lines.append(line)
    for name, k in (("first", 0), ("second", 1)):
        seconds = [times[k] for times in spawns]
        line = Line("spawn of 2 workers", name, {"ms": median(seconds) * 1e3}, seconds)
        if name == "second":
            line = line.compared("ms until it runs", Figure.of([1e3 * s for s in seconds], LIMIT))
        report.lines.append(line)
    return report


def spawn_times() -> list[float]:
    """Seconds until a function runs on both of 2 workers: of this process's first spawn, and of its second."""
    import minidp

    times = []
    for _ in range(2):
        start = time.perf_counter()  # CLOCK_MONOTONIC: one clock for all processes of a machine
        times.append(max(minidp.spawn(_clock, 2, progress=False)) - start)
    return times


def _clock(comm: Any) -> float:
    return time.perf_counter()


def fresh_interpreter(code: str) -> Any:
    """What ``code`` prints in an interpreter of its own, as JSON."""
    home = str(Path(__file__).resolve().parents[2])
    search = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = os.environ | dict.fromkeys(blas.VARIABLES, "1") | {"PYTHONPATH": search}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"{code!r} failed in a fresh interpreter:\n{done.stderr}")
    return json.loads(done.stdout)
