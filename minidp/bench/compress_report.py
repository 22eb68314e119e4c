"""What `compress` has found, as three tables for those who want to know whether to compress."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from minidp.bench import machine
from minidp.bench.compress_training import CLUSTERS
from minidp.bench.jobs import human_bytes
from minidp.bench.measure import PROPER_PAIRS, Figure
from minidp.bench.report import QUIET, Line, Report

GBITS = (1, 10, 100)  # a network of an office, of a data centre, of a data centre for training
PAYS, LOSES = 1.1, 1 / 1.1
ROUTES = ("sum", "gather", "owners")

NOTES_ALONE = (
    "The gradient: {size} of float32, a {side} × {side} matrix of random numbers with a heavy tail, as "
    "gradients have it: most are small, a few 10 to 100 times larger (Student's t, 3 degrees of freedom).",
    "payload: what travels in place of the gradient, with all that belongs to it: packed numbers, scales, "
    "positions. bits: of the payload for each number; float32 has 32. smaller: bytes of the gradient over "
    "those of the payload.",
    "encode: from gradient to payload; decode: from payload to array. GB/s: 10⁹ bytes of the float32 gradient "
    "a second, median of the rounds; in brackets their quartiles. Without error feedback. (PowerSGD's encode "
    "has a decode in it.)",
)
NOTES_TOGETHER = (
    "+ef: with error feedback: what a payload leaves out is remembered, and added to the next gradient.",
    "added up: sum: payloads are added as they travel, as in any all-reduce. gather: everybody gets "
    "everybody's, and adds up: grows with N. owners: each rank owns a part, gets it from all, adds up, and "
    "sends the sum to all, compressed once more.",
    "error: ‖x − C(x)‖ / ‖x‖ of one call: 0 is exact, 1 is as if nothing had come through. Beyond 1 rounding at "
    "random is larger than the gradient, but 0 in the mean. With +ef the error is made up for later. sign has "
    "none: it says nothing of length. Random numbers are PowerSGD's worst case: true gradients have structure.",
    "sent: MB (2²⁰ bytes) of one rank a step, of N = 2 and of N = 8 ranks. computing: ms of one of 8 ranks a "
    "step: all that it encodes, decodes and adds, error feedback too. (Not: packing into messages, and, for "
    "either side, additions inside an all-reduce.) sign sends a second bit a number where there are zeros, as "
    "a vote of 8 that ends 4 to 4 is.",
    "break-even, for 8 ranks: on a network of so many Gb/s (10⁹ bits a second) it makes no difference: bits "
    "saved over seconds of computing. On a slower one it pays to compress, on a faster one time is lost.",
    "with 1, 10, 100 Gb/s: how many times sooner 8 ranks are done than with float32, whose ring all-reduce "
    "sends 2(N−1)/N of the gradient. pays: 1.1 times or more. loses: takes 1.1 times as long, or longer. "
    "even: between.",
)
NOTES_TRAINING = (
    "{model} a rank. ms: of a step, in virtual time: forward, backward, compress, exchange, update; computing "
    "takes what the meter counts, encoding too. × float32: steps/s over those without compression.",
    "Two kinds of node. default: that of the virtual world, 1 TFLOP/s, memory costs nothing. like a core: as "
    "one of this machine, 0.1 TFLOP/s, 20 GB/s of memory, 2 µs an operation. Both: 1 Gb/s, 5 µs a message.",
)


@dataclass
class Column:
    """One of a table.

    Args:
        heading: over it, of one line or two.
        left: how it is aligned.
        spare: narrow terminals do without: the highest number goes first; 0 stays.
    """

    heading: str
    left: bool = False
    spare: int = 0
    cells: list[str] = field(default_factory=list)


@dataclass
class CompressReport(Report):
    """All lines. ``job`` is the compressor; ``who``: encode or decode, how payloads are added up, or which nodes.

    Args:
        side: of the matrix that is compressed.
        model: that virtual ranks train.
    """

    side: int = 0
    model: str = ""

    def print(self, console: Console) -> None:
        """Three tables, each with its notes; how many bars are met."""
        console.print(f"[dim]{escape(machine.headline(self.machine))}")
        size, pairs = human_bytes(4 * self.side**2), self.rounds.pairs
        how = (
            f"medians of {pairs} rounds"
            if self.rounds.proper
            else f"SMOKE RUN of {pairs} round{'s' * (pairs > 1)}, not a measurement ({PROPER_PAIRS} rounds are)"
        )
        for title, columns, notes in (
            (f"1. There and back: {size} of float32, one thread\n{how}", self._alone(), NOTES_ALONE),
            (f"2. N ranks add up {size} of float32: where it pays\n{how}", self._together(), NOTES_TOGETHER),
            (
                "3. 8 virtual ranks train on a network of 1 Gb/s\nexact: each run finds the same",
                self._training(),
                NOTES_TRAINING,
            ),
        ):
            console.print()
            console.print(fitting(columns, title, console))
            for note in notes:
                note = note.format(size=size, side=self.side, model=self.model)
                console.print(escape(note), style="dim", highlight=False)
        console.print()
        console.print(self._verdict())
        if self.others is not None and self.others > QUIET:
            others = f"other processes took {self.others:.2f} of its {self.machine['cores']} cores"
            console.print(f"[bold yellow]Not a quiet machine: {others}. These figures are noise.")

    # -- tables ------------------------------------------------------------------------------------------

    def _alone(self) -> list[Column]:
        columns = [Column("compressor", left=True), Column("payload", spare=1), Column("bits"), Column("smaller")]
        for way in ("encode", "decode"):
            columns += [Column(f"{way}\nGB/s"), Column("\nquartiles", spare=2), Column("\nbar", left=True)]
        decodes = {line.job: line for line in self._lines("decode")}
        for line in self._lines("encode"):
            smaller = line.figures["smaller"]
            payload = human_bytes(round(line.figures["payload_bytes"]))
            row = [line.job, payload, f"{32 / smaller:.2f}", f"{smaller:,.1f}×"]
            for each in (line, decodes[line.job]):
                figure = each.result
                assert figure is not None
                row += [f"{figure.median:.2f}", f"[dim]({figure.low:.2f}–{figure.high:.2f})[/]", _bar(figure)]
            _add(columns, row)
        return columns

    def _together(self) -> list[Column]:
        columns = [
            Column("compressor", left=True),
            Column("added\nup", left=True, spare=1),
            Column("\nerror", spare=2),
            Column("sent MB\nN = 2", spare=3),
            Column("\nN = 8", spare=3),
            Column("computing\nms", spare=1),
            Column("break-even\nGb/s"),
            *(Column(f"with\n{gbits} Gb/s", left=True) for gbits in GBITS),
        ]
        for line in self._lines(*ROUTES):
            figures = line.figures
            row = [
                line.job,
                line.who,
                f"{figures['error']:.4f}" if "error" in figures else "–",
                f"{figures['sent_bytes_2'] / 2**20:.2f}",
                f"{figures['sent_bytes_8'] / 2**20:.2f}",
                f"{figures['computing_ms']:,.1f}",
                f"{figures['break_even_Gb_per_s']:,.1f}",
                *(verdict(figures[f"times_{gbits}_Gb_per_s"]) for gbits in GBITS),
            ]
            _add(columns, row)
        return columns

    def _training(self) -> list[Column]:
        columns, (default, core) = [Column("compressor", left=True)], CLUSTERS
        for nodes in (default, core):
            columns += [Column(f"{nodes}\nms"), Column("\n× float32"), Column("\nbar", left=True)]
        others = {line.job: line for line in self._lines(core)}
        for line in self._lines(default):
            row = ["float32" if line.job == "none" else line.job]
            for each in (line, others[line.job]):
                times = "1" if each.result is None else f"{each.result.median:.2f}"
                row += [f"{each.figures['ms']:.2f}", times, _bar(each.result)]
            _add(columns, row)
        return columns

    def _lines(self, *whos: str) -> list[Line]:
        return [line for line in self.lines if line.who in whos]


def verdict(times: float) -> str:
    """``12.87× pays``, in a colour."""
    word, style = ("pays", "green") if times >= PAYS else ("loses", "red") if times <= LOSES else ("even", "dim")
    return f"[{style}]{times:5.2f}× {word}[/]"


def fitting(columns: Sequence[Column], title: str, console: Console) -> Table:
    """The table with as many columns as there is room for."""
    for most in range(max(column.spare for column in columns), -1, -1):
        table = _table([column for column in columns if column.spare <= most], title)
        if Measurement.get(console, console.options.update(max_width=1000), table).maximum <= console.width:
            break
    return table


def _table(columns: Sequence[Column], title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, title=title, title_justify="left")
    for column in columns:
        table.add_column(
            column.heading, justify="left" if column.left else "right", no_wrap=True, vertical="bottom"
        )
    for row in zip(*(column.cells for column in columns)):
        table.add_row(*row)
    return table


def _add(columns: Sequence[Column], row: Iterable[str]) -> None:
    for column, cell in zip(columns, row, strict=True):
        column.cells.append(cell)


def _bar(figure: Figure | None) -> str:
    if figure is None or figure.bar is None:
        return ""
    return f"{figure.bar} [green]met[/]" if figure.met else f"{figure.bar} [bold red]missed[/]"
