"""Docstrings as they are written here, made reStructuredText.

They are plain text: paragraphs, `names` and ``code`` in backticks, indented formulas and programs, doctests, and
the sections "Args:", "Attributes:", "Raises:" and "Returns:". Everything else stands for itself: a star, a bar or
a trailing underscore of a formula is no markup.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import minidp

ROOMS = ("autograd", "backend", "comm", "compress", "data", "launch", "nn", "optim", "parallel", "sim", "trace")
SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields):(?: (.*))?$")
ITEM = re.compile(r"([\w*]+(?:, [\w*]+)*(?: and [\w ]+)?): (.*)$", re.DOTALL)
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


def depth(line: str) -> int:
    return len(line) - len(line.lstrip())


def reference(name: str) -> str:
    """A link to the name if it is documented, else the name as code: that is what the role makes of it."""
    target, short = name, name.removeprefix("minidp.")
    if name.split(".")[0] in ROOMS and "." in name:
        target = f"minidp.{name}"
    elif short in minidp._HOME and name != "tensor":  # `tensor` by itself is an axis of a mesh, or a file
        target = f"{minidp._HOME[short]}.{short}"
    return f":py:obj:`{name} <{target}>`"


def inline(text: str) -> str:
    """Text with its code marked, and nothing else that could be taken for markup."""
    parts = re.split(r"(``.+?``|`[^`]+`)", " ".join(text.split()))
    for k, part in enumerate(parts):
        if k % 2 == 0:
            parts[k] = re.sub(r"([\\*`|_])", r"\\\1", part)
        else:
            code = part.strip("`")
            role = reference(code) if DOTTED.match(code) else f"``{code}``"
            parts[k] = f"\\ {role}\\ "  # an escaped space vanishes, and lets markup stand beside a letter
    return "".join(parts)


def code_block(lines: list[str], language: str) -> list[str]:
    least = min(depth(line) for line in lines if line)
    return [f".. code-block:: {language}", "", *(f"    {line[least:]}" if line else "" for line in lines), ""]


def indented(lines: list[str], start: int, base: int) -> int:
    """Index of the first line from `start` on that is neither blank nor deeper than `base`."""
    stop = start
    while stop < len(lines) and (not lines[stop] or depth(lines[stop]) > base):
        stop += 1
    while stop > start and not lines[stop - 1]:
        stop -= 1
    return stop


def items(lines: list[str]) -> list[str]:
    """What the lines of a section list: each begins at the least depth, deeper lines continue it."""
    base, found = depth(lines[0]), list[str]()
    for line in filter(None, lines):
        if depth(line) == base:
            found.append(line.strip())
        else:
            found[-1] += f" {line.strip()}"
    return found


def section(title: str, rest: str, lines: list[str]) -> list[str]:
    if rest or not lines:
        return [f":{title}: {inline(' '.join([rest, *lines]))}", ""]
    entries = [ITEM.match(entry) for entry in items(lines)]
    if not all(entries):
        return [f":{title}: {inline(' '.join(lines))}", ""]
    made = [f":{title}:"]
    for entry in filter(None, entries):
        names = entry[1].replace("*", "\\*").split(", ")
        shown = [f":py:exc:`{name}`" if title == "Raises" else f"**{name}**" for name in names]
        made.append(f"    - {', '.join(shown)}: {inline(entry[2])}")
    return [*made, ""]


def convert(lines: list[str]) -> list[str]:
    """The docstring of these lines (dedented) as reStructuredText."""
    lines, made, k = [line.rstrip() for line in lines], list[str](), 0
    program = False  # whether the paragraph before ended in "::"
    while k < len(lines):
        line = lines[k]
        if not line:
            k += 1
        elif line.lstrip().startswith(">>>"):
            stop = next((j for j in range(k, len(lines)) if not lines[j]), len(lines))
            made += code_block(lines[k:stop], "pycon")
            k = stop
        elif depth(line):
            stop = indented(lines, k, 0)
            made += code_block(lines[k:stop], "python" if program else "text")
            k, program = stop, False
        elif (heading := SECTION.match(line)) and (heading[2] or k + 1 < len(lines)):
            stop = k + 1
            if heading[2]:  # on one line: the paragraph, with whatever hangs below it
                while stop < len(lines) and lines[stop]:
                    stop += 1
            else:
                stop = indented(lines, k + 1, 0)
            made += section(heading[1], heading[2] or "", lines[k + 1 : stop])
            k = stop
        elif line.startswith("- "):
            stop = indented(lines, k + 1, 0)
            made += [f"- {inline(' '.join([line[2:], *lines[k + 1 : stop]]))}"]
            made += [] if stop < len(lines) and lines[stop].startswith("- ") else [""]
            k = stop
        else:
            stop = k + 1
            while stop < len(lines) and lines[stop] and not SECTION.match(lines[stop]):
                if depth(lines[stop]) and lines[stop - 1].endswith(":"):
                    break
                stop += 1
            text = " ".join(lines[k:stop])
            program = text.endswith("::")
            made += [inline(text.removesuffix("::") + ":" if program else text), ""]
            k = stop
    return made


@cache
def public() -> dict[Any, str]:
    """Class → the documented name of it, for all that rooms offer."""
    rooms = [import_module(f"minidp.{room}") for room in ROOMS]
    offered = [(getattr(room, name), f"{room.__name__}.{name}") for room in rooms for name in room.__all__]
    return {thing: name for thing, name in offered if isinstance(thing, type)}


def base_of(cls: type) -> str | None:
    """The nearest base class that is documented, or the built-in exception."""
    for base in cls.__mro__[1:]:
        if base in public():
            return public()[base]
        if base.__module__ == "builtins" and issubclass(base, BaseException):
            return base.__name__
    return None


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = convert(lines)
    base = base_of(obj) if isinstance(obj, type) else None
    if base is not None:
        lines[:0] = [f"*Base class:* :py:class:`~{base}`", ""]


def owner(obj: Any) -> tuple[type, str] | None:
    """The class that a method or property was written in, and its name there."""
    function = getattr(obj, "fget", None) or getattr(obj, "__func__", None) or getattr(obj, "func", None) or obj
    path = getattr(function, "__qualname__", "").split(".")
    found: Any = sys.modules.get(getattr(function, "__module__", None) or "")
    for part in path[:-1]:
        found = getattr(found, part, None)
    return (found, path[-1]) if isinstance(found, type) else None


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what has no text, but for a method or property that no base class has: it is news."""
    if what != "class":
        return None
    if getattr(obj, "__doc__", None) and (callable(obj) or isinstance(obj, property | classmethod | staticmethod)):
        return None
    if (place := owner(obj)) is None:
        return True
    cls, name = place
    layer = name == "forward" and issubclass(cls, minidp.nn.Module)  # what it computes is told by the class
    return layer or any(name in vars(base) for base in cls.__mro__[1:-1]) or None


def shorten(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str | None, str | None]:
    """Signatures as one would write them: arrays without their parameters, 1e12, and no ``<factory>``."""

    def short(text: str | None) -> str | None:
        if text is None:
            return None
        text = re.sub(r"ndarray\[\S*tuple\[\S*Any, \.\.\.\], \S*dtype\[[\w.~]+\]\]", "ndarray", text)
        text = re.sub(r"\b\d{7,}\.0\b", lambda m: re.sub(r"e\+0*", "e", f"{float(m[0]):.4g}"), text)
        return text.replace("<factory>", "...")

    return short(signature), short(returned)


def without_overloads(analyze: Callable[[ModuleAnalyzer], None]) -> Callable[[ModuleAnalyzer], None]:
    """One signature a function: overloads tell type checkers what the text tells readers. Sphinx has no option."""

    def analyze_then_forget(self: ModuleAnalyzer) -> None:
        analyze(self)
        self.overloads = {}

    return analyze_then_forget


def setup(app: Sphinx) -> dict[str, bool]:
    ModuleAnalyzer.analyze = without_overloads(ModuleAnalyzer.analyze)
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-skip-member", skip)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
