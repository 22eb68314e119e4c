"""Our pages in a real browser: they are drawn, fetch nothing, complain of nothing, and can be read on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from minidp.comm import schedules
from minidp.demo.__main__ import main
from minidp.trace import Event, animate, plot_timeline
from minidp.trace.clock import moment, total_s
from minidp.trace.curves import plot_curves
from minidp.trace.pareto import Choice, plot_pareto
from tests.browser import Browser, Seen, browser, contrast, overflow_px, texts

PHONE, SCREEN = 360, 1200
SMALLEST_PX, CONTRAST = 11, 4.5
PAGES = ("ring", "tree", "direct", "timeline", "curves", "pareto", "report", "strategies")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, each made once."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("pages")
    animate(schedules.ring(9), folder / "ring.html")
    animate(schedules.binomial_tree(6), folder / "tree.html", title="A title that is long: " + "word " * 20)
    animate(schedules.direct(5), folder / "direct.html")
    events = [Event("forward", "compute", k, k + 1.0, rank, {}) for rank in range(3) for k in range(4)]
    plot_timeline(events, folder / "timeline.html", title="Steps")
    plot_curves({"a": [(0.0, 2.0), (1.0, 1.0)]}, {"a": {0: 3, 2: 1}}, folder / "curves.html")
    plot_pareto(
        [Choice("a", (1.0, 2.0), 0.5, "k", True), Choice("b", (2.0, 1.0), 0.6, "l", False)], folder / "pareto.html"
    )
    virtual = "--world", "virtual", "--workers", "3", "--epochs", "1"
    assert main([*virtual, "--report", str(folder / "report.html")]) == 0
    assert main([*virtual, "--strategy", "async", "--report", str(folder / "strategies.html")]) == 0
    return folder


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, SCREEN])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(chromium: Browser, folder: Path, name: str, width: int, dark: bool) -> None:
    with chromium.open(folder / f"{name}.html", width, dark) as (page, seen):
        assert overflow_px(page) <= 0
        found = texts(page)
        for text in found:
            assert text["width"] > 1, text
            assert text["height"] > 1, text
            assert text["size"] >= SMALLEST_PX, text
            assert contrast(text["ink"], text["paper"]) >= CONTRAST, text
        assert found or name in ("curves", "pareto")  # whose letters are outlines
        for drawn in page.locator("svg").all():
            box = drawn.bounding_box()
            assert box["width"] >= 300
            assert box["height"] >= 100
        assert page.locator("svg").count() >= 1
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (contrast(ground, "rgb(255, 255, 255)") > 10) is dark
    assert seen.nothing(), seen


def texts_of_svg(page: Any) -> list[str]:
    """What the animation says now."""
    found: list[str] = page.evaluate(
        """[...document.querySelectorAll("svg text")].filter(
             text => !text.closest("g") || getComputedStyle(text.closest("g")).opacity === "1"
           ).map(text => text.textContent)"""
    )
    return found


def parts(page: Any) -> int:
    """How many layers are seen."""
    found: int = page.evaluate(
        """[...document.querySelectorAll("[data-part]")].filter(
             part => getComputedStyle(part.parentElement).opacity === "1").length"""
    )
    return found


def messages(page: Any) -> list[tuple[int, float, float]]:
    """(step, x, y) of all that are on their way, in pixels."""
    found: list[tuple[int, float, float]] = page.evaluate(
        """[...document.querySelectorAll("[data-message]")].filter(
             each => getComputedStyle(each).opacity === "1").map(each => {
               const box = each.getBoundingClientRect();
               return [+each.dataset.message.split(" ")[0], box.x, box.y];
           })"""
    )
    return found


def slide(page: Any, half: int) -> None:
    page.locator("#step").evaluate(
        "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input', {bubbles: true})); }", half
    )


def test_the_slider_moves_the_ring(chromium: Browser, folder: Path) -> None:
    p, steps = 9, 16
    with chromium.open(folder / "ring.html") as (page, seen):
        for half in (0, 1, 2, 15, 16, 17, 31, 32, 3, 0):
            slide(page, half)
            done, within = divmod(half, 2)
            added = min(done, p - 1) * (min(done, p - 1) + 1) // 2  # 1 + 2 + … layers, in each of p columns
            copied = sum(p - 1 - k for k in range(max(0, done - (p - 1))))
            assert parts(page) == p * p + p * (added + copied)
            moving = messages(page)
            assert [step for step, _, _ in moving] == [done] * (p * within)
            says = texts_of_svg(page)[1]
            if within:
                assert says.startswith(f"Step {done + 1} of {steps}: ")
                assert page.locator("#where").inner_text() == f"in step {done + 1} of {steps}"
            else:
                assert page.locator("#where").inner_text() == f"after {done} of {steps} steps"
            assert page.locator("#play").inner_text() == "Play"
    assert seen.nothing(), seen


def test_play_and_pause(chromium: Browser, folder: Path) -> None:
    """Time is set, not waited for; that it then goes on by itself is waited for by the browser."""
    with chromium.open(folder / "ring.html") as (page, seen):
        clock = "document.querySelector('svg').getCurrentTime()"
        assert page.locator("#play").inner_text() == "Pause"
        slide(page, 5)
        before = page.evaluate(clock)
        assert before == pytest.approx(moment(5, 16), abs=1e-3)
        assert page.evaluate("document.querySelector('svg').animationsPaused()")
        here = messages(page)[0]
        page.evaluate(f"document.querySelector('svg').setCurrentTime({before + 0.3})")
        assert messages(page)[0] != here
        page.locator("#play").click()
        assert page.locator("#play").inner_text() == "Pause"
        page.wait_for_function(f"{clock} > {before + 0.4}")
        page.locator("#play").click()
        assert page.locator("#play").inner_text() == "Play"
        paused = page.evaluate(clock)
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.evaluate(clock) == paused
        # After the end all begins again, and the slider comes along.
        slide(page, 32)
        page.evaluate(f"document.querySelector('svg').setCurrentTime({total_s(16) - 0.1})")
        page.locator("#play").click()
        page.wait_for_function("+document.getElementById('step').value < 32")
    assert seen.nothing(), seen


def test_keys_move_the_slider(chromium: Browser, folder: Path) -> None:
    with chromium.open(folder / "direct.html") as (page, _):
        page.locator("#step").focus()
        slide(page, 0)
        page.keyboard.press("ArrowRight")
        assert page.locator("#where").inner_text() == "in step 1 of 1"
        assert len(messages(page)) == 20
        page.keyboard.press("ArrowRight")
        assert parts(page) == 25
        assert page.locator("#step").get_attribute("aria-valuetext") == "after 1 of 1 steps"


def test_who_asks_for_less_motion_gets_the_end(chromium: Browser, folder: Path, tmp_path: Path) -> None:
    """On our page: the beginning, and the slider. Of the picture alone: how all ends."""
    animate(schedules.ring(4), tmp_path / "ring.svg")
    with chromium.open(folder / "direct.html", still=True) as (page, _):
        assert page.evaluate("document.querySelector('svg').animationsPaused()")
        assert parts(page) == 5
        slide(page, 2)
        assert parts(page) == 25
    with chromium.open(tmp_path / "ring.svg", still=True) as (page, seen):
        page.evaluate(f"document.documentElement.setCurrentTime({moment(3, 6)})")
        assert parts(page) == 64
        assert messages(page) == []
        assert "End: each rank has the sum of all 4" in texts_of_svg(page)
    with chromium.open(tmp_path / "ring.svg") as (page, _):
        page.evaluate(f"document.documentElement.setCurrentTime({moment(3, 6)})")
        assert parts(page) == 16 + 4
        assert len(messages(page)) == 4
        page.emulate_media(media="print")
        assert parts(page) == 64
    assert seen.nothing(), seen


def test_the_picture_moves_as_an_image(chromium: Browser, tmp_path: Path) -> None:
    """As in documents: an <img> runs no script, and the picture moves all the same."""
    animate(schedules.ring(2), tmp_path / "ring.svg")
    (tmp_path / "doc.html").write_text(
        '<!doctype html><link rel="icon" href="data:,"><img src="ring.svg">', encoding="utf-8"
    )
    with chromium.open(tmp_path / "doc.html") as (page, seen):
        assert page.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == 512
        first = page.locator("img").screenshot()
        end = monotonic() + 20  # nothing moves in the first second
        while page.locator("img").screenshot() == first:
            assert monotonic() < end, "it does not move"
        assert seen.fetched == [(tmp_path / "ring.svg").as_uri()]


def test_a_bar_tells_what_it_is(chromium: Browser, folder: Path) -> None:
    with chromium.open(folder / "timeline.html", PHONE) as (page, seen):
        says = page.locator(".readout")
        assert says.inner_text() == "Point at a bar, or tap it, to read what it is."
        page.locator(".part").nth(1).hover()
        assert says.inner_text() == "rank 0: forward (compute), 1 s, from 1 s on"
        page.locator(".part").nth(4).click()
        assert says.inner_text() == "rank 1: forward (compute), 1 s, from 0 s on"
        assert page.locator(".part.chosen").count() == 1
    assert seen.nothing(), seen


def test_wide_things_scroll_in_their_boxes(chromium: Browser, folder: Path) -> None:
    with chromium.open(folder / "report.html", PHONE) as (page, _):
        box = page.locator(".picture").last
        assert box.evaluate("box => box.scrollWidth > box.clientWidth")
        box.evaluate("box => { box.scrollLeft = 200; }")
        assert box.evaluate("box => box.scrollLeft") == 200


def test_without_a_browser_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skipped, but where somebody relies on it: a check that is passed over there would not be missed."""
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("MINIDP_NEEDS_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no browser: "), browser():
        pass
    monkeypatch.setenv("MINIDP_NEEDS_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no browser: "), browser():
        pass


def test_the_helper_sees_what_is_wrong(chromium: Browser, tmp_path: Path) -> None:
    """What all tests here rest on can fail."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><style>body { background: #fff }</style><img src=missing.png>"
        '<p style="width: 900px; font-size: 9px; color: #999">small</p>'
        "<script>console.warn('told'); document.title.no.thing;</script>",
        encoding="utf-8",
    )
    with chromium.open(bad, PHONE) as (page, seen):
        assert overflow_px(page) > 500
        (text,) = texts(page)
        assert text["size"] == 9
        assert contrast(text["ink"], text["paper"]) == pytest.approx(2.85, abs=0.01)
    assert any("told" in line for line in seen.console)
    assert len(seen.errors) == 1
    assert seen.fetched == [(tmp_path / "missing.png").as_uri()]
    assert not seen.nothing()
    assert Seen().nothing()
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
