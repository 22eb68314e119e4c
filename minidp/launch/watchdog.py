"""Who blocks outside of ``comm`` in a virtual world stops everybody: it is told so.

All ranks share one thread. A rank that waits there for a lock, a queue or a socket waits for ever if another rank
is to give it, since no other rank runs. The watchdog is a thread that sees that for ``timeout_s`` no event was
handled and the ranks' thread used no processor time; it then interrupts what blocks by a signal, whose handler
raises.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from greenlet import getcurrent

from minidp.comm.errors import CommError
from minidp.comm.venue import Venue
from minidp.launch.whereabouts import place_of, users_frame
from minidp.sim.loop import Task

_SIGNAL = signal.SIGURG  # ignored unless somebody asks for it
_IDLE = 0.05  # share of its time that a thread may compute and still count as blocked


@contextlib.contextmanager
def watching(venue: Venue, timeout_s: float) -> Iterator[None]:
    """Watch the run inside the block. Only in the main thread: elsewhere Python handles no signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(time, "pthread_getcpuclockid"):
        yield
        return

    told: set[str] = set()

    def interrupt(_: int, frame: FrameType | None) -> None:
        task = getcurrent()
        who = f"rank {task.rank}" if isinstance(task, Task) else "the virtual world"
        text = (
            f"{who} has blocked outside of comm for {timeout_s:g} s, {_place(frame)}. In the virtual world all "
            "ranks share one thread, so no other rank runs meanwhile: let ranks wait for each other by comm "
            f"alone. {venue.where_all_are(place_of(frame)[0])}"
        )
        if who in told:  # it has caught the first one, and blocks again
            raise SystemExit(text)
        told.add(who)
        raise CommError(text)

    before: Any = signal.signal(_SIGNAL, interrupt)
    over = threading.Event()
    watchdog = threading.Thread(
        target=_watch, args=(venue, timeout_s, threading.get_ident(), over), name="minidp-watchdog", daemon=True
    )
    watchdog.start()
    try:
        yield
    finally:
        over.set()
        watchdog.join()
        signal.signal(_SIGNAL, before)


def _watch(venue: Venue, timeout_s: float, thread: int, over: threading.Event) -> None:
    clock = time.pthread_getcpuclockid(thread)
    events, used, since = venue.loop.events, time.clock_gettime(clock), time.monotonic()
    looked, interval_s = since, min(timeout_s / 4, 1.0)
    while not over.wait(interval_s):
        now = time.monotonic()
        stopped, looked = now - looked > 2 * interval_s + 1, now  # the whole process was, by Ctrl-Z for example
        if stopped or venue.loop.events != events or time.clock_gettime(clock) - used > _IDLE * (now - since):
            events, used, since = venue.loop.events, time.clock_gettime(clock), now
        elif now - since >= timeout_s:
            signal.pthread_kill(thread, _SIGNAL)
            since = now


def _place(frame: FrameType | None) -> str:
    frame = users_frame(frame)
    return "at an unknown place" if frame is None else f"at {frame.f_code.co_filename}:{frame.f_lineno}"
