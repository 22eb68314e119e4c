"""A page in a real browser, without a window: what it says, what it asks for, and how it looks.

Tests that use it are skipped, with the reason, where Playwright or Chromium is not installed; where the variable
MINIDP_NEEDS_BROWSER is set, as .ci/run does, they fail.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@dataclass
class Seen:
    """What a page did besides being looked at."""

    console: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    """What was asked for, but for the page itself and what it has in it (data:)."""

    def nothing(self) -> bool:
        return not (self.console or self.errors or self.fetched)


class Browser:
    """An open browser; it has no history, no extensions and no cache."""

    def __init__(self, context: Any) -> None:
        self._context = context

    @contextmanager
    def open(
        self, where: Path | str, width: int = 1200, dark: bool = False, still: bool = False
    ) -> Iterator[tuple[Any, Seen]]:
        """(Playwright's page, what it did) of a file or an address; ``still``: who looks asks for less motion."""
        address = where.absolute().as_uri() if isinstance(where, Path) else where
        page, seen = self._context.new_page(), Seen()
        try:
            page.set_default_timeout(20_000)
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(
                color_scheme="dark" if dark else "light", reduced_motion="reduce" if still else "no-preference"
            )
            page.on("console", lambda message: seen.console.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.on("request", lambda request: _note(seen, request.url, address))
            page.goto(address)
            yield page, seen
        finally:
            page.close()


def _note(seen: Seen, url: str, own: str) -> None:
    if url.partition("#")[0] != own.partition("#")[0] and not url.startswith("data:"):
        seen.fetched.append(url)


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with an empty profile; none of its processes outlives the block."""
    missing = pytest.fail if os.environ.get("MINIDP_NEEDS_BROWSER") else pytest.skip
    try:
        from playwright import sync_api as api
    except ImportError:
        missing("no browser: Playwright is not installed")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        missing(f"no browser: none of {', '.join(NAMES)} is installed")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            profile, executable_path=program, args=list(OPTIONS), headless=True
        )
        try:
            yield Browser(context)
        finally:
            context.close()


def overflow_px(page: Any) -> int:
    """By how much the page is wider than the screen: it then scrolls sideways as a whole."""
    found: int = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return found


# Each element that has text of its own and can be seen. Letters of an SVG have the size that it is shown at.
_TEXTS = """() => {
  const found = [];
  for (const each of document.querySelectorAll("body *")) {
    const own = [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!own || each.closest("style, script, title, .unseen, [opacity='0']") || !each.checkVisibility()) continue;
    const style = getComputedStyle(each), drawn = each instanceof SVGElement;
    const size = parseFloat(style.fontSize) * (drawn ? each.getScreenCTM().a : 1);
    const box = each.getBoundingClientRect();
    let under = each.parentElement, behind = null;
    if (drawn) {
      const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
      behind = [...each.closest("svg").querySelectorAll("rect.paper, rect.card")].filter(rect => {
        const r = rect.getBoundingClientRect();
        return r.x <= x && x <= r.right && r.y <= y && y <= r.bottom && !rect.closest("[opacity]");
      }).map(rect => getComputedStyle(rect).fill).pop();
    }
    for (under = each; !behind && under; under = under.parentElement) {
      const colour = getComputedStyle(under).backgroundColor;
      if (colour !== "rgba(0, 0, 0, 0)") behind = colour;
    }
    found.push({text: each.textContent.trim().slice(0, 40), size, ink: drawn ? style.fill : style.color,
      paper: behind || "rgb(255, 255, 255)", width: box.width, height: box.height});
  }
  return found;
}"""


def texts(page: Any) -> list[dict[str, Any]]:
    """Of each piece of text that is seen: ``text, size, ink, paper, width, height``, in pixels of the screen."""
    found: list[dict[str, Any]] = page.evaluate(_TEXTS)
    return found


def contrast(ink: str, paper: str) -> float:
    """Of two colours as ``rgb(r, g, b)``, from 1 to 21 (WCAG 2.1: text needs 4.5)."""
    bright, dim = sorted((_luminance(ink), _luminance(paper)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def _luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
