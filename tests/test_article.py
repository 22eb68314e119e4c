"""The map from the article to code, notebook and test: whole, true, and the page that is committed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = [
    *("2.1", "2.2", "2.3", "2.4", "3.1", "3.2.1", "3.2.2", "3.2.3", "3.2.4", "3.2.5", "3.2.6", "3.3.1", "3.3.2"),
    *("3.4.1", "3.4.2", "3.4.3", "4.1", "4.2", "4.3", "4.4", "4.5", "practice"),
]


def tool() -> Any:
    spec = importlib.util.spec_from_file_location("article_map", ROOT / "docs" / "article_map.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TOOL = tool()
ENTRIES = TOOL.entries()


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry['section']} {entry['title']}")
def test_each_formula_has_code_notebook_and_test(entry: dict[str, Any]) -> None:
    assert list(TOOL.problems(entry)) == []


def test_all_sections_are_there_in_order() -> None:
    assert list(dict.fromkeys(entry["section"] for entry in ENTRIES)) == SECTIONS


def test_all_notebooks_are_there() -> None:
    named = {number for entry in ENTRIES for number in entry["notebooks"]}
    # 14 is every formula once more, on other hardware.
    assert named == {f"{i:02}" for i in range(1, 16)} - {"14"}


def test_the_page_is_that_of_the_map() -> None:
    assert TOOL.PAGE.read_text() == TOOL.page(), "run: python docs/article_map.py"


@pytest.mark.parametrize("page", ["tour.md", "zh/tour.md"])
def test_the_tours_say_which_sections_a_notebook_covers(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for number in range(1, 16):
        file, _, sections = TOOL.notebook(f"{number:02}")
        (row,) = re.findall(rf"^\| \[\w+\]\([./]*notebooks/{file}\) \| (.*) \|$", text, re.MULTILINE)
        assert re.findall(r"\d[\d.]*\d", row) == [each for each in sections if each != "practice"]


ENTRY = next(entry for entry in ENTRIES if entry["section"] == "3.2.4")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"code": []}, "no code"),
        ({"notebooks": []}, "no notebooks"),
        ({"tests": []}, "no tests"),
        ({"code": [["minidp/parallel/naive.py", "gradient /= nothing"]]}, "0 lines with 'gradient /= nothing'"),
        ({"code": [["minidp/parallel/naive.py", "import"]]}, "lines with 'import', not one"),
        ({"code": [["minidp/parallel/nobody.py", "import"]]}, "No such file"),
        ({"notebooks": ["10"]}, "10_stability.ipynb does not name it"),
        ({"notebooks": ["99"]}, "no notebook 99"),
        (
            {"tests": ["tests/test_data_parallel.py::test_of_nothing"]},
            "there is no tests/test_data_parallel.py::test_of_nothing",
        ),
        ({"tests": ["tests/test_of_nobody.py::test_n"]}, "no tests/test_of_nobody.py"),
    ],
)
def test_what_is_missing_is_told(change: dict[str, Any], says: str) -> None:
    (told,) = TOOL.problems(ENTRY | change)
    assert told.startswith("3.2.4 Averaging the gradients: ")
    assert says in told
