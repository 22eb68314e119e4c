"""``faults``: what goes wrong on purpose, and what becomes of it.

Each trial starts a run of three ranks, lets one fault strike at a random moment of a random step (`injector`),
and looks: how long until somebody was told, who was named, what is left behind, and whether the step that the
survivors hold, and the newest checkpoint, are whole: equal to those of a run without a fault, to the bit.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import minidp
from minidp.bench.fault_report import Trial, Trials
from minidp.bench.injector import MOMENTS, SAVE_EVERY, STEPS, Fault, program
from minidp.bench.leftovers import Script, children, descriptors, gone_within, segments
from minidp.parallel import checkpoint_files

RANKS, TIMEOUT_S = 3, 20.0
PARENT = {
    "ctrl-c": signal.SIGINT,
    "term": signal.SIGTERM,
    "hangup": signal.SIGHUP,
    "parent killed": signal.SIGKILL,
}
KINDS = (*MOMENTS, "truncate", *PARENT)
MISMATCHES = ("return", "order", "shape", "dtype", "op")
HARMLESS = ("pause", "slow")
"""Which only take time: the run ends as if nothing had been."""
LIMITS_S = {**dict.fromkeys(KINDS, 0.2), **dict.fromkeys(MISMATCHES, 1.0), **dict.fromkeys(PARENT, 2.0)}


def draw(kind: str, rng: np.random.Generator) -> Fault:
    """A fault of that kind, at a random moment of a random step on a random rank."""
    moment = str(rng.choice(MOMENTS[kind]))
    if kind == "disk":
        return Fault(kind, moment, SAVE_EVERY * int(rng.integers(1, STEPS // SAVE_EVERY)), 0)
    step = int(rng.integers(0, STEPS))
    if moment == "save":
        step = SAVE_EVERY * (1 + step % (STEPS // SAVE_EVERY))
    return Fault(kind, moment, step, int(rng.integers(RANKS)))


def reference() -> list[str]:
    """What each committed step is, hashed: of a run without a fault."""
    with tempfile.TemporaryDirectory() as folder:
        hashes: list[str] = minidp.spawn(program, RANKS, None, Path(folder), progress=False)[0]
    return hashes


def trial_of(kind: str, rng: np.random.Generator, states: list[str]) -> Trial:
    """Let a fault of that kind strike, and look."""
    before = children(), segments(), descriptors()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        last: int | None = None
        if kind in PARENT:
            trial = _parent_ends(kind, rng, folder)
        elif kind == "truncate":
            trial, last = _truncated(rng, folder), STEPS - SAVE_EVERY
        else:
            fault = draw(kind, rng)
            trial, last = _struck(fault, folder, states), _last_saved(fault)
        trial.problems += _torn(folder, states, last)
        trial.problems += [f"{path.name} was left" for path in folder.iterdir() if path.name.startswith(".")]
    deadline = time.monotonic() + 2
    while children() - before[0] and time.monotonic() < deadline:
        time.sleep(0.005)
    for what, now, then in zip(("process", "segment", "descriptor"), (children, segments, descriptors), before):
        trial.problems += [f"a {what} was left: {each}" for each in now() - then]  # type: ignore[operator]
    limit = LIMITS_S[kind]
    if trial.noticed_s is not None and trial.noticed_s > limit:
        trial.problems.append(f"noticed after {trial.noticed_s:.3f} s, not {limit:g}")
    if not trial.struck:
        trial.problems.append("the fault did not strike")
    return trial


# --- a rank ---------------------------------------------------------------------------------------------------


def _struck(fault: Fault, folder: Path, states: list[str]) -> Trial:
    trial, over = Trial(str(fault)), threading.Event()
    waker = threading.Thread(target=_wake, args=(fault, folder, over), daemon=True)
    if fault.kind == "pause":
        waker.start()
    error: minidp.RankFailed | None = None
    try:
        hashes = minidp.spawn(program, RANKS, fault, folder, timeout_s=TIMEOUT_S, progress=False)[0]
    except minidp.RankFailed as failed:
        error, ended = failed, time.monotonic()
    finally:
        over.set()
        if waker.ident is not None:
            waker.join()
    diaries = {rank: _diary(folder, rank) for rank in range(RANKS)}
    strikes = [entry for entry in diaries[fault.rank] if "fault" in entry]
    trial.struck = [entry["fault"] for entry in strikes] == [str(fault)]
    if error is None:
        if fault.kind not in HARMLESS:
            trial.problems.append("nobody was told")
        elif hashes != states:
            trial.problems.append("it changed the result")
        return trial
    if strikes:
        told = [entry["time"] for entries in diaries.values() for entry in entries if "told" in entry]
        trial.noticed_s = min([ended, *told]) - strikes[0]["time"]
    trial.problems += [*_misnamed(fault, error), *_not_told(fault, diaries)]
    for rank, entries in diaries.items():
        for entry in entries:
            if "told" in entry and states[entry["updates"]] != entry["state"]:
                trial.problems.append(f"rank {rank} holds a torn step {entry['updates']}")
    return trial


def _misnamed(fault: Fault, error: minidp.RankFailed) -> list[str]:
    """What the error should say, and does not."""
    text, cause = str(error), error.__cause__
    who = f"rank {fault.rank} of {RANKS}"
    if fault.moment == "save" and fault.rank == 0:  # what who writes meets, all raise
        who = f"rank {error.rank} of {RANKS}" if fault.kind == "raise" else who
    wanted: dict[str, bool] = {
        "raise": text == f"{who} raised Injected: an injected fault",
        "second": text == f"{who} raised Injected: an injected fault",
        "kill": text.startswith(f"{who} was killed by SIGKILL"),
        "exit": text.startswith(f"{who} exited with code 3"),
        "memory": text.startswith(f"{who} raised MemoryError") and isinstance(cause, MemoryError),
        "nan": f"on rank {fault.rank} at step {fault.step}" in text and "NonFiniteGradient" in text,
        "bit": f"the gradients of rank {fault.rank} at step {fault.step}" in text,
        "disk": "OSError" in text and "File too large" in text,
        **{kind: isinstance(error, minidp.CollectiveMismatch) for kind in MISMATCHES},
    }
    return [] if wanted.get(fault.kind, False) else [f"it was told as: {text.splitlines()[0]}"]


def _wake(fault: Fault, folder: Path, over: threading.Event) -> None:
    """Let the rank that has stopped itself go on, 0.2 s later."""
    while not over.wait(0.01):
        for entry in _diary(folder, fault.rank):
            if "fault" in entry:
                over.wait(0.2)
                os.kill(entry["pid"], signal.SIGCONT)
                return


def _diary(folder: Path, rank: int) -> list[dict[str, Any]]:
    path = folder / f"diary-{rank}"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _torn(folder: Path, states: list[str], last: int | None) -> list[str]:
    """All checkpoints must be whole, the newest that of update ``last`` (None: of any); and others can go on.

    A file that is cut on purpose is passed over: ``last`` is then that of the one before.
    """
    problems = []
    for path in checkpoint_files.files(folder):
        try:
            checkpoint_files.read_one(path)
        except ValueError as error:
            if checkpoint_files.updates_of(path) != STEPS or last != STEPS - SAVE_EVERY:  # not cut by us
                problems.append(f"a checkpoint is torn: {error}")
    if last or (last is None and checkpoint_files.files(folder)):
        try:
            hashes = minidp.spawn(program, RANKS, None, folder, True, progress=False)[0]
        except minidp.RankFailed as error:
            return [*problems, f"nothing can be resumed: {error}"]
        made = len(hashes) - 1
        if hashes != states[STEPS - made :] or (last is not None and STEPS - made != last):
            problems.append(f"resumed {made} steps before the end, not {STEPS - (last or 0)}, or with other bits")
    if minidp.spawn(program, RANKS, None, folder, progress=False)[0] != states:
        problems.append("the next run differs")
    return problems


def _last_saved(fault: Fault) -> int:
    """The update of the newest checkpoint when that fault has struck; 0 if there is none."""
    if fault.kind in HARMLESS:
        return STEPS
    before = fault.step - 1 if fault.moment == "save" else fault.step
    return before // SAVE_EVERY * SAVE_EVERY


def _not_told(fault: Fault, diaries: dict[int, list[dict[str, Any]]]) -> list[str]:
    """Every survivor must have heard of it, unless it is rank 0's own error, which all raise as theirs."""
    if fault.kind in HARMLESS or (fault.kind == "raise" and fault.moment == "save" and fault.rank == 0):
        return []
    survivors = set(range(RANKS)) - {fault.rank}
    silent = [rank for rank in sorted(survivors) if not any("told" in entry for entry in diaries[rank])]
    return [f"rank {rank} was not told" for rank in silent]


# --- a file, the parent -----------------------------------------------------------------------------------------


def _truncated(rng: np.random.Generator, folder: Path) -> Trial:
    """The newest checkpoint loses its end; `_torn` goes on from the one before."""
    minidp.spawn(program, RANKS, None, folder, progress=False)
    newest = checkpoint_files.files(folder)[0]
    size = int(rng.integers(0, newest.stat().st_size))
    os.truncate(newest, size)
    return Trial(f"truncate@{newest.name}:{size}", struck=newest.stat().st_size == size)


_PROGRAM = """
import sys
from pathlib import Path
import minidp
from minidp.bench.injector import program
print("started", flush=True)
while True:
    minidp.spawn(program, 3, None, Path(sys.argv[1]), progress=False)
"""


def _parent_ends(kind: str, rng: np.random.Generator, folder: Path) -> Trial:
    delay, number = float(rng.uniform(0.15, 0.6)), PARENT[kind]
    trial = Trial(f"{kind} after {delay:.3f} s")
    script = Script(_PROGRAM, str(folder))
    try:
        script.wait_for_line("started")
        time.sleep(delay)
        trial.struck = script.process.poll() is None
        if number == signal.SIGINT:
            script.interrupt_group()
        else:
            script.process.send_signal(number)
        script.process.wait(10)
        trial.noticed_s = gone_within(script.token, 4)
        if trial.noticed_s is None:
            trial.problems.append("processes outlived their parent")
    finally:
        script.clean()
    return trial


def run(count: int, seed: int, tick: Callable[[], None] = lambda: None) -> list[Trials]:
    """``count`` trials, the kinds in turn."""
    for name in ("minidp.launch", "minidp.parallel"):
        logging.getLogger(name).setLevel(logging.ERROR)  # cores that take turns, files that are damaged on purpose
    states, rng = reference(), np.random.default_rng(seed)
    found = {kind: Trials(kind, LIMITS_S[kind]) for kind in KINDS}
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        found[kind].trials.append(trial_of(kind, rng, states))
        tick()
    return [each for each in found.values() if each.trials]
