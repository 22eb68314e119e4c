"""The documents are built without a warning or a network, links lead somewhere, every public name is explained."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from inspect import cleandoc
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import browser, overflow_px

pytest.importorskip("sphinx", reason="the extra docs is not installed (sphinx)")
pytest.importorskip("myst_nb", reason="the extra docs is not installed (myst-nb)")
pytest.importorskip("furo", reason="the extra docs is not installed (furo)")

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).parents[1]
ROOMS = ("autograd", "backend", "comm", "compress", "data", "launch", "nn", "optim", "parallel", "sim", "trace")
NOWHERE = "http://127.0.0.1:9"  # where nobody answers

VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"'>]+)"""
TAG = re.compile(rf"""<([a-zA-Z][\w-]*)((?:\s+[^\s"'=>/]+(?:\s*=\s*{VALUE})?)*)\s*/?>""")
ATTRIBUTE = re.compile(rf"""([^\s"'=>/]+)\s*=\s*({VALUE})""")
LOADED = re.compile(r"""(?:url\(\s*|@import\s+)["']?([^"')\s]+)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built once. A proxy that does not exist stands before every network."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-c", "docs", "-b", "html", "-W", "--keep-going", "-q"]
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), NOWHERE)
    run = subprocess.run(
        [*command, "-d", str(out / "doctrees"), ".", str(out / "html")],
        cwd=ROOT,
        env={**os.environ, **proxies},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return out / "html"


def tags(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(name, attributes) of all tags, also of those in the pages of iframes."""
    for name, attributes in TAG.findall(text):
        found = {key.lower(): html.unescape(value.strip("\"'")) for key, value in ATTRIBUTE.findall(attributes)}
        yield name.lower(), found
        if "srcdoc" in found:
            yield from tags(found["srcdoc"])


@dataclass
class Page:
    """What a page says of other files: ``links`` are followed by readers, ``loads`` by browsers by themselves."""

    links: set[str] = field(default_factory=set)
    loads: set[str] = field(default_factory=set)
    anchors: set[str] = field(default_factory=set)


def read(text: str) -> Page:
    page = Page()
    for name, found in tags(text):
        page.anchors.update(found[key] for key in ("id", "name") if key in found)
        if "href" in found and name not in ("base", "use"):
            (page.links if name == "a" else page.loads).add(found["href"])
        page.loads.update(found[key] for key in ("src", "data", "poster", "xlink:href") if key in found)
        page.loads.update(part.split()[0] for part in found.get("srcset", "").split(",") if part.strip())
        page.loads.update(LOADED.findall(found.get("style", "")))
    for style in re.findall(r"<style[^>]*>(.*?)</style>", text, re.DOTALL):
        page.loads.update(LOADED.findall(style))
    return page


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: read(path.read_text()) for path in site.rglob("*.html")}


def from_elsewhere(target: str) -> bool:
    return target.startswith("//") or urlsplit(target).scheme not in ("", "data")


def dead_links(pages: dict[Path, Page], top: Path) -> list[str]:
    """Links of all pages to files or anchors that are not there."""
    dead = []
    for path, page in pages.items():
        for link in page.links | page.loads:
            parts = urlsplit(link)
            if parts.scheme or link.startswith("//") or link == "#":
                continue
            target = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            known = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.is_file() or (parts.fragment and unquote(parts.fragment) not in known):
                dead.append(f"{path.relative_to(top)}: {link}")
    return sorted(dead)


def test_the_checks_find_what_they_look_for(tmp_path: Path) -> None:
    text = (
        '<link rel="x" href="https://a/b.css"><a href="https://fine">f</a><img alt=">" src=//c/d.png>'
        '<iframe srcdoc="&lt;script src=&#39;http://e/f.js&#39;&gt;&lt;/script&gt;"></iframe>'
        "<style>p { background: url('https://g/h.png') } @import \"i.css\";</style>"
    )
    assert sorted(filter(from_elsewhere, read(text).loads)) == [
        "//c/d.png", "http://e/f.js", "https://a/b.css", "https://g/h.png",
    ]  # fmt: skip
    (tmp_path / "a.html").write_text('<p id=here><a href="#here">1</a><a href="b.html#no">2</a><a href="c">3</a>')
    (tmp_path / "b.html").write_text('<a href="a.html#here">4</a>')
    pages = {path: read(path.read_text()) for path in tmp_path.iterdir()}
    assert dead_links(pages, tmp_path) == ["a.html: b.html#no", "a.html: c"]


def converted(text: str) -> list[str]:
    """The docstring as reStructuredText, without blank lines."""
    spec = spec_from_file_location("docstrings", ROOT / "docs" / "_sphinx" / "docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return [line for line in module.convert(cleandoc(text).splitlines()) if line]


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("2 * x_i |g| and f_*", [r"2 \* x\_i \|g\| and f\_\*"]),
        ("All of ``x * 2``'s.", [r"All of \ ``x * 2``\ 's."]),
        ("See `nn.Linear`.", [r"See \ :py:obj:`nn.Linear <minidp.nn.Linear>`\ ."]),
        ("One.\n\n    w ← w − η g\n\nTwo.", ["One.", ".. code-block:: text", "    w ← w − η g", "Two."]),
        ("So::\n\n    if x:\n        y\n\nx", ["So:", ".. code-block:: python", "    if x:", "        y", "x"]),
        ("An example\n\n>>> 1 + 1\n2", ["An example", ".. code-block:: pycon", "    >>> 1 + 1", "    2"]),
        (
            "F.\n\nArgs:\n    x, *y: one\n        more: yes\n    z: two\n\nEnd.",
            ["F.", ":Args:", r"    - **x**, **\*y**: one more: yes", "    - **z**: two", "End."],
        ),
        ("F.\n\nRaises:\n    TypeError: no", ["F.", ":Raises:", "    - :py:exc:`TypeError`: no"]),
        ("F.\n\nRaises: TypeError for\n    no.", ["F.", ":Raises: TypeError for no."]),
        ("F:\n\n- one\n  more\n- two", ["F:", "- one more", "- two"]),
    ],
)
def test_docstrings_are_converted(text: str, made: list[str]) -> None:
    assert converted(text) == made


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert len(pages) > 20
    for path, page in pages.items():
        assert not [target for target in page.loads if from_elsewhere(target)], path
    for sheet in site.rglob("*.css"):
        assert not [target for target in LOADED.findall(sheet.read_text()) if from_elsewhere(target)], sheet


def test_every_link_leads_somewhere(site: Path, pages: dict[Path, Page]) -> None:
    assert dead_links(pages, site) == []


def test_the_top_leads_to_the_front_page(site: Path, pages: dict[Path, Page]) -> None:
    assert "docs/index.html" in pages[site / "index.html"].links


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    listed = [line.split(" ") for line in zlib.decompress(packed).decode().splitlines()]
    page = {name: place.split("#")[0] for name, kind, _, place, *_ in listed if kind.startswith("py:")}
    for room in ROOMS:
        for name in import_module(f"minidp.{room}").__all__:
            assert page.get(f"minidp.{room}.{name}") == f"docs/api/{room}.html", f"minidp.{room}.{name}"


def test_every_page_can_be_reached_from_the_front_page(site: Path, pages: dict[Path, Page]) -> None:
    front = site / "docs" / "index.html"
    reached = {os.path.normpath(front.parent / link.split("#")[0]) for link in pages[front].links}
    texts = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    for source in [*texts, ROOT / "README.md"]:
        if source != ROOT / "docs" / "index.md":
            assert str((site / source.relative_to(ROOT)).with_suffix(".html")) in reached, source


def test_pages_in_a_browser(site: Path) -> None:
    pages = [
        "docs/index",
        "README",
        "docs/tour",
        "docs/api/parallel",
        "docs/hybrid",
        "source/minidp/parallel/naive.py",
    ]
    with browser() as opened:
        for name in pages:
            for width in (1920, 1200, 900, 380):
                with opened.open(site / f"{name}.html", width=width) as (page, seen):
                    assert overflow_px(page) <= 0, (name, width)
                    assert page.locator("h1").first.is_visible()
                    assert (seen.errors, seen.console) == ([], []), name
                    assert [url for url in seen.fetched if not url.startswith(site.as_uri())] == []


def test_pictures_of_notebooks_keep_their_size_on_a_telephone(site: Path) -> None:
    """Else letters of a wide timeline would have three pixels; animations may shrink."""
    with browser() as opened, opened.open(site / "notebooks" / "07_buckets_and_overlap.html", 380) as (page, _):
        assert overflow_px(page) <= 0
        pictures = page.locator(".cell_output img[src$='.png']").all()
        assert pictures
        for each in pictures:
            shown, drawn = each.evaluate("image => [image.clientWidth, image.naturalWidth]")
            assert shown == drawn


def test_the_search_finds_names_and_words(site: Path) -> None:
    with browser() as opened:
        for words, wanted in (("ParameterServer", "docs/api/parallel.html"), ("straggler", "docs/virtual.html")):
            with opened.open(f"{(site / 'search.html').as_uri()}?q={words}") as (page, seen):
                page.wait_for_selector("#search-results li a", timeout=20_000)
                page.wait_for_function("document.querySelector('#search-results p')?.innerText.includes('found')")
                found = page.eval_on_selector_all("#search-results li a", "all => all.map(each => each.href)")
                assert any(wanted in link for link in found), (words, found)
                assert seen.errors == []
