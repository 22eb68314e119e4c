"""The probe models, and how a step of each is timed: by one worker alone, and by two together.

The steps are those of the training loop, ``forward_backward`` and ``step`` of ``DataParallel``. What costs time in
them is told apart by models of different kinds: tiny ones pay for operations, wide ones with small batches for
memory traffic, large batches for FLOPs.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from minidp import backend, nn, optim, parallel
from minidp.comm import Communicator, comm_self
from minidp.nn.functional import cross_entropy

SECONDS = 4.0
ROUNDS = 12  # the machine's speed changes by the second: a probe's bursts are spread over the whole time
WARM_UP = 3  # steps of a fresh model: its pages are touched, its plans made


class Probe(NamedTuple):
    """One step: an MLP with ReLUs, widths from inputs to classes; rows a worker; "momentum" (SGD) or "adam"."""

    widths: tuple[int, ...]
    batch: int
    optimizer: str


# Not the models of ``minidp.bench``, by which predictions are checked. From 70 µs to 6 ms a step on a Zen 4.
PROBES = (
    Probe((16, 32, 4), 8, "momentum"),
    Probe((32, 64, 64, 10), 16, "momentum"),
    Probe((32, 48, 48, 48, 48, 8), 16, "adam"),
    Probe((48, 96, 10), 64, "momentum"),
    Probe((128, 256, 10), 64, "adam"),
    Probe((512, 768, 16), 16, "momentum"),
    Probe((256, 384, 384, 16), 64, "adam"),
    Probe((640, 640, 640, 20), 48, "momentum"),
    Probe((384, 256, 256, 256, 10), 256, "momentum"),
    Probe((896, 512, 10), 256, "momentum"),
)


def measure(comm: Communicator, seconds: float) -> dict[str, Any]:
    """Time all probes for about ``seconds``, by rank 0 alone and, if there are more ranks, by all together.

    Bursts of steps take turns: first probe alone, first probe together, second probe alone, … ``ROUNDS`` times.
    A burst's time is the mean of its steps: where two ranks wait for each other some steps take far longer than
    most, and who trains pays for them. A probe's is the median of its bursts: other programs, and other guests of
    a virtual machine's host, disturb for a second or more at a time, but mostly for less than half of it all.

    Returns, from rank 0, ``others_cores``, how many cores' worth other programs took meanwhile (None: unknown),
    and ``probes``, for each what it is, what a step of one worker counts (``operations``, ``flops``, ``nbytes``)
    and its ``gradient_bytes``, seconds a step alone (``one_s``) and together (``two_s``, None with one rank).
    """
    lead, together = comm.rank == 0, comm.world_size > 1
    alone = [_Step(probe, comm_self()) for probe in PROBES] if lead else []
    paired = [_Step(probe, comm) for probe in PROBES] if together else []
    burst_s = seconds / (ROUNDS * len(PROBES) * (1 + together))
    repeats = comm.broadcast_object([max(2, math.ceil(burst_s / step.warm_up())) for step in alone], 0)
    for step in paired:
        step.warm_up()
    one_s: list[list[float]] = [[] for _ in PROBES]
    two_s: list[list[float]] = [[] for _ in PROBES]
    start, busy, own = time.perf_counter(), _machine_s(), time.process_time()
    for _ in range(ROUNDS):
        for i in range(len(PROBES)):
            comm.barrier()
            if lead:
                one_s[i].append(_burst(alone[i].run, repeats[i]))
            comm.barrier()
            if together:
                two_s[i].append(_burst(paired[i].run, repeats[i]))
    own = sum(comm.all_gather_object(time.process_time() - own))
    others = None if busy is None else ((_machine_s() or 0) - busy - own) / (time.perf_counter() - start)
    measured = [
        {
            **probe._asdict(),
            **step.counts(),
            "one_s": median(one),
            "two_s": median(two) if together else None,
        }
        for probe, step, one, two in zip(PROBES, alone, one_s, two_s)
    ]
    return {"others_cores": others, "probes": measured}


class _Step:
    """One rank's step of a probe: ``run`` is what is timed."""

    def __init__(self, probe: Probe, comm: Communicator) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip(probe.widths, probe.widths[1:]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        model = nn.Sequential(*layers[:-1], seed=0)
        optimizer = _OPTIMIZERS[probe.optimizer](model.parameters())
        self.strategy = parallel.DataParallel(model, optimizer, comm)
        rng = backend.generator(0, "calibrate", comm.rank)
        self.x = rng.random((probe.batch, probe.widths[0]), dtype=np.float32)
        self.y = rng.integers(0, probe.widths[-1], probe.batch)

    def run(self) -> None:
        self.strategy.forward_backward(self.x, self.y, cross_entropy)
        self.strategy.step()

    def warm_up(self) -> float:
        """The first steps; seconds of the last."""
        start = 0.0
        for _ in range(WARM_UP):
            start = time.perf_counter()
            self.run()
        return time.perf_counter() - start

    def counts(self) -> dict[str, float]:
        """What one step computes, and the bytes of its gradients."""
        with backend.meter() as m:
            self.run()
        gradient_bytes = sum(p.data.nbytes for p in self.strategy.model.parameters())
        return {"operations": m.operations, "flops": m.flops, "nbytes": m.nbytes, "gradient_bytes": gradient_bytes}


# Rates so small that thousands of steps on one batch leave the arithmetic ordinary: no infinities, no denormals.
_OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "momentum": lambda parameters: optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "adam": lambda parameters: optim.Adam(parameters, lr=1e-5),
}


def _burst(run: Callable[[], None], repeats: int) -> float:
    """Seconds a step, the mean of so many; one more before them brings the caches to where they were."""
    run()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - start) / repeats


def _machine_s() -> float | None:
    """Seconds of all cores, since the machine started, in which anything ran or another guest of its host did."""
    try:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
