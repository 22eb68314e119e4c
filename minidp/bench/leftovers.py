"""Finding what a run has left behind: processes by a token in their environment, segments, descriptors."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
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


def named_memory(pid: int) -> set[Path]:
    """What a process uses of /dev/shm under a name: MPICH removes its own only if it ends in its own time."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return set()
    return {
        Path(line[line.index("/dev/shm/") :]) for line in lines if "/dev/shm/" in line and "(deleted)" not in line
    }


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


class Script:
    """A Python program that runs as a process of its own, with a token to find its descendants by."""

    def __init__(self, source: str, *args: str, stdin: bool = False, path: Path | None = None) -> None:
        self.token = secrets.token_hex(8)
        environment = {**os.environ, VARIABLE: self.token, "PYTHONUNBUFFERED": "1"}
        if path is not None:
            path.write_text(source)
        command = [
            sys.executable,
            "-" if stdin else str(path) if path else "-c",
            *([] if stdin or path else [source]),
        ]
        self.process = subprocess.Popen(
            [*command, *args],
            env=environment,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        if stdin and self.process.stdin:
            self.process.stdin.write(source)
            self.process.stdin.close()
            self.process.stdin = None

    def wait_for_line(self, line: str, seconds: float = 20) -> None:
        assert self.process.stdout is not None
        start = time.monotonic()
        while time.monotonic() - start < seconds:
            got = self.process.stdout.readline()
            if not got:
                raise AssertionError(
                    f"ended before {line!r}: {self.process.stderr and self.process.stderr.read()}"
                )
            if got.strip() == line:
                return
        raise AssertionError(f"{line!r} did not come")

    def finish(self, seconds: float = 30) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=seconds)
        return self.process.returncode, out, err

    def interrupt_group(self) -> None:
        """What a terminal does on Ctrl-C: SIGINT to every process of the job."""
        os.killpg(self.process.pid, signal.SIGINT)

    def clean(self) -> None:
        for pid in [self.process.pid, *processes(self.token)]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.wait(5)
