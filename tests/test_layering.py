"""The arrows between the rooms, read from the imports, and a few rules of the house that the code itself can tell.

Late imports, inside functions, and those for type checkers count like all others.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import minidp

PACKAGE = Path(minidp.__file__).parent

# A room may use itself, the rooms on the right, and what those may use.
ROOMS: dict[str, tuple[str, ...]] = {
    "backend": (),
    "trace": (),
    "sim": ("backend", "trace"),
    "autograd": ("backend",),
    "nn": ("autograd",),
    "optim": ("nn",),
    "data": ("backend",),
    "compress": ("backend",),
    "comm": ("backend", "trace", "sim"),
    "parallel": ("comm", "nn", "optim", "data", "compress"),
    "launch": ("parallel",),
}
# May use everything, and the package by its own name.
COMMANDS = ("demo", "bench", "plan", "replay", "doctor", "calibrate")

# Besides NumPy and the standard library. A new line here is a new dependency: it needs a reason.
THIRD_PARTY = {
    "backend": {"cupy", "cupyx", "cupy_backends"},
    "trace": {"matplotlib"},
    "sim": {"greenlet"},
    "comm": {"cupy", "greenlet"},
    "nn": {"safetensors"},
    "launch": {"cloudpickle", "greenlet", "multiprocessing_logging", "rich", "threadpoolctl"},
    # micro_shards: the number of BLAS threads changes bits; servers get rules whose schedules may be lambdas
    "parallel": {"cloudpickle", "threadpoolctl"},
    "demo": {"rich"},
    "doctor": {"rich", "threadpoolctl"},
    "plan": {"matplotlib", "rich"},
    "replay": {"rich"},
    "bench": {"rich", "threadpoolctl", "torch", "mpi4py", "ray"},
}
LONGEST = 320


def reachable(room: str) -> set[str]:
    found, frontier = {room}, [room]
    while frontier:
        new = set(ROOMS[frontier.pop()]) - found
        found |= new
        frontier += new
    return found


def room_of(path: Path) -> str:
    """``minidp/comm/queue.py`` → comm, ``minidp/backend.py`` → backend, ``minidp/__init__.py`` → "" """
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(tree: ast.AST) -> Iterator[str]:
    """Dotted names of all modules that the code imports, wherever; ``from minidp import nn`` gives minidp.nn."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where an arrow goes"
            assert node.module is not None
            yield from (f"minidp.{a.name}" for a in node.names) if node.module == "minidp" else (node.module,)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in (
            "import_module",
            "__import__",
        ):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def wrong_arrows(room: str, tree: ast.AST) -> list[str]:
    wrong = []
    for name in imported(tree):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "minidp":
            if room in COMMANDS or room == "":
                fine = target not in COMMANDS or target == room
            else:
                fine = target in reachable(room)
            if not fine:
                wrong.append(f"{room} → {target or 'minidp itself'}")
    return wrong


def foreign(room: str, tree: ast.AST) -> list[str]:
    """Third-party modules that are imported, and not allowed in this room."""
    allowed = {"minidp", "numpy", *sys.stdlib_module_names, *THIRD_PARTY.get(room, ())}
    late = {"sklearn", "IPython", "_posixshmem"}  # asked for by import_module where the user has them anyway
    return sorted({name.split(".")[0] for name in imported(tree)} - allowed - late)


def prints(room: str, tree: ast.AST) -> list[str]:
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [f"line {call.lineno}" for call in calls if getattr(call.func, "id", "") == "print"]


def global_state(room: str, tree: ast.AST) -> list[str]:
    """Assigned module globals and anything of NumPy's or the standard library's global random generators."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Global) and (room, node.names) != ("launch", ["inside_worker"]):
            found.append(f"global {', '.join(node.names)}")
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Attribute)
            and node.value.attr == "random"
        ):
            allowed = ("BitGenerator", "Generator", "SeedSequence", "default_rng", "PCG64", "Philox", "SFC64")
            found += [f"random.{node.attr}"] * (node.attr not in allowed)
    return found + ["import random"] * ("random" in imported(tree))


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file(path: Path) -> None:
    room, source = room_of(path), path.read_text()
    tree = ast.parse(source)
    assert room in (*ROOMS, *COMMANDS, ""), f"{room!r} is no room of the design"
    assert wrong_arrows(room, tree) == []
    assert foreign(room, tree) == []
    assert global_state(room, tree) == []
    if room not in COMMANDS:
        assert prints(room, tree) == [], "the package speaks through logging, errors and return values"
    assert len(source.splitlines()) <= LONGEST, "an idea a file: split it"


def test_the_arrows_run_one_way() -> None:
    for room in ROOMS:
        assert not [other for other in reachable(room) - {room} if room in reachable(other)]
    for room in ("autograd", "nn", "optim", "data", "compress"):
        assert not {"comm", "parallel", "launch"} & reachable(room), "knows nothing of ranks"
    assert not {"autograd", "nn", "optim", "data"} & reachable("comm"), "knows nothing of tensors"


@pytest.mark.parametrize(
    ("room", "source", "rule", "found"),
    [
        ("comm", "from minidp.nn import Layout", wrong_arrows, ["comm → nn"]),
        ("comm", "def f():\n    from minidp import autograd", wrong_arrows, ["comm → autograd"]),
        ("data", "if TYPE_CHECKING:\n    import minidp.comm.errors", wrong_arrows, ["data → comm"]),
        ("nn", "import minidp", wrong_arrows, ["nn → minidp itself"]),
        ("nn", "importlib.import_module('minidp.launch')", wrong_arrows, ["nn → launch"]),
        ("parallel", "from minidp import launch, comm", wrong_arrows, ["parallel → launch"]),
        ("trace", "import minidp.backend", wrong_arrows, ["trace → backend"]),
        ("launch", "from minidp.demo import train", wrong_arrows, ["launch → demo"]),
        ("demo", "from minidp.bench import cli", wrong_arrows, ["demo → bench"]),
        ("demo", "import minidp\nfrom minidp import launch", wrong_arrows, []),
        ("nn", "import torch, numpy.random", foreign, ["torch"]),
        ("nn", "x = print", prints, []),
        ("nn", "print('x')", prints, ["line 1"]),
        ("nn", "np.random.seed(0)", global_state, ["random.seed"]),
        ("nn", "import random", global_state, ["import random"]),
        ("nn", "np.random.default_rng(0)", global_state, []),
        ("nn", "def f():\n    global calls", global_state, ["global calls"]),
    ],
)
def test_the_rules_bite(
    room: str, source: str, rule: Callable[[str, ast.AST], list[str]], found: list[str]
) -> None:
    assert rule(room, ast.parse(source)) == found
