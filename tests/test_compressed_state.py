"""Compressed training in checkpoints: residuals, counters, Q, masks come back, or it is said what is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minidp.comm import comm_self
from minidp.parallel import checkpoint_files
from tests.test_compressed import WORLDS, build, everything, go_on, of_model
from tests.test_data_parallel import same_bits
from tests.told import told
from tests.training import spawned

pytestmark = pytest.mark.timeout(60)

SPECS = (
    "none",
    "topk:0.01+ef",
    "topk:0.1:owners+ef",
    "int8",
    "int8+ef",
    "qsgd:4",
    "qsgd:4+ef",
    "powersgd:4+ef",
    "powersgd:2",
    "randomk:0.1",
    "randomk:0.1+ef",
    "sign",
    "sign+ef",
    "terngrad",
    "int8:stochastic",
)
SAVED, END = 4, 9


def saves(comm: Any, folder: Path, spec: str | None, rule: str, prunes: bool) -> Any:
    s = go_on(build(comm, spec, rule), 2)
    if prunes:
        s.prune(0.3)
    go_on(s, SAVED)
    before = everything(s)
    s.save(folder)
    assert same_bits(before, everything(s)), "saving changes nothing"
    return everything(go_on(s, END))


def resumes(comm: Any, folder: Path, spec: str | None, rule: str, first: str) -> Any:
    """By a strategy that was built with another seed, and has made some steps, or pruned, before."""
    s = go_on(build(comm, spec, rule, seed=7), 3)
    if "prunes" in first:
        s.prune(0.5)
        go_on(s, 5)
    if "in a step" in first:
        s.forward_backward(np.ones((2, 16)), np.zeros(2, int), lambda out, y: out.sum())
    found = s.load(folder)
    assert found.updates == s.updates == SAVED
    return everything(go_on(s, END))


@pytest.mark.parametrize("spec", SPECS)
def test_resumed_is_uninterrupted(spec: str, tmp_path: Path) -> None:
    rule = "adam" if spec in ("none", "int8+ef") else "momentum"
    for world in WORLDS if spec in ("int8+ef", "powersgd:4+ef") else ("virtual",):
        want = spawned(saves, 3, world, tmp_path / world, spec, rule, False)
        for first in ("", "prunes, in a step"):
            for mine, expected in zip(spawned(resumes, 3, world, tmp_path / world, spec, rule, first), want):
                assert same_bits(mine, expected), first
    residuals = [{k: v for k, v in state.items() if "residual/" in k} for state in want]
    assert all(residuals) == spec.endswith("+ef")
    if residuals[0]:
        assert not same_bits(*residuals[:2]), "each rank has its own"


@pytest.mark.parametrize(
    "spec", ["none", "int8", "topk:0.1+ef", "int8+ef", "qsgd:4", "powersgd:2+ef", "randomk:0.1"]
)
def test_pruned_goes_on_pruned(spec: str, tmp_path: Path) -> None:
    want = spawned(saves, 3, "virtual", tmp_path, spec, "adam", True)
    assert any("mask/" in name for name in want[0])
    for first in ("", "prunes"):
        for mine, expected in zip(spawned(resumes, 3, "virtual", tmp_path, spec, "adam", first), want):
            assert same_bits(mine, expected), first


def test_what_is_in_the_file(tmp_path: Path) -> None:
    spawned(saves, 3, "virtual", tmp_path, "topk:0.1+ef", "momentum", True)
    (path,) = checkpoint_files.files(tmp_path)
    arrays, facts = checkpoint_files.read_one(path)
    assert facts["compress"] == {"spec": "topk:0.1+ef", "ranks": 3, "cut_by": "ranks"}
    for rank in range(3):
        assert f"compress@{rank}.residual/first.weight" in arrays
        assert arrays[f"compress@{rank}.mask/first.weight"].nbytes == 16 * 40 // 8
    assert not any(name.startswith("compress@3") for name in arrays)
    assert len({arrays[f"compress@{rank}.residual/first.weight"].tobytes() for rank in range(3)}) == 3


# -- what fits what ----------------------------------------------------------------------------------------------


def loads(comm: Any, folder: Path, spec: str | None, kind: str = "DataParallel") -> Any:
    s = go_on(build(comm, spec, seed=3, kind=kind), 2)
    before, memory = everything(s), getattr(s.compressor, "state_dict", dict)()
    said = told(lambda: s.load(folder))
    if said == "nothing":
        assert s.updates == SAVED
    else:
        assert s.updates == 2
        assert same_bits(before, everything(s)), "nothing has changed"
        assert same_bits(memory, getattr(s.compressor, "state_dict", dict)())
    loaded = everything(s)
    after = everything(go_on(s, s.updates + 2))
    return said, of_model(loaded), of_model(after), {k: v for k, v in loaded.items() if k.startswith("compress.")}


FINE = "nothing"
RESIDUALS, MASKS = "residuals", "masks of pruned weights"


def says_what_is_lost(said: str, lost: str, saved: str | None, loaded: str | None, ranks: int) -> None:
    assert said.startswith(f"ValueError: the checkpoint holds {lost} of compress={saved!r} on 3 ranks"), said
    assert f"here is compress={loaded!r} on {ranks}" in said
    assert "load it by the same, or give its parameters alone" in said
    assert "model.<name> of nn.load_file(…), to strategy.load_state_dict" in said


# Saved by three ranks with / pruned / loaded with / on so many ranks: what would be lost.
MEETINGS: list[tuple[str | None, bool, str | None, int, str]] = [
    ("topk:0.1+ef", False, "topk:0.1+ef", 2, RESIDUALS),
    ("topk:0.1+ef", False, "topk:0.1+ef", 4, RESIDUALS),
    ("topk:0.1+ef", False, "topk:0.2+ef", 3, RESIDUALS),
    ("topk:0.1+ef", False, "topk:0.1", 3, RESIDUALS),
    ("topk:0.1+ef", False, "int8+ef", 3, RESIDUALS),
    ("topk:0.1+ef", False, None, 3, RESIDUALS),
    ("int8+ef", False, "int8", 3, RESIDUALS),
    ("int8+ef", True, "int8+ef", 2, f"{RESIDUALS} and {MASKS}"),
    ("int8+ef", True, None, 3, f"{RESIDUALS} and {MASKS}"),
    ("none", True, None, 3, MASKS),
    ("none", True, None, 1, MASKS),
    ("none", True, "int8", 2, ""),
    ("none", True, "none", 1, ""),
    ("none", True, "topk:0.1+ef", 3, ""),
    ("int8", True, "int8", 4, ""),
    ("none", False, None, 3, ""),
    (None, False, "none", 3, ""),
    (None, False, "topk:0.1+ef", 2, ""),
    ("int8", False, "int8", 2, ""),
    ("int8", False, "int8", 4, ""),
    ("int8", False, "int8+ef", 3, ""),
    ("int8", False, None, 2, ""),
    ("qsgd:4", False, "terngrad", 3, ""),
    ("powersgd:2", False, "powersgd:2", 2, ""),
    ("topk:0.1", False, "topk:0.1", 1, ""),
]


@pytest.mark.parametrize(("saved", "prunes", "loaded", "ranks", "lost"), MEETINGS)
def test_what_can_be_loaded_by_what(
    saved: str | None, prunes: bool, loaded: str | None, ranks: int, lost: str, tmp_path: Path
) -> None:
    spawned(saves, 3, "virtual", tmp_path, saved, "momentum", prunes)
    (path,) = checkpoint_files.files(tmp_path)
    arrays, _ = checkpoint_files.read_one(path)
    file = {k: v for k, v in arrays.items() if not k.startswith("compress@")}
    first, *others = results = spawned(loads, ranks, "virtual", tmp_path, loaded)
    for said, state, _, memory in results:
        if lost:
            says_what_is_lost(said, lost, saved, loaded, ranks)
            continue
        assert said == FINE
        assert same_bits(state, file)
        assert any("mask/" in name for name in memory) == prunes
        assert not any("residual/" in name for name in memory)
    assert all(same_bits(first[2], other[2]) for other in others), "all ranks go on alike"
    if prunes and not lost:
        for name in ("first.weight", "last.weight"):
            zeros = file[f"model.{name}"] == 0
            assert zeros.any()
            assert not first[2][f"model.{name}"][zeros].any(), "pruned weights are 0 for ever"


@pytest.mark.parametrize("world", WORLDS)
def test_said_on_all_ranks_in_both_worlds(world: str, tmp_path: Path) -> None:
    spawned(saves, 3, world, tmp_path, "topk:0.1+ef", "momentum", False)
    for said, *_ in spawned(loads, 2, world, tmp_path, "topk:0.1+ef"):
        says_what_is_lost(said, RESIDUALS, "topk:0.1+ef", "topk:0.1+ef", 2)
    for said, *_ in spawned(loads, 3, world, tmp_path, "topk:0.1+ef"):
        assert said == FINE


def test_other_strategies_would_lose_residuals_too(tmp_path: Path) -> None:
    spawned(saves, 3, "virtual", tmp_path, "topk:0.1+ef", "momentum", False)
    for said, *_ in spawned(loads, 3, "virtual", tmp_path, None, "NaiveDataParallel"):
        says_what_is_lost(said, RESIDUALS, "topk:0.1+ef", None, 3)


def test_files_of_before_there_were_compressors(tmp_path: Path) -> None:
    s = go_on(build(comm_self(), None), SAVED)
    arrays, facts = checkpoint_files.read_one(s.save(tmp_path))
    del facts["compress"]
    path = checkpoint_files.write(tmp_path / "old", checkpoint_files.Content(arrays, facts), 1)
    for spec in (None, "topk:0.1+ef"):
        other = go_on(build(comm_self(), spec, seed=1), 2)
        other.load(path)
        assert same_bits(of_model(everything(other)), everything(s))
        assert other.compressor is None or not any("residual" in k for k in other.compressor.state_dict())


def test_a_second_save_holds_the_second_state(tmp_path: Path) -> None:
    """What was loaded, saved again at once, is the same file."""
    s = go_on(build(comm_self(), "int8+ef"), SAVED)
    first, _ = checkpoint_files.read_one(s.save(tmp_path / "a"))
    other = build(comm_self(), "int8+ef", seed=9)
    other.load(tmp_path / "a")
    second, _ = checkpoint_files.read_one(other.save(tmp_path / "b"))
    assert same_bits(first, second)
    go_on(other, END)
    third, _ = checkpoint_files.read_one(other.save(tmp_path / "b"))
    assert not same_bits(first, third)
