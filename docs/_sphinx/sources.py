"""Pages of the source: a link to a file of the package, or to a folder of it, leads to a page that shows it."""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from html import escape
from pathlib import Path, PurePosixPath
from typing import Any

from docutils import nodes
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

ROOT = Path(__file__).parents[2]
SHOWN = {".py", ".cu", ".cuh", ".h", ".sh", ".toml", ".txt"}
TOPS = ("minidp", "tests")
FOLDER = "source"
INDEXES = {Path("notebooks"): "docs/notebooks.html", Path("docs"): "docs/index.html"}  # folders told by a page


@cache
def files() -> list[Path]:
    """What has a page, relative to the repository."""
    found = [path for top in TOPS for path in (ROOT / top).rglob("*") if path.suffix in SHOWN]
    return sorted(path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts)


@cache
def folders() -> list[Path]:
    return sorted({parent for path in files() for parent in path.parents} - {Path()})


def page_of(path: Path) -> str | None:
    """The page of a file or folder of the repository, from the site's root."""
    if path in INDEXES:
        return INDEXES[path]
    if path in files():
        return f"{FOLDER}/{path.as_posix()}.html"
    return f"{FOLDER}/{path.as_posix()}/index.html" if path in folders() else None


def place_of(module: str, name: str) -> str | None:
    """Page and line of what a module calls `name`."""
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    found = getattr(found, "fget", found)
    try:
        path = Path(inspect.getsourcefile(inspect.unwrap(found)) or "").relative_to(ROOT)
        line = inspect.getsourcelines(inspect.unwrap(found))[1]
    except (TypeError, OSError, ValueError):
        return None
    return f"{page_of(path)}#L-{line}"


class SourceLinks(SphinxTransform):
    """Links to files and folders of the source lead to their pages, before they are taken for downloads."""

    default_priority = 500

    def apply(self, **kwargs: Any) -> None:
        here = PurePosixPath(self.env.docname).parent
        for node in list(self.document.findall(addnodes.download_reference)) + list(
            self.document.findall(addnodes.pending_xref)
        ):
            target, _, line = node.get("reftarget", "").partition("#")
            if not target or "://" in target:
                continue
            base = Path() if target.startswith("/") else Path(here)
            path = Path(os.path.normpath(base / target.lstrip("/")))
            if (page := page_of(path)) is not None:
                uri = os.path.relpath(page, here) + (f"#{line.replace('L', 'L-')}" if line else "")
                node.replace_self(nodes.reference("", "", *node.children, refuri=uri, internal=True))


def first_sentence(path: Path) -> str:
    """What a Python file says that it is."""
    text = (ROOT / path).read_text(encoding="utf-8")
    first = text.split('"""')[1].split("\n\n")[0] if text.startswith('"""') else ""
    return re.split(r"(?<=\.)\s+(?=[^\Wa-z])", " ".join(first.split()))[0]


def listing(folder: Path) -> str:
    """A folder's files, and what each is."""
    rows = [(f"{path.name}/index.html", f"{path.name}/", "") for path in folders() if path.parent == folder]
    rows += [(f"{path.name}.html", path.name, first_sentence(path)) for path in files() if path.parent == folder]
    lines = [f'<li><a href="{to}">{name}</a> {escape(says)}</li>' for to, name, says in rows]
    return f"<ul>{''.join(lines)}</ul>"


def coloured(path: Path) -> str:
    try:
        lexer = get_lexer_for_filename(path.name)
    except ClassNotFound:
        lexer = get_lexer_for_filename("plain.txt")
    text = (ROOT / path).read_text(encoding="utf-8")
    return highlight(text, lexer, HtmlFormatter(lineanchors="L", wrapcode=False))


def navigation(app: Sphinx) -> Callable[[str], Callable[..., str]]:
    """The tree beside the text, for a page: made once for each depth, since no page of the source is in it."""
    made: dict[Any, str] = {}

    def for_page(page: str) -> Callable[..., str]:
        def toctree(**options: Any) -> str:
            key = page.count("/"), *sorted(options.items())
            if key not in made:
                made[key] = app.builder._get_local_toctree(page, **options)  # what pages get if nothing is said
            return made[key]

        return toctree

    return for_page


def pages(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    toctree = navigation(app)
    found = [(folder, "/index", listing) for folder in folders()] + [(path, "", coloured) for path in files()]
    for path, rest, show in found:
        title, above = path.as_posix(), path.parent.as_posix()
        up = "" if above == "." else f'<p>in <a href="{"../" if rest else ""}index.html">{above}/</a></p>'
        body = f'<h1 class="source">{title}{"/" if rest else ""}</h1>{up}{show(path)}'
        page = f"{FOLDER}/{title}{rest}"
        yield page, {"title": title, "body": body, "toctree": toctree(page)}, "page.html"


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(SourceLinks)
    app.connect("html-collect-pages", pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
