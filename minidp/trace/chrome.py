"""Chrome's trace format, which opens in Perfetto (https://ui.perfetto.dev) and in chrome://tracing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

from minidp.trace.recorder import Event


def write_chrome(
    path: str | os.PathLike[str], events: Iterable[Event], nodes: Mapping[int, int] | None = None
) -> None:
    """Write the events of all ranks as one JSON file: a row for each rank, in groups of nodes.

    Args:
        path: the file; an existing one is overwritten.
        events: of any ranks, in any order; their clocks must share an origin. The first one starts at 0.
        nodes: rank → node; all are on node 0 if not given.

    Complete events ("ph": "X"), times in microseconds, pid = node, tid = rank: Google's "Trace Event Format".
    """
    import json  # late: only those who write a trace need it

    ordered = sorted(events, key=lambda e: (e.start_s, -e.end_s))  # parents before what they contain
    origin = ordered[0].start_s if ordered else 0.0
    node = {rank: (nodes or {}).get(rank, 0) for rank in sorted({e.rank for e in ordered})}
    rows = [
        *(_metadata("process_name", f"node {pid}", pid) for pid in sorted(set(node.values()))),
        *(_metadata("thread_name", f"rank {rank}", pid, rank) for rank, pid in node.items()),
        *(_complete(e, origin, node[e.rank]) for e in ordered),
    ]
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"displayTimeUnit": "ms", "traceEvents": rows}, file, allow_nan=False)


def _metadata(kind: str, name: str, pid: int, tid: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _complete(event: Event, origin: float, pid: int) -> dict[str, Any]:
    # Both ends are rounded to the nanosecond, and the duration is their difference: a span never sticks out of
    # its parent by a rounding error, which viewers would draw as an overlap.
    start_ns, end_ns = (round((t - origin) * 1e9) for t in (event.start_s, event.end_s))
    return {
        "ph": "X",
        "name": event.name,
        "cat": event.category,
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
        "pid": pid,
        "tid": event.rank,
        "args": {key: _plain(value) for key, value in event.args.items()},
    }


def _plain(value: Any) -> Any:
    """`value` in JSON's types; NumPy scalars by value, NaN and infinity (which JSON lacks) and others as text."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return str(value)
