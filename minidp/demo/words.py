"""Figures in words, as all reports of the demo write them; and in files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from minidp.trace import Event, write_chrome
from minidp.trace.lanes import time_unit
from minidp.trace.page import readable


def seconds(value: float | None) -> str:
    if value is None:
        return "–"
    unit_s, unit = time_unit(value, digits=3)
    return f"{value / unit_s:.3g} {unit}"


def in_bytes(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 999.5:  # 1000 would take an exponent
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GB"


def number(count: int, thing: str) -> str:
    """``1 worker``, ``4 workers``."""
    return f"{count} {thing}{'s' * (count != 1)}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def write(console: Console, path: Path | None, figures: Any) -> None:
    """``--json``: a dataclass of figures to that file, if there is one."""
    if path is not None:
        path.write_text(json.dumps(asdict(figures), indent=2) + "\n")
        told(console, "Figures", path)


def write_trace(console: Console, path: Path | None, events: list[Event]) -> None:
    """``--trace``: the events of all ranks to that file, if there is one."""
    if path is not None:
        write_chrome(path, events)
        told(console, "Trace of all ranks", path, " (open it at https://ui.perfetto.dev)")


def told(console: Console, what: str, path: Path, more: str = "") -> None:
    """``Figures: FILE``, as it is and in one line: names may have brackets, and be longer than a line."""
    console.print(f"{what}: {readable(str(path))}{more}", highlight=False, markup=False, soft_wrap=True)
