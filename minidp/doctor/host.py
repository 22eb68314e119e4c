"""The processor, its memory and the software: read from the system, without touching any GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import threadpoolctl

import minidp
from minidp.comm.arena import PAGE, Arena, available_bytes
from minidp.doctor.facts import Host, Software
from minidp.launch import cores

NO_LIMIT = 2**60  # bytes from which on a limit of cgroup version 1 means that there is none
_BLAS = {"openblas": "OpenBLAS", "mkl": "MKL", "blis": "BLIS", "accelerate": "Accelerate"}


def look_at_host() -> Host:
    return Host(
        cpu=_cpu(),
        cores=cores(),
        cores_of_machine=os.cpu_count() or 1,
        quota=quota(),
        memory=_memory(),
        available=available_bytes(),
        limit=memory_limit(),
        shared="memfd" if hasattr(os, "memfd_create") else "POSIX shared memory",
        shared_problem=_try_shared_memory(),
    )


def look_at_software() -> Software:
    blas, threads = _blas()
    mpiexec = find_mpiexec()
    return Software(
        minidp=minidp.__version__,
        python=platform.python_version(),
        numpy=np.__version__,
        blas=blas,
        blas_threads=threads,
        system=f"{platform.system()} {platform.release()}",
        matplotlib=version_of("matplotlib"),
        torch=version_of("torch"),
        mpi4py=version_of("mpi4py"),
        mpi=None if mpiexec is None else _what_mpi(mpiexec),
        mpiexec=mpiexec,
    )


def version_of(package: str) -> str | None:
    """The installed version of a distribution, without importing it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in _lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory() -> int | None:
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


# -- what a container allows: the strictest of all groups that this process is in ---------------------------


def quota(root: Path = Path("/")) -> float | None:
    """Cores' worth of processor time, by control groups of version 2 or 1."""
    found = []
    for place in _places(root, "cpu"):
        words = " ".join(_lines(place / "cpu.max")).split()
        if len(words) != 2:
            words = [*_lines(place / "cpu.cfs_quota_us"), *_lines(place / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal() and int(words[1]):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes, by control groups of version 2 or 1."""
    names = ("memory.max", "memory.limit_in_bytes")
    lines = [line for place in _places(root, "memory") for name in names for line in _lines(place / name)]
    limits = [int(line) for line in lines if line.isdecimal()]
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def _places(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups, and of those around them. In a container its own is often the top."""
    for line in _lines(root / "proc/self/cgroup"):
        number, names, path = (*line.split(":", 2), "", "")[:3]
        if number != "0" and controller not in names.split(","):
            continue
        top = root / "sys/fs/cgroup" / ("" if number == "0" else controller)
        group = top / path.strip("/")
        yield from (place for place in (group, *group.parents) if place.is_relative_to(top))


# -- memory that ranks share, linear algebra, MPI -----------------------------------------------------------


def _try_shared_memory() -> str | None:
    """Take a page, write into it, read it through another mapping; why that failed."""
    try:
        arena = Arena.create(1)
        try:
            offset = arena.take(0, PAGE)
            arena.reserve(offset, PAGE)
            arena.map(offset, PAGE)[0] = 42
            return None if arena.map(offset, PAGE)[0] == 42 else "two mappings of it differ"
        finally:
            arena.close()
    except (OSError, MemoryError) as error:
        return str(error)


def _blas() -> tuple[str, int | None]:
    """(name and version, threads) of the library that NumPy multiplies with."""
    for library in threadpoolctl.threadpool_info():
        if library["user_api"] == "blas":
            name = _BLAS.get(library["internal_api"], library["internal_api"])
            return f"{name} {library.get('version') or ''}".strip(), int(library["num_threads"])
    return "a BLAS that does not tell its name", None


def find_mpiexec() -> str | None:
    """On the PATH, or beside this Python, where pip puts it."""
    return shutil.which("mpiexec") or shutil.which("mpiexec", path=str(Path(sys.executable).parent))


def _what_mpi(mpiexec: str) -> str | None:
    """``mpiexec (OpenRTE) 4.1.4``, ``HYDRA …``: the first words of what it says; None if it says nothing."""
    try:
        done = subprocess.run(
            [mpiexec, "--version"], capture_output=True, text=True, timeout=10, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return name_of_mpi(done.stdout)


def name_of_mpi(said: str) -> str | None:
    """The implementation and its version, by what ``mpiexec --version`` said."""
    words = said.split()
    version = next((word for word in words if word[0].isdecimal() and "." in word), "")
    if "HYDRA" in words:
        return f"MPICH {version}".strip()
    if "(OpenRTE)" in words or "Open MPI" in said or "prte" in said.lower():
        return f"Open MPI {version}".strip()
    return said.strip().splitlines()[0] if words else None
