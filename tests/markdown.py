"""Markdown as the tests of documents need it: blocks of code, programs with what they print, targets of links."""

from __future__ import annotations

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, text) of each block of code, in order."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def programs(text: str) -> list[tuple[str, str]]:
    """(program, what it prints): Python followed by a block without a language."""
    pairs = pairwise(blocks(text))
    return [(a, b) for (kind, a), (following, b) in pairs if (kind, following) == ("python", "")]


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, timeout=60)


def targets(text: str) -> list[str]:
    """The files and addresses that links lead to."""
    return re.findall(r"\]\(([^)#]+)\)", text)
