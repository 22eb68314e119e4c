"""Run a probe in a process of its own, with a time limit, and make facts of what it says.

A broken driver may hang, even where no signal ends it, or crash the process. Here that is a fact like any other.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import minidp
from minidp.doctor.facts import Cuda, Gpu, Meeting
from minidp.doctor.lines import understand

LIMIT_S = 90.0  # the first kernels of a fresh installation are compiled in some of these
_LAST_WORDS = 300  # characters of what a probe that has crashed wrote to standard error


def run(command: Sequence[str], limit_s: float) -> tuple[dict[str, Any], str | None]:
    """(what the probe found, how it ended). The latter is None for a good end, else in words, after "it"."""
    home = str(Path(minidp.__file__).resolve().parents[1])
    search = os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")]))
    # Files, not pipes: a grandchild that hangs would hold a pipe open for ever.
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": search, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # a group of its own, which is ended as a whole
        )
        try:
            ended: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            ended = None
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(5)  # in vain, if it hangs inside the kernel: then it is left to itself
        output.seek(0)
        errors.seek(0)
        facts, last = understand(output.read())
        said = " ".join(errors.read().split())[-_LAST_WORDS:]
    if ended is None:
        return facts, f"hangs: after {limit_s:g} s it still {last}"
    if ended == 0:
        return facts, None
    how = f"exited with code {ended}"
    if ended < 0:
        with contextlib.suppress(ValueError):
            how = f"was killed by {signal.Signals(-ended).name}"
    return facts, f"{how} while it {last}" + (f": {said}" if said else "")


def probe(name: str, *options: str) -> list[str]:
    """The command of one of this room's probes."""
    return [sys.executable, "-m", f"minidp.doctor.{name}", *options]


def look_at_cuda(
    pairs: bool = True,
    limit_s: float = LIMIT_S,
    single: Sequence[str] | None = None,
    pair: Sequence[str] | None = None,
) -> Cuda:
    """All that is known of the GPUs. With ``pairs`` two ranks meet there, if one can work at all.

    ``single``, ``pair``: other commands than this room's probes.
    """
    facts, ended = run(single or probe("cuda_probe"), limit_s)
    cuda = conclude(facts, ended)
    if not (pairs and cuda.works):
        return cuda
    two = ["--two"] * (len(cuda.gpus) > 1)
    more, ended = run(pair or probe("pair_probe", *two), limit_s)
    if ended is not None:
        # Whatever had not met by then, has not met at all.
        for missing in ("one_gpu", *["two_gpus"] * bool(two)):
            more.setdefault(missing, {"transport": "none", "shares_memory": False, "problem": f"the try {ended}"})
    return conclude(facts | more, None)


def conclude(facts: dict[str, Any], ended: str | None) -> Cuda:
    """What a probe found, and how it ended, as facts."""
    facts = {"problem": None, **facts}
    for name in ("one_gpu", "two_gpus"):
        if facts.get(name) is not None:
            facts[name] = Meeting(**facts[name])
    facts["gpus"] = tuple(Gpu(**gpu) for gpu in facts.get("gpus", ()))
    facts["peers"] = tuple(tuple(row) for row in facts.get("peers", ()))
    facts["packages"] = tuple(facts.get("packages", ()))
    if ended is not None and facts["problem"] is None:
        facts["problem"] = f"the process that looked at the GPU {ended}"
    return Cuda(**facts)
