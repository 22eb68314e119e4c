"""What the README prints is what its program prints, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.markdown import blocks, targets

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def of_language(language: str) -> list[str]:
    return [text for name, text in blocks(README) if name == language]


def test_the_program_prints_what_the_readme_shows(tmp_path: Path) -> None:
    (program,) = of_language("python")
    (shown,) = of_language("")
    path = tmp_path / "program.py"  # a script without a __main__ guard
    path.write_text(program)
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    # Another CPU rounds otherwise: the last digits may differ there, words and sizes may not.
    number = re.compile(r"(\d)e-0(\d)")
    for got, want in zip(run.stdout.splitlines(), shown.splitlines(), strict=True):
        assert number.sub("", got) == number.sub("", want)
        assert all(int(exponent) >= 6 for _, exponent in number.findall(got))


def test_the_commands_exist() -> None:
    for command in of_language("sh"):
        shell, script, name = command.split()
        assert (shell, script) == ("sh", "try.sh")
        assert f"\n    {name})" in (ROOT / "try.sh").read_text()


def test_the_options_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    from minidp.demo import options
    from minidp.plan.__main__ import parse

    monkeypatch.setattr(options.Task, "load", lambda task: ([None] * 100, []))  # whether there are files or not

    parsers = {"minidp.demo": options.parse, "minidp.plan": parse}
    for command in of_language("shell"):
        python, module_option, module, *arguments = command.split()
        assert (python, module_option) == ("python", "-m")
        parsers[module](arguments)


def test_links_lead_somewhere() -> None:
    for target in targets(README):
        assert (ROOT / target).exists(), target
