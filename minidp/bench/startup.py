"""``startup``: what ``import minidp`` adds to ``import numpy``, and how soon a spawned function runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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
    "import: each in a fresh interpreter, byte code cached; alternating, differences within a round.",
    "`import minidp` loads its rooms on first use; the row below it is all that a training script loads.",
    "spawn: from the call in the parent until the function runs in the last of 2 workers, in a fresh interpreter.",
)


def _timed(statements: str) -> list[str]:
    return ["-c", f"import time; start = time.perf_counter(); {statements}; print(time.perf_counter() - start)"]


IMPORTS = {
    "import numpy": _timed("import numpy"),
    "import minidp": _timed("import numpy, minidp"),
    "all that trains": _timed("import numpy, minidp; from minidp import data, nn, optim, parallel; minidp.spawn"),
}
SPAWNS = ["-m", "minidp.bench.peers.clock"]


def run(rounds: Rounds, screen: Screen) -> Report:
    report = Report("startup", "start-up times", rounds, COLUMNS, notes=NOTES)
    samples: dict[str, list[float]] = {name: [] for name in IMPORTS}
    spawns: list[list[float]] = []
    with tempfile.TemporaryDirectory(prefix="minidp-bench-") as cache:
        fresh = Interpreters(cache)
        screen.phase("filling the cache of byte code")
        for arguments in (*IMPORTS.values(), SPAWNS):
            fresh.run(arguments)
        screen.phase("startup", rounds.pairs * (len(IMPORTS) + 1))
        for _ in range(rounds.pairs):
            for name, arguments in IMPORTS.items():
                samples[name].append(fresh.run(arguments))
                screen.tick()
            spawns.append(fresh.run(SPAWNS))
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


class Interpreters:
    """Fresh interpreters that share one cache of byte code, as programs do that are started more than once."""

    def __init__(self, cache: str) -> None:
        home = str(Path(__file__).resolve().parents[2])
        search = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._environ = os.environ | dict.fromkeys(blas.VARIABLES, "1")
        self._environ |= {"PYTHONPATH": search, "PYTHONPYCACHEPREFIX": cache}
        self._environ.pop("PYTHONDONTWRITEBYTECODE", None)

    def run(self, arguments: Sequence[str]) -> Any:
        """What a new interpreter with these arguments prints, as JSON."""
        done = subprocess.run(
            [sys.executable, *arguments], env=self._environ, capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr}")
        return json.loads(done.stdout)
