"""Recorded runs, run again: the same bits; another rule on the same order; the guilty event; damaged logs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import data, nn, optim, parallel
from minidp.launch import worker
from minidp.nn import functional as F
from minidp.parallel import event_log
from minidp.parallel.event_log import DamagedLog
from minidp.parallel.wire import Op
from minidp.replay.__main__ import main
from minidp.replay.rerun import DepartedFromLog, rerun, revised

STEPS = 12
RULES: dict[str, dict[str, Any]] = {
    "synchronous": {"staleness": 0},
    "bounded": {"staleness": 1},
    "asynchronous": {"staleness": None},
    "dc-asgd": {"staleness": None, "delay_compensation": 0.1},
    "backup": {"staleness": 0, "backup_workers": 1},
}


def train(comm: Any, options: dict[str, Any], steps: int = STEPS, rate: float = 0.05) -> Any:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((96, 5)).astype(np.float32), rng.integers(0, 3, 96)
    model = nn.Sequential(nn.Linear(5, 600), nn.ReLU(), nn.Linear(600, 3), seed=0)
    rule = optim.SGD(model.parameters(), lr=rate, momentum=0.5)
    strategy = parallel.ParameterServer(model, rule, comm, **options)
    loader = data.DataLoader(data.ArrayDataset(x, y), batch_size=8, shard=strategy.shard, shuffle=True, seed=0)
    for epoch in range(100):
        for batch in loader.epoch(epoch):
            strategy.forward_backward(*batch, F.cross_entropy)
            strategy.step()
            if strategy.updates == steps:
                return strategy.state_dict()
    return None


def dies(comm: Any, options: dict[str, Any]) -> Any:
    if comm.rank == 1:
        with contextlib.suppress(StopIteration):
            train(comm, options, 3)
        if worker.inside_worker:  # in the rerun it would kill this process, which all ranks share
            os.kill(os.getpid(), signal.SIGKILL)
    return train(comm, options)


def asks_the_time(comm: Any) -> Any:
    """A program that does something else each time it runs, once ``departs`` is there."""
    return train(comm, RULES["asynchronous"], 3 if Path("departs").exists() else STEPS)


def record(path: Path, function: Any = train, *args: Any, workers: int = 2, servers: int = 2, world: str) -> Any:
    return minidp.spawn(
        function, workers, *args, servers=servers, world=world, record=path, progress=False, timeout_s=20
    )


@pytest.mark.parametrize("world", ["process", "virtual"])
@pytest.mark.parametrize("rule", RULES)
def test_the_same_bits(tmp_path: Path, rule: str, world: str) -> None:
    path = tmp_path / "run.log"
    record(path, train, RULES[rule], world=world)
    log = event_log.read(path)
    outcome = rerun(log)
    assert log.whole
    assert len(log.ends) == 2
    assert outcome.ends == log.ends
    assert sum(event.op == Op.PUSH for event in log.events[0]) == 2 * STEPS
    assert outcome.pushes
    assert [(m.event.worker, m.event.loss) for m in outcome.pushes] == [
        (e.worker, e.loss) for e in log.events[0] if e.op == Op.PUSH
    ]


def test_workers_get_the_same_too(tmp_path: Path) -> None:
    """What the servers' digests stand for is what the workers returned."""
    path = tmp_path / "run.log"
    states = record(path, train, RULES["asynchronous"], world="process")
    log = event_log.read(path)
    assert rerun(log).ends == log.ends
    layout = nn.Layout(nn.Sequential(nn.Linear(5, 600), nn.ReLU(), nn.Linear(600, 3), seed=0))
    flat = np.zeros(layout.size, layout.dtype)
    for segment, view in zip(layout.segments, layout.views(flat)):
        view[...] = states[0][segment.name]
    import hashlib

    opened = parallel.links.server_slices(layout.size, layout.itemsize, 2)
    digests = [hashlib.sha256(flat[lo:hi].tobytes()).hexdigest() for lo, hi in opened]
    assert digests == [log.ends[server, 0][1] for server in (0, 1)]


def test_another_order_gives_other_bits(tmp_path: Path) -> None:
    """So that equal bits mean something: two pushes exchanged in the log change w."""
    path = tmp_path / "run.log"
    record(path, train, RULES["asynchronous"], world="virtual", servers=1)
    log = event_log.read(path)
    events = log.events[0]
    first = next(i for i, e in enumerate(events) if e.op == Op.PUSH and events[i + 1].op == Op.PUSH and i > 4)
    assert events[first].worker != events[first + 1].worker
    events[first], events[first + 1] = events[first + 1], events[first]
    assert rerun(log).ends != log.ends


def test_a_worker_that_died(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run.log"
    states = record(path, dies, RULES["asynchronous"], workers=3, world="process")
    assert states[1] is None
    log = event_log.read(path)
    assert any(event.op == Op.LOST and event.worker == 1 for event in log.events[0])
    assert rerun(log).ends == log.ends


@pytest.mark.parametrize(
    ("what", "changes"), [("dc-asgd=0.5", True), ("staleness-aware", True), ("lr=0.05", False)]
)
def test_what_if(tmp_path: Path, what: str, changes: bool) -> None:
    """Another rule on the same order of arrivals; the rate that it had is no other rule."""
    path = tmp_path / "run.log"
    record(path, train, RULES["asynchronous"], workers=3, servers=1, world="virtual")
    log = event_log.read(path)
    outcome = rerun(log, revised(what))
    assert (outcome.ends != log.ends) == changes
    assert [m.event.worker for m in outcome.pushes] == [e.worker for e in log.events[0] if e.op == Op.PUSH]


def test_what_if_is_the_rule_itself(tmp_path: Path) -> None:
    """What if it had been dc-asgd: the bits of the run that was dc-asgd, where the order is the same."""
    ends = []
    for name, options in (("plain", {"staleness": None}), ("dc", {"staleness": None, "delay_compensation": 0.5})):
        record(tmp_path / name, train, options, workers=3, servers=1, world="virtual")
        log = event_log.read(tmp_path / name)
        ends.append(rerun(log, revised("dc-asgd=0.5")).ends if name == "plain" else log.ends)
    assert ends[0] == ends[1]


@pytest.mark.parametrize("what", ["", "adam", "lr", "lr=x", "lr=-1", "lr=inf", "staleness-aware=1", "dc-asgd=-1"])
def test_what_can_not_be(what: str) -> None:
    with pytest.raises(ValueError, match=r"give|number"):
        revised(what)


def test_until_the_loss_exceeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.log"
    record(path, train, RULES["asynchronous"], STEPS, 30.0, world="virtual", servers=1)
    log = event_log.read(path)
    losses = [event.loss for event in log.events[0] if event.op == Op.PUSH]
    limit = sorted(losses)[len(losses) // 2]
    first = next(i for i, loss in enumerate(losses) if loss > limit)
    found = rerun(log, until=limit).found
    assert found is not None
    assert found.event.loss == losses[first]
    assert found.norm > 0
    assert main([str(path), "--until-loss-exceeds", str(limit)]) == 0
    text = capsys.readouterr().out
    assert f"Event {found.number}" in text
    assert f"version {found.event.version}" in text.replace("\n", " ")
    assert main([str(path), "--until-loss-exceeds", "1e30"]) == 0
    assert "No loss exceeds" in capsys.readouterr().out


def test_a_program_that_departs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "run.log", asks_the_time, world="virtual")
    log = event_log.read(tmp_path / "run.log")
    assert rerun(log).ends == log.ends
    (tmp_path / "departs").touch()
    with pytest.raises(DepartedFromLog, match=r"now it is (GATHER|PARK)"):
        rerun(log)


def test_a_log_that_ends_early(tmp_path: Path) -> None:
    """Wherever a run is killed, its log is good up to there."""
    path = tmp_path / "run.log"
    record(path, train, RULES["asynchronous"], world="virtual")
    whole = path.read_bytes()
    header = whole.index(b"\n", whole.index(b"\n") + 1) + 1
    for cut in range(header, len(whole), len(whole) // 7):
        path.write_bytes(whole[:cut])
        log = event_log.read(path)
        outcome = rerun(log)
        assert {server for server, _ in outcome.ends} <= {0, 1}
        assert len(outcome.pushes) == sum(event.op == Op.PUSH for event in log.events[0])


def test_a_damaged_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.log"
    record(path, train, RULES["asynchronous"], world="virtual", servers=1)
    whole = path.read_bytes()
    at = whole.rindex(b" push ") + 1
    for bad, says in (
        (b"", "is not the log of a run"),
        (b"something else\n", "is not the log of a run"),
        (whole.replace(b"format 1", b"format 7", 1), "has format 7, this version of minidp reads format 1"),
        (whole[: whole.index(b"\n") + 1], "ends before it begins"),
        (whole.replace(b'"workers": 2', b'"workers": 3', 1), "line 2: the description of the run is damaged"),
        (whole[:at] + b"pull" + whole[at + 4 :], "is damaged"),
    ):
        path.write_bytes(bad)
        with pytest.raises(DamagedLog, match=says):
            event_log.read(path)
        assert main([str(path)]) == 1
        assert says in capsys.readouterr().out.replace("\n", " ")
    assert main([str(tmp_path / "nothing")]) == 1
    assert "No such file" in capsys.readouterr().out


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    record(path, train, RULES["asynchronous"], 2, world="virtual", servers=1)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(whole) - 1, 60):
        if whole[at : at + 1] == b"\n":
            continue  # a line that is cut: what remains is damaged, or is the log of a shorter run
        flipped = bytearray(whole)
        flipped[at] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(DamagedLog):
            event_log.read(path)


def test_the_command(tmp_path: Path) -> None:
    """As a user calls it, in a process of its own: the program comes with the log."""
    path = tmp_path / "run.log"
    record(path, train, RULES["asynchronous"], world="process")
    home = Path(minidp.__file__).parents[1]
    command = [sys.executable, "-m", "minidp.replay", str(path)]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(home)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same bits") == 2


def test_bad_wishes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give servers=1 or more"):
        minidp.spawn(train, 2, {}, record=tmp_path / "run.log")
    with pytest.raises(ValueError, match="blas_threads=2"):
        minidp.spawn(train, 2, {}, servers=1, record=tmp_path / "run.log", blas_threads=2)
    with pytest.raises(FileNotFoundError):
        minidp.spawn(train, 2, {}, servers=1, record=tmp_path / "no" / "run.log")
