"""``--report``: what was run, what came of it, and where, as one page that needs no other file."""

from __future__ import annotations

import platform
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minidp.demo import report
from minidp.demo.curve import Moment
from minidp.demo.words import in_bytes, number, told
from minidp.launch import cores
from minidp.trace import Event, plot_timeline
from minidp.trace.curves import plot_curves
from minidp.trace.page import page, picture, table

if TYPE_CHECKING:
    from minidp.demo import compare, compare_compressors, hybrid_outcome
    from minidp.trace.page import Figure

Section = tuple[str, list[str]]
"""A heading, and what stands below it as HTML."""


class Telling(Console):
    """A console that remembers what it has said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[Any] = []

    def print(self, *objects: Any, **options: Any) -> None:
        plain = options.get("markup") is False
        self.said += [Text(each) if plain and isinstance(each, str) else each for each in objects]
        super().print(*objects, **options)


def of_training(
    console: Console,
    args: Namespace,
    result: report.Outcome,
    curves: Mapping[str, Sequence[Moment]],
    events: list[Event],
) -> None:
    """N workers beside one. ``events``: of the last two steps."""
    ranks = report.interesting(args.workers, args.cluster)
    window = [event for event in events if event.rank in ranks]
    some = f"{len(ranks)} of " if len(ranks) < args.workers else ""
    timeline = plot_timeline(window, title=f"The last two steps of {some}{number(args.workers, 'worker')}")
    rows = [
        ("sent by a worker in a step", in_bytes(result.bytes_per_step)),
        (f"sent by a worker in {number(result.steps, 'step')}", in_bytes(result.bytes_per_step * result.steps)),
    ]
    if result.compress is not None:
        rows.insert(1, ("without compression, as float32", in_bytes(result.bytes_per_step_float32)))
    _write(
        console,
        args,
        [
            ("How the loss falls", _losses(curves, args)),
            ("Two steps", [picture(timeline, f"Timeline of two steps of {args.workers} workers")]),
            ("Bytes", [table((), rows)]),
        ],
    )


def of_hybrid(
    console: Console,
    args: Namespace,
    result: hybrid_outcome.Outcome,
    curves: Mapping[str, Sequence[Moment]],
    timeline: Figure,
) -> None:
    """A mesh of workers beside one."""
    words = {"dp": "between replicas (dp)", "tp": "within layers (tp)", "pp": "between stages (pp)"}
    rows = [(words[axis], in_bytes(sent)) for axis, sent in result.bytes_per_step.items()]
    _write(
        console,
        args,
        [
            ("How the loss falls", _losses(curves, args)),
            ("One step", [picture(timeline, "Timeline of one step of a replica")]),
            ("Bytes", [table(("sent by a rank in a step", "at most"), rows)]),
        ],
    )


def of_strategies(
    console: Console,
    args: Namespace,
    result: compare.Comparison,
    curves: Figure,
    events: Mapping[str, list[Event]],
) -> None:
    """Strategies beside each other."""
    timelines = []
    for name, of_run in events.items():
        ranks = report.interesting(args.workers, args.cluster)
        window = [event for event in report.last_steps(of_run, 2) if event.rank in ranks]
        figure = plot_timeline(window, title=f"{name}: since a worker began its last step but one")
        timelines.append(picture(figure, f"Timeline of the last steps of {name}"))
    rows = [
        (
            each.strategy,
            in_bytes(each.bytes_per_step),
            f"{sum(each.steps):,}",
            in_bytes(each.bytes_per_step * sum(each.steps)),
        )
        for each in result.strategies
    ]
    _write(
        console,
        args,
        [
            ("How the loss falls", [picture(curves, "Training loss against time, and staleness")]),
            ("Two steps", timelines),
            ("Bytes", [table(("", "sent in a step", "steps of all workers", "sent in all"), rows)]),
        ],
    )


def of_compressors(console: Console, args: Namespace, result: compare_compressors.Survey, figure: Figure) -> None:
    """Compressors beside each other."""
    rows = [
        (
            each.compressor,
            in_bytes(each.bytes_per_step),
            f"{each.times_less:.1f}",
            in_bytes(each.bytes_per_step * result.steps),
        )
        for each in result.compressors
    ]
    header = ("", "sent by a rank in a step", "times less", f"in {number(result.steps, 'step')}")
    _write(
        console,
        args,
        [
            (
                "What is saved, and what is lost",
                [picture(figure, "Test accuracy against bytes, and against time")],
            ),
            ("Bytes", [table(header, rows)]),
        ],
    )


def _losses(curves: Mapping[str, Sequence[Moment]], args: Namespace) -> list[str]:
    """By steps, where the curves should be one; by time, where they should not."""
    by_step = {name: [(float(at.step), at.loss) for at in curve] for name, curve in curves.items()}
    by_time = {name: [(at.time_s, at.loss) for at in curve] for name, curve in curves.items()}
    clock = "virtual time" if args.cluster else "time"
    return [
        "<p>The loss of the batches: the mean over all workers' samples of a step, or of a few.</p>",
        picture(plot_curves(by_step, {}, clock="", unit="steps"), "Training loss against steps"),
        picture(plot_curves(by_time, {}, clock=clock), "Training loss against time"),
    ]


def _write(console: Console, args: Namespace, sections: list[Section]) -> None:
    assert isinstance(console, Telling)
    said = list(console.said)
    first = next((i for i, each in enumerate(said) if isinstance(each, Table)), len(said))
    title, _, introduction = "\n".join(_plain(each) for each in said[:first]).partition("\n")
    parts = [
        ("What was run", [f'<pre class="wrap">{escape(args.command)}</pre>', *_paragraphs(introduction)]),
        ("Result", [html for each in said[first:] for html in _html(each)]),
        *sections,
        ("Environment", [table((), environment(args), words=True)]),
    ]
    text = page(title, [f"<h2>{escape(heading)}</h2>\n" + "\n".join(html) for heading, html in parts])
    args.report.write_text(text, encoding="utf-8")
    told(console, "Report", args.report)


def _html(said: Any) -> list[str]:
    if isinstance(said, Table):
        columns = [[_plain(cell) for cell in column.cells] for column in said.columns]
        caption = [f"<p><strong>{escape(_plain(said.title))}</strong></p>"] if said.title else []
        return [*caption, table([_plain(column.header) for column in said.columns], zip(*columns))]
    return _paragraphs(_plain(said))


def _plain(said: Any) -> str:
    return said.plain if isinstance(said, Text) else Text.from_markup(str(said)).plain


def _paragraphs(text: str) -> list[str]:
    """What is laid out by spaces keeps its layout; the rest may be broken anywhere."""
    found = []
    for block in filter(str.strip, text.split("\n\n")):
        laid_out = any(line.startswith("  ") for line in block.splitlines())
        name = "pre" if laid_out else "p"
        block = block.strip("\n")
        found.append(f'<{name} class="said">{escape(block)}</{name}>')
    return found


def environment(args: Namespace) -> Iterable[tuple[str, str]]:
    """Where the figures were taken."""
    workers = number(args.workers, "worker")
    where = f"{workers} on the virtual clock" if args.world == "virtual" else f"{workers}, a process each"
    yield "date", datetime.now().astimezone().isoformat(" ", "seconds")
    yield "minidp", version("minidp")
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "NumPy", version("numpy")
    yield "system", f"{platform.system()} {platform.release()}"
    yield "processor", f"{_processor()}, {number(cores(), 'core')}"
    yield "device", args.device.name
    yield "workers", where


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
