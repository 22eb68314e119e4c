"""One page that needs no other file: text, tables and pictures as HTML, in light and in dark."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary
from zlib import crc32

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure as Figure  # also for who builds pages of them

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #222; --soft: #595959; --line: #d5d5d5; --link: #0064a0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #17191c; --ink: #e8e8e8; --soft: #b0b0b0; --line: #43474d; --link: #7cc4f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0.5rem 0 1rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; }
p { max-width: 44rem; }
pre, .box { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px; margin: 0 0 1rem; }
.box { width: fit-content; max-width: 100%; }
pre.wrap { white-space: pre-wrap; overflow-wrap: anywhere; }
p.said { white-space: pre-line; }
pre { padding: 0.75rem; font: 0.85rem/1.45 ui-monospace, "SF Mono", Consolas, "DejaVu Sans Mono", monospace; }
table { border-collapse: collapse; font-size: 0.925rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.35rem 0.75rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; min-width: 6.5rem; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: pre-line; }
tr:last-child td { border-bottom: 0; }
td.words { text-align: left; white-space: normal; }
.picture { background: #fff; }
.picture svg { display: block; height: auto; margin: 0 auto; }
.told svg * { pointer-events: none; }
.told .part, .told .part * { pointer-events: auto; cursor: pointer; }
.part.chosen path { stroke: #000 !important; stroke-width: 2 !important; }
.stage svg { display: block; width: 100%; max-width: 40rem; height: auto; margin: 0 auto; }
.controls { display: flex; flex-wrap: wrap; gap: 0.75rem; align-items: center; max-width: 40rem;
  margin: 1rem auto; }
.controls input { flex: 1 1 10rem; min-width: 0; height: 2rem; accent-color: var(--link); }
.controls button { font: inherit; min-width: 5rem; min-height: 2.5rem; border-radius: 6px; cursor: pointer;
  color: var(--ink); background: transparent; border: 1px solid var(--soft); }
.controls output { min-width: 9.5rem; color: var(--soft); }
.readout { min-height: 1.5em; color: var(--soft); margin: 0.25rem 0 0.5rem; }
@media print { .controls { display: none; } }
"""

# Not in XML or UTF-8: most control characters, and halves of characters (of file names that are no text).
_NO_TEXT = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_REM_AN_INCH = 6.2  # so that letters of 8 points have 11 pixels
_HINT = "Point at a bar, or tap it, to read what it is."
_notes: WeakKeyDictionary[Any, list[str]] = WeakKeyDictionary()

# Telephones show no titles of what one points at.
_READOUT = """
for (const box of document.querySelectorAll(".told")) {
  const says = box.querySelector(".readout");
  for (const kind of ["pointerover", "click"])
    box.addEventListener(kind, event => {
      const part = event.target.closest(".part");
      if (!part) return;
      box.querySelector(".part.chosen")?.classList.remove("chosen");
      part.classList.add("chosen");
      says.textContent = part.querySelector("title").textContent;
    });
}
"""


def readable(text: str) -> str:
    """The same with � for all that pages and pictures can't have in them."""
    return _NO_TEXT.sub("\ufffd", text)


def page(title: str, parts: Iterable[str], script: str = "", heading: bool = True) -> str:
    """The text of a page. ``parts`` are HTML, the title is plain text; ``script`` runs once all is there. Without
    ``heading`` the title is not seen: a picture has its own."""
    parts = list(parts)
    script = _READOUT * any('class="told"' in part for part in parts) + script
    hidden = "" if heading else ' class="unseen"'
    return readable(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # A browser asks for an icon unless there is one.
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<h1{hidden}>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</body>\n</html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """A table of plain texts, which scrolls within its box where it is too wide. The first column names the rows;
    ``words``: the others are words, not figures."""
    kind = ' class="words"' if words else ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join(
        f"<tr><td>{escape(row[0])}</td>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    head = f"<thead><tr>{head}</tr></thead>\n" if header else ""
    return f'<div class="box" tabindex="0"><table>{head}<tbody>\n{body}</tbody></table></div>'


def can_draw(who: str = "pictures need") -> None:
    """Raises: ImportError without matplotlib, which says ``who`` needs it, and what to do."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{who} matplotlib, which is missing: pip install matplotlib") from error


def annotate(artist: Artist, notes: Sequence[str]) -> None:
    """Remember what each part of a collection is: a page tells it to who points at the part."""
    _notes[artist] = list(notes)


def picture(figure: Figure, label: str) -> str:
    """A figure of matplotlib as an SVG within the page: letters are outlines, which look the same everywhere.

    ``label``: what it shows, for who can't see it; two on a page have different ones. It keeps its size, at which
    letters can be read, and scrolls within its box on a narrow screen. Parts with notes (`annotate`) tell them
    where one points at them, in a line below.
    """
    import matplotlib

    text = StringIO()
    noted: list[Any] = [artist for artist in figure.findobj() if artist in _notes]
    for at, artist in enumerate(noted):
        artist.set_urls([f"note:{at}:{i}" for i in range(len(_notes[artist]))])
    try:  # without a salt ids are new in each run
        with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": label}):
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    finally:
        for artist in noted:
            artist.set_urls([None])
    svg = text.getvalue()
    width = min(10, figure.get_size_inches()[0]) * _REM_AN_INCH
    svg = svg[svg.index("<svg ") :].replace(
        "<svg ", f'<svg role="img" aria-label="{escape(label)}" style="width:{width:g}rem" ', 1
    )
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)  # of no use within a page
    svg = _unique(svg, f"{crc32(label.encode()):08x}")

    def part(found: re.Match[str]) -> str:
        note = _notes[noted[int(found[1])]][int(found[2])]
        return f'<g class="part"><title>{escape(note)}</title>{found[3]}</g>'

    svg = re.sub(r'<a xlink:href="note:(\d+):(\d+)"[^>]*>(.*?)</a>', part, svg, flags=re.DOTALL)
    box = f'<div class="box picture" tabindex="0">{svg}</div>'
    return f'<div class="told">{box}<p class="readout">{_HINT}</p></div>' if noted else box


def _unique(svg: str, key: str) -> str:
    """The same with ids that no other picture on the page has, and only those that it uses itself."""
    used = set(re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: f' id="{found[1]}-{key}"' * (found[1] in used), svg)
    return re.sub(r'(xlink:href="#|url\(#)([^")]+)', rf"\1\2-{key}", svg)


def save(figure: Figure, path: str | os.PathLike[str], title: str | None, label: str, dpi: int) -> None:
    """Write a figure in the format that the suffix says; ``.html``: a page with nothing else on it."""
    if Path(path).suffix == ".html":
        text = page(title or label, [picture(figure, label)], heading=not title)
        Path(path).write_text(text, encoding="utf-8")
    else:
        figure.savefig(path, dpi=dpi)
