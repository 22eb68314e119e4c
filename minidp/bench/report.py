"""What a bench has found: as a table with the bars beside the figures, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from minidp.bench import machine
from minidp.bench.contest import Rounds
from minidp.bench.measure import PROPER_PAIRS, Figure

QUIET = 0.1  # of a core; the services of an idle machine take a few hundredths


@dataclass(frozen=True)
class Line:
    """One contestant at one job.

    Args:
        job, who: what was done and by whom.
        figures: medians by column key.
        samples_s: seconds per repetition, one a round.
        what: what ``result`` compares: ``"MPICH / ours"``.
        result: the comparison, with its bar if it has one.
    """

    job: str
    who: str
    figures: Mapping[str, float]
    samples_s: Sequence[float]
    what: str = ""
    result: Figure | None = None

    def compared(self, what: str, result: Figure) -> Line:
        """This line with its comparison."""
        return replace(self, what=what, result=result)

    def as_json(self) -> dict[str, Any]:
        line: dict[str, Any] = {
            "job": self.job,
            "who": self.who,
            **self.figures,
            "samples_s": list(self.samples_s),
        }
        if self.result is not None:
            figure = self.result
            line["comparison"] = {
                "what": self.what,
                "median": figure.median,
                "quartiles": [figure.low, figure.high],
                "bar": None if figure.bar is None else str(figure.bar),
                "met": figure.met,
            }
        return line


@dataclass
class Report:
    """All lines of one bench.

    Args:
        bench: its name on the command line.
        title: what is measured, in a few words.
        columns: heading and number format of the ``Line.figures`` that the table shows, by key.
        others: cores' worth of time that other processes took meanwhile, if it could be measured.
        notes: how to read the figures; printed under the table.
    """

    bench: str
    title: str
    rounds: Rounds
    columns: Mapping[str, tuple[str, str]]
    lines: list[Line] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    others: float | None = None
    notes: Sequence[str] = ()
    machine: dict[str, Any] = field(default_factory=machine.describe)

    def as_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "machine": self.machine,
            "pairs": self.rounds.pairs,
            "burst_s": self.rounds.burst_s,
            "proper": self.rounds.proper,
            "others_cores": self.others,
            "missing": self.missing,
            "lines": [line.as_json() for line in self.lines],
        }

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_json(), indent=1) + "\n")

    def print(self, console: Console) -> None:
        """The header line, the table, what is missing, how many bars are met."""
        console.print(f"[dim]{escape(machine.headline(self.machine))}")
        for hidden in (set(), {"quartiles"}, {"quartiles", *list(self.columns)[1:]}):
            table = self._table(hidden)
            if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
                break
        console.print(table)
        for sentence in [*self.missing, *self.notes]:
            console.print(escape(sentence), style="yellow" if sentence in self.missing else "dim")
        console.print(self._verdict())
        if self.others is not None and self.others > QUIET:
            others = f"other processes took {self.others:.2f} of its {self.machine['cores']} cores"
            console.print(f"[bold yellow]Not a quiet machine: {others}. These figures are noise.")

    def _table(self, hidden: set[str]) -> Table:
        """The table without the columns ``hidden``, for narrow terminals."""
        pairs = self.rounds.pairs
        how = (
            f"medians of {pairs} alternating rounds"
            if self.rounds.proper
            else f"SMOKE RUN of {pairs} round{'s' * (pairs > 1)}, not a measurement ({PROPER_PAIRS} rounds are)"
        )
        columns = {key: column for key, column in self.columns.items() if key not in hidden}
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            title=f"{self.title}\n{how}",
            title_justify="left",
        )
        headings = [
            "",
            "",
            *(heading for heading, _ in columns.values()),
            "compared",
            "median",
            "quartiles",
            "bar",
        ]
        left = {"", "compared", "bar"}
        for heading in headings:
            if heading not in hidden:
                table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
        for _, group in groupby(self.lines, key=lambda line: line.job):
            lines = list(group)
            # A job's name of several parts stands beside its first lines, to keep the table narrow.
            parts = lines[0].job.split(", ") if len(lines) > 1 else [lines[0].job]
            for k, line in enumerate(lines):
                numbers = [
                    format(line.figures[key], spec) if key in line.figures else ""
                    for key, (_, spec) in columns.items()
                ]
                median, spread, bar = _cells(line.result)
                comparison = [median, bar] if "quartiles" in hidden else [median, spread, bar]
                job = parts[k] if k < len(parts) else ""
                table.add_row(job, line.who, *numbers, line.what, *comparison, end_section=line is lines[-1])
        return table

    def _verdict(self) -> str:
        judged = [line for line in self.lines if line.result is not None and line.result.met is not None]
        missed = [line for line in judged if line.result is not None and not line.result.met]
        if not judged:
            return "No bar could be checked."
        text = f"{len(judged) - len(missed)} of {len(judged)} bars met"
        names = [f"{line.job}: {line.what}" for line in missed]
        return escape(text + (". Missed: " + "; ".join(names) if names else "") + ".")


def _cells(figure: Figure | None) -> tuple[str, str, str]:
    if figure is None:
        return "", "", ""
    digits = 2 if figure.median < 10 else 1
    verdict = ""
    if figure.bar is not None:
        verdict = f"{figure.bar} [green]met[/]" if figure.met else f"{figure.bar} [bold red]missed[/]"
    return f"{figure.median:.{digits}f}", f"{figure.low:.{digits}f}–{figure.high:.{digits}f}", verdict
