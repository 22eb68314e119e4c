"""Timelines as text, exactly as they are printed."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minidp.trace import Event, Recorder, as_text, recording, span
from minidp.trace.lanes import NOTHING


def ev(category, start_s, end_s, rank=0, name="", **args):
    return Event(name or category, category, start_s, end_s, rank, args)


def lane(events, width=10):
    """The cells of the only lane."""
    (row,) = (line for line in as_text(events, width).splitlines() if "│" in line)
    return row.split("│")[1]


# --- the text -----------------------------------------------------------------------------------------------


def test_two_ranks_one_of_which_waits():
    events = [ev("compute", 5.0, 6.0), ev("wait", 6.0, 8.0), ev("communication", 8.0, 9.0)]
    events += [ev("compute", 5.0, 8.0, rank=1), ev("communication", 8.0, 9.0, rank=1)]
    expected = """\
        0                4 s
rank 0 │█████··········▒▒▒▒▒│
rank 1 │███████████████▒▒▒▒▒│

█ compute   · wait   ▒ communication   blank: nothing recorded

% of 4 s   compute   wait   communication
rank 0        25.0   50.0            25.0
rank 1        75.0    0.0            25.0"""
    assert as_text(events, width=20) == expected


def test_innermost_spans_count():
    """As recorders record them: a step with two spans in it; what is left of the step is its own category."""
    clock = iter([0.0, 0.002, 0.005, 0.006, 0.008, 0.010])
    recorder = Recorder(rank=3, clock=lambda: next(clock))
    with recording(recorder), span("step", "other"):
        with span("forward", "compute"):
            pass
        with span("all_reduce", "communication"):
            pass
    expected = """\
        0    10 ms
rank 3 │++███+▒▒++│

█ compute   ▒ communication   + other   blank: nothing recorded

% of 10 ms   compute   communication   other
rank 3          30.0            20.0    50.0"""
    assert as_text(recorder.events, width=10) == expected


def test_streams_have_lanes_of_their_own():
    events = [ev("data", 0.0, 1.0), ev("compute", 1.0, 6.0), ev("wait", 6.0, 8.0), ev("compute", 9.0, 10.0)]
    events += [ev("communication", t, t + 2.0, stream="buckets") for t in (3.0, 5.0)]
    events += [ev("compute", 0.0, 10.0, rank=10, stream=None)]  # no name: no stream
    expected = """\
          0     10 s
rank 0   │=█████·· █│
  stream │   ▒▒▒▒   │
rank 10  │██████████│

█ compute   · wait   ▒ communication   = data   blank: nothing recorded

% of 10 s   compute   wait   data   unrecorded   stream   overlapped
rank 0         60.0   20.0   10.0         10.0     40.0         30.0
rank 10       100.0    0.0    0.0          0.0      0.0          0.0

stream: what ran beside the rank itself; overlapped: the part of that during compute"""
    assert as_text(events, width=10) == expected


def test_streams_of_a_rank_share_a_lane():
    """Where they overlap, time counts once. A rank may have nothing but streams."""
    events = [ev("communication", 0.0, 3.0, stream="up"), ev("data", 2.0, 4.0, stream="down")]
    events += [ev("compute", 0.0, 5.0, rank=1)]
    expected = """\
          0      5 s
rank 0   │          │
  stream │▒▒▒▒====  │
rank 1   │██████████│

█ compute   ▒ communication   = data   blank: nothing recorded

% of 5 s   compute   unrecorded   stream   overlapped
rank 0         0.0        100.0     80.0          0.0
rank 1       100.0          0.0      0.0          0.0

stream: what ran beside the rank itself; overlapped: the part of that during compute"""
    assert as_text(events, width=10) == expected


def test_gaps_are_blank():
    expected = """\
        0      1 s
rank 0 │██      · │
rank 1 │         █│

█ compute   · wait   blank: nothing recorded

% of 1 s   compute   wait   unrecorded
rank 0        20.0   10.0         70.0
rank 1        10.0    0.0         90.0"""
    events = [ev("compute", 0.0, 0.2), ev("wait", 0.8, 0.9), ev("compute", 0.9, 1.0, rank=1)]
    assert as_text(events, width=10) == expected


def test_other_categories_have_signs_too():
    """In alphabetical order, after the usual ones; of more than twelve, the last share a sign."""
    names = [f"c{i:02}" for i in range(10)]
    text = as_text([ev(c, i, i + 1) for i, c in enumerate(["wait", *names])], width=11)
    assert text.splitlines()[1] == "rank 0 │·+ox#*%@&??│"
    assert text.splitlines()[3] == (
        "· wait   + c00   o c01   x c02   # c03   * c04   % c05   @ c06   & c07   ? c08   ? c09   "
        "blank: nothing recorded"
    )


def test_a_category_may_be_called_like_a_column():
    text = as_text([ev("stream", 0.0, 1.0), ev("unrecorded", 1.0, 2.0), ev("unrecorded", 3.0, 4.0)], width=4)
    assert text.splitlines()[-2:] == [
        "% of 4 s   stream   unrecorded   unrecorded",
        "rank 0       25.0         50.0         25.0",
    ]


def test_ranks_left_out_are_counted():
    """The lowest stay. The time shown remains that of all ranks, so that a scale does not depend on the choice."""
    events = [ev("compute", 0.0, 1.0 + rank, rank=rank) for rank in (7, 2, 5, 4)]
    expected = """\
        0      8 s
rank 2 │████      │
rank 4 │███████   │

█ compute   blank: nothing recorded

% of 8 s   compute   unrecorded
rank 2        37.5         62.5
rank 4        62.5         37.5

2 more ranks not shown (max_ranks=2)"""
    assert as_text(events, width=10, max_ranks=2) == expected
    assert as_text(events, max_ranks=3).endswith("\n\n1 more rank not shown (max_ranks=3)")
    assert "not shown" not in as_text(events, max_ranks=4)


@pytest.mark.parametrize(
    "events",
    [
        [],
        [ev("compute", 1.0, 1.0)],
        [ev("compute", 1.0, 1.0), ev("wait", 2.0, 2.0, rank=1)],
        [ev("compute", 2.0, 1.0)],
    ],
    ids=["none", "an instant", "instants", "backwards"],
)
def test_nothing_to_show(events):
    assert as_text(events) == "Nothing to show: no event that took any time was recorded."
    assert as_text(iter(events)) == NOTHING


def test_instants_change_nothing():
    """They can't be seen, and neither stretch the time shown nor cut the span that they lie in."""
    events = [ev("compute", 1.0, 2.0), ev("wait", 2.0, 3.0)]
    instants = [ev("data", t, t, rank=rank) for t in (0.0, 1.0, 1.5, 2.0, 9.0) for rank in (0, 8)]
    assert as_text(instants[:5] + events + instants[5:]) == as_text(events)


@pytest.mark.parametrize("width", [0, -1])
def test_a_lane_needs_a_cell(width):
    with pytest.raises(ValueError, match=f"^width={width}: a lane needs at least one cell$"):
        as_text([], width)


@pytest.mark.parametrize("max_ranks", [0, -1])
def test_one_rank_must_be_shown(max_ranks):
    with pytest.raises(ValueError, match=f"^max_ranks={max_ranks}: at least one rank must be shown$"):
        as_text([], max_ranks=max_ranks)


def test_narrow_lanes_keep_their_labels():
    events = [ev("compute", 0.0, 3.0), ev("wait", 3.0, 4.0)]
    assert as_text(events, width=1).splitlines()[:2] == ["        0 4 s", "rank 0 │█│"]
    assert as_text(events, width=5).splitlines()[:2] == ["        0 4 s", "rank 0 │████·│"]


def test_the_order_of_events_does_not_matter():
    """But for spans of the same start and end: of these the first is the inner one, as recorders write them."""
    events = [ev("compute", 0.3 * i, 0.3 * i + 0.7, rank=i % 3, stream=("a", None)[i % 2]) for i in range(12)]
    events += [ev("wait", 0.1 * i, 0.1 * i + 0.25, rank=i % 3) for i in range(30)]
    expected = as_text(events)
    for seed in range(5):
        assert as_text(random.Random(seed).sample(events, len(events))) == expected
    twins = [ev("wait", 0.0, 1.0), ev("compute", 0.0, 1.0)]
    assert lane(twins) == "··········"
    assert lane(twins[::-1]) == "██████████"


# --- cells --------------------------------------------------------------------------------------------------


def test_a_cell_shows_what_took_most_of_it():
    assert lane([ev("wait", 0.0, 0.51), ev("compute", 0.51, 2.0)], 2) == "·█"
    assert lane([ev("wait", 0.0, 0.49), ev("compute", 0.49, 2.0)], 2) == "██"
    assert lane([ev("wait", 0.0, 0.5), ev("compute", 0.5, 2.0)], 2) == "██"  # a draw: the first in the legend
    # Twice 0.3 of wait is more than 0.4 of compute.
    assert lane([ev("wait", 0.0, 0.3), ev("compute", 0.3, 0.7), ev("wait", 0.7, 2.0)], 2) == "··"


def test_short_events_are_seen_between_gaps():
    """Only what is recorded competes for a cell. What takes less than 1/2000 of a cell is rounded away."""
    assert lane([ev("compute", 0.0, 1.0), ev("wait", 4.5, 4.501), ev("compute", 9.0, 10.0)]) == "█   ·    █"
    assert lane([ev("compute", 0.0, 1.0), ev("wait", 4.5, 4.5004), ev("compute", 9.0, 10.0)]) == "█        █"


@pytest.mark.parametrize("origin_s", [0.0, 1e-3, 12345.678, 1.7e9])
def test_edges_of_cells_are_not_blurred_by_rounding(origin_s):
    """Each cell its own event, with ends that decimal fractions can't hit: no neighbour takes part."""
    for width in (3, 7, 10, 49, 72):
        ends = [origin_s + 0.1 * i for i in range(width + 1)]
        every = [ev(("compute", "wait")[i % 2], *ends[i : i + 2]) for i in range(width)]
        assert lane(every, width) == ("█·" * width)[:width]
        assert "unrecorded" not in as_text(every)
        assert lane([*every[::2], ev("data", ends[0], ends[-1])], width) == ("█=" * width)[:width]
        if width % 2:
            assert lane(every[::2], width) == ("█ " * width)[:width]


@pytest.mark.parametrize(
    ("duration_s", "told"),
    [
        (1e-12, "0.001 ns"),
        (999.9e-9, "999.9 ns"),
        (999.96e-9, "1 µs"),
        (12.345e-6, "12.35 µs"),
        (0.32, "320 ms"),
        (0.99994, "999.9 ms"),
        (0.99996, "1 s"),
        (59.994, "59.99 s"),
        (86400.0, "86400 s"),
        (1e9, "1000000000 s"),
    ],
)
def test_any_time_scale(duration_s, told):
    text = as_text([ev("compute", 0.0, duration_s / 2), ev("wait", duration_s / 2, duration_s)], width=20)
    first, row, *_ = text.splitlines()
    assert first == f"        0{told:>19}"
    assert row == "rank 0 │██████████··········│"
    assert f"% of {told}   compute   wait\n" in text


@given(
    st.lists(
        st.builds(
            ev,
            st.sampled_from(["compute", "wait", "communication", "evaluation"]),
            st.floats(0, 1e3),
            st.floats(0, 1e3),
            st.integers(0, 3),
            stream=st.sampled_from([None, None, "a"]),
        ),
        max_size=12,
    ),
    st.integers(1, 40),
)
def test_any_events_give_a_well_formed_text(events, width):
    text = as_text(events, width)
    if text == NOTHING:
        assert not any(e.end_s > e.start_s for e in events)
        return
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    rows = [line for line in lines if "│" in line]
    assert len({len(row) for row in rows}) == 1
    assert all(len(row.split("│")[1]) == width for row in rows)
    legend = lines[len(rows) + 2]
    assert {cell for row in rows for cell in row.split("│")[1]} <= {" ", *legend}
    assert len({len(line) for line in lines if line.startswith(("% of", "rank")) and "│" not in line}) == 1
