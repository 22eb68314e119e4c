"""A script whose descendants can be found, and what else a run may leave behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

from minidp.bench.leftovers import VARIABLE, children, descriptors, gone_within, processes, segments

__all__ = ["Script", "children", "descriptors", "gone_within", "processes", "segments"]


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
