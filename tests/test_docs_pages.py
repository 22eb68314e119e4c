"""The tour, the extending guide, the glossary and the references say what the code does."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

import minidp
from minidp import autograd, backend, comm, compress, data, nn, optim, parallel, sim, trace
from minidp.comm import schedules  # noqa: F401 (an attribute of its room from now on)
from tests.markdown import programs, run

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
ROOMS = (autograd, backend, comm, compress, data, nn, optim, parallel, sim, trace)
PAGES = ("tour.md", "design.md", "glossary.md", "references.md", "extending.md")
SKIP = "# …"  # a line of a quotation that stands for lines which are left out

BODY = r"((?:(?!```).*\n)*)```$"
QUOTATION = re.compile(rf"^\[`(\S+)`\]\(\.\./(\S+)\):\n\n```python\n{BODY}", re.MULTILINE)


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


def all_programs() -> list[object]:
    return [
        pytest.param(program, shown, id=f"{page}-{i}")
        for page in ("tour.md", "extending.md")
        for i, (program, shown) in enumerate(programs(text_of(page)))
    ]


# -- programs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "shown"), all_programs())
def test_programs_print_what_is_shown(program: str, shown: str, tmp_path: Path) -> None:
    done = run(program, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr  # what is logged of deaths and of few cores depends on the machine
    assert done.stdout == shown


@pytest.mark.parametrize(("page", "least"), [("tour.md", 13), ("extending.md", 5)])
def test_no_program_is_passed_over(page: str, least: int) -> None:
    """Each block without a language is the output of a program that was found; a stray line would hide one."""
    fences = re.findall(r"^```(.*)$", text_of(page), re.MULTILINE)
    assert set(fences[1::2]) == {""}  # closings
    assert fences[::2].count("") == len(programs(text_of(page))) >= least


# -- quotations ------------------------------------------------------------------------------------------------


def occurs(quoted: str, source: str) -> bool:
    """Whether the lines stand in the source in this order: those between two SKIPs next to each other."""
    lines = source.splitlines()
    start = 0
    for part in quoted.split(SKIP + "\n"):
        wanted = part.splitlines()
        for at in range(start, len(lines) - len(wanted) + 1):
            if dedent("\n".join(lines[at : at + len(wanted)])) == "\n".join(wanted):
                start = at + len(wanted)
                break
        else:
            return False
    return True


@pytest.mark.parametrize("page", ["tour.md", "extending.md", "design.md"])
def test_quotations_stand_in_the_source(page: str) -> None:
    found = QUOTATION.findall(text_of(page))
    assert found or page != "tour.md"
    for named, linked, quoted in found:
        assert named == linked
        assert occurs(quoted, (ROOT / named).read_text()), f"{page} quotes {named}:\n{quoted}"


def test_a_wrong_quotation_is_found() -> None:
    source = "def f():\n    a = 1\n    b = 2\n    c = 3\n"
    assert occurs("a = 1\nb = 2\n", source)
    assert occurs("a = 1\n# …\nc = 3\n", source)
    assert not occurs("a = 1\nc = 3\n", source)
    assert not occurs("c = 3\n# …\na = 1\n", source)
    assert not occurs("a = 2\n", source)


# -- glossary --------------------------------------------------------------------------------------------------


def rows(page: str) -> list[list[str]]:
    lines = [line for line in text_of(page).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def found(name: str) -> bool:
    """``parallel.Strategy.step`` below minidp; ``Class(option=)``: of a class that some room makes public."""
    option = re.fullmatch(r"(\w+)\((\w+)=\)", name)
    if option:
        classes = [getattr(room, option[1]) for room in ROOMS if hasattr(room, option[1])]
        return any(option[2] in inspect.signature(init).parameters for c in classes for init in (c.__init__, c))
    thing: Any = minidp
    for part in name.split("."):
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


def test_the_glossary_has_all_its_cells() -> None:
    terms = [row for row in rows("glossary.md") if row[0] != "English"]
    assert len(terms) > 100
    for row in terms:
        assert len(row) == 4, row
        assert all(row), row
    english = [row[0] for row in terms]
    assert len(set(english)) == len(english)


@pytest.mark.parametrize("where", sorted({row[-1] for row in rows("glossary.md") if row[0] != "English"}))
def test_what_the_glossary_names_exists(where: str) -> None:
    links = re.findall(r"\]\(([^)#]+)(#[^)]+)?\)", where)
    names = re.findall(r"`([^`]+)`", re.sub(r"\[[^]]+\]\([^)]+\)", "", where))
    assert links or names
    for target, anchor in links:
        assert (DOCS / target).exists(), target
        assert not anchor or anchor[1:] in anchors(target), anchor
    for name in names:
        assert found(name), name


def anchors(page: str) -> set[str]:
    """As GitHub and MyST make them of headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_into_pages_meet_a_heading(page: str) -> None:
    for target, anchor in re.findall(r"\]\(([\w.]*)#([^)]+)\)", text_of(page)):
        assert anchor in anchors(target or page), (target, anchor)


def test_a_name_that_is_not_there_is_found() -> None:
    assert found("parallel.Strategy.step")
    assert found("DataParallel(micro_shards=)")
    assert not found("parallel.Strategy.stop")
    assert not found("DataParallel(nano_shards=)")


# -- references ------------------------------------------------------------------------------------------------

NAME = r"[A-Z][\w'’]+"
CITED = re.compile(  # Goyal et al. 2017 · Niu, Recht, Ré & Wright, "Hogwild!: …", NIPS 2011
    rf"({NAME})(?:(?:, {NAME})*,? (?:and|&) {NAME}| et al\.)?(?:, \"[^\"]+\"(?: \([\w-]+\))?)?,? "
    r"\(?(?:[A-Z][A-Za-z]+ )?(?:\d+\(\d+\), )?((?:19|20)\d\d)\b(?!-\d)"
)


def citations(text: str) -> set[tuple[str, str]]:
    """(first author, year) of each work that a docstring or a page cites."""
    return set(CITED.findall(re.sub(r"\s*\n\s*(?://|#)?\s*", " ", text)))


def works() -> list[str]:
    """The entries of references.md, each in one line."""
    return [" ".join(entry.split()) for entry in re.findall(r"^- (.*(?:\n  .*)*)", text_of("references.md"), re.M)]


def test_all_that_is_cited_is_among_the_references() -> None:
    sources = [path for kind in ("*.py", "*.cu") for path in (ROOT / "minidp").rglob(kind)]
    pages = [path for path in DOCS.glob("*.md") if path.name != "references.md"]
    cited = set().union(*(citations(path.read_text()) for path in (*sources, *pages)))
    assert len(cited) > 45
    for author, year in sorted(cited):
        listed = [
            work for work in works() if re.match(rf"[^*]*?{author}\b", work) and re.search(rf"\b{year}\b", work)
        ]
        assert listed, f"{author} {year} is cited, but not in docs/references.md"


@pytest.mark.parametrize("work", [work for work in works() if "Used for" in work])
def test_references_are_cited_where_they_say(work: str) -> None:
    """Each file that an entry names has the first author's name, or, of books, the title."""
    first = re.match(r"(?:[A-Z]\.(?:-[A-Z]\.)? ?)*([\w'’-]+)", work)
    title = re.search(r"\*(.*?)\*", work)
    files = re.findall(r"\]\(\.\./([^)]+)\)", work)
    assert first
    assert title
    assert files
    for path in files:
        text = (ROOT / path).read_text()
        assert re.search(rf"\b{first[1]}\b", text) or title[1] in text, path


def test_citations_are_understood() -> None:
    text = (
        'See Li and Hoefler, "Near-Optimal\n    Sparse" (Ok-Topk), PPoPP 2022; Ho et al. (NIPS\n    2013). '
        "Adam & Eve 2001, on an EPYC 2026-11-26."
    )
    assert citations(text) == {("Li", "2022"), ("Ho", "2013"), ("Adam", "2001")}
