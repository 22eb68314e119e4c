"""From each section and formula of the article to the line of code, the notebook and the test: makes article.md.

``python docs/article_map.py`` writes the page from article.toml. The tests make it anew and compare, and fail for
a formula that lacks one of the three: a line that is gone, a notebook that does not name the section, a test that
is no more.
"""

from __future__ import annotations

import ast
import json
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "article.md"
KINDS = ("code", "notebooks", "tests")
HEAD = """# From the article to the code

<!-- Made from article.toml by docs/article_map.py: change that, not this. -->

Each section and formula of the article, with the line of code that does it, the notebook in which it is seen, and
the test that holds it. Sections have the article's numbers; their titles here are ours.
"""

Entry = dict[str, Any]


def entries() -> list[Entry]:
    found: list[Entry] = tomllib.loads((ROOT / "docs" / "article.toml").read_text())["entry"]
    return found


def line_of(file: str, text: str) -> tuple[int, str]:
    """(number, text) of the line of a file that contains `text`. ValueError unless there is exactly one."""
    lines = (ROOT / file).read_text().splitlines()
    found = [(number, line.strip()) for number, line in enumerate(lines, 1) if text in line]
    if len(found) != 1:
        raise ValueError(f"{file} has {len(found)} lines with {text!r}, not one")
    return found[0]


def notebook(number: str) -> tuple[str, str, list[str]]:
    """(file, title, sections that it names). ValueError if there is none, or if it names none."""
    try:
        (path,) = ROOT.glob(f"notebooks/{number}_*.ipynb")
        first = "".join(json.loads(path.read_text())["cells"][0]["source"]).splitlines()
        (article,) = (line for line in first if line.startswith("Article: "))
    except ValueError as error:
        raise ValueError(f"there is no notebook {number} that names its sections") from error
    return path.name, first[0].removeprefix("# "), article.removeprefix("Article: ").split(", ")


@cache
def tests_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def problems(entry: Entry) -> Iterator[str]:
    """What an entry lacks, in words."""
    name = f"{entry['section']} {entry['title']}"
    for kind in KINDS:
        if not entry[kind]:
            yield f"{name}: no {kind}"
    for file, text in entry["code"]:
        try:
            line_of(file, text)
        except (ValueError, OSError) as error:
            yield f"{name}: {error}"
    for number in entry["notebooks"]:
        try:
            file, _, sections = notebook(number)
        except ValueError as error:
            yield f"{name}: {error}"
        else:
            if entry["section"] not in sections:
                yield f"{name}: {file} does not name it"
    for test in entry["tests"]:
        file, _, function = test.partition("::")
        if not (ROOT / file).is_file() or function not in tests_of(file):
            yield f"{name}: there is no {test}"


def section(entry: Entry) -> Iterator[str]:
    """The lines about an entry."""
    yield f"\n## {entry['section']} {entry['title']}\n"
    if entry["formula"]:
        yield f"**{entry['formula']}**\n"
    yield f"{entry['says']}\n"
    for file, text in entry["code"]:
        number, line = line_of(file, text)
        yield f"- code: [{file}](../{file}), line {number}: `` {line} ``"
    for number in entry["notebooks"]:
        file, title, _ = notebook(number)
        yield f"- notebook: [{title}](../notebooks/{file})"
    for test in entry["tests"]:
        yield f"- test: `{test}`"


def page() -> str:
    return HEAD + "\n".join(line for entry in entries() for line in section(entry)) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
