"""Who is stuck: on a timeout, and when somebody asks, one message says where every rank is."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.bench.leftovers import Script
from minidp.comm import comm_self
from minidp.launch.whereabouts import Sampler, place_of, telling
from minidp.nn import functional as F

pytestmark = pytest.mark.timeout(60)

HANG_S = 30.0


class Slow(nn.Module):
    """A layer that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def forward(self, x: Any) -> Any:
        time.sleep(self.seconds)
        return F.relu(x)


class Net(nn.Module):
    def __init__(self, seconds: float = 0.0) -> None:
        self.conv1, self.act, self.conv2 = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8)
        self.slow, self.last = Slow(seconds), nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.last(self.slow(self.conv2(self.act(self.conv1(x)))))


def load_batch(seconds: float) -> tuple[np.ndarray, np.ndarray]:
    time.sleep(seconds)
    return np.zeros((2, 4), np.float32), np.zeros(2, int)


def hangs(comm: Any, where: str, seconds: float = HANG_S) -> None:
    here = comm.rank == 2
    model = Net(seconds if here and where == "forward" else 0).initialize(0)
    if here and where == "backward":
        model.conv2.weight.register_post_accumulate_grad_hook(lambda _: time.sleep(seconds))
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    x, y = load_batch(seconds if here and where == "data" else 0)
    if here and where == "stopped":
        time.sleep(0.4)
        os.kill(os.getpid(), signal.SIGSTOP)
    strategy.forward_backward(x, y, F.cross_entropy)
    strategy.step()


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("forward", r"forward, layer 4 \(slow\), \d\.\d s"),
        ("backward", r"backward, layer 3 \(conv2\), \d\.\d s"),
        ("data", r"test_whereabouts.py:\d+ in load_batch, \d\.\d s"),
        ("stopped", r"test_whereabouts.py:\d+ in hangs, last seen \d\.\d s ago"),
    ],
)
def test_a_timeout_says_where_each_rank_is(where: str, place: str) -> None:
    with pytest.raises(minidp.CollectiveTimeout) as caught:
        minidp.spawn(hangs, 4, where, timeout_s=2.0 if where == "stopped" else 1.0, progress=False)
    text = str(caught.value)
    assert "rank 2 did not come to step/gradients" in text
    assert re.search(rf"rank 2: {place}; ranks 0, 1, 3 wait in step/gradients #\d+ of DataParallel", text), text
    if where == "stopped":
        assert "rank 2 is stopped (SIGSTOP)" in text


@pytest.mark.parametrize(
    ("where", "place"),
    [
        ("forward", r"forward, layer 4 \(slow\)"),
        ("data", r"test_whereabouts.py:\d+ in load_batch"),
    ],
)
def test_so_does_a_virtual_rank_that_blocks(where: str, place: str) -> None:
    with pytest.raises(minidp.RankFailed) as caught:
        minidp.spawn(hangs, 4, where, timeout_s=0.5, world="virtual")
    assert re.search(rf"rank 2: {place}; rank 3 computes; ranks 0, 1 wait in ", str(caught.value)), caught.value


PROGRAM = """
import os, sys
from tests.test_whereabouts import hangs
import minidp
print("started", flush=True)
minidp.spawn(hangs, 4, "forward", 2.5, timeout_s=20, world=sys.argv[1])
print("ended", flush=True)
"""


@pytest.mark.parametrize("world", ["process", "virtual"])
def test_whoever_asks_by_a_signal_is_told_and_the_run_goes_on(world: str) -> None:
    script = Script(PROGRAM, world)
    try:
        script.wait_for_line("started")
        time.sleep(1.3)
        script.process.send_signal(signal.SIGUSR1)
        code, out, err = script.finish()
        assert (code, out) == (0, "ended\n"), err
        (told,) = [line for line in err.splitlines() if line.startswith("minidp: ")]
        assert "rank 2: forward, layer 4 (slow)" in told
        assert re.search(r"ranks 0, 1(, 3)? wait in ", told)
    finally:
        script.clean()


def test_it_may_come_while_workers_are_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = sys.modules["minidp.launch.spawn"]
    context = room._context

    def asked_meanwhile() -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return context()

    monkeypatch.setattr(room, "_context", asked_meanwhile)
    assert minidp.spawn(lambda comm: comm.rank, 2, progress=False) == [0, 1]
    assert "minidp: rank" in capsys.readouterr().err


def test_nobody_elses_signal_is_taken() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with telling(lambda: heard.append(-1)):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    with telling(lambda: heard.append(-2)):
        os.kill(os.getpid(), signal.SIGUSR1)
    assert heard[1:] == [-2]
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


class Blackboard:
    """In place of the board."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, int]] = []

    def seen(self, rank: int, place: str, since_ns: int, now_ns: int) -> None:
        self.notes.append((place, since_ns))


def test_who_goes_on_is_not_said_to_have_stayed() -> None:
    """The same place in another step is another stay."""
    board: Any = Blackboard()
    sampler = Sampler(board, 0, every_s=0.01)
    model = Net(0.05).initialize(0)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm_self())
    x, y = load_batch(0)
    sampler.start()
    try:
        for _ in range(6):
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
    finally:
        sampler.stop()
    stays = {since for place, since in board.notes if place == "forward, layer 4 (slow)"}
    assert 3 <= len(stays) <= 6, "six steps; on a busy machine some may pass unseen"
    assert not sampler.is_alive()


def test_calls_that_follow_each_other_are_not_one_stay() -> None:
    """The same line of the same function, called again and again; and a layer outside of any step."""
    board: Any = Blackboard()
    sampler = Sampler(board, 0, every_s=0.01)
    model, x = Net(0.05).initialize(0), load_batch(0)[0]
    sampler.start()
    try:
        for _ in range(6):
            load_batch(0.05)
        for _ in range(6):
            model(x)
    finally:
        sampler.stop()
    for place in (r"test_whereabouts.py:\d+ in load_batch", r"forward, layer 4 \(slow\)"):
        stays = {since for text, since in board.notes if re.fullmatch(place, text)}
        seen = [since for text, since in board.notes if re.fullmatch(place, text)]
        assert 3 <= len(stays) <= 6, "six calls; on a busy machine some may pass unseen"
        assert len(seen) > len(stays), "one is seen several times"


WATCHED = """
import gc, os, random, sys, time
import numpy as np
from minidp import nn
from minidp.autograd import Tensor
from minidp.launch.whereabouts import Sampler
from tests.test_whereabouts import Blackboard

class Dies:
    def __del__(self):
        for _ in range(50):  # long enough for another thread to come
            pass

def deep(n):  # over a chunk of the interpreter's stack, which is mapped and unmapped as it grows and shrinks
    if n:
        return deep(n - 1)
    for _ in range(3):
        dies = Dies()
        dies.itself = dies  # only the garbage collector can

class Layer(nn.Module):
    def forward(self, x):
        for _ in range(5):
            gone = Dies()
        deep(random.randrange(20, 400))
        return x * 2

model = nn.Sequential(Layer(), Layer())
sys.setswitchinterval(1e-6)
gc.set_threshold(50)
board = Blackboard()
Sampler(board, 0, 1e-5).start()
end = time.monotonic() + 4
while time.monotonic() < end:
    model(Tensor(np.ones(3), requires_grad=True)).sum().backward()
    board.notes = board.notes[-500:]
assert any("layer" in place for place, _ in board.notes)
print("alive", flush=True)
os._exit(0)
"""


def test_looking_at_a_thread_that_runs_is_safe() -> None:
    """Without care about garbage collections this program ends by SIGSEGV within a second (Python 3.11)."""
    script = Script(WATCHED)
    try:
        assert script.finish()[:2] == (0, "alive\n")
    finally:
        script.clean()


def test_odd_programs_do_not_end_the_looking() -> None:
    board: Any = Blackboard()
    sampler = Sampler(board, 0, every_s=0.01)
    sampler.start()
    try:
        code = compile("import time\ntime.sleep(0.1)", "caf\udce9.py", "exec")
        exec(code, {"__name__": ["unhashable"]})
        load_batch(0.1)
    finally:
        sampler.stop()
    places = {text for text, _ in board.notes}
    assert any("caf" in place for place in places)
    assert any("load_batch" in place for place in places)


def test_models_that_can_not_be_told_about_are_no_error() -> None:
    class Odd(nn.Module):
        @property
        def everything(self) -> Any:
            raise RuntimeError

        def modules(self) -> Any:
            raise RuntimeError("no")

        def forward(self) -> tuple[str, Any]:
            return place_of(sys._getframe())

    assert Odd()()[0] == "forward, in Odd"
    assert place_of(None)[0] == "at an unknown place"
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(place_of(sys._getframe())[0]))
    thread.start()
    thread.join()
    assert found[0].startswith("test_whereabouts.py:")


def test_a_signal_to_the_whole_group_kills_nobody() -> None:
    source = """
import minidp, time
def sleep(comm):
    if comm.rank == 0:
        print("running", flush=True)
    time.sleep(1.0)
minidp.spawn(sleep, 2)
print("ended", flush=True)
"""
    script = Script(source)
    try:
        script.wait_for_line("running")
        time.sleep(0.4)
        os.killpg(script.process.pid, signal.SIGUSR1)
        code, out, err = script.finish()
        assert (code, out) == (0, "ended\n"), err
        assert re.search(r"minidp: ranks? 0.*: <string>:\d+ in sleep, \d\.\d s", err), err
    finally:
        script.clean()
