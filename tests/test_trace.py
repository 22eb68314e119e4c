"""Traces: what is recorded, that it nests, that it costs nothing while off, and that viewers can read it."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
import threading
import timeit
from contextvars import copy_context
from itertools import count, pairwise

import numpy as np
import pytest

from minidp import trace


def ticking():
    """A clock that shows 0, 1, 2 … seconds, one more each time that it is read."""
    ticks = count()
    return lambda: float(next(ticks))


def test_spans_nest():
    recorder = trace.Recorder(rank=3, clock=ticking())
    with trace.recording(recorder), trace.span("step", update=7):
        with trace.span("forward"):
            pass
        with trace.span("all_reduce", "communication", bytes=64):
            pass
    assert recorder.events == [
        trace.Event("forward", "compute", 1.0, 2.0, 3, {}),
        trace.Event("all_reduce", "communication", 3.0, 4.0, 3, {"bytes": 64}),
        trace.Event("step", "compute", 0.0, 5.0, 3, {"update": 7}),
    ]
    assert recorder.events[2].duration_s == 5.0
    assert repr(recorder) == "Recorder(rank=3, 3 events)"


def test_real_time_passes():
    recorder = trace.Recorder()
    with trace.recording(recorder), trace.span("outer"), trace.span("inner"):
        pass
    inner, outer = recorder.events
    assert outer.start_s <= inner.start_s <= inner.end_s <= outer.end_s


def test_an_exception_is_recorded_and_passes():
    recorder = trace.Recorder(clock=ticking())
    with pytest.raises(KeyError), trace.recording(recorder), trace.span("backward"):
        raise KeyError
    assert recorder.events == [trace.Event("backward", "compute", 0.0, 1.0, 0, {"error": "KeyError"})]
    assert trace.current() is None


def test_recordings_restore_what_was_before():
    outer, inner = trace.Recorder(0, ticking()), trace.Recorder(1, ticking())
    assert trace.current() is None
    with trace.recording(outer) as recorder:
        assert recorder is outer is trace.current()
        with trace.recording(inner), trace.span("a"):
            pass
        with trace.span("b"):
            pass
    assert trace.current() is None
    assert [e.name for e in inner.events] == ["a"]
    assert [e.name for e in outer.events] == ["b"]


def test_contexts_do_not_see_each_other():
    """Virtual ranks share a thread: the recorder belongs to the context."""
    seen = []
    with trace.recording(trace.Recorder()):
        other = threading.Thread(target=lambda: seen.append(trace.current()))
        other.start()
        other.join()
        inside = copy_context()
    assert seen == [None]
    assert inside.run(trace.current) is not None


def test_off_is_nearly_free():
    assert trace.span("a") is trace.span("b", "wait", bytes=3)  # nothing is made
    loop = "with span('forward', 'compute'): pass"
    seconds = min(timeit.repeat(loop, globals={"span": trace.span}, number=1000, repeat=20)) / 1000
    assert seconds < 2e-6  # 0.3 µs on the machine where it was written


def test_events_with_known_times():
    recorder = trace.Recorder(rank=1)
    recorder.add("message", "communication", 2.0, 2.5, bytes=10)
    assert recorder.events == [trace.Event("message", "communication", 2.0, 2.5, 1, {"bytes": 10})]


def test_events_travel_between_processes():
    recorder = trace.Recorder(rank=2)
    with trace.recording(recorder), trace.span("forward", samples=32):
        pass
    assert pickle.loads(pickle.dumps(recorder.events)) == recorder.events


# --- the file -----------------------------------------------------------------------------------------------


def read(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def test_chrome_trace(tmp_path):
    recorders = [trace.Recorder(rank, ticking()) for rank in (0, 1)]
    for recorder in recorders:
        recorder.clock()  # so that the first event does not start at 0
        with trace.recording(recorder), trace.span("step ∇"), trace.span("forward", samples=np.int64(8)):
            pass
    path = tmp_path / "run.trace.json"
    trace.write_chrome(path, [e for r in reversed(recorders) for e in r.events])
    written = read(path)
    assert written["displayTimeUnit"] == "ms"
    rows = written["traceEvents"]
    assert {row["ph"] for row in rows} == {"M", "X"}
    names = {(row["name"], row["pid"], row["tid"]): row["args"]["name"] for row in rows if row["ph"] == "M"}
    assert names == {
        ("process_name", 0, 0): "node 0",
        ("thread_name", 0, 0): "rank 0",
        ("thread_name", 0, 1): "rank 1",
    }
    spans = [row for row in rows if row["ph"] == "X"]
    step = {"ph": "X", "name": "step ∇", "cat": "compute", "ts": 0.0, "dur": 3e6, "pid": 0, "args": {}}
    assert [row for row in spans if row["tid"] == 1] == [
        {**step, "tid": 1},
        {**step, "tid": 1, "name": "forward", "ts": 1e6, "dur": 1e6, "args": {"samples": 8}},
    ]
    assert len(spans) == 4


def test_nodes_become_processes(tmp_path):
    events = [trace.Event("step", "compute", 0.0, 1.0, rank, {}) for rank in range(4)]
    trace.write_chrome(str(tmp_path / "t.json"), events, nodes={0: 0, 1: 0, 2: 1, 3: 1})
    rows = read(tmp_path / "t.json")["traceEvents"]
    assert [(row["pid"], row["tid"]) for row in rows if row["ph"] == "X"] == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert [row["args"]["name"] for row in rows if row["name"] == "process_name"] == ["node 0", "node 1"]


def test_rounding_keeps_the_nesting(tmp_path):
    """Times far from the origin, nested and adjacent spans: none sticks out of its parent."""
    times = np.sort(1e6 + np.random.default_rng(0).random(201)).tolist()
    events = [trace.Event("run", "compute", times[0], times[-1], 0, {})]
    events += [trace.Event("step", "compute", lo, hi, 0, {}) for lo, hi in pairwise(times)]
    trace.write_chrome(tmp_path / "t.json", events)
    run, *steps = (
        [r["ts"], r["ts"] + r["dur"]] for r in read(tmp_path / "t.json")["traceEvents"] if r["ph"] == "X"
    )
    previous = run[0]
    for start, end in steps:
        assert previous <= start + 1e-6
        assert start <= end <= run[1] + 1e-6  # 1e-6 µs: what adding two decimal numbers costs
        previous = end


def test_arguments_that_json_lacks(tmp_path):
    odd = {
        "loss": math.nan,
        "norm": np.float32(math.inf),
        "shape": (2, np.int64(3)),
        "by": {1: 0.5},
        "at": tmp_path,
    }
    trace.write_chrome(tmp_path / "t.json", [trace.Event("step", "compute", 0.0, 1.0, 0, odd)])
    (row,) = (r for r in read(tmp_path / "t.json")["traceEvents"] if r["ph"] == "X")
    expected = {"loss": "nan", "norm": "inf", "shape": [2, 3], "by": {"1": 0.5}, "at": str(tmp_path)}
    assert row["args"] == expected


def test_a_trace_without_events_is_valid(tmp_path):
    trace.write_chrome(tmp_path / "t.json", [])
    assert read(tmp_path / "t.json") == {"displayTimeUnit": "ms", "traceEvents": []}


def test_the_room_stands_on_the_floor():
    """It imports nothing of minidp, and neither json nor NumPy nor matplotlib before they are needed."""
    code = (
        "import sys; before = set(sys.modules); import minidp.trace; "
        "print(*sorted(set(sys.modules) - before, key=str))"
    )
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert {m for m in loaded if m.startswith("minidp")} == {
        "minidp", "minidp.trace", "minidp.trace.animation", "minidp.trace.canvas", "minidp.trace.chrome",
        "minidp.trace.clock", "minidp.trace.curves", "minidp.trace.lanes", "minidp.trace.page",
        "minidp.trace.recorder", "minidp.trace.stage", "minidp.trace.text", "minidp.trace.timeline",
    }  # fmt: skip
    assert not loaded & {"json", "numpy", "matplotlib"}
