"""Ctrl-C while workers are being started or cleaned away is held back, and delivered when that is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held() -> Iterator[None]:
    """Hold SIGINT back in this block; what came meanwhile goes to the handler that was there, afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only: nothing can interrupt this one
        return
    arrived: list[FrameType | None] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: arrived.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
        if arrived and callable(before):
            before(signal.SIGINT, arrived[0])
