"""Pages that need no other file: what is escaped, what is inside, and the same text each time."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from minidp.trace import Event, plot_timeline
from minidp.trace.curves import plot_curves
from minidp.trace.page import annotate, can_draw, page, picture, table
from minidp.trace.pareto import Choice, plot_pareto

EVIL = "<script>alert('&')</script> \"x\""
STEP = [
    Event("forward", "compute", 10.0, 10.002, 0, {}),
    Event(EVIL, "wait", 10.002, 10.0025, 0, {}),
    Event("bucket", "communication", 10.001, 10.002, 1, {"stream": "gradients"}),
    Event("wait", "wait", 10.0, 10.001, 1, {}),
]
VOID = {"meta", "link", "br"}


class Tree(HTMLParser):
    """Checks that tags close in order; counts them, and keeps texts and addresses."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]


def stands_alone(text: str) -> Tree:
    """The tree of a page that asks for nothing; it has no id twice."""
    tree = Tree(text)
    assert all(address.startswith(("#", "data:")) for address in tree.addresses)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/)", text)
    assert len(set(tree.ids)) == len(tree.ids)
    return tree


def test_a_page() -> None:
    text = page(EVIL, [table(("", "a\nb"), [(EVIL, "1"), ("x", "<2")]), "<p>told</p>"])
    tree = stands_alone(text)
    assert tree.of("title") == tree.of("h1") == [EVIL]
    assert tree.of("td") == [EVIL, "1", "x", "<2"]
    assert tree.of("th") == ["a\nb"]
    assert tree.of("p") == ["told"]
    assert "script" not in tree.tags
    assert text.startswith('<!doctype html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    assert Tree(page("t", [], script="let a = 1 < 2;")).of("script") == ["let a = 1 < 2;"]
    assert '<h1 class="unseen">t</h1>' in page("t", [], heading=False)


def test_what_is_no_text_is_replaced() -> None:
    """Else the page could not be written, and an existing one would be lost."""
    text = page("a\x00b\udcff", [table(("x\x1b",), [("tab\there\n",)])])
    assert stands_alone(text).of("h1") == ["a\ufffdb\ufffd"]
    assert "x\ufffd" in text
    assert "tab\there\n" in text
    text.encode()


def test_tables_without_a_header_and_of_words() -> None:
    text = table((), [("a", "b")], words=True)
    assert "thead" not in text
    assert '<td class="words">b</td>' in text


@pytest.fixture
def html(tmp_path: Path) -> Path:
    pytest.importorskip("matplotlib")
    return tmp_path / "picture.html"


def test_bars_of_a_timeline_tell_what_they_are(html: Path) -> None:
    plot_timeline(STEP, html, title=EVIL)
    tree = stands_alone(html.read_text(encoding="utf-8"))
    assert tree.of("h1") == [EVIL]
    assert tree.of("title")[1:] == [  # in order of the legend
        "rank 0: forward (compute), 2 ms, from 0 s on",
        f"rank 0: {EVIL} (wait), 500 µs, from 2 ms on",
        "rank 1: wait, 1 ms, from 0 s on",
        "rank 1: bucket (communication), 1 ms, from 1 ms on",
    ]
    assert tree.tags.count("a") == 0
    assert tree.tags.count("script") == 1
    assert tree.of("p") == ["Point at a bar, or tap it, to read what it is."]


def test_names_that_are_no_text(html: Path) -> None:
    """Fonts have no signs for them, and halves of characters can't be drawn at all."""
    plot_timeline([Event("a\x1bb\udcff", "c\x00", 0.0, 1.0, 0, {})], html, title="t\udcff")
    tree = stands_alone(html.read_text(encoding="utf-8"))
    assert tree.of("h1") == ["t\ufffd"]
    assert tree.of("title")[1:] == ["rank 0: a\ufffdb\ufffd (c\ufffd), 1 s, from 0 s on"]


def test_other_formats_are_as_they_were(html: Path) -> None:
    """A page of a figure leaves nothing behind in it: no links in a picture that is saved later."""
    figure = plot_timeline(STEP, html)
    figure.savefig(html.with_suffix(".svg"))
    svg = html.with_suffix(".svg").read_text(encoding="utf-8")
    assert "note:" not in svg
    assert "<a " not in svg


def test_curves_and_choices(html: Path) -> None:
    plot_curves({"one & <all>": [(0.0, 2.0), (1.0, 0.5)]}, {}, html, title=EVIL, clock="", unit="steps")
    tree = stands_alone(html.read_text(encoding="utf-8"))
    assert tree.tags.count("svg") == 1
    assert "script" not in tree.tags
    plot_pareto([Choice("<a>", (1.0, 2.0), 0.5, "k", True)], html)
    assert stands_alone(html.read_text(encoding="utf-8")).of("h1") == [
        "Test accuracy against bytes, and against time, of each choice"
    ]


def test_steps_are_the_unit_of_an_axis(html: Path) -> None:
    left, *_ = plot_curves({"a": [(0.0, 2.0), (1e-3, 0.5)]}, {}, clock="time").axes
    assert left.get_xlabel() == "time [ms]"
    left, *_ = plot_curves({"a": [(0.0, 2.0), (400.0, 0.5)]}, {}, clock="", unit="steps").axes
    assert left.get_xlabel() == "steps"
    assert list(left.lines[0].get_xdata()) == [0.0, 400.0]


def test_a_run_of_one_step_is_seen() -> None:
    pytest.importorskip("matplotlib")
    left, *_ = plot_curves({"one": [(1.0, 2.3)], "two": [(1.0, 2.3), (2.0, 2.2)]}, {}, unit="steps").axes
    assert [line.get_marker() for line in left.lines] == ["o", ""]


@pytest.mark.parametrize(
    ("losses", "least", "most"),
    [
        ((2.30549, 2.305495), 2, 10),
        ((2.3, 1.9), 2, 10),
        ((2.3, 1e-3), 5, 16),
        ((2.3, 1e7), 4, 10),
        ((2.3, 1e37), 3, 12),
    ],
)
def test_losses_have_labels_that_differ(losses: tuple[float, float], least: int, most: int) -> None:
    """Also those that hardly fall, and those of a run that diverges."""
    pytest.importorskip("matplotlib")
    figure = plot_curves({"a": [(float(step), loss) for step, loss in enumerate(losses)]}, {})
    figure.draw_without_rendering()
    axis = figure.axes[0].yaxis
    low, high = axis.get_view_interval()
    shown = [
        text.get_text() for text, at in zip(axis.get_ticklabels(), axis.get_majorticklocs()) if low <= at <= high
    ]
    assert least <= len(shown) <= most
    assert len(set(shown)) == len(shown)


@pytest.mark.parametrize("last", [0, 1, 9, 11, 12, 13, 16, 23, 24, 35, 36, 99, 100, 250, 999, 1000, 2047])
def test_labels_of_staleness_keep_apart(last: int) -> None:
    """Also the last one, of all that is later still."""
    pytest.importorskip("matplotlib")
    counts = {0: 1000, last: 1000, last + 50: 1}
    figure = plot_curves({"a": [(0.0, 2.0), (1.0, 1.0)]}, {"a": counts})
    figure.draw_without_rendering()
    labels = figure.axes[1].get_xticklabels()
    assert labels[0].get_text() == "0"
    assert labels[-1].get_text() == f">{last}"
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 + 1 <= b.x0 for a, b in pairwise(boxes))


def test_pictures_on_one_page_keep_apart(html: Path) -> None:
    """Matplotlib numbers its parts from one on in each picture: clip paths of one must not cut the other."""
    figures = [plot_timeline(STEP, title=f"number {i}") for i in range(2)]
    parts = [picture(figure, f"picture {i}") for i, figure in enumerate(figures)]
    text = page("both", parts)
    tree = stands_alone(text)
    assert tree.tags.count("svg") == 2
    used = re.findall(r'(?:url\(#|xlink:href="#)([^")]+)', text)
    assert used
    assert set(used) <= set(tree.ids)


def test_the_same_picture_gives_the_same_text(html: Path) -> None:
    plot_timeline(STEP, html, title="once")
    first = html.read_bytes()
    plot_timeline(STEP, html, title="once")
    assert html.read_bytes() == first


def test_notes_are_of_their_parts(html: Path) -> None:
    """In the order in which they were given; a note's own text is no pattern."""
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    figure = Figure()
    squares = [[(i, 0), (i + 1, 0), (i + 1, 1), (i, 1)] for i in range(12)]
    drawn = PolyCollection(squares)
    figure.add_subplot().add_collection(drawn)
    notes = [rf"\{i} note:0:{11 - i} $&" for i in range(12)]
    annotate(drawn, notes)
    found = Tree(picture(figure, "squares")).of("title")
    assert found == notes


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"^pictures need matplotlib, which is missing: pip install matplotlib$"):
        can_draw()
