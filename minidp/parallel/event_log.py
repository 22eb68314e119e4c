"""The log of a run with servers: what each server did, in which order. Enough to run it again, bit for bit.

What an asynchronous run computes depends on nothing but its program and the order in which each server handles
its workers' requests. The log holds both: the function that the workers ran, and a line for each event. Lines are
written as they happen, whole, so a run that is killed leaves a log that ends early and is good up to there. Each
line ends with its checksum, and has its number among its server's.

    minidp run log, format 1
    {"workers": 4, "servers": 2, …, "function": …}                                    *5d0c13f6
    server line op session worker version pulled samples loss                         *0f37b1aa
    server line end session version sha256 of the slice                               *…
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pickle
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from minidp.parallel.checkpoint_files import surroundings
from minidp.parallel.served import ServedSlice
from minidp.parallel.session import Session
from minidp.parallel.wire import Op, Request

FORMAT = 1
_TITLE = "minidp run log, format "


class DamagedLog(ValueError):
    """A file is not a log of a run, or not of this version's format, or it is damaged; the message tells where."""


class Event(NamedTuple):
    """A request that a server handled, or a worker's leaving.

    ``worker`` is the rank. Of a push: the version of w that it met, the one that it was computed from (their
    difference is its staleness), its number of samples and its loss.
    """

    server: int
    op: Op
    session: int
    worker: int
    version: int = 0
    pulled: int = 0
    samples: int = 0
    loss: float = 0.0

    @property
    def staleness(self) -> int:
        return self.version - self.pulled


@dataclass
class RunLog:
    """A log as it was read.

    Attributes:
        workers, servers: their numbers; ``facts`` has what else was written down of the run.
        function: (fn, args), pickled.
        events: of each server, in order.
        ends: {(server, session): (version, digest)} of servers that came to the end.
        whole: False if the last line is cut off: the run was killed.
    """

    facts: dict[str, Any]
    function: bytes
    events: list[list[Event]]
    ends: dict[tuple[int, int], tuple[int, str]] = field(default_factory=dict)
    whole: bool = True

    @property
    def workers(self) -> int:
        return int(self.facts["workers"])

    @property
    def servers(self) -> int:
        return int(self.facts["servers"])


def create(path: Path, function: bytes, search: list[str], **facts: Any) -> None:
    """Begin a log: the parent, before its servers start. ``search``: where the function's modules are found.

    An older file of that name is replaced. OSError if it can't be written.
    """
    header = {
        **facts,
        "surroundings": surroundings(),
        "search": search,
        "function": base64.b85encode(zlib.compress(function)).decode(),
    }
    path.write_text(f"{_TITLE}{FORMAT}\n{_sealed(json.dumps(header))}", encoding="utf-8")


class Recorder:
    """Writes what a server does; an `Observer` of `serve`, to be closed. A system call an event."""

    def __init__(self, path: Path, server: int) -> None:
        # Each line is one write at the end of the file: those of several servers do not mix.
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)
        self._server, self._lines = server, 0

    def close(self) -> None:
        os.close(self._file)

    def handles(self, worker: int, request: Request, session: Session | None) -> None:
        numbers: tuple[Any, ...] = (0, 0, 0, 0.0)
        if session is not None and request.op == Op.PUSH:
            index = session.opening.workers.index(worker)
            numbers = session.slice.version, session.slice.pulled[index], request.samples, request.loss
        self._write(Op(request.op).name.lower(), request.session, worker, *numbers)

    def ended(self, number: int, session: Session) -> None:
        self._write("end", number, session.slice.version, digest(session.slice))

    def _write(self, *words: Any) -> None:
        os.write(self._file, _sealed(" ".join(map(str, (self._server, self._lines, *words)))).encode())
        self._lines += 1


def digest(served: ServedSlice) -> str:
    """Of the bits of a server's w."""
    data = pickle.dumps(served.w.tolist()) if served.w.dtype.hasobject else served.w.tobytes()
    return hashlib.sha256(data).hexdigest()


def read(path: Path) -> RunLog:
    """Read a log. DamagedLog if it is none, or damaged; a last line that is cut off is left out.

    It holds a program, which runs when it is replayed: read logs of people whom you trust.
    """
    title, *lines = path.read_bytes().split(b"\n")
    rest = lines.pop() if lines else b""  # what follows the last newline: nothing, or half a line
    if not title.startswith(_TITLE.encode()):
        raise DamagedLog(f"{path} is not the log of a run: spawn(..., servers=1, record={path.name!r}) writes one")
    if title != f"{_TITLE}{FORMAT}".encode():
        found = title.decode(errors="replace").removeprefix(_TITLE)
        raise DamagedLog(
            f"{path} has format {found}, this version of minidp reads format {FORMAT}: record it again"
        )
    if not lines:
        raise DamagedLog(f"{path} ends before it begins: the run was killed while it started")
    try:
        facts = json.loads(_opened(lines[0]))
        function = zlib.decompress(base64.b85decode(facts.pop("function")))
        if (
            facts["workers"] < 1
            or facts["servers"] < 1
            or not facts["world"]
            or not facts["surroundings"]["minidp"]
        ):
            raise ValueError("no workers, servers or world")
        log = RunLog(facts, function, [[] for _ in range(int(facts["servers"]))], whole=not rest)
        counts = [0] * log.servers
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        raise DamagedLog(f"{path}, line 2: the description of the run is damaged ({error})") from error
    for number, line in enumerate(lines[1:], 3):
        try:
            _add(log, counts, _opened(line).split())
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise DamagedLog(
                f"{path}, line {number} is damaged: {line[:80].decode(errors='replace')!r}"
            ) from error
    return log


def _add(log: RunLog, counts: list[int], words: list[str]) -> None:
    server, line, op = int(words[0]), int(words[1]), words[2]
    if server < 0 or line != counts[server]:
        raise ValueError("a line is missing, or comes twice")
    counts[server] += 1
    if op == "end":
        log.ends[server, int(words[3])] = int(words[4]), words[5]
    else:
        *numbers, loss = words[3:]
        session, worker, version, pulled, samples = map(int, numbers)
        event = Event(server, Op[op.upper()], session, worker, version, pulled, samples, float(loss))
        log.events[server].append(event)


def _sealed(text: str) -> str:
    return f"{text} *{zlib.crc32(text.encode()):08x}\n"


def _opened(line: bytes) -> str:
    text, _, checksum = line.rpartition(b" *")
    if checksum != b"%08x" % zlib.crc32(text):
        raise ValueError("checksum")
    return text.decode()
