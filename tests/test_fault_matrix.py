"""The fault matrix of ``python -m minidp.bench faults``: one trial of each kind here, fifty under soak."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import minidp
from minidp.bench import cli, faults
from minidp.bench.fault_report import FaultReport, Trial, Trials
from minidp.bench.injector import MOMENTS, STEPS, Fault
from minidp.parallel import checkpoint_files

pytestmark = pytest.mark.timeout(60)

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(1, 50))]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.getLogger("minidp.launch").setLevel(logging.ERROR)
    logging.getLogger("minidp.parallel").setLevel(logging.ERROR)
    yield
    logging.getLogger("minidp.launch").setLevel(logging.NOTSET)
    logging.getLogger("minidp.parallel").setLevel(logging.NOTSET)


@lru_cache
def states() -> list[str]:
    return faults.reference()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", faults.KINDS)
def test_who_is_named_what_is_left_and_whether_steps_are_whole(kind: str, seed: int) -> None:
    rng = np.random.default_rng([seed, faults.KINDS.index(kind)])
    trial = faults.trial_of(kind, rng, states())
    assert trial.struck
    late = [problem for problem in trial.problems if problem.startswith("noticed after")]
    assert trial.problems == late, "how soon is for the bench to say"
    if kind not in (*faults.HARMLESS, "truncate"):
        assert trial.noticed_s is not None


def test_every_kind_is_drawn_at_all_its_moments() -> None:
    rng = np.random.default_rng(0)
    for kind, moments in MOMENTS.items():
        drawn = [faults.draw(kind, rng) for _ in range(200)]
        assert {fault.moment for fault in drawn} == set(moments)
        assert {fault.rank for fault in drawn} == ({0} if kind == "disk" else set(range(faults.RANKS)))
        for fault in drawn:
            assert str(fault) == f"{kind}@{fault.moment}:{fault.step} rank={fault.rank}"
            assert 0 <= fault.step <= STEPS


# --- the matrix sees what it should -------------------------------------------------------------------------


def look(kind: str, expected: list[str], seed: int = 0) -> list[str]:
    return faults.trial_of(kind, np.random.default_rng(seed), expected).problems


def test_a_torn_step_is_seen() -> None:
    """Against the states of another run, everything is torn."""
    wrong = ["0" * 16] * (STEPS + 1)
    found = look("raise", wrong)
    assert any("holds a torn step" in problem for problem in found)
    assert "the next run differs" in found
    assert "it changed the result" in look("slow", wrong)


def test_a_torn_or_lost_checkpoint_is_seen(tmp_path: Path) -> None:
    minidp.spawn(faults.program, faults.RANKS, None, tmp_path, progress=False)
    assert faults._torn(tmp_path, states(), STEPS) == []
    newest, *_ = checkpoint_files.files(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1])
    (problem, *_) = faults._torn(tmp_path, states(), STEPS)
    assert problem.startswith("a checkpoint is torn")
    newest.unlink()
    assert "resumed 2 steps before the end, not 0, or with other bits" in faults._torn(tmp_path, states(), STEPS)
    for path in tmp_path.iterdir():
        path.unlink()
    (problem,) = faults._torn(tmp_path, states(), STEPS)
    assert problem.startswith("nothing can be resumed")


def test_a_file_that_is_written_in_place_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the matrix is for: without a temporary file and its renaming, a kill leaves half a checkpoint."""
    fault = Fault("kill", "save", 4, 0)
    monkeypatch.setattr(faults, "draw", lambda kind, rng: fault)
    monkeypatch.setattr(faults, "program", in_place)
    assert any("a checkpoint is torn" in problem for problem in look("kill", states()))


def in_place(comm: Any, fault: Fault | None, folder: Path, resume: bool = False) -> list[str]:
    from minidp.bench import injector
    from minidp.parallel import checkpoint_files as room

    def save_file(arrays: Any, path: Path, metadata: Any) -> None:
        import safetensors.numpy

        data = safetensors.numpy.save(arrays, metadata)
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
            file.flush()
            os.fsync(file.fileno())
            file.write(data[len(data) // 2 :])

    room.save_file = save_file  # in this worker, which ends with the run
    return injector.program(comm, fault, folder, resume)


def test_a_survivor_that_is_not_told_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    read = faults._diary
    monkeypatch.setattr(faults, "_diary", lambda folder, rank: [e for e in read(folder, rank) if "told" not in e])
    for kind in ("kill", "nan", "order"):
        assert any("was not told" in problem for problem in look(kind, states()))


def test_a_fault_that_does_not_strike_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Fault("kill", "update", STEPS + 5, 1)
    monkeypatch.setattr(faults, "draw", lambda kind, rng: late)
    found = look("kill", states())
    assert "nobody was told" in found
    assert "the fault did not strike" in found


def test_a_wrong_name_is_seen() -> None:
    error = minidp.RankFailed("rank 2 of 3 was killed by SIGKILL", 2)
    assert faults._misnamed(Fault("kill", "flip", 1, 2), error) == []
    assert faults._misnamed(Fault("kill", "flip", 1, 1), error) != []
    for kind in MOMENTS:
        if kind not in faults.HARMLESS:
            assert faults._misnamed(Fault(kind, MOMENTS[kind][0], 1, 0), error) != [], kind


def test_what_is_left_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[Any] = []

    def children() -> set[int]:
        before.append(1)
        return set() if len(before) == 1 else {12345}

    monkeypatch.setattr(faults, "children", children)
    monkeypatch.setattr(faults, "segments", lambda: {"psm_1"} if before[1:] else set())
    assert {"a process was left: 12345", "a segment was left: psm_1"} <= set(look("raise", states()))


def test_the_report_counts(tmp_path: Path) -> None:
    bad = Trial("kill@flip:1 rank=1", struck=True, noticed_s=0.3, problems=["noticed after 0.300 s, not 0.2"])
    good = Trial("kill@save:2 rank=0", struck=True, noticed_s=0.1)
    report = FaultReport([Trials("kill", 0.2, [bad, good])], seed=3)
    assert report.problems == ["kill@flip:1 rank=1: noticed after 0.300 s, not 0.2"]
    console = Console(width=100, record=True, file=io.StringIO())
    report.print(console)
    text = console.export_text()
    for words in ("2 faults", "seed 3", "200.0 ms", "300.0 ms", "≤ 200 ms", "problem: kill@flip:1 rank=1"):
        assert words in text
    report.write(tmp_path / "json")
    (kind,) = json.loads((tmp_path / "json").read_text())["kinds"]
    assert (kind["kind"], kind["trials"], kind["struck"], kind["noticed_max_s"]) == ("kill", 2, 2, 0.3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.main(["faults", "--trials", "3", "--seed", "1", "--json", str(tmp_path / "json")])
    assert code == 0
    found = json.loads((tmp_path / "json").read_text())
    assert [(kind["kind"], kind["trials"]) for kind in found["kinds"]] == [("raise", 1), ("kill", 1), ("exit", 1)]
    assert "No hang, nothing left, no torn step" in capsys.readouterr().out
