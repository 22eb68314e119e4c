"""Programs in docs print what the docs show, their commands have the options, their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from minidp.demo import options

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md"))


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of each block of code."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["index.md", "models.md", "asynchronous.md", "compression.md", "hybrid.md"])
def test_programs_print_what_is_shown(page: str, tmp_path: Path) -> None:
    found = blocks(page)
    pairs = [(a, b) for (kind, a), (following, b) in pairwise(found) if (kind, following) == ("python", "")]
    assert pairs
    for program, shown in pairs:
        run = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert (run.returncode, run.stderr) == (0, "")
        assert run.stdout == shown


def test_models_commands_are_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.Task, "load", lambda task: ([None] * 100, []))  # whether there are files or not
    commands = [text.split() for kind, text in blocks("models.md") if kind == "shell"]
    assert len(commands) == 2
    for python, module_option, module, *arguments in commands:
        assert (python, module_option, module) == ("python", "-m", "minidp.demo")
        options.parse(arguments)


@pytest.mark.parametrize("page", [*PAGES, "../README.md"])
def test_nothing_is_left_open(page: str) -> None:
    assert not re.search(r"\b(FIGURE|TODO|TBD|XXX)\b", (DOCS / page).read_text())


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text()):
        assert target.startswith("https://") or (DOCS / target).exists(), target
