"""``virtual``: how fast the virtual world turns, and how true its clock is.

    messages    through the event loop, 64 ranks, with and without payload
    training    1000 ranks train the digits MLP: the steps over the pure cost of their gradients
    timing      10 000 ranks without arrays
    prediction  of a step on this machine over the step itself, in `predict`

All but the last runs in this process, in one thread; every burst has a fresh world.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import threadpoolctl

import minidp
from minidp.bench import measure, predict
from minidp.bench.contest import Rounds
from minidp.bench.jobs import TINY
from minidp.bench.machine import Neighbours
from minidp.bench.measure import Bar, Figure, ratio
from minidp.bench.peers.ours import model_of, strategy_of
from minidp.bench.report import Line, Report
from minidp.bench.screen import Screen
from minidp.comm import Communicator, RankFailed
from minidp.comm.rehearsal import Collective, Script
from minidp.nn.functional import cross_entropy
from minidp.parallel.timing import Layer, described_step, rehearse, replay
from minidp.sim import Cluster

RANKS = 64  # as many as pass message by message
STEPS = 5
LENGTHS = {"no payload": 0, "38 kB a message": 9500}  # float32
MESSAGES_BARS = {"no payload": Bar(300), "38 kB a message": Bar(150)}  # thousands a second
BIG_MODEL = [Layer(7_000_000_000 // 32, 3.5e12, 7e12)] * 32  # 7e9 parameters


@dataclass(frozen=True)
class Size:
    """How much is simulated. The bars are for the default.

    Args:
        ranks: that train.
        timed_ranks: without arrays.
        calibration_s: of this machine, once before and once after its steps are timed.
    """

    ranks: int = 1000
    timed_ranks: int = 10_000
    calibration_s: float = 4.0


FULL, QUICK = Size(), Size(ranks=50, timed_ranks=500, calibration_s=0.5)

COLUMNS = {
    "ms": ("ms", ",.3f"),
    "predicted_ms": ("predicted", ".3f"),
}
NOTES = (
    f"messages: one repetition is 2·{RANKS - 1}·{RANKS} of them; `send and recv` are calls of the ranks' program, "
    "to the right and from the left.",
    "training: steps are forward, backward, exchange and update; the whole run sets up its ranks, too. gradients: "
    "forward and backward of as many batches on as many models, without strategy or meter.",
    f"timing: the rehearsed step of the digits MLP, replayed {STEPS} times; one step of 32 described layers with "
    "7e9 parameters; one all-reduce.",
    "prediction: the rehearsed step, replayed on this machine as calibrate() sees it: the mean of one before the "
    "measurement and one after it.",
)


def run(rounds: Rounds, screen: Screen, size: Size = FULL) -> Report:
    report = Report("virtual", "the virtual world, one thread", rounds, COLUMNS, notes=NOTES)
    neighbours = Neighbours({os.getpid()})
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        report.lines += [*messages(rounds, screen), *training(rounds, screen, size), *timing(rounds, screen, size)]
    others = neighbours.cores()
    lines, during = predict.run(rounds, screen, size.calibration_s)
    report.lines += lines
    report.others = None if others is None or during is None else max(others, during)
    return report


# --- messages ---------------------------------------------------------------------------------------------

Repetition = Callable[[], object]
Program = Callable[[Communicator, int], Repetition]


def ring_all_reduce(comm: Communicator, length: int) -> Repetition:
    """2·(p−1) messages a rank, of ``length`` elements each."""
    x = _touched(comm.world_size * length)
    return lambda: comm.all_reduce(x, algorithm="ring")


def send_and_recv(comm: Communicator, length: int) -> Repetition:
    """As many messages as those of a ring all-reduce, by calls of the user's program."""
    p, x, received = comm.world_size, _touched(length), _touched(length)
    right, left = (comm.rank + 1) % p, (comm.rank - 1) % p

    def repetition() -> None:
        for _ in range(2 * (p - 1)):
            comm.send(x, right)
            comm.recv(received, left)

    return repetition


def _touched(length: int) -> Any:
    """Zeros in memory that is really there: the first writing to a page takes longer than to send it."""
    x = np.empty(length, np.float32)
    x.fill(0)
    return x


class Ranks:
    """A contender of `measure.compare`: a fresh virtual world for each burst."""

    def __init__(self, program: Program, length: int) -> None:
        self._program, self._length = program, length

    def burst(self, repeats: int, warm_up: int = 0) -> float:
        spans = spawned(_bursts, RANKS, self._program, self._length, repeats, warm_up)
        return _last_end(spans)


def _bursts(comm: Communicator, program: Program, length: int, repeats: int, warm_up: int) -> tuple[float, float]:
    repetition = program(comm, length)
    for _ in range(warm_up):
        repetition()
    return _timed(comm, repetition, repeats)


def _timed(comm: Communicator, repetition: Repetition, repeats: int) -> tuple[float, float]:
    """When the repetitions began and ended on this rank, by the clock on the wall."""
    comm.barrier()
    start = time.perf_counter()
    for _ in range(repeats):
        repetition()
    comm.barrier()
    return start, time.perf_counter()


def _last_end(spans: list[tuple[float, float]]) -> float:
    """Seconds from the first rank's start to the last one's end: all share one clock."""
    return max(end for _, end in spans) - min(start for start, _ in spans)


def messages(rounds: Rounds, screen: Screen) -> list[Line]:
    """A line for each kind of sending and each length."""
    count = 2 * (RANKS - 1) * RANKS
    programs: dict[str, Program] = {"ring all-reduce": ring_all_reduce, "send and recv": send_and_recv}
    lines = []
    for payload, length in LENGTHS.items():
        job = f"{RANKS} ranks, {payload}"
        screen.phase(job, rounds.pairs * len(programs))
        contenders = {who: Ranks(program, length) for who, program in programs.items()}
        samples = measure.compare(contenders, rounds.pairs, rounds.burst_s, screen.tick)
        for who, seconds in samples.items():
            rates = [count / each for each in seconds]
            figures = {"ms": median(seconds) * 1e3, "messages_per_s": median(rates)}
            result = Figure.of([rate / 1000 for rate in rates], MESSAGES_BARS[payload])
            lines.append(Line(job, who, figures, seconds).compared("1000 messages/s", result))
    return lines


# --- training ---------------------------------------------------------------------------------------------


def _train(comm: Communicator) -> tuple[float, float]:
    strategy = strategy_of(TINY, comm)
    x, y = TINY.batch_of(comm.rank)

    def step() -> None:
        strategy.forward_backward(x, y, cross_entropy)
        strategy.step()

    return _timed(comm, step, STEPS)


def gradients_s(ranks: int) -> float:
    """Seconds for the gradients that ``ranks`` compute in all steps: as many models and batches, one by one."""
    models = [(model_of(TINY), *TINY.batch_of(rank)) for rank in range(ranks)]
    gc.collect()
    gc.disable()  # to look through a thousand models for garbage takes longer than some of their gradients
    try:
        start = time.perf_counter()
        for _ in range(STEPS):
            for model, x, y in models:
                for parameter in model.parameters():
                    parameter.grad = None
                cross_entropy(model(x), y).backward()
        return time.perf_counter() - start
    finally:
        gc.enable()


def training(rounds: Rounds, screen: Screen, size: Size) -> list[Line]:
    """The steps of a thousand ranks over the pure cost of their gradients, which is measured in between."""
    job = f"{size.ranks} ranks train, {TINY.name}, {STEPS} steps"
    screen.phase(job, 2 * rounds.pairs)
    steps, whole, pure = [], [], []
    for _ in range(rounds.pairs):
        start = time.perf_counter()
        spans = spawned(_train, size.ranks)
        whole.append(time.perf_counter() - start)
        steps.append(_last_end(spans))
        screen.tick()
        pure.append(gradients_s(size.ranks))
        screen.tick()
    bar = Bar(3, at_least=False) if size.ranks == FULL.ranks else None
    lines = [_line(job, who, s) for who, s in (("steps", steps), ("gradients", pure), ("whole run", whole))]
    lines[0] = lines[0].compared("steps / gradients", ratio(steps, pure, bar))
    return lines


# --- timing without arrays --------------------------------------------------------------------------------


def timing(rounds: Rounds, screen: Screen, size: Size) -> list[Line]:
    """Seconds that it takes to time ``size.timed_ranks`` ranks."""
    p = size.timed_ranks
    job = f"{p} ranks, timing only"

    def digits() -> None:
        script = rehearse(lambda comm: strategy_of(TINY, comm), *TINY.batch_of(0), cross_entropy)
        replay(script, Cluster(nodes=p), p, STEPS)

    ring: Script = [Collective("ring", 9616, 4)]  # the gradients of the digits MLP, with room for alignment
    jobs: list[tuple[str, Callable[[], object]]] = [
        (f"digits MLP ×{STEPS}", digits),
        ("7e9 parameters", lambda: replay(described_step(BIG_MODEL), Cluster(nodes=p), p)),
        ("ring all-reduce", lambda: replay(ring, Cluster(nodes=p), p)),
    ]
    samples: dict[str, list[float]] = {who: [] for who, _ in jobs}
    screen.phase(job, rounds.pairs * len(jobs))
    for _ in range(rounds.pairs):
        for who, function in jobs:
            start = time.perf_counter()
            function()
            samples[who].append(time.perf_counter() - start)
            screen.tick()
    lines = [_line(job, who, seconds) for who, seconds in samples.items()]
    bar = Bar(10, at_least=False) if p == FULL.timed_ranks else None
    lines[0] = lines[0].compared("seconds", Figure.of(lines[0].samples_s, bar))
    return lines


def _line(job: str, who: str, seconds: list[float]) -> Line:
    return Line(job, who, {"ms": median(seconds) * 1e3}, seconds)


def spawned(function: Callable[..., Any], ranks: int, *arguments: Any, **options: Any) -> list[Any]:
    """``minidp.spawn`` in the virtual world; nothing of it is left in memory."""
    try:
        return minidp.spawn(function, ranks, *arguments, world="virtual", **options)
    except RankFailed as failed:
        if isinstance(failed.__cause__, SystemExit):  # SIGTERM ends whoever runs just then: that may be a rank
            raise failed.__cause__ from None
        raise
    finally:
        gc.collect()  # worlds are full of cycles
