"""The bench of the parameter server: what its contestants do, its law, and Ray's processes, which end with it."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.bench import jobs, leftovers, pace, ps, roster
from minidp.bench.contest import Rounds, contest
from minidp.bench.peers.ps import Synchronous
from minidp.bench.peers.ps_async import Asynchronous
from minidp.bench.screen import Screen
from minidp.bench.team import PeerFailed, Team

needs_ray = pytest.mark.skipif(roster.RAY.missing() is not None, reason="needs ray")


def exchanged(comm: Any, contestant: type[Synchronous]) -> tuple[list[np.ndarray], list[tuple[int, int]]]:
    """w after each of two exchanges of one size, then of another; updates and size of the servers in the end."""
    us = contestant(comm)
    w = []
    for nbytes in (400, 4 * 37):
        repetition = us.exchange(jobs.Exchange(nbytes))
        w += [np.array(repetition())[: nbytes // 4] for _ in range(2)]
    return w, [(server.version, server.hi) for server in us._strategy.servers()]


@pytest.mark.parametrize("contestant", [Synchronous, Asynchronous])
def test_an_exchange_is_a_step_of_sgd(contestant: type[Synchronous]) -> None:
    ((w, servers),) = minidp.spawn(exchanged, 1, contestant, servers=1, world="virtual")
    for first, second, size in ((*w[:2], 100), (*w[2:], 37)):
        gradient = jobs.Exchange(4 * size).gradient()
        assert len(first) == len(set(gradient)) == size
        np.testing.assert_allclose(first, -jobs.LEARNING_RATE * gradient, rtol=1e-6)
        np.testing.assert_allclose(second, -2 * jobs.LEARNING_RATE * gradient, rtol=1e-6)
    assert servers == [(2, 48)], "37 elements are 3 cache lines"


def test_a_server_is_no_neighbour() -> None:
    """What it takes is not counted as other processes' time."""
    with Screen() as screen, contest((roster.PS_ASYNC,), screen) as teams:
        team = teams.teams["ours"]
        helpers = team.pids - {os.getpid()}
        assert len(helpers) == 3, "who launched, worker, server"
        assert all(Path(f"/proc/{pid}").exists() for pid in helpers)


@pytest.mark.parametrize("s", [1, 3])
def test_a_head_start_of_ssp_and_then_the_pace_of_the_straggler(s: int) -> None:
    cluster, _ = pace.ROOMS.values()
    together = pace.trained(cluster, 0, float("inf"), 12)
    until_s = max(worker.ends[-1] for worker in together)
    base = pace._rate(together, 0, until_s)
    workers = pace.trained(cluster, s, until_s)
    start, pace_of_all = pace.law("", "", s, workers, base)
    assert start.figures == {"predicted": 3 * s, "found": 3 * s}
    assert start.result is not None
    assert start.result.median == 1
    assert pace_of_all.result is not None
    assert pace_of_all.result.median == pytest.approx(1, rel=0.01)
    assert workers == pace.trained(cluster, s, until_s), "to the bit"


LEAVES_A_HELPER = """
import os, subprocess, sys
from multiprocessing.connection import Client
from minidp.bench.peers.serve import Hello
helper = subprocess.Popen(["sleep", "60"])
connection = Client(sys.argv[1], "AF_UNIX")
connection.send(Hello(0, os.getpid(), 1, (helper.pid,)))
connection.recv()
os._exit(1)
"""


def test_helpers_end_with_their_team(tmp_path: Path) -> None:
    with Team("a peer", [[sys.executable, "-c", LEAVES_A_HELPER, "SOCKET"]], 1, tmp_path / "socket") as peer:
        peer.gather()
        (helper,) = peer.pids - {process.pid for process in peer._processes}
        with pytest.raises(PeerFailed, match="died"):
            peer.prepare(jobs.TINY)
        assert os.getpgid(helper) in peer.pids
    start = time.monotonic()
    while state_of(helper) not in ("gone", "Z"):
        assert time.monotonic() - start < 5
        time.sleep(0.01)


def state_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "gone"


@needs_ray
def test_beside_a_ray_actor() -> None:
    """`Contest.run` compares their w: it raises if these differ."""
    before = temporary()
    with Screen() as screen:
        report = ps.run(Rounds(1, 0.01), screen, (400,), pace.QUICK)
    assert report.missing == []
    assert [(line.who, line.what) for line in report.lines[:3]] == [
        ("minidp s=0", "µs"),
        ("minidp s=None", "µs"),
        ("Ray actor", "Ray / ours"),
    ]
    assert temporary() == before


@needs_ray
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_of_ray_is_left_behind(number: signal.Signals) -> None:
    code = """
import sys
from minidp.bench import cli
from minidp.bench.screen import Screen
from minidp.bench.team import PeerFailed, Team
Screen.tick = lambda self: print("burst", flush=True)
sys.exit(cli.main(["ps", "--pairs", "500", "--burst", "0.02"]))
"""
    segments, before = leftovers.segments(), temporary()
    script = leftovers.Script(code)
    try:
        script.wait_for_line("burst", 60)
        assert len(leftovers.processes(script.token)) >= 15, "ours, and half a dozen of Ray's"
        script.process.send_signal(number)
        status, _, errors = script.finish()
        assert leftovers.gone_within(script.token, 15) is not None
    finally:
        script.clean()
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    assert number is signal.SIGKILL or "Traceback" not in errors
    assert leftovers.segments() == segments
    assert temporary() == before


def temporary() -> set[str]:
    """What benches have left in the folder for temporary files, and Ray there and at home."""
    folder = Path(tempfile.gettempdir())
    found = [*folder.glob("minidp-bench-*"), *folder.glob("minidp-ray-*"), folder / "ray", Path.home() / ".ray"]
    return {str(path) for path in found if path.exists()}
