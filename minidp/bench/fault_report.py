"""What `faults` has seen, as a table and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from minidp.bench import machine


@dataclass
class Trial:
    """One fault, and what was seen."""

    fault: str
    struck: bool = False
    """The injector has written down that it did it."""
    noticed_s: float | None = None
    problems: list[str] = field(default_factory=list)


@dataclass
class Trials:
    """All trials of one kind."""

    kind: str
    limit_s: float
    """The bar: until somebody is told; of the parent's end, until nothing is left."""
    trials: list[Trial] = field(default_factory=list)

    @property
    def struck(self) -> int:
        return sum(trial.struck for trial in self.trials)

    @property
    def noticed_s(self) -> list[float]:
        return [trial.noticed_s for trial in self.trials if trial.noticed_s is not None]

    @property
    def problems(self) -> list[str]:
        return [f"{trial.fault}: {problem}" for trial in self.trials for problem in trial.problems]

    def as_dict(self) -> dict[str, Any]:
        times = self.noticed_s
        return {
            "kind": self.kind,
            "trials": len(self.trials),
            "struck": self.struck,
            "noticed_median_s": median(times) if times else None,
            "noticed_max_s": max(times, default=None),
            "limit_s": self.limit_s,
            "problems": self.problems,
            "each": [asdict(trial) for trial in self.trials],
        }


@dataclass
class FaultReport:
    """The matrix, as a table and as JSON."""

    kinds: list[Trials]
    seed: int

    @property
    def problems(self) -> list[str]:
        return [problem for each in self.kinds for problem in each.problems]

    def print(self, console: Console) -> None:
        described = machine.describe()
        console.print(machine.headline(described), highlight=False, style="dim")
        count = sum(len(each.trials) for each in self.kinds)
        table = Table(box=box.SIMPLE, title=f"{count} faults, seed {self.seed}", title_justify="left")
        for heading in ("fault", "trials", "struck", "told after", "latest", "bar", "problems"):
            table.add_column(heading, justify="left" if heading == "fault" else "right")
        for each in self.kinds:
            told = each.noticed_s
            limit = f"≤ {each.limit_s * 1e3:,.0f} ms" if told else ""
            table.add_row(
                each.kind,
                str(len(each.trials)),
                str(each.struck),
                f"{median(told) * 1e3:.1f} ms" if told else "–",
                f"{max(told) * 1e3:.1f} ms" if told else "–",
                limit,
                str(len(each.problems)),
            )
        console.print(table)
        for line in NOTES:
            console.print(line, highlight=False, style="dim")
        for problem in self.problems:
            console.print(f"[red]problem:[/] {problem}", highlight=False)
        if not self.problems:
            console.print("No hang, nothing left, no torn step; everybody named rightly and in time.")

    def write(self, path: Path) -> None:
        found = {"bench": "faults", "seed": self.seed, "machine": machine.describe()}
        path.write_text(json.dumps({**found, "kinds": [each.as_dict() for each in self.kinds]}, indent=1) + "\n")


NOTES = (
    "told after: from the fault until the first rank, or the parent, knows; of the parent's own end, until no",
    "process is left. Pauses, slowness and cut files are no failures: the run must end with the same bits.",
    "A trial has a problem if the wrong one is named, a survivor's step or the newest checkpoint is torn, or a",
    "process, segment, descriptor or temporary file is left.",
)
