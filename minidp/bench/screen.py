"""What is seen while a bench runs: one line of progress on standard error, gone when it ends."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


class Screen:
    """A progress line, as a context manager; silent where standard error is not a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=console,
            transient=True,
            auto_refresh=False,  # a thread that redraws would take a core from whoever is measured
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("", total=None)

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def phase(self, text: str, total: int | None = None) -> None:
        """What happens now, and of how many bursts it consists."""
        self._progress.reset(self._task, description=text, total=total)
        self._progress.refresh()

    def tick(self) -> None:
        """One burst is done. Called between bursts, when nobody is measured."""
        self._progress.advance(self._task)
        self._progress.refresh()
