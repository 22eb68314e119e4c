"""How long steps take on a big machine: the communication of a strategy, replayed without arrays.

A step is a script: what a rank computes, what it begins, what it waits for. `rehearse` writes down the step of a
real strategy and model; `described_step` makes one from the sizes of layers. `replay` runs it on any number of
ranks, all at once: clocks are a vector, a step of a schedule is a few vector operations. Tests hold the clocks
equal to those of the virtual world, where the same strategy runs rank by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.comm import Communicator, costs
from minidp.comm.meeting import EVENTS_UP_TO, Group, Movement, by_waves
from minidp.comm.rehearsal import Collective, Compute, Entry, Rehearsal, Script, Tape, Wait
from minidp.comm.venue import Venue
from minidp.parallel.strategy import Strategy
from minidp.sim import Cluster

Floats = npt.NDArray[np.float64]


class Layer(NamedTuple):
    """A layer, described: its parameters (elements), and the FLOPs of its forward and its backward for a batch."""

    parameters: int
    forward_flops: float
    backward_flops: float


@dataclass(frozen=True)
class Timing:
    """Virtual seconds. ``clocks``: shape (steps, ranks), when each rank has ended each step."""

    clocks: Floats
    compute_s: float  # of a step on a rank that is no straggler, alone

    @property
    def step_s(self) -> float:
        """Of a step, the mean over steps; the slowest rank counts."""
        return float(self.clocks[-1].max()) / len(self.clocks)

    @property
    def efficiency(self) -> float:
        """What part of a step a rank that is no straggler computes: 1 is a perfect speed-up."""
        return self.compute_s / self.step_s


def rehearse(build: Callable[[Communicator], Strategy], x: Any, y: Any, loss_fn: Callable[..., Any]) -> Script:
    """Write down one step of the strategy that ``build(comm)`` makes, with a batch (x, y) on each rank.

    ``build`` makes model, optimizer and strategy. Two steps are made here, in real time and memory, and the second
    is taken: the first may set something up.
    """
    tape = Tape()
    strategy = build(Rehearsal(tape))
    with tape.metered():
        for _ in range(2):
            tape.cut()
            strategy.forward_backward(x, y, loss_fn)
            strategy.step()
        script = tape.cut()
    strategy.release()
    return script


def described_step(
    layers: Sequence[Layer], bucket_cap_mb: float = 25, itemsize: int = 4, update: Compute | None = None
) -> Script:
    """The step of ``DataParallel`` on a model of these layers: buckets leave while backward goes on.

    Args:
        layers: from input to output.
        bucket_cap_mb: gradients leave in buckets of at most this size, at least a layer (2^20 bytes).
        itemsize: bytes of a gradient's element as it travels.
        update: the work of the optimizer; none if not given.
    """
    script: Script = [Compute(len(layers), sum(layer.forward_flops for layer in layers))]
    bucket, count = 0, 0

    def leave() -> None:
        nonlocal bucket, count
        if bucket:
            script.append(Collective("all_reduce", bucket, itemsize, stream=0))
            bucket, count = 0, count + 1

    for layer in reversed(layers):
        if bucket and (bucket + layer.parameters) * itemsize > bucket_cap_mb * 2**20:
            leave()
        script.append(Compute(1, layer.backward_flops))
        bucket += layer.parameters
    leave()
    script += [Collective("", stream=1), Wait(0, count), Wait(1, 1)]
    return [*script, update] if update is not None else script


def replay(script: Script, cluster: Cluster, world_size: int, steps: int = 1) -> Timing:
    """Run a script ``steps`` times on each of ``world_size`` ranks of the cluster.

    Equal to the virtual world, to the bit, for up to 64 ranks; beyond that to rounding (1e-12), since the time of
    a collective that finds an idle network is computed once for each size. Cost: per distinct collective its
    schedule's steps, a few vector operations each; 10 000 ranks take seconds.

    Raises ValueError if the ranks do not fit into the cluster.
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step makes a timing")
    clocks = _Clocks(cluster, world_size)
    ends = []
    for _ in range(steps):
        for entry in script:
            clocks.follow(entry)
        clocks.next_step()
        ends.append(clocks.now.copy())
    alone = sum(float(cluster.compute_s(*entry)) for entry in script if isinstance(entry, Compute))
    return Timing(np.array(ends), alone)


class _Clocks:
    """The clocks of all ranks, as a vector, and the streams' ends."""

    def __init__(self, cluster: Cluster, world_size: int) -> None:
        self.cluster, self.world_size = cluster, world_size
        self.group = Group(Venue(cluster, world_size), range(world_size), "world")
        self.free = np.array(self.group.venue.network.free)
        self.now = np.zeros(world_size)
        self._slowness = np.array([cluster.slowness(rank) for rank in range(world_size)])
        self._jitters = [cluster.jitter_factors(rank) for rank in range(world_size)] if cluster.jitter else []
        self._factor: Floats | None = None  # by which this stretch of computing is longer
        self._stream_end: dict[int, float] = {}
        self._ends: dict[int, list[float]] = {}  # of each stream's collectives in this step
        self._durations: dict[Movement, float] = {}

    def next_step(self) -> None:
        self._ends.clear()

    def follow(self, entry: Entry) -> None:
        if isinstance(entry, Compute):
            if self._factor is None:
                self._factor = self._slowness
                if self._jitters:
                    self._factor = self._slowness * np.array([jitter.next() for jitter in self._jitters])
            self.now = self.now + self.cluster.compute_s(*entry) * self._factor
        elif isinstance(entry, Wait):
            self._waited(self._ends[entry.stream][entry.nth - 1])
        elif entry.stream is None:
            self._waited(self._end(entry, float(self.now.max())))
        else:
            start = max(float(self.now.max()), self._stream_end.get(entry.stream, 0.0))
            end = self._stream_end[entry.stream] = self._end(entry, start)
            self._ends.setdefault(entry.stream, []).append(end)

    def _waited(self, until: float) -> None:
        self.now = np.maximum(self.now, until)
        self._factor = None

    def _end(self, entry: Collective, start: float) -> float:
        p, cluster = self.world_size, self.cluster
        if p == 1:
            return start
        if not entry.schedule:
            return start + cluster.latency_s
        alpha, beta, gamma = cluster.latency_s, cluster.seconds_per_byte, cluster.reduce_seconds_per_byte
        name = entry.schedule
        if name == "all_reduce":
            name = costs.fastest(p, entry.length * entry.itemsize, alpha, beta, gamma)
        movement = Movement(name, entry.root, entry.length * p**entry.scale, entry.itemsize)
        if p <= EVENTS_UP_TO:
            return by_waves(self.group, self.free, movement, start, gamma)
        if movement not in self._durations:
            self._durations[movement] = by_waves(self.group, np.zeros_like(self.free), movement, 0.0, gamma)
        return start + self._durations[movement]
