"""Workers' progress in the parent: one line a rank, in a terminal or a notebook, gone when the run ends.

In a terminal the bars own the last lines. Whatever else is to appear there, a worker's print or a log record,
erases them first, and the next refresh draws them again below it: nothing is lost, and nothing is painted over.
In a notebook they are one output that is replaced, which needs no widgets.
"""

from __future__ import annotations

import io
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from minidp.comm.board import RETURNED, Board

REFRESH_S = 0.1
DELAY_S = 0.5  # a run shorter than this shows nothing: a flash of bars tells nobody anything


def wanted(asked: bool | None) -> bool:
    """Whether to show progress: unless told not to, if there is a terminal or a notebook to show it in."""
    return asked is not False and (sys.stderr.isatty() or _in_notebook())


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class Display:
    """Progress bars fed from the board. Rich is imported when there is something to show, not before."""

    def __init__(self, board: Board, title: str, show: bool) -> None:
        self._board, self._title, self._show = board, title, show
        self._screen: _Terminal | _Notebook = _Notebook() if show and _in_notebook() else _Terminal()
        self._start = time.monotonic()
        self._next = self._start + DELAY_S
        self._bars: Any = None
        self._lock = threading.Lock()  # held while bars are drawn or erased, never while somebody prints
        self._printing = 0

    def refresh(self) -> None:
        """Redraw if it is time to."""
        now = time.monotonic()
        if not self._show or now < self._next:
            return
        self._next = now + REFRESH_S
        progress = [self._board.progress_of(rank) for rank in range(self._board.world_size)]
        if self._bars is None:
            if not any(done for done, _, _ in progress):
                return
            self._bars = _make_bars([self._board.name(rank) for rank in range(len(progress))])
        for rank, (done, total, note) in enumerate(progress):
            state = "returned" if self._board.state(rank) == RETURNED else note
            speed = f"{done / (now - self._start):,.0f} steps/s" if done else ""
            self._bars.update(
                self._bars.task_ids[rank], completed=done, total=total or None, note=state, speed=speed
            )
        with self._lock:
            if not self._printing:
                self._screen.draw(self._title, self._bars)

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """No bars during this block, which prints, in whatever thread. Nobody waits for it."""
        with self._lock:
            self._printing += 1
            self._screen.erase()
        try:
            yield
        finally:
            with self._lock:
                self._printing -= 1

    def write(self, text: str, stream: str) -> None:
        """Print a worker's output to where the parent prints."""
        target = sys.stdout if stream == "stdout" else sys.stderr
        with self.hidden():
            target.write(text)
            target.flush()
            self._screen.mid_line = target.isatty() and not text.endswith("\n")

    def close(self) -> None:
        """Remove the bars for good."""
        self._show = False
        with self._lock:
            self._screen.close()


class _Terminal:
    """Bars at the bottom of the terminal, on standard error."""

    def __init__(self) -> None:
        self.mid_line = False
        self._live: Any = None

    def draw(self, title: str, bars: Any) -> None:
        if self._live is None:
            from rich.console import Console, Group
            from rich.live import Live

            if self.mid_line:
                sys.stderr.write("\n")
                self.mid_line = False
            # Rich's own redirection would send standard output to standard error, even if that is a file.
            self._live = Live(
                Group(f"[dim]{title}", bars),
                console=Console(stderr=True, highlight=False),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._live.start()
        self._live.refresh()

    def erase(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    close = erase


class _Notebook:
    """Bars as one output of the cell, replaced in place."""

    def __init__(self) -> None:
        self.mid_line = False
        self._handle: Any = None

    def draw(self, title: str, bars: Any) -> None:
        from rich.console import Console, Group

        console = Console(file=io.StringIO(), record=True, width=100, force_jupyter=False, highlight=False)
        console.print(Group(f"[dim]{title}", bars))
        html = console.export_html(inline_styles=True, code_format="<pre>{code}</pre>", clear=False)
        self._show({"text/plain": console.export_text(), "text/html": html})

    def erase(self) -> None:
        """Prints do not run into it."""

    def close(self) -> None:
        if self._handle is not None:
            self._show({"text/plain": "", "text/html": ""})

    def _show(self, output: dict[str, str]) -> None:
        if self._handle is None:
            self._handle = import_module("IPython.display").display(output, raw=True, display_id=True)
        else:
            self._handle.update(output, raw=True)


def _make_bars(names: list[str]) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    bars = Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    for name in names:
        bars.add_task(name, total=None, note="", speed="")
    return bars
