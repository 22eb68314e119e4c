"""The animation of a collective shows at each moment what its schedule does. Read from the SVG, as browsers do."""

from __future__ import annotations

import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from xml.etree import ElementTree

import numpy as np
import pytest

from minidp.comm import schedules
from minidp.comm.schedules import Schedule, Transfer
from minidp.trace import animate
from minidp.trace.clock import moment

SVG = "{http://www.w3.org/2000/svg}"
ALL = [
    *(make(n) for make in schedules.ALL_REDUCE.values() for n in range(1, 10)),
    *(make(n) for make in (schedules.broadcast, schedules.reduce, schedules.all_gather) for n in range(1, 10)),
    *(schedules.get(name, n, n - 1) for name in ("broadcast", "gather", "direct_reduce") for n in (2, 5)),
    schedules.all_to_all(3),
    schedules.direct_reduce_scatter(12),
]


def named(schedule: Schedule) -> str:
    return f"{schedule.name}-{schedule.world_size}"


# --- an SVG at a moment -----------------------------------------------------------------------------------------


def seen_at(svg: str, time_s: float | None):
    """All elements that are visible then; None: where nothing is animated."""
    found = []

    def walk(element):
        animated = element.find(f"{SVG}animate")
        if animated is not None and time_s is not None:
            assert animated.get("attributeName") == "opacity"
            assert animated.get("calcMode") == "discrete"
            times = [float(t) * float(animated.get("dur")[:-1]) for t in animated.get("keyTimes").split(";")]
            assert times[0] == 0
            assert times == sorted(set(times))
            value = animated.get("values").split(";")[bisect_right(times, time_s) - 1]
        else:
            value = element.get("opacity", "1")
        if value == "1":
            found.append(element)
            for child in element:
                walk(child)
        else:
            assert value == "0"

    walk(ElementTree.fromstring(svg))
    return found


def state_at(svg: str, schedule: Schedule, time_s: float | None):
    """rank → chunk → how often each rank's part is in: 0, 1 or 2, which stands for more."""
    ranks = range(schedule.world_size)
    state = [[[0 for _ in ranks] for _ in range(schedule.chunks)] for _ in ranks]
    for element in seen_at(svg, time_s):
        for name in ("data-part", "data-twice"):
            if name in element.attrib:
                rank, chunk, k = map(int, element.get(name).split())
                state[rank][chunk][k] += 1
    return state


def whole_at(svg: str, time_s: float | None):
    return {tuple(map(int, e.get("data-whole").split())) for e in seen_at(svg, time_s) if "data-whole" in e.attrib}


def captions_at(svg: str, time_s: float | None):
    return ["".join(e.itertext()) for e in seen_at(svg, time_s) if e.tag == f"{SVG}text"]


def simulated(schedule: Schedule, steps: int):
    """The same from `schedules.simulate`: rank k's number is (p+1)^k, so that digits of sums count."""
    p = schedule.world_size
    rest = replace(schedule, transfers=tuple(t for t in schedule.transfers if t.step < steps))
    arrays = [np.full(schedule.chunks, (p + 1) ** k, dtype=object) for k in range(p)]
    return [
        [[min(2, int(x) // (p + 1) ** k % (p + 1)) for k in range(p)] for x in array]
        for array in schedules.simulate(rest, arrays)
    ]


# --- laws -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_each_moment_shows_what_simulate_gives(schedule: Schedule) -> None:
    made = animate(schedule)
    assert made.steps == schedule.steps
    for done in range(schedule.steps + 1):
        expected = simulated(schedule, done)
        assert state_at(made.svg, schedule, moment(2 * done, made.steps)) == expected
        if done < schedule.steps:  # messages are on their way: nothing has changed yet
            assert state_at(made.svg, schedule, moment(2 * done + 1, made.steps)) == expected
    assert state_at(made.svg, schedule, None) == simulated(schedule, schedule.steps)  # without animation: the end
    assert whole_at(made.svg, None) == {
        (rank, chunk)
        for rank, cells in enumerate(simulated(schedule, schedule.steps))
        for chunk, cell in enumerate(cells)
        if set(cell) == {1}
    }


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_each_transfer_is_on_its_way_once_and_in_its_step(schedule: Schedule) -> None:
    made = animate(schedule)

    def messages(elements):
        for element in elements:
            if "data-message" in element.attrib:
                step, src, dst, op = element.get("data-message").split()
                yield from (
                    Transfer(int(step), int(src), int(dst), int(chunk), op)
                    for chunk in element.get("data-chunks").split()
                )

    everything = Counter(messages(ElementTree.fromstring(made.svg).iter()))
    assert everything == Counter(schedule.transfers)
    for half in range(2 * made.steps + 1):
        now = Counter(messages(seen_at(made.svg, moment(half, made.steps))))
        assert now == Counter(t for t in schedule.transfers if half == 2 * t.step + 1)
    assert not list(messages(seen_at(made.svg, None)))


@pytest.mark.parametrize("schedule", ALL, ids=named)
def test_captions_tell_step_and_bytes(schedule: Schedule) -> None:
    made = animate(schedule)
    title, *_ = captions_at(made.svg, 0.0)
    assert title.startswith(schedule.name.replace("_", " ").capitalize())
    for done in range(schedule.steps + 1):
        rest = replace(schedule, transfers=tuple(t for t in schedule.transfers if t.step < done))
        sent = schedules.bytes_sent(rest, schedule.chunks)
        _, step, cost, *_ = captions_at(made.svg, moment(2 * done, made.steps))
        if done:
            assert f"{max(sent) / schedule.chunks:.3g} n by" in cost
            assert cost.endswith(f"{sum(sent) / schedule.chunks:.3g} n in all")
            assert ("at most" in cost) == (len(set(sent)) > 1)
        else:
            assert cost == "Sent so far: 0 of n bytes"
        if 0 < done < schedule.steps:
            assert step.startswith(f"Step {done} of {schedule.steps}: ")
            ops = {t.op for t in schedule.transfers if t.step == done - 1}
            assert ("add" in step, "take" in step) == ("reduce" in ops, "copy" in ops)
    if schedule.name in schedules.ALL_REDUCE and schedule.world_size > 1:
        end = f"End: each rank has the sum of all {schedule.world_size}"
        for at in (moment(2 * made.steps, made.steps) + 1.0, None):
            assert captions_at(made.svg, at)[1] == end


@pytest.mark.parametrize("left_out", range(0, 24, 5))
def test_a_faulty_schedule_looks_faulty(left_out: int) -> None:
    """One transfer of a ring is missing: some sum is not whole, and the caption does not say that it is."""
    ring = schedules.ring(4)
    broken = replace(ring, transfers=tuple(t for i, t in enumerate(ring.transfers) if i != left_out))
    made = animate(broken)
    assert state_at(made.svg, broken, None) == simulated(broken, broken.steps) != simulated(ring, ring.steps)
    assert len(whole_at(made.svg, None)) < 16
    assert "each rank has the sum" not in captions_at(made.svg, None)[1]


def test_where_nothing_is_sent() -> None:
    assert captions_at(animate(schedules.ring(1)).svg, None)[1] == "Nothing is sent: one rank has it all"
    nothing = animate(replace(schedules.ring(3), transfers=()))
    assert captions_at(nothing.svg, None)[1] == "Nothing is sent"


def test_what_is_added_twice_has_a_sign() -> None:
    pair = schedules.recursive_doubling(2)
    again = replace(pair, transfers=(*pair.transfers, *(t._replace(step=1) for t in pair.transfers)))
    made = animate(again)
    assert state_at(made.svg, again, None) == simulated(again, 2) == [[[2, 2]], [[2, 2]]]
    assert whole_at(made.svg, None) == set()
    assert captions_at(made.svg, None)[-1].endswith("dark: more than once")
    assert "data-twice" not in animate(pair).svg


# --- the rest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "says"),
    [
        (schedules.ring(13), r"^ring of 13 ranks has 13 ranks: more than 12 can't be drawn$"),
        (schedules.direct(64), r"^direct of 64 ranks has 64 ranks: more than 12"),
        (schedules.all_to_all(4), r"^all_to_all of 4 ranks has 16 chunks: more than 12 can't be drawn$"),
    ],
)
def test_what_is_too_large_is_refused(schedule: Schedule, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        animate(schedule)


def test_files(tmp_path) -> None:
    made = animate(schedules.ring(3), tmp_path / "ring.svg", title="Ring")
    assert (tmp_path / "ring.svg").read_text(encoding="utf-8") == made.svg
    made.save(str(tmp_path / "ring.html"))
    page = (tmp_path / "ring.html").read_text(encoding="utf-8")
    assert made.svg in page
    assert page == made.html()
    with pytest.raises(ValueError, match=r"ring\.gif: an animation is saved as \.svg or \.html$"):
        made.save(tmp_path / "ring.gif")
    assert not (tmp_path / "ring.gif").exists()


@pytest.mark.parametrize("p", [8, 9, 10, 11, 12])
def test_many_ranks_do_not_hide_each_other(p: int) -> None:
    """Cards cover no columns of other ranks, and the legend's numbers have room: a digit takes 14 at most."""
    root = ElementTree.fromstring(animate(schedules.ring(p)).svg)

    def box(element):
        x, y, width, height = (float(element.get(name)) for name in ("x", "y", "width", "height"))
        return x, y, x + width, y + height

    cards = [box(e) for e in root.iter(f"{SVG}rect") if e.get("class") == "card"]
    columns = [box(e) for e in root.iter(f"{SVG}rect") if "data-whole" in e.attrib]
    assert len(cards) == p
    assert len(columns) == p * p
    for left, top, right, bottom in columns:
        over = [c for c in cards if c[0] < right and left < c[2] and c[1] < bottom and top < c[3]]
        assert len(over) == 1
    squares = [e for e in root.iter(f"{SVG}rect") if e.get("width") == e.get("height") == "16"]
    starts = [float(e.get("x")) for e in squares]
    ends = [start + 20 + 14 * len(str(k)) for k, start in enumerate(starts)]
    assert all(end < start for end, start in zip(ends, [*starts[1:], 640]))


def test_names_are_escaped() -> None:
    title = "<b>&\"x'</b> " + "long " * 20
    made = animate(replace(schedules.ring(2), name="<i>&"), title=title)
    root = ElementTree.fromstring(made.svg)
    assert not root.findall(f".//{SVG}b")
    assert title.split() == " ".join(e.text for e in root.iter(f"{SVG}text") if e.get("class") == "title").split()
    assert "<b>" not in made.html()
    odd = animate(schedules.ring(2), title="a\x00b\x1bc\udcffd")  # neither XML nor UTF-8 has these
    assert captions_at(odd.svg, 0.0)[0] == "a\ufffdb\ufffdc\ufffdd"
    assert "<title>a\ufffdb" in odd.html()
    unnamed = animate(replace(schedules.ring(2), name="<i>&"))
    assert captions_at(unnamed.svg, 0.0)[0] == "<i>&, 2 ranks"


def test_a_notebook_gets_the_picture_and_a_sentence() -> None:
    made = animate(schedules.halving_doubling(4))
    about = "Halving doubling, 4 ranks: 4 ranks, 4 steps, 24 chunks sent"
    assert made._repr_mimebundle_() == {"image/svg+xml": made.svg, "text/plain": about}
    assert ElementTree.fromstring(made.svg).get("aria-label") == about


def test_nothing_in_it_is_for_others() -> None:
    """Beside another one in a notebook: no ids, no rule that is not its own, nothing to be fetched, no script."""
    svg = animate(schedules.ring(4)).svg
    root = ElementTree.fromstring(svg)
    for element in root.iter():
        assert not {name for name in element.attrib if name == "id" or name.endswith("href")}
        assert element.tag not in (f"{SVG}script", f"{SVG}image", f"{SVG}use")
    style = root.find(f"{SVG}style").text
    assert "url" not in style
    assert "@import" not in style
    rules = [rule.rpartition("{")[0] for rule in style.replace("{ .", "{\n.").split("\n") if "{" in rule]
    selectors = [rule for rule in rules if rule.strip().startswith(".")]
    assert len(selectors) > 10
    assert all(selector.strip().startswith(".minidp-animation") for selector in selectors)


def test_the_same_schedule_gives_the_same_text() -> None:
    code = (
        "import sys; from hashlib import sha256; "
        "from minidp.comm import schedules; from minidp.trace import animate; "
        "print(sha256(animate(schedules.halving_doubling(6)).html().encode()).hexdigest()); "
        "assert 'matplotlib' not in sys.modules"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True, text=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {sha256(animate(schedules.halving_doubling(6)).html().encode()).hexdigest()}
