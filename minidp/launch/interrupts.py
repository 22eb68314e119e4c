"""Ctrl-C while workers are being started or cleaned away is held back, and delivered when that is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

NUMBERS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP


@contextmanager
def held() -> Iterator[None]:
    """Hold SIGINT back in this block, and SIGTERM and SIGHUP where the program handles them: interrupted in the
    middle of a start, the server of processes would complain. What came goes to the handlers afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs signal handlers in the main thread only: nothing can interrupt this one
        return
    arrived: list[tuple[int, FrameType | None]] = []
    before = {number: signal.getsignal(number) for number in NUMBERS}
    held_back = [number for number in NUMBERS if number == signal.SIGINT or callable(before[number])]
    for number in held_back:
        signal.signal(number, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        for number in held_back:
            handler = before[number]
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        if arrived:
            first, frame = arrived[0]
            handler = before[signal.Signals(first)]
            if callable(handler):
                handler(first, frame)
