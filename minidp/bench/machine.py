"""Where the figures were taken: what a number needs beside it to mean something."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Set
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from minidp.launch import blas

VERSIONS = ("minidp", "numpy", "torch", "mpi4py", "mpich", "ray")


def version_of(package: str) -> str | None:
    """The installed version of a distribution, without importing it; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Date, CPU, cores, load and versions."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": _cpu(),
        "cores": blas.cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "blas_threads": 1,
        "versions": {package: version_of(package) for package in VERSIONS},
    }


def headline(machine: dict[str, Any]) -> str:
    """``describe()`` on one line."""
    versions = " · ".join(f"{name} {version or 'absent'}" for name, version in machine["versions"].items())
    return (
        f"{machine['date'].replace('T', ' ')} · {machine['cpu']}, {machine['cores']} cores · "
        f"Python {machine['python']} · {versions} · one BLAS thread a process"
    )


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class Neighbours:
    """Counts the processor time that others take from now on, besides the processes ``pids``.

    Others are other processes here and, on a virtual machine, other guests of the host ("steal").
    """

    def __init__(self, pids: Set[int]) -> None:
        self._pids = pids
        self._start = time.monotonic(), _taken_s(pids)

    def cores(self) -> float | None:
        """How many cores' worth they took since the beginning; None where the system does not tell (no /proc)."""
        then, before = self._start
        now, after = time.monotonic(), _taken_s(self._pids)
        if before is None or after is None:
            return None
        return max(0.0, (after - before) / max(now - then, 1e-9))


def _taken_s(pids: Set[int]) -> float | None:
    """Processor time of the whole machine since it started, less that of ``pids``, in seconds."""
    try:
        # user nice system idle iowait irq softirq steal …, in ticks
        machine = [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        busy = sum(machine) - machine[3] - machine[4]
        for pid in pids:
            # utime and stime follow the name, which may hold blanks and brackets
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            busy -= int(fields[11]) + int(fields[12])
    except OSError:
        return None
    return busy / os.sysconf("SC_CLK_TCK")
