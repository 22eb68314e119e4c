"""Where a rank is, by looking: a thread reads the stack of its main thread a few times a second.

So that is always known, and costs next to nothing where a rank works: which module and which operation is under
way is noted there (``minidp.autograd.underway``), for a thread must not read another one's local variables.
``python -m minidp.bench whereabouts`` measures what the looking itself takes from a step.

    forward, layer 3 (conv2)          a module of the model, counted and named
    backward, layer 3 (conv2)         of the parameter whose gradient is being computed
    reduce and update · push and pull · step · save · load
    train.py:12 in load_batch         the user's own code
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from minidp.autograd.underway import under_way
from minidp.comm.board import Board
from minidp.parallel.agreement import owners

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
        last, since = "", 0
        while not self._over.wait(self._every_s):
            with _nothing_collected():
                text, known = _look(threading.main_thread().ident)
            now = time.monotonic_ns()
            if text != last or not known:
                last, since = text, now
            self._board.seen(self._rank, text, since, now)

    def stop(self) -> None:
        self._over.set()
        self.join()


@contextlib.contextmanager
def _nothing_collected() -> Iterator[None]:
    """Inside the block another thread's stack can be read.

    Before Python 3.12 each frame that is looked at may begin a garbage collection. If that runs a finalizer, the
    other thread may go on and leave the very frame, and what is read then is no frame any more (SIGSEGV).
    """
    if sys.version_info >= (3, 12) or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _look(thread: int | None) -> tuple[str, bool]:
    """Where a thread is, and whether it was seen in this very call before."""
    text, stay = "at an unknown place", None
    with contextlib.suppress(Exception):  # it is the user's program, and may be anything
        text, stay = place_of(sys._current_frames().get(thread))  # type: ignore[arg-type]
    return text, _seen_before(stay)


def _seen_before(frame: FrameType | None) -> bool:
    """Whether this very call of a function has been seen; it is marked, which matters to debuggers only."""
    if frame is None or frame.f_trace_opcodes:
        return True
    frame.f_trace_opcodes = True
    return False


def place_of(frame: FrameType | None) -> tuple[str, FrameType | None]:
    """Where code is whose innermost frame this is: in words, and the frame that lives as long as this stay.

    Its thread may be running: of frames only their code and line are read, never ``f_locals``.
    """
    layer, node = under_way.module, under_way.node
    stay, user, phase, in_call, in_engine, inner = frame, users_frame(frame), "", False, False, None
    while frame is not None:
        code = frame.f_code
        where = str(frame.f_globals.get("__name__")), code.co_qualname
        if where == _CALL:
            if not in_call:
                in_call = True
                if layer is not None and getattr(layer.forward, "__code__", inner) is not inner:
                    layer = None  # the note is another virtual rank's
            stay = frame if not phase else stay
        elif where == _ENGINE:
            in_engine = True
        elif not phase and where in _PHASES:
            phase, stay = _PHASES[where], frame
        inner, frame = code, frame.f_back
    if not phase and in_call:
        phase = "forward"
    if not phase:
        if user is None:
            return "at an unknown place", None
        return f"{os.path.basename(user.f_code.co_filename)}:{user.f_lineno} in {user.f_code.co_name}", user
    if phase == "forward":
        layer = layer if in_call else None
    else:
        layer = _layer_of(node) if phase == "backward" and in_engine else None
    return phase + _named(layer), stay


def _named(layer: Any) -> str:
    """``, layer 3 (conv2)``: which of the model's layers, those modules that have no others inside."""
    if layer is None:
        return ""
    name = layer._path or type(layer).__name__
    with contextlib.suppress(Exception):  # the rank goes on meanwhile, and the model is the user's
        for model in _models():
            layers = [each for each in model.modules() if len(list(each.modules())) == 1]
            for i, each in enumerate(layers, 1):
                if each is layer:
                    return f", layer {i} ({name})"
    return f", in {name}"


def _models() -> list[Any]:
    """Those that are trained, and the one whose forward is under way."""
    return [*owners, *([] if under_way.model is None else [under_way.model])]


def _layer_of(node: Any) -> Any:
    """The module with a parameter that goes into this operation; None if none does."""
    with contextlib.suppress(Exception):
        inputs = [each for each in node.inputs or () if hasattr(each, "_grad_slot")]
        for model in _models():
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
