"""Where a rank is, by looking: a thread reads the stack of its main thread a few times a second.

So that is always known, and costs nothing where a rank works: no line is written for it in forward or backward.
``python -m minidp.bench whereabouts`` measures what the looking itself takes from a step.

    forward, layer 3 (conv2)          a module of the model, counted and named
    backward, layer 3 (conv2)         of the parameter whose gradient is being computed
    reduce and update · push and pull · step · save · load
    train.py:12 in load_batch         the user's own code
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from minidp.comm.board import Board

EVERY_S = 0.25
ASK = getattr(signal, "SIGUSR1", None)
"""Sent to the parent while ``spawn`` runs in its main thread: it says where all ranks are, and goes on."""

_HOME = os.path.dirname(os.path.dirname(__file__)) + os.sep
_LIBRARY = os.path.dirname(threading.__file__) + os.sep
_PHASES = {
    ("minidp.parallel.strategy", "Strategy._forward_backward"): "forward",
    ("minidp.parallel.pipeline", "Pipeline._through"): "forward",
    ("minidp.parallel.strategy", "Strategy.backward"): "backward",
    ("minidp.parallel.strategy", "Strategy.step"): "step",
    ("minidp.parallel.data_parallel", "DataParallel._average_and_update"): "reduce and update",
    ("minidp.parallel.links", "Links.exchange"): "push and pull",
    ("minidp.parallel.checkpoint", "save"): "save",
    ("minidp.parallel.checkpoint", "load"): "load",
}
_CALL = ("minidp.nn.module", "Module.__call__")
_ENGINE = ("minidp.autograd.engine", "backward")


class Sampler(threading.Thread):
    """Writes where the main thread of this process, which is ``rank``, is to the board, until ``stop``."""

    def __init__(self, board: Board, rank: int, every_s: float = EVERY_S) -> None:
        super().__init__(name="minidp-whereabouts", daemon=True)
        self._board, self._rank, self._every_s = board, rank, every_s
        self._over = threading.Event()

    def run(self) -> None:
        main = threading.main_thread().ident
        last, since = "", 0
        while not self._over.wait(self._every_s):
            frame = sys._current_frames().get(main)  # type: ignore[arg-type]
            if frame is None:
                return
            text, stay = "at an unknown place", None
            with contextlib.suppress(Exception):  # it is the user's program, and may be anything
                text, stay = place_of(frame)
            now = time.monotonic_ns()
            known = _seen_before(stay)
            if text != last or not known:
                last, since = text, now
            del frame, stay  # they hold the rank's arrays
            self._board.seen(self._rank, text, since, now)

    def stop(self) -> None:
        self._over.set()
        self.join()


def _seen_before(frame: FrameType | None) -> bool:
    """Whether this very call of a function has been seen; it is marked, which matters to debuggers only."""
    if frame is None or frame.f_trace_opcodes:
        return True
    frame.f_trace_opcodes = True
    return False


def place_of(frame: FrameType | None) -> tuple[str, FrameType | None]:
    """Where code is whose innermost frame this is: in words, and the frame that lives as long as this stay."""
    stay, user, module, node, outermost = frame, users_frame(frame), None, None, None
    phase, strategy = "", None
    while frame is not None:
        code = frame.f_code
        where = str(frame.f_globals.get("__name__")), code.co_qualname
        if where == _CALL:
            outermost = frame.f_locals.get("self")
            module = module or outermost
            stay = frame if not phase else stay
        elif where == _ENGINE and node is None:
            node = frame.f_locals.get("fn")
        elif not phase and where in _PHASES:
            phase, strategy = _PHASES[where], frame.f_locals.get("self") or frame.f_locals.get("strategy")
            stay = frame
        frame = frame.f_back
    if not phase and module is not None:
        phase = "forward"
    if not phase:
        if user is None:
            return "at an unknown place", None
        return f"{os.path.basename(user.f_code.co_filename)}:{user.f_lineno} in {user.f_code.co_name}", user
    model = getattr(strategy, "model", outermost)
    layer = module if phase == "forward" else _layer_of(model, node) if phase == "backward" else None
    return phase + _named(model, layer), stay


def _named(model: Any, layer: Any) -> str:
    """``, layer 3 (conv2)``: which of the model's layers, those modules that have no others inside."""
    if layer is None:
        return ""
    name = layer._path or type(layer).__name__
    with contextlib.suppress(Exception):  # the rank goes on meanwhile, and the model is the user's
        layers = [each for each in model.modules() if len(list(each.modules())) == 1]
        return f", layer {next(i for i, each in enumerate(layers, 1) if each is layer)} ({name})"
    return f", in {name}"


def _layer_of(model: Any, node: Any) -> Any:
    """The module with a parameter that goes into this operation; None if none does."""
    with contextlib.suppress(Exception):
        inputs = [each for each in node.inputs or () if hasattr(each, "_grad_slot")]
        for module in model.modules():
            for value in vars(module).values():
                if any(value is each for each in inputs):
                    return module
    return None


def users_frame(frame: FrameType | None) -> FrameType | None:
    """The innermost one that is no library's: who called it says more than the line there. Else the innermost."""
    found = frame
    while found is not None and _is_library(found.f_code.co_filename):
        found = found.f_back
    return found or frame


def _is_library(file: str) -> bool:
    return file.startswith((_HOME, _LIBRARY, "<frozen")) or "site-packages" in file


@contextlib.contextmanager
def telling(tell: Callable[[], None]) -> Iterator[None]:
    """Inside the block SIGUSR1 calls ``tell``, if this is the main thread and nobody else wants that signal."""
    main = threading.current_thread() is threading.main_thread()
    if ASK is None or not main or signal.getsignal(ASK) is not signal.SIG_DFL:
        yield
        return
    signal.signal(ASK, lambda number, frame: tell())
    try:
        yield
    finally:
        signal.signal(ASK, signal.SIG_DFL)
