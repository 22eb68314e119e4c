"""Finding what a run has left behind: processes by a token in their environment, segments, descriptors."""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "MINIDP_TEST_RUN"


def processes(token: str) -> list[int]:
    """Live (not zombie) processes whose environment has the token."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and f"{VARIABLE}={token}".encode() in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except (OSError, IndexError):
                pass
    return found


def gone_within(token: str, seconds: float) -> float | None:
    """How long it took until no process of the run was left, or None."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if not processes(token):
            return time.monotonic() - start
        time.sleep(0.01)
    return None


def segments() -> set[str]:
    """What lies in /dev/shm, but for MPICH's: another program on this machine may be starting or ending."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("mpich_shm")}


def children() -> set[int]:
    """Children of this process, and of its fork server: workers are the server's."""
    found, frontier = set(), {os.getpid()}
    while frontier:
        parents, frontier = frontier, set()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                except OSError:
                    continue
                if int(fields[1]) in parents and fields[0] != "Z":
                    frontier.add(int(entry.name))
        found |= frontier
    return found


def descriptors() -> set[str]:
    return {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)}


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
