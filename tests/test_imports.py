"""``import minidp`` is quick because it loads almost nothing; every public name is there when it is asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import minidp

HEAVY = (
    "rich",
    "threadpoolctl",
    "multiprocessing_logging",
    "safetensors",
    "matplotlib",
    "torch",
    "cupy",
    "mpi4py",
)
ROOMS = ("autograd", "backend", "comm", "data", "launch", "nn", "optim", "parallel", "sim", "trace")


def loaded_by(source: str) -> set[str]:
    """Names of the modules that a fresh interpreter has loaded after ``source``."""
    program = f"{source}\nimport json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr == ""
    return set(json.loads(done.stdout))


def test_import_loads_no_room_and_nothing_heavy() -> None:
    loaded = loaded_by("import minidp")
    assert not loaded & {*HEAVY, "numpy", "multiprocessing", "logging"}
    assert {name for name in loaded if name.startswith("minidp")} == {"minidp"}


def test_learning_on_one_worker_loads_nothing_heavy() -> None:
    loaded = loaded_by("from minidp import data, nn, optim, trace\nnn.Sequential(nn.Linear(2, 2), nn.ReLU())")
    assert not loaded & {*HEAVY, "minidp.comm", "minidp.launch", "minidp.parallel", "multiprocessing"}


def test_spawn_shows_nothing_and_loads_no_bars() -> None:
    """Rich costs 25 ms: it is loaded when there is something to show."""
    loaded = loaded_by("import minidp\nassert minidp.spawn(lambda comm: comm.rank, 1, progress=True) == [0]")
    assert not loaded & {"rich", "safetensors", "matplotlib", "torch", "cupy", "mpi4py"}
    assert "threadpoolctl" in loaded


def test_public_names() -> None:
    everything: dict[str, object] = {}
    exec("from minidp import *", everything)
    assert everything.keys() - {"__builtins__"} == set(minidp.__all__)
    for name in (*minidp.__all__, *ROOMS):
        assert getattr(minidp, name) is not None
        assert name in dir(minidp)
    assert minidp.__version__.count(".") == 2
    for room in ROOMS:
        module = getattr(minidp, room)
        for name in getattr(module, "__all__", ()):
            assert hasattr(module, name), f"minidp.{room}.{name} does not exist"
        assert module.__doc__, f"minidp.{room} does not say what it is"


@pytest.mark.parametrize(
    ("name", "home"),
    [
        ("spawn", "minidp.launch"),
        ("Tensor", "minidp.autograd"),
        ("tensor", "minidp.autograd"),
        ("no_grad", "minidp.autograd"),
        ("Communicator", "minidp.comm"),
        ("ReduceOp", "minidp.comm"),
        ("CommError", "minidp.comm"),
        ("RankFailed", "minidp.comm"),
        ("CollectiveMismatch", "minidp.comm"),
        ("CollectiveTimeout", "minidp.comm"),
    ],
)
def test_each_name_has_one_source(name: str, home: str) -> None:
    assert getattr(minidp, name) is getattr(sys.modules[home], name)
    assert getattr(minidp, name).__module__.startswith(home)


def test_the_errors_are_one_family() -> None:
    for name in ("RankFailed", "CollectiveMismatch", "CollectiveTimeout"):
        assert issubclass(getattr(minidp, name), minidp.CommError)
    assert issubclass(minidp.CommError, RuntimeError)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError) as caught:
        minidp.DataParallel  # noqa: B018
    message = str(caught.value)
    assert message.startswith("module 'minidp' has no attribute 'DataParallel'; public names: ")
    for name in minidp.__all__:
        assert name in message
    with pytest.raises(ImportError):
        from minidp import nothing_of_that_name  # noqa: F401
