"""The Chinese pages keep to the English ones: the same programs, figures, names and links, in Chinese prose."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENGLISH = {"docs/zh/README.md": "README.md", "docs/zh/tour.md": "docs/tour.md"}
PAGES = sorted(ENGLISH)
OWN = "从文章到代码"  # a section that only the Chinese README has

BLOCK = re.compile(r"^```\w*\n.*?^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
CJK = "\u4e00-\u9fff"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def headings(text: str, marks: str = "#+") -> list[str]:
    return re.findall(rf"^{marks} (.*)$", BLOCK.sub("", text), re.MULTILINE)


def without_own_section(text: str) -> str:
    return re.sub(rf"^## {OWN}\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """What is written in words: no blocks, no names of code, no targets of links, no formulas that stand alone."""
    text = re.sub(r"^    .*$", "", BLOCK.sub("", text), flags=re.MULTILINE)
    return LINK.sub("", CODE.sub("", text))


def paragraphs(text: str) -> list[str]:
    """Longer paragraphs and items of lists: no headings, tables or quotations."""
    return [line for line in prose(text).splitlines() if len(line) > 60 and not line.startswith(("#", "|", ">"))]


def share_of_chinese(text: str) -> float:
    """Of all letters; a Latin word counts as two, about what it would be in Chinese."""
    chinese, latin = len(re.findall(f"[{CJK}]", text)), len(re.findall(r"[A-Za-z]+", text))
    return chinese / max(1, chinese + 2 * latin)


def is_in_order(some: list[str], others: list[str]) -> bool:
    rest = iter(others)
    return all(one in rest for one in some)


def slug(heading: str) -> str:
    """A heading's anchor, as code hosts and MyST make it."""
    return re.sub(r"[^\w\- ]", "", CODE.sub(r"\1", heading).lower()).replace(" ", "-")


def targets(page: str, text: str) -> Counter[str]:
    """Where links lead, from the root of the repository, without anchors, and how often."""
    folder = os.path.dirname(page)
    found = (link.split("#")[0] for link in LINK.findall(BLOCK.sub("", text)))
    return Counter(os.path.normpath(os.path.join(folder, link)) for link in found if link and "://" not in link)


def dead_links(page: str, text: str) -> list[str]:
    """Links to files that do not exist, and to headings that the page does not have."""
    dead = []
    for link in LINK.findall(BLOCK.sub("", text)):
        file, _, anchor = link.partition("#")
        target = os.path.normpath(os.path.join(os.path.dirname(page), file)) if file else page
        if not (ROOT / target).exists() or (anchor and anchor not in map(slug, headings(text_of(target)))):
            dead.append(link)
    return dead


# -- the same as in English ------------------------------------------------------------------------------------


def test_the_tour_has_the_same_blocks() -> None:
    assert BLOCK.findall(text_of("docs/zh/tour.md")) == BLOCK.findall(text_of("docs/tour.md"))


def test_the_readme_has_blocks_of_the_english_one() -> None:
    ours, theirs = BLOCK.findall(text_of("docs/zh/README.md")), BLOCK.findall(text_of("README.md"))
    assert is_in_order(ours, theirs)
    assert ours[:2] == theirs[:2]  # the program and what it prints
    assert [block.split("\n")[0] for block in ours[:2]] == ["```python", "```"]


def test_the_tour_has_the_same_sections() -> None:
    number = re.compile(r"\d\.\d(?:\.\d)?")
    ours, theirs = (headings(text_of(page), "##") for page in ("docs/zh/tour.md", "docs/tour.md"))
    assert [number.findall(heading) for heading in ours] == [number.findall(heading) for heading in theirs]


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_those_of_the_english_page(page: str) -> None:
    """A figure that has changed there has to change here. Words of numbers are not looked at."""
    figure = re.compile(r"\d+(?:\.\d+)*(?:e-?\d+)?")
    ours = set(figure.findall(prose(without_own_section(text_of(page)))))
    assert ours - set(figure.findall(text_of(ENGLISH[page]))) == set()
    assert len(ours) > 20


@pytest.mark.parametrize("page", PAGES)
def test_names_are_those_of_the_english_page(page: str) -> None:
    """What is written as code stands there too, in the text or in a program."""
    ours = BLOCK.sub("", text_of(page))
    theirs = " ".join(text_of(ENGLISH[page]).split())  # a name may be broken over two lines
    assert [name for name in CODE.findall(without_own_section(ours)) if name not in theirs] == []
    assert len(CODE.findall(ours)) > 40


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_where_the_english_ones_lead(page: str) -> None:
    """At least as often: a Chinese page stands for the English one there."""
    english, links = ENGLISH[page], targets(page, text_of(page))
    assert links[english] == 1  # a way back
    ours, theirs = Counter[str](), Counter[str]()
    for target, times in links.items():
        ours[ENGLISH.get(target, target)] += times
    for target, times in targets(english, text_of(english)).items():
        theirs[ENGLISH.get(target, target)] += times
    assert theirs - ours - Counter({english: 1}) == Counter()


# -- links and Chinese -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = text_of(page)
    assert dead_links(page, text) == []
    # What is written as the name of a file is the file that it leads to.
    for name, link in re.findall(r"\[`(minidp/[^`]+)`\]\(([^)]+)\)", text):
        assert link == f"../../{name}"


@pytest.mark.parametrize("page", PAGES)
def test_the_prose_is_chinese(page: str) -> None:
    text = text_of(page)
    assert share_of_chinese(prose(text)) > 0.6
    assert len(paragraphs(text)) > 20
    for part in paragraphs(text):
        assert share_of_chinese(part) > 0.3, part
    for heading in headings(text)[1:]:
        assert share_of_chinese(heading) > 0.3, heading
    assert not re.search(r"\b(FIGURE|TODO|TBD|XXX)\b", text)


@pytest.mark.parametrize("page", PAGES)
def test_paragraphs_and_punctuation_are_set_as_in_chinese(page: str) -> None:
    words = prose(text_of(page))
    # A line break inside a paragraph is shown as a space between two characters.
    assert re.findall(r"^[^\n|>#!-].*\n(?=[^\n|>#!-]).*$", words, re.MULTILINE) == []
    assert re.findall(rf"[{CJK}][,;:!?.]|[{CJK}] *\((?!\))[^)]*[{CJK}]", words) == []
    # After a full stop inside and before a word outside, emphasis does not end: the asterisks would be seen.
    assert re.findall(r"\*\*[^*\n]*\W\*\*\w", words) == []


def test_the_checks_find_what_they_look_for() -> None:
    assert is_in_order(["a", "c"], ["a", "b", "c"])
    assert not is_in_order(["c", "a"], ["a", "b", "c"])
    assert slug("同步（3.2.6）") == "同步326"
    assert slug("`train`, line by line") == "train-line-by-line"
    assert share_of_chinese(prose(text_of("README.md"))) < 0.1
    assert share_of_chinese("用 float64 时") < share_of_chinese("梯度求平均")
    assert headings("# a\n\n```sh\n# b\n```\n\n## c\n") == ["a", "c"]
    assert without_own_section(f"## x\n1\n## {OWN}\n2\n## y\n3\n") == "## x\n1\n## y\n3\n"
    assert targets("docs/zh/x.md", "[a](../tour.md#b) [c](https://d/e) [f](#g)") == {"docs/tour.md": 1}
    links = "[a](tour.md) [b](tour.md#同步326) [c](tour.md#同步) [d](nowhere.md)"
    assert dead_links("docs/zh/README.md", links) == ["tour.md#同步", "nowhere.md"]
