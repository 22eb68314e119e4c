"""Where the figures were taken: what a number needs beside it to mean something."""

from __future__ import annotations

import os
import platform
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from minidp.launch import blas

VERSIONS = ("minidp", "numpy", "torch", "mpi4py", "mpich")
BUSY = 0.5  # load average above which the header warns: with 2 cores a quarter of them is somebody else's


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
