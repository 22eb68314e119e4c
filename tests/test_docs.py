"""Programs in docs print what the docs show, their commands have the options, their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minidp.demo import options
from tests.markdown import blocks, programs, run, targets

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def text_of(page: str) -> str:
    return (DOCS / page).read_text()


@pytest.mark.parametrize("page", ["index.md", "models.md", "asynchronous.md", "compression.md", "hybrid.md"])
def test_programs_print_what_is_shown(page: str, tmp_path: Path) -> None:
    found = programs(text_of(page))
    assert found
    for program, shown in found:
        done = run(program, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == shown


def test_models_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.Task, "load", lambda task: ([None] * 100, []))  # whether there are files or not
    commands = [text.split() for kind, text in blocks(text_of("models.md")) if kind == "shell"]
    assert len(commands) == 2
    for python, module_option, module, *arguments in commands:
        assert (python, module_option, module) == ("python", "-m", "minidp.demo")
        options.parse(arguments)


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_nothing_is_left_open(page: str) -> None:
    assert not re.search(r"\b(FIGURE|TODO|TBD|XXX)\b", text_of(page))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in targets(text_of(page)):
        assert target.startswith("https://") or (DOCS / target).exists(), target
