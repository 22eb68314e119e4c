"""Timelines: the lanes that events are cut into, and the picture of them."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidp.trace import Event, plot_timeline
from minidp.trace.lanes import (
    NOTHING,
    Lane,
    Segment,
    categories,
    innermost,
    overlapped_s,
    seconds,
    time_unit,
    timeline,
)


def ev(category, start_s, end_s, rank=0, name="", **args):
    return Event(name or category, category, start_s, end_s, rank, args)


# --- lanes --------------------------------------------------------------------------------------------------


def brute(events, waits_last=False):
    """The innermost span of each elementary interval: (start, end, event), with neighbours joined."""
    times = sorted({t for e in events for t in (e.start_s, e.end_s)})
    pieces = []
    for lo, hi in pairwise(times):
        open_ = [(i, e) for i, e in enumerate(events) if e.start_s <= lo and hi <= e.end_s]
        over = [(waits_last and e.category == "wait", -e.start_s, e.end_s, i) for i, e in open_]
        if over:
            i = min(over)[-1]
            if pieces and pieces[-1][1:] == (lo, i):
                lo, *_ = pieces.pop()
            pieces.append((lo, hi, i))
    return [Segment(lo, hi, events[i]) for lo, hi, i in pieces]


WHOLE = st.integers(0, 12).map(float)  # many ties, and exact sums


def spans(times):
    return st.lists(st.builds(ev, st.sampled_from(["compute", "wait"]), times, times), max_size=12)


@pytest.mark.parametrize("waits_last", [False, True])
@given(events=spans(WHOLE | st.floats(-1e6, 1e6)))
def test_innermost_equals_brute_force(events, waits_last):
    for i, e in enumerate(events):
        e.args["id"] = i  # equal spans differ
    segments = innermost(events, waits_last)
    assert segments == brute(events, waits_last)
    assert all(s.start_s < s.end_s for s in segments)
    assert all(a.end_s <= b.start_s for a, b in pairwise(segments))


def test_innermost_of_nested_and_of_overlapping_spans():
    outer, inner, late = ev("wait", 0.0, 4.0), ev("compute", 1.0, 2.0), ev("data", 3.0, 6.0)
    expected = [(0.0, 1.0, outer), (1.0, 2.0, inner), (2.0, 3.0, outer), (3.0, 6.0, late)]
    assert innermost([late, outer, inner]) == expected
    assert innermost([]) == innermost([ev("data", 1.0, 1.0), ev("data", 2.0, 1.0)]) == []
    same, shorter = ev("wait", 0.0, 4.0, name="twin"), ev("data", 0.0, 1.0)
    assert innermost([same, outer, shorter]) == [(0.0, 1.0, shorter), (1.0, 4.0, same)]


def test_a_stream_that_waits_hides_no_message_of_another():
    message = ev("communication", 0.0, 4.0, rank=0, stream="buckets")
    wait = ev("wait", 1.0, 6.0, rank=0, stream="samples")
    (lane,) = timeline([message, wait], 1).lanes
    assert lane.stream == [(0.0, 4.0, message), (4.0, 6.0, wait)]


def test_innermost_is_fast():
    """50 000 spans inside each other, and as many one after the other: a quadratic sweep would take minutes."""
    n = 50_000
    nested = [ev("compute", float(i), float(4 * n - i)) for i in range(n)]
    nested += [ev("wait", 4.0 * n + i, 4.0 * n + i + 1) for i in range(n)]
    assert len(innermost(nested)) == 2 * n - 1 + n


def test_timeline():
    events = [
        ev("wait", 3.0, 4.0, rank=2),
        ev("data", 1.0, 2.0, rank=0, stream="s"),
        ev("compute", 0.0, 9.0, rank=5),
    ]
    line = timeline(iter(events), max_ranks=2)
    assert line == (0.0, 9.0, [(0, [], [(1.0, 2.0, events[1])]), (2, [(3.0, 4.0, events[0])], [])], 1)
    assert line.duration_s == 9.0
    assert line.categories == ["wait", "data"]
    assert line.lanes[0].stream[0].duration_s == 1.0
    assert timeline([], 1) == (0.0, 0.0, [], 0)


def test_categories_have_an_order():
    names = ["zeta", "data", "alpha", "communication", "wait", "data", "compute"]
    segments = [Segment(0.0, 1.0, ev(name, 0.0, 1.0)) for name in names]
    assert categories(segments) == ["compute", "wait", "communication", "data", "alpha", "zeta"]
    assert categories([]) == []


@given(spans(WHOLE), spans(WHOLE))
def test_times_add_up(own, stream):
    """Each time is the measure of a set of unit intervals."""
    segments = Lane(0, innermost(own), innermost(stream))

    def units(pieces, category=None):
        return {t for s in pieces for t in range(int(s[0]), int(s[1])) if category in (None, s[2].category)}

    for category in ("compute", "wait"):
        assert seconds(segments.own).get(category, 0.0) == len(units(brute(own), category))
    assert overlapped_s(segments) == len(units(brute(own), "compute") & units(brute(stream)))


def test_overlap():
    own = [ev("compute", 0.0, 2.0), ev("wait", 2.0, 3.0), ev("compute", 3.0, 4.0), ev("compute", 4.0, 6.0)]
    stream = [ev("communication", 1.0, 3.5), ev("communication", 5.0, 9.0)]
    assert overlapped_s(Lane(0, innermost(own), innermost(stream))) == 1.0 + 0.5 + 1.0
    assert overlapped_s(Lane(0, innermost(own), [])) == overlapped_s(Lane(0, [], innermost(stream))) == 0.0


def test_time_units():
    told = [time_unit(t)[1] for t in (0.0, 1e-12, 0.9e-6, 1e-6, 0.9e-3, 1e-3, 0.9, 1.0, 1e6)]
    assert told == ["ns", "ns", "ns", "µs", "µs", "ms", "ms", "s", "s"]
    assert [time_unit(t)[0] for t in (1e-9, 1e-6, 1e-3, 1.0)] == [1e-9, 1e-6, 1e-3, 1.0]
    for unit_s in (1e-6, 1e-3, 1.0):  # what is printed as 1 unit never is 1000 of the smaller one
        for share in (0.99994, 0.999949, 0.99995, 0.99996, 0.999999):
            assert f"{unit_s * share / time_unit(unit_s * share)[0]:.4g}" in ("999.9", "1")


# --- the picture --------------------------------------------------------------------------------------------


@pytest.fixture
def plot():
    """The function, if it can draw, with a check of what holds for each picture."""
    pytest.importorskip("matplotlib")

    def plot(events, *args, **kwargs):
        figure = plot_timeline(events, *args, **kwargs)
        figure.draw_without_rendering()  # lays out the labels
        (axes,) = figure.axes
        for text in [*figure.texts, *axes.texts, *axes.get_yticklabels()]:  # nothing is cut off
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1
        return figure

    return plot


def bars(figure):
    """label → its bars: (start, end, top, bottom)."""
    (axes,) = figure.axes
    found = {}
    for collection in axes.collections:
        corners = [path.vertices for path in collection.get_paths()]
        found[collection.get_label()] = [(*c[:, 0][[0, 1]], *c[:, 1][[0, 2]]) for c in corners]
        for c in corners:  # rectangles
            assert set(map(tuple, c)) == {(x, y) for x in set(c[:, 0]) for y in set(c[:, 1])}
    return found


def words(texts):
    return [text.get_text() for text in texts]


STEP = [
    ev("compute", 10.000, 10.005, name="step"),
    ev("compute", 10.001, 10.003, name="forward"),
    ev("wait", 10.005, 10.006),
    ev("communication", 10.002, 10.0055, name="bucket", stream="gradients"),
    ev("communication", 10.006, 10.008, rank=3, name="all_reduce"),
]


def test_bars_are_where_the_events_are(plot):
    """In units of the axis from the first event's start; lanes are one unit high, the first on top."""
    figure = plot(STEP)
    own, lower = (-0.4, 0.12), (0.16, 0.4)
    expected = {
        "compute": [(0, 1, *own), (1, 3, *own), (3, 5, *own)],
        "wait": [(5, 6, *own)],
        "communication": [(2, 5.5, *lower), (6, 8, 0.6, 1.12)],
    }
    found = bars(figure)
    assert list(found) == list(expected)
    for category, of_category in expected.items():
        np.testing.assert_allclose(found[category], of_category, rtol=0, atol=1e-9)
    (axes,) = figure.axes
    np.testing.assert_allclose(axes.get_xlim(), (0, 8), atol=1e-9)
    assert axes.get_ylim() == (1.5, -0.5)
    assert axes.get_xlabel() == "time [ms]"
    assert words(axes.get_yticklabels()) == ["rank 0", "rank 3"]
    assert axes.get_yticks() == pytest.approx([-0.14, 0.86])  # the middle of the own bars
    assert words(axes.get_legend().get_texts()) == ["compute", "wait", "communication"]
    assert words(figure.texts) == ["thin bars: what ran on a stream, beside the rank itself"]


def test_bars_fill_the_lane_if_there_are_no_streams(plot):
    figure = plot([ev("compute", 0.0, 2.0), ev("wait", 0.0, 1.0, rank=1)])
    assert bars(figure) == {"compute": [(0, 2, -0.4, 0.4)], "wait": [(0, 1, 0.6, 1.4)]}
    assert figure.axes[0].get_xlabel() == "time [s]"
    assert words(figure.texts) == []


def test_names_stand_in_bars_that_they_fit_into(plot):
    events = [
        ev("compute", 0.0, 9.0, name=r"$\for$"),
        ev("compute", 9.0, 9.1, name="forward"),
        ev("wait", 9.1, 10.0),
    ]
    figure = plot(events)
    assert words(figure.axes[0].texts) == [r"$\for$", "wait"]
    for text, (start, end) in zip(figure.axes[0].texts, [(0.0, 9.0), (9.1, 10.0)]):
        box = text.get_window_extent().transformed(figure.axes[0].transData.inverted())
        assert start < box.x0 < box.x1 < end
        assert -0.4 < min(box.y0, box.y1) < max(box.y0, box.y1) < 0.4


def test_colours_are_those_of_the_categories(plot):
    """Whatever else is in the picture. Beyond seven they would be hard to tell apart: the rest is "other"."""
    names = ["compute", "wait", "communication", "data", "e", "f", "g", "h", "i"]
    figure = plot([ev(c, i, i + 1) for i, c in enumerate(names)])
    assert words(figure.axes[0].get_legend().get_texts()) == [*names[:7], "other"]
    colours = {c.get_label(): tuple(c.get_facecolor()[0]) for c in figure.axes[0].collections}
    assert len(set(colours.values())) == 8
    assert len(bars(figure)["other"]) == 2
    (only,) = plot([ev("data", 0.0, 1.0)]).axes[0].collections
    assert tuple(only.get_facecolor()[0]) == colours["data"]


def test_ranks_left_out_are_counted(plot):
    events = [ev("compute", 0.0, 1.0 + rank, rank=rank) for rank in (7, 2, 5)]
    figure = plot(events, max_ranks=1)
    assert words(figure.texts) == ["2 more ranks not shown"]
    assert figure.axes[0].get_xlim() == (0, 8)  # that of all ranks
    assert words(plot(events, max_ranks=2).texts) == ["1 more rank not shown"]
    assert words(plot(events, max_ranks=3).texts) == []
    with pytest.raises(ValueError, match=r"^max_ranks=0: at least one rank must be shown$"):
        plot(events, max_ranks=0)


def test_many_ranks_make_it_grow(plot):
    """Up to 8 ranks have full lanes, up to 25 share four inches; labels never overlap."""
    heights = []
    for ranks in (1, 8, 25, 64, 128):
        figure = plot([ev("compute", 0.0, 1.0, rank=rank) for rank in range(ranks)], max_ranks=128)
        labels = figure.axes[0].get_yticklabels()
        assert words(labels) == [f"rank {rank}" for rank in range(ranks)]
        boxes = [label.get_window_extent() for label in labels]
        assert all(upper.y0 > lower.y1 for upper, lower in pairwise(boxes))
        heights.append(figure.get_size_inches()[1])
    assert heights == sorted(heights)
    assert heights[2] - heights[1] < 0.01
    assert heights[4] - heights[3] == pytest.approx(64 * 0.16)


@pytest.mark.parametrize("events", [[], [ev("compute", 1.0, 1.0)]], ids=["none", "an instant"])
def test_nothing_to_show(plot, tmp_path, events):
    figure = plot(events, tmp_path / "t.png", title="run 1")
    assert words(figure.texts) == ["run 1"]
    assert words(figure.axes[0].texts) == [NOTHING]
    assert bars(figure) == {}


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_files(plot, tmp_path, suffix, magic):
    path = tmp_path / f"run.{suffix}"
    path.write_bytes(b"old")
    figure = plot(STEP, str(path), title=r"A step that costs $\5$")
    assert path.read_bytes().startswith(magic)
    assert words(figure.texts)[0] == r"A step that costs $\5$"


def test_no_pyplot_and_no_display(plot, tmp_path):
    code = (
        "import sys; from minidp.trace import Event, plot_timeline; "
        "plot_timeline([Event('step', 'compute', 0.0, 1.0, 0, {})], sys.argv[1]); "
        "assert 'matplotlib.figure' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "t.png")], check=True)
    assert (tmp_path / "t.png").stat().st_size > 0


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^plot_timeline needs matplotlib, .*: pip install matplotlib$"):
        plot_timeline([])
