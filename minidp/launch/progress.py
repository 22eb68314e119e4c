"""Workers' progress in the parent: one line a rank, in a terminal or a notebook, gone when the run ends."""

from __future__ import annotations

import sys
import time
from typing import Any

from minidp.comm.board import RETURNED, Board

REFRESH_S = 0.1
DELAY_S = 0.5  # a run shorter than this shows nothing: a flash of bars tells nobody anything


def wanted(asked: bool | None) -> bool:
    """Whether to show progress: as asked, or if somebody can be looking."""
    if asked is not None:
        return asked
    return sys.stderr.isatty() or "ipykernel" in sys.modules


class Display:
    """Progress bars fed from the board. Rich is imported when there is something to show, not before."""

    def __init__(self, board: Board, title: str, show: bool) -> None:
        self._board, self._title, self._show = board, title, show
        self._start = time.monotonic()
        self._next = self._start + DELAY_S
        self._live: Any = None
        self._tasks: list[Any] = []

    def refresh(self) -> None:
        """Redraw if it is time to."""
        now = time.monotonic()
        if not self._show or now < self._next:
            return
        self._next = now + REFRESH_S
        progress = [self._board.progress_of(rank) for rank in range(self._board.world_size)]
        if self._live is None:
            if not any(done for done, _, _ in progress):
                return
            self._open()
        for rank, (task, (done, total, note)) in enumerate(zip(self._tasks, progress)):
            state = "returned" if self._board.state(rank) == RETURNED else note
            speed = f"{done / (now - self._start):,.0f} steps/s" if done else ""
            self._live.update(task, completed=done, total=total or None, note=state, speed=speed)
        self._live.refresh()

    def write(self, text: str, stream: str) -> None:
        """Print a worker's output above the bars, to where the parent prints."""
        if self._live is not None and stream == "stdout" and not sys.stdout.isatty():
            sys.stdout.write(text)  # redirected to a file: as it is, the bars are elsewhere
        elif self._live is not None:
            self._live.console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
        else:
            target = sys.stdout if stream == "stdout" else sys.stderr
            target.write(text)
            target.flush()

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._live = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=True,
        )
        self._live.start()
        self._live.console.print(f"[dim]{self._title}")
        self._tasks = [
            self._live.add_task(f"rank {rank}", total=None, note="", speed="")
            for rank in range(self._board.world_size)
        ]
