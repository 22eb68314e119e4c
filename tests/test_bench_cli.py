"""The bench as a command: its JSON, absent peers, peers that fail, and that no process outlives it."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minidp.bench import allreduce, cli, jobs, leftovers, machine, pace, ps, roster, scaling, step, virtual
from minidp.bench.contest import Rounds, contest
from minidp.bench.roster import Entrant
from minidp.bench.screen import Screen
from minidp.bench.team import PeerFailed, Team

needs_mpich = pytest.mark.skipif(roster.MPICH.missing() is not None, reason="needs mpi4py and mpich")
needs_torch = pytest.mark.skipif(roster.DDP.missing() is not None, reason="needs torch")


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if only minidp's own dependencies were installed."""
    installed = machine.version_of
    absent = {"torch", "mpi4py", "mpich", "ray"}
    monkeypatch.setattr(machine, "version_of", lambda package: None if package in absent else installed(package))


def run_bench(path: Path, *arguments: str) -> dict[str, Any]:
    assert cli.main([*arguments, "--json", str(path)]) == 0
    report: dict[str, Any] = json.loads(path.read_text())
    return report


def check_schema(report: dict[str, Any], bench: str, pairs: int) -> None:
    assert report["bench"] == bench
    assert report["pairs"] == pairs
    assert report["proper"] is (pairs >= 9)
    assert {"date", "cpu", "cores", "python", "versions", "load_average_1min", "blas_threads"} <= set(
        report["machine"]
    )
    assert set(report["machine"]["versions"]) == {"minidp", "numpy", "torch", "mpi4py", "mpich", "ray"}
    assert report["others_cores"] is None or report["others_cores"] >= 0
    for line in report["lines"]:
        assert line["job"]
        assert line["who"]
        assert len(line["samples_s"]) == pairs
        assert all(seconds > 0 for seconds in line["samples_s"])
        if "comparison" in line:
            comparison = line["comparison"]
            assert set(comparison) == {"what", "median", "quartiles", "bar", "met"}
            assert comparison["met"] in ((True, False) if comparison["bar"] else (None,))


@pytest.mark.usefixtures("no_peers")
def test_allreduce_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_bench(
        tmp_path / "out.json", "allreduce", "--pairs", "2", "--burst", "0.005", "--sizes", "4", "2M"
    )
    check_schema(report, "allreduce", 2)
    whos = ["minidp ×2", "minidp slab"]
    assert [(line["job"], line["who"]) for line in report["lines"]] == [
        (n, w) for n in ("4 B", "2 MB") for w in whos
    ]
    assert [line["comparison"]["what"] for line in report["lines"] if "comparison" in line] == ["slab / ours"] * 2
    for line in report["lines"]:
        assert line["busbw_GB_per_s"] == line["algbw_GB_per_s"] > 0
    assert report["missing"] == [
        "MPICH is missing: mpi4py and mpich are not installed here; python -m pip install mpi4py mpich",
        "gloo is missing: torch is not installed here; python -m pip install torch==2.13.0",
    ]
    printed = " ".join(capsys.readouterr().out.split())
    assert "SMOKE RUN of 2 rounds, not a measurement (9 rounds are)" in printed
    assert all(sentence in printed for sentence in report["missing"])
    assert "No bar could be checked." in printed
    assert "torch absent" in printed


@pytest.mark.usefixtures("no_peers")
def test_scaling_alone_compares_two_workers_with_one(tmp_path: Path) -> None:
    report = run_bench(tmp_path / "out.json", "scaling", "--quick")
    check_schema(report, "scaling", 1)
    assert [line["who"] for line in report["lines"]] == ["minidp ×1", "minidp ×2"] * len(jobs.MODELS)
    for one, two in zip(report["lines"][::2], report["lines"][1::2]):
        assert "comparison" not in one
        assert two["comparison"]["what"] == "×2 / ×1"
        assert two["comparison"]["median"] == pytest.approx(2 * one["samples_s"][0] / two["samples_s"][0])
        assert one["job"] == two["job"]
        assert two["samples_per_s"] == pytest.approx(two["steps_per_s"] * 2 * int(two["job"].split()[-1]))
    assert len(report["missing"]) == 3


def test_startup(tmp_path: Path) -> None:
    report = run_bench(tmp_path / "out.json", "startup", "--quick")
    check_schema(report, "startup", 1)
    assert [line["who"] for line in report["lines"]] == [
        "import numpy",
        "import minidp",
        "all that trains",
        "first",
        "second",
    ]


@pytest.mark.usefixtures("no_peers")
def test_ps_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_bench(tmp_path / "out.json", "ps", "--quick")
    lines = report["lines"]
    law = [line for line in lines if "predicted" in line]
    report["lines"] = [line for line in lines if line not in law]
    check_schema(report, "ps", 1)
    straggler, jitter = pace.ROOMS
    found = [(line["job"], line["who"], *map(line.get("comparison", {}).get, ("what", "bar"))) for line in lines]
    assert found == [
        *((jobs.Exchange(ps.TINY_BYTES).name, f"minidp s={s}", "µs", "≤ 150") for s in (0, None)),
        *((jobs.Exchange(ps.MB * 4).name, f"minidp s={s}", "µs", "≤ 4000") for s in (0, None)),
        (straggler, "synchronous", None, None),
        (straggler, "SSP s=2", "/ synchronous", "≥ 1"),
        (straggler, "SSP s=2, head start", "found / law", "0.99–1.01"),
        (straggler, "SSP s=2, long run", "found / law", "0.99–1.01"),
        (straggler, "asynchronous", "/ synchronous", "≥ 3"),
        (jitter, "synchronous", None, None),
        (jitter, "SSP s=2", "/ synchronous", "≥ 1"),
        (jitter, "asynchronous", "/ synchronous", "≥ 1"),
    ]
    for line in lines[:4]:
        assert (
            line["comparison"]["median"] == pytest.approx(line["us"]) == pytest.approx(1e6 * line["samples_s"][0])
        )
    assert all(line["comparison"]["met"] for line in lines[4:] if "comparison" in line), "virtual: no noise"
    assert (law[0]["predicted"], law[0]["found"]) == (6, 6)
    assert report["missing"] == ["Ray actor is missing: ray is not installed here; python -m pip install ray"]
    assert report["missing"][0] in " ".join(capsys.readouterr().out.split())


def test_micro_shards(tmp_path: Path) -> None:
    report = run_bench(tmp_path / "out.json", "micro-shards", "--quick")
    check_schema(report, "micro-shards", 1)
    assert [line["who"] for line in report["lines"]] == ["whole batch", "V = 2", "V = 4", "V = 8"] * 5
    for whole, *cut in zip(*(report["lines"][i::4] for i in range(4))):
        assert "comparison" not in whole
        for line in cut:
            assert line["job"] == whole["job"]
            assert line["comparison"]["median"] == pytest.approx(line["us"] / whole["us"])


def test_whereabouts(tmp_path: Path) -> None:
    report = run_bench(tmp_path / "out.json", "whereabouts", "--quick")
    check_schema(report, "whereabouts", 1)
    assert [line["who"] for line in report["lines"]] == ["watched", "plain"] * 2
    watched, plain = report["lines"][:2]
    assert watched["comparison"]["median"] == pytest.approx(100 * (watched["us"] / plain["us"] - 1) / 25)
    assert watched["comparison"]["bar"] == "≤ 1"


def test_virtual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_bench(tmp_path / "out.json", "virtual", "--quick")
    check_schema(report, "virtual", 1)
    assert [(line["job"], line["who"]) for line in report["lines"]] == [
        *((f"64 ranks, {n}", who) for n in virtual.LENGTHS for who in ("ring all-reduce", "send and recv")),
        *((f"50 ranks train, {jobs.TINY.name}, 5 steps", who) for who in ("steps", "gradients", "whole run")),
        *(("500 ranks, timing only", who) for who in ("digits MLP ×5", "7e9 parameters", "ring all-reduce")),
        *((job.name, who) for job in jobs.MLPS for who in ("minidp ×1", "minidp ×2")),
    ]
    found = [
        (line["comparison"]["what"], line["comparison"]["bar"]) for line in report["lines"] if "comparison" in line
    ]
    assert found == [
        *(("1000 messages/s", bar) for bar in ("≥ 300", "≥ 300", "≥ 150", "≥ 150")),
        ("steps / gradients", None),  # the bars are for 1000 ranks, and 10 000
        ("seconds", None),
        *[("predicted / real", "0.85–1.15")] * 6,
    ]
    for line in report["lines"][:4]:
        assert line["messages_per_s"] == pytest.approx(2 * 63 * 64 / line["samples_s"][0])
        assert line["comparison"]["median"] == pytest.approx(line["messages_per_s"] / 1000)
    for line in report["lines"][-6:]:
        assert line["predicted_ms"] == pytest.approx((line["before_ms"] + line["after_ms"]) / 2)
        assert line["comparison"]["median"] == pytest.approx(line["predicted_ms"] / line["ms"])
    steps, gradients, whole = report["lines"][4:7]
    assert steps["comparison"]["median"] == pytest.approx(steps["ms"] / gradients["ms"])
    assert steps["ms"] < whole["ms"]
    assert "SMOKE RUN of 1 round, not a measurement" in " ".join(capsys.readouterr().out.split())


def test_the_bars_of_virtual_are_for_its_full_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual, "FULL", virtual.Size(ranks=2, timed_ranks=65))
    with Screen() as screen:
        trained = virtual.training(Rounds(1, 0.01), screen, virtual.FULL)
        timed = virtual.timing(Rounds(1, 0.01), screen, virtual.FULL)
    assert [str(line.result and line.result.bar) for line in (*trained, *timed)] == [
        *("≤ 3", "None", "None"),
        *("≤ 10", "None", "None"),
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_virtual_ranks_end_with_the_bench(number: signal.Signals) -> None:
    code = """
import sys
from minidp.bench import cli
from minidp.bench.screen import Screen
Screen.tick = lambda self: print("burst", flush=True)
sys.exit(cli.main(["virtual", "--pairs", "500", "--burst", "0.02"]))
"""
    script = leftovers.Script(code)
    try:
        script.wait_for_line("burst")
        script.process.send_signal(number)
        status, _, errors = script.finish()
    finally:
        script.clean()
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in errors


@needs_mpich
def test_all_reduce_beside_mpich(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allreduce, "ENTRANTS", (roster.OURS_2, roster.MPICH))
    before = set(Path("/dev/shm").iterdir())
    report = run_bench(tmp_path / "out.json", "allreduce", "--quick", "--sizes", "4K")
    assert set(Path("/dev/shm").iterdir()) <= before, "MPICH's too"
    check_schema(report, "allreduce", 1)
    assert report["missing"] == []
    ours, mpich = report["lines"]
    assert mpich["comparison"]["what"] == "MPICH / ours"
    assert mpich["comparison"]["median"] == pytest.approx(mpich["samples_s"][0] / ours["samples_s"][0])
    assert mpich["comparison"]["bar"] == "≥ 1"


@needs_mpich
@needs_torch
def test_two_workers_train_as_pytorch_with_mpi_does() -> None:
    """``Contest.run`` compares their losses after four updates from the same weights: it raises if they differ."""
    with Screen() as screen, contest((roster.OURS_2, roster.TORCH_MPICH), screen) as teams:
        assert teams.missing == []
        assert set(teams.run(jobs.TINY, Rounds(1, 0.01))) == {"ours", "torch_mpich"}


@needs_torch
def test_images_and_text_train_as_in_pytorch() -> None:
    """Small ones of either kind; the memory format for images sits out where there are none."""
    small = (jobs.CNN((4, 6), 9, 5), jobs.Transformer(11, 6, 8, 2, 2, 3))
    with Screen() as screen:
        report = step.run(Rounds(1, 0.01), screen, small)
    assert report.missing == []
    assert [(line.job, line.who, line.what) for line in report.lines] == [
        (small[0].name, "minidp ×1", "ours / eager"),
        (small[0].name, "PyTorch eager", ""),
        (small[0].name, "channels_last", "ours / channels_last"),
        (small[1].name, "minidp ×1", "ours / eager"),
        (small[1].name, "PyTorch eager", ""),
    ]


@pytest.mark.soak  # four processes import PyTorch
@needs_mpich
@needs_torch
def test_all_contestants_train_alike() -> None:
    with Screen() as screen:
        report = scaling.run(Rounds(1, 0.01), screen, (jobs.TINY,))
    assert report.missing == []
    assert [(line.who, line.what, line.result and str(line.result.bar)) for line in report.lines] == [
        ("minidp ×1", "ours / eager", "≤ 0.4"),
        ("PyTorch eager", "", None),
        ("minidp ×2", "×2 / ×1", "≥ 1.55"),
        ("PyTorch DDP", "DDP / ours", "≥ 28"),
        ("PyTorch+MPICH", "MPICH / ours", "≥ 3"),
    ]


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["allreduce", "--help"], ["scaling", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert "ours, peer, ours, peer" in text
        assert "pip install torch==2.13.0 mpi4py mpich ray" in text
    assert "--pairs N" in text
    assert "--json FILE" in text


SAYS_HELLO = """
import os, sys, time
from multiprocessing.connection import Client
from minidp.bench.peers.serve import Hello
connection = Client(sys.argv[1], "AF_UNIX")
connection.send(Hello(int(sys.argv[2]), os.getpid(), int(sys.argv[3])))
"""


def team(folder: Path, code: str, *arguments: tuple[int, int]) -> Team:
    """Ranks that run ``code``; ``arguments`` are their rank and threads."""
    commands = [[sys.executable, "-c", code, "SOCKET", *map(str, each)] for each in arguments]
    return Team("a peer", commands, len(commands), folder / "socket")


def test_a_peer_that_does_not_start(tmp_path: Path) -> None:
    with team(tmp_path, "raise SystemExit('no libmpi here')", (0, 1)) as peer, pytest.raises(PeerFailed) as failed:
        peer.gather()
    assert str(failed.value) == "a peer ended before all of its ranks were ready\n    no libmpi here"
    assert not list(tmp_path.iterdir())


def test_a_peer_that_dies_while_another_of_its_ranks_waits(tmp_path: Path) -> None:
    code = SAYS_HELLO + "connection.recv()\nif sys.argv[2] == '0': time.sleep(60)\nraise SystemExit('too hot')"
    start = time.monotonic()
    peer = team(tmp_path, code, (0, 1), (1, 1))
    with peer:
        peer.gather()
        with pytest.raises(PeerFailed, match=r"(?s)a peer died.*too hot"):
            peer.prepare(jobs.AllReduce(4))
        peer._processes[0].kill()  # it sleeps, and would be given time to leave
    assert time.monotonic() - start < 10


def test_a_peer_with_two_threads_is_refused(tmp_path: Path) -> None:
    with team(tmp_path, SAYS_HELLO, (0, 2)) as peer, pytest.raises(PeerFailed, match="2 threads in rank 0"):
        peer.gather()


def test_a_peer_that_fails_is_missing_and_we_are_not_stopped() -> None:
    broken = Entrant("Broken", "broken", "broken", "no_such_module", 1, ("numpy",))
    with Screen() as screen, contest((broken, roster.OURS_1), screen) as teams:
        assert list(teams.teams) == ["ours_1"]
        (sentence,) = teams.missing
        assert sentence.startswith("Broken is missing: Broken ended before all of its ranks were ready")
        assert "no_such_module" in sentence
        assert teams.teams["ours_1"].prepare(jobs.TINY) > 0


def test_an_mpi_without_a_launcher_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "version_of", lambda package: "1.0")
    monkeypatch.setattr(roster, "mpiexec", lambda: None)
    assert roster.MPICH.missing() == (
        "MPICH is missing: mpiexec is not installed here; python -m pip install mpi4py mpich"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_behind(number: signal.Signals) -> None:
    code = """
import sys
from minidp.bench import cli, machine
machine.version_of = lambda package: None
from minidp.bench.screen import Screen
Screen.tick = lambda self: print("burst", flush=True)
sys.exit(cli.main(["scaling", "--pairs", "500", "--burst", "0.02"]))
"""
    before = leftovers.segments()
    script = leftovers.Script(code)
    try:
        script.wait_for_line("burst")
        assert len(leftovers.processes(script.token)) >= 5  # itself, one worker, two workers, who started them
        script.process.send_signal(number)
        status, _, errors = script.finish()
        assert leftovers.gone_within(script.token, 5) is not None
    finally:
        script.clean()
    assert leftovers.segments() == before
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    if number is signal.SIGINT:
        assert "interrupted; all contestants have ended" in errors
        assert "Traceback" not in errors
