"""What breaks, is named; what is named, is named soon; and nothing is left. Three tries each, 50 under soak."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.bench.leftovers import Script, gone_within, segments
from minidp.nn import functional as F
from tests.leftovers import nothing_is_left

TRIES = [*range(3), *(pytest.param(i, marks=pytest.mark.soak) for i in range(3, 50))]
NOTICE_S = 0.2  # a dead rank
MISMATCH_S = 1.0


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with nothing_is_left():
        yield


def training(comm: Any, body: Callable[..., None], *args: Any) -> None:
    """A training loop that calls ``body(comm, step, place, *args)`` at each place of each step."""
    rng = np.random.default_rng(comm.rank)
    x, y = rng.standard_normal((64, 32)).astype(np.float32), rng.integers(0, 10, 64)

    class Spy(nn.Module):
        step = 0

        def forward(self, x: Any) -> Any:
            body(comm, self.step, "forward", *args)
            return x

    spy = Spy()
    model = nn.Sequential(nn.Linear(32, 64), spy, nn.ReLU(), nn.Linear(64, 10), seed=0)
    strategy = parallel.DataParallel(model, optim.Adam(model.parameters()), comm)
    for spy.step in range(100_000):
        strategy.forward_backward(x, y, F.cross_entropy)
        body(comm, spy.step, "between", *args)
        strategy.step()


def mark(path: str) -> None:
    Path(path).write_text(str(time.monotonic()))


def die(path: str) -> None:
    mark(path)
    os.kill(os.getpid(), signal.SIGKILL)


def killed_in_forward(comm: Any, step: int, place: str, path: str) -> None:
    if comm.rank == 1 and step == 7 and place == "forward":
        die(path)


def killed_at_a_random_moment(comm: Any, step: int, place: str, path: str, delay: float) -> None:
    if comm.rank == 1 and step == 3 and place == "between":
        threading.Timer(delay, die, [path]).start()


def killed_while_it_logs(comm: Any, step: int, place: str, path: str) -> None:
    if step == 0 and comm.rank == 1 and place == "between":
        threading.Timer(0.03, die, [path]).start()
    logging.getLogger("noise").info("rank %d step %d %s", comm.rank, step, "x" * 2000)


def failed(fn: Callable[..., Any], world_size: int, *args: Any, **options: Any) -> tuple[minidp.RankFailed, float]:
    """Run it, expect a failure, and say when it was noticed."""
    with pytest.raises(minidp.RankFailed) as caught:
        minidp.spawn(fn, world_size, *args, **options)
    return caught.value, time.monotonic()


@pytest.mark.parametrize("trial", TRIES)
def test_killed_in_forward(trial: int, tmp_path: Path) -> None:
    error, noticed = failed(training, 3, killed_in_forward, str(tmp_path / "t"))
    assert str(error) == "rank 1 of 3 was killed by SIGKILL (out of memory?)"
    assert error.rank == 1
    assert noticed - float((tmp_path / "t").read_text()) < NOTICE_S + 0.1  # 0.1 s: the others are ended


def test_who_dies_by_a_fault_of_the_program_shows_its_stack() -> None:
    source = """
import os, signal
import minidp
def breaks(comm):
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    comm.barrier()
minidp.spawn(breaks, 2, progress=False)
"""
    script = Script(source)
    try:
        code, _, err = script.finish()
        assert code == 1
        assert re.search(r"Fatal Python error: Segmentation fault\n(.*\n)*?.* in breaks\n", err), err
        assert err.rstrip().endswith("RankFailed: rank 1 of 2 was killed by SIGSEGV")
    finally:
        script.clean()


@pytest.mark.parametrize("trial", TRIES)
def test_killed_at_a_random_moment(trial: int, tmp_path: Path) -> None:
    delay = float(np.random.default_rng(trial).uniform(0, 0.05))
    error, noticed = failed(training, 2, killed_at_a_random_moment, str(tmp_path / "t"), delay)
    assert error.rank == 1
    assert noticed - float((tmp_path / "t").read_text()) < NOTICE_S + 0.1


@pytest.mark.parametrize("trial", TRIES)
def test_killed_while_it_logs(trial: int, tmp_path: Path) -> None:
    logging.getLogger("noise").setLevel(logging.INFO)
    error, noticed = failed(training, 2, killed_while_it_logs, str(tmp_path / "t"))
    assert error.rank == 1
    assert noticed - float((tmp_path / "t").read_text()) < NOTICE_S + 0.1


def survivors_are_told(comm: Any, folder: str) -> None:
    if comm.rank == 2:
        time.sleep(0.1)
        die(f"{folder}/dead")
    try:
        comm.all_reduce(np.ones(10))
    except minidp.RankFailed as error:
        Path(f"{folder}/{comm.rank}").write_text(f"{time.monotonic()} {error.rank} {error}")
        raise


@pytest.mark.parametrize("trial", TRIES)
def test_survivors_in_a_collective_are_told_who_died(trial: int, tmp_path: Path) -> None:
    failed(survivors_are_told, 4, str(tmp_path))
    died = float((tmp_path / "dead").read_text())
    for rank in (0, 1, 3):
        when, who, text = (tmp_path / str(rank)).read_text().split(" ", 2)
        assert float(when) - died < NOTICE_S
        assert who == "2"
        assert "rank 2 of 4 was killed by SIGKILL" in text
        assert f"this is rank {rank}, waiting in all_reduce #1 (float64 (10,), sum)" in text


def raises(comm: Any, step: int, place: str) -> None:
    if comm.rank == 1 and step == 2 and place == "forward":
        raise ValueError("no such thing")


@pytest.mark.parametrize("trial", TRIES)
def test_a_rank_that_raises(trial: int) -> None:
    start = time.monotonic()
    error, _ = failed(training, 3, raises)
    assert str(error) == "rank 1 of 3 raised ValueError: no such thing"
    assert isinstance(error.__cause__, ValueError)
    assert "in raises" in "".join(error.__notes__), "the worker's traceback"
    assert time.monotonic() - start < 2


def leaves(comm: Any, how: str) -> None:
    if comm.rank == 1:
        if how == "os._exit":
            os._exit(3)
        raise SystemExit(4) if how == "sys.exit" else KeyboardInterrupt
    comm.barrier()


def test_a_rank_that_exits() -> None:
    assert str(failed(leaves, 2, "os._exit")[0]).startswith("rank 1 of 2 exited with code 3 without a word")
    assert str(failed(leaves, 2, "sys.exit")[0]) == "rank 1 of 2 raised SystemExit: 4"
    assert str(failed(leaves, 2, "interrupt")[0]).startswith("rank 1 of 2 raised KeyboardInterrupt")


# -- disagreement --------------------------------------------------------------------------------------------


def disagree(comm: Any, how: str, folder: str) -> None:
    r = comm.rank
    x = np.ones((2, 3), np.float32)
    comm.barrier()
    if r == comm.world_size - 1:
        time.sleep(0.05)
    mark(f"{folder}/arrived-{r}")
    try:
        if how == "shape":
            comm.all_reduce(x if r else x.T)
        elif how == "dtype":
            comm.all_reduce(x if r else x.astype(np.int32))
        elif how == "operation":
            comm.barrier() if r else comm.broadcast(x)
        elif how == "op":
            comm.all_reduce(x, minidp.ReduceOp.MAX if r else minidp.ReduceOp.SUM)
        elif how == "src":
            comm.broadcast(x, r % 2)
        elif how == "algorithm":
            comm.all_reduce(x, algorithm="ring" if r else None)
        elif how == "order of two groups":
            other = comm.split(0)
            for group in (comm, other) if r else (other, comm):
                group.barrier()
        elif how == "receive instead of reduce":
            comm.recv(x, 1) if r == 0 else comm.all_reduce(x)
        elif how == "all receive":
            comm.recv(x, (r + 1) % comm.world_size)
        elif how == "returns early":
            if r == 2 % comm.world_size:
                return
            comm.all_reduce(x)
        else:
            comm.send(x, 1) if r == 0 else comm.recv(x.astype(np.float64), 0)
    except minidp.CollectiveMismatch as error:
        Path(f"{folder}/{r}").write_text(f"{time.monotonic()} {error}")
        raise


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("shape", "called all_reduce float32 (3, 2), sum; "),
        ("dtype", "rank 0 called all_reduce int32 (2, 3), sum; "),
        ("operation", "rank 0 called broadcast float32 (2, 3), src=0; "),
        ("op", "called all_reduce float32 (2, 3), max"),
        ("src", "called broadcast float32 (2, 3), src=1"),
        ("algorithm", "called all_reduce float32 (2, 3), sum, ring"),
        ("order of two groups", "wait for each other and none can go on"),
        ("receive instead of reduce", "rank 0 waits in recv from rank 1, tag 0 (float32[6])"),
        ("all receive", "wait for each other and none can go on"),
        ("returns early", "returned; rank"),
    ],
)
def test_ranks_that_disagree(how: str, says: str, world_size: int, tmp_path: Path) -> None:
    with pytest.raises(minidp.CollectiveMismatch) as caught:
        minidp.spawn(disagree, world_size, how, str(tmp_path))
    assert isinstance(caught.value, minidp.RankFailed)
    assert says in str(caught.value)
    last = max(float(path.read_text()) for path in tmp_path.glob("arrived-*"))
    silent = {2 % world_size} if how == "returns early" else set()
    for rank in set(range(world_size)) - silent:
        when, text = (tmp_path / str(rank)).read_text().split(" ", 1)
        assert says in text
        assert float(when) - last < MISMATCH_S


def test_early_return_names_everybody(tmp_path: Path) -> None:
    with pytest.raises(minidp.CollectiveMismatch) as caught:
        minidp.spawn(disagree, 4, "returns early", str(tmp_path))
    assert "rank 2 returned; ranks 0, 1, 3 wait in all_reduce #2" in str(caught.value)


def test_a_message_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(minidp.CollectiveMismatch, match=r"rank 0 sent float32\[6\] .* receives float64\[6\]"):
        minidp.spawn(disagree, 2, "message", str(tmp_path))


def late_but_there(comm: Any) -> float:
    if comm.rank == 0:
        time.sleep(0.5)
    comm.barrier()
    comm.recv(np.empty(1), 0) if comm.rank else comm.send(np.ones(1), 1) or time.sleep(0.3)
    return 1.0


def test_late_is_not_mismatched() -> None:
    assert minidp.spawn(late_but_there, 2, timeout_s=5) == [1.0, 1.0]


def stop(comm: Any) -> None:
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.all_reduce(np.ones(3))


def absent(comm: Any) -> None:
    if comm.rank == 1:
        time.sleep(30)
    comm.all_reduce(np.ones(3))


def test_a_stopped_rank_is_named() -> None:
    with pytest.raises(minidp.CollectiveTimeout) as caught:
        minidp.spawn(stop, 3, timeout_s=0.5)
    assert "rank 1 did not come to all_reduce #1 (float64 (3,), sum) within 0.5 s" in str(caught.value)
    assert "rank 1 is stopped (SIGSTOP)" in str(caught.value)


def test_an_absent_rank_is_named() -> None:
    with pytest.raises(minidp.CollectiveTimeout, match="rank 1 did not come to all_reduce #1") as caught:
        minidp.spawn(absent, 2, timeout_s=0.5)
    assert "stopped" not in str(caught.value)


# -- the parent ends -----------------------------------------------------------------------------------------

PARENT = """
import sys, time, numpy as np, minidp
def busy(comm):
    if comm.rank == 0:
        print("running", flush=True)
    x = np.ones(1000)
    while True:
        comm.all_reduce(x); x[:] = 1
        sum(range(20_000))
try:
    minidp.spawn(busy, 3)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(42)
"""


def end_parent(send: Callable[[Script], object], trial: int) -> tuple[int, str, str, float | None]:
    before = segments()
    script = Script(PARENT)
    try:
        script.wait_for_line("running")
        time.sleep(0.01 * (trial % 7))
        send(script)
        result = script.finish(10)
        left = gone_within(script.token, 2)
        assert segments() <= before
        return *result, left
    finally:
        script.clean()


@pytest.mark.parametrize("trial", TRIES)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_the_parent_is_killed(number: signal.Signals, trial: int) -> None:
    code, _, _, left = end_parent(lambda script: script.process.send_signal(number), trial)
    assert code == -number
    assert left is not None, "workers outlived their parent by 2 s"


@pytest.mark.parametrize("trial", TRIES)
@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c(presses: int, trial: int) -> None:
    def press(script: Script) -> None:
        for i in range(presses):
            time.sleep(0.003 * i)
            script.interrupt_group()

    code, out, err, left = end_parent(press, trial)
    assert left is not None
    if presses == 1:
        assert (code, out.strip().splitlines()[-1]) == (42, "interrupted"), err
        assert "Traceback" not in err, "no worker may shout"
    else:
        assert code != 0
