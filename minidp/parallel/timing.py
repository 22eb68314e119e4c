"""How long steps take on a big machine: the communication of a strategy, replayed without arrays.

A step is a script: what a rank computes, what it begins, what it waits for. Two ways to get one:

    rehearse            writes down the step of a real strategy and model
    described_step      makes it from the sizes of layers

`replay` runs it on any number of ranks, all at once: clocks are a vector, a step of a schedule is a few vector
operations. Tests hold the clocks equal to those of the virtual world, where the same strategy runs rank by rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.comm import Communicator
from minidp.comm.meeting import Meeting, Transport, passes_one_by_one
from minidp.comm.movement import Group, Movement, by_waves
from minidp.comm.rehearsal import Collective, Compute, Entry, Rehearsal, Script, Tape, Wait
from minidp.comm.venue import Venue
from minidp.comm.waves import waves
from minidp.parallel.strategy import Strategy
from minidp.sim import Cluster, Switch

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
    compute_s: float  # of a step on a rank that is no straggler, without jitter, alone

    @property
    def step_s(self) -> float:
        """Of a step, the mean over steps; the slowest rank counts."""
        return float(self.clocks[-1].max()) / len(self.clocks)

    @property
    def efficiency(self) -> float:
        """What part of a step a rank that is no straggler computes: 1 is a perfect speed-up (weak scaling)."""
        return self.compute_s / self.step_s if self.step_s else 1.0


def rehearse(
    build: Callable[[Communicator], Strategy],
    x: Any,
    y: Any,
    loss_fn: Callable[..., Any],
    world_size: int = 2,
) -> Script:
    """Write down one step of the strategy that ``build(comm)`` makes, with a batch (x, y) on each rank.

    ``build`` makes model, optimizer and strategy. Two steps are made here, in real time and memory (they train the
    model), and the second is taken: the first may set something up. Each has as many backwards, all of (x, y), as
    the strategy accumulates. ``world_size`` is what the rank believes: it matters where its work depends on that,
    as with ``micro_shards``. The model belongs to no strategy afterwards, even if a step failed.

    Raises NotImplementedError for a strategy that sends messages from rank to rank; see `Rehearsal` for what it
    can't see.
    """
    tape = Tape()
    strategy = build(Rehearsal(tape, world_size))
    try:
        with tape.metered():
            for _ in range(2):
                tape.cut()
                for _ in range(strategy.accumulation_steps):
                    strategy.forward_backward(x, y, loss_fn)
                strategy.step()
            return tape.cut()
    finally:
        strategy.release()


def described_step(
    layers: Sequence[Layer], bucket_cap_mb: float = 25, itemsize: int = 4, update: Compute | None = None
) -> Script:
    """The step of ``DataParallel`` on a model of these layers: buckets leave while backward goes on.

    A bucket leaves when the backward of its last layer has ended; so finish_k = max(finish_{k−1}, ready_k) +
    comm_k. Each layer counts two operations, one each way.

    Args:
        layers: from input to output. Those without parameters only compute.
        bucket_cap_mb: gradients leave in buckets of at most this size, at least a layer (2^20 bytes).
        itemsize: bytes of a gradient's element as it travels.
        update: the work of the optimizer; none if not given.

    Raises ValueError for a negative number of parameters or size of buckets.
    """
    if bucket_cap_mb < 0:
        raise ValueError(f"bucket_cap_mb={bucket_cap_mb}: give 0 (a bucket a layer) or more")
    if any(layer.parameters < 0 for layer in layers):
        raise ValueError("a layer has a negative number of parameters: give 0 or more")
    sizes = _buckets(layers, bucket_cap_mb * 2**20 / itemsize)
    script: Script = [Compute(len(layers), sum(layer.forward_flops for layer in layers))]
    for i in reversed(range(len(layers))):
        script.append(Compute(1, layers[i].backward_flops))
        if i in sizes:
            script.append(Collective("all_reduce", sizes[i], itemsize, stream=0))
    script.append(Collective("", stream=1))  # Σ n_i
    script += [Wait(0, len(sizes))] * bool(sizes) + [Wait(1, 1)]
    return [*script, update] if update is not None else script


def _buckets(layers: Sequence[Layer], cap: float) -> dict[int, int]:
    """Elements of each bucket, by the layer whose gradients complete it: as `make_buckets` cuts them."""
    sizes: dict[int, int] = {}
    last = -1  # the layer that the newest bucket ends with
    for i in reversed(range(len(layers))):
        size = layers[i].parameters
        if size:
            sizes[i] = size + (sizes.pop(last) if sizes and sizes[last] + size <= cap else 0)
            last = i
    return sizes


def replay(script: Script, cluster: Cluster, world_size: int, steps: int = 1) -> Timing:
    """Run a script ``steps`` times on each of ``world_size`` ranks of the cluster.

    Equal to the virtual world, to the bit, for up to 64 ranks; beyond that to rounding (1e-12), since the time of
    a collective that finds an idle network is computed once for each size. Cost: per distinct collective its
    schedule's steps, a few vector operations each (a ring on a flat switch: none); 10 000 ranks take less than a
    second. Up to 64 ranks messages pass one by one, as they do there.

    Raises ValueError if the ranks do not fit into the cluster, and for a script that nobody can follow: it waits
    for what it has not begun, names a schedule that there is none of, or lets two collectives that carry bytes
    travel at the same time (here one has the network for itself).
    """
    if steps < 1:
        raise ValueError(f"steps={steps}: at least one step makes a timing")
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: give at least 1")
    clocks = _Clocks(cluster, world_size)
    ends = []
    for _ in range(steps):
        clocks.begin_step()
        for entry in script:
            clocks.follow(entry)
        ends.append(clocks.now)
    alone = sum(float(cluster.compute_s(*entry)) for entry in script if isinstance(entry, Compute))
    return Timing(np.array(ends), alone)


class _Clocks:
    """The clocks of all ranks, as a vector (replaced, never changed), and when what is on the streams ends."""

    def __init__(self, cluster: Cluster, world_size: int) -> None:
        self.cluster, self.world_size = cluster, world_size
        self.now: Floats = np.zeros(world_size)
        self._network = _Network(cluster, world_size)
        self._slowness = np.array([cluster.slowness(rank) for rank in range(world_size)])
        self._jitters = [cluster.jitter_factors(rank) for rank in range(world_size)] if cluster.jitter else []
        self._factor: Floats | None = None  # by which this stretch of computing is longer
        self._ends: dict[int, list[float]] = {}  # of each stream's collectives, in order
        self._before: dict[int, int] = {}  # how many of them belong to earlier steps

    def begin_step(self) -> None:
        self._before = {stream: len(ends) for stream, ends in self._ends.items()}

    def follow(self, entry: Entry) -> None:
        if isinstance(entry, Compute):
            if self._factor is None:
                self._factor = self._slowness
                if self._jitters:
                    self._factor = self._slowness * np.array([jitter.next() for jitter in self._jitters])
            self.now = self.now + self.cluster.compute_s(*entry) * self._factor
        elif isinstance(entry, Wait):
            end = self._end_of(entry)
            if end is not None:
                self._waited(end)
        elif entry.stream is None:
            self._waited(self._network.end(entry, float(self.now.max())))
        else:
            ends = self._ends.setdefault(entry.stream, [])
            ends.append(self._network.end(entry, max(float(self.now.max()), ends[-1] if ends else 0.0)))

    def _end_of(self, wait: Wait) -> float | None:
        ends, before = self._ends.get(wait.stream, []), self._before.get(wait.stream, 0)
        at = before + wait.nth - 1
        if at >= len(ends):
            raise ValueError(
                f"{wait} waits for what the script has not begun: in this step stream {wait.stream} has been "
                f"given {len(ends) - before} collectives"
            )
        return ends[at] if at >= 0 else None  # before the first step there was nothing

    def _waited(self, until: float) -> None:
        self.now = np.maximum(self.now, until)
        self._factor = None


class _Network:
    """When collectives of all ranks end."""

    def __init__(self, cluster: Cluster, world_size: int) -> None:
        self.world_size = world_size
        self.group = Group(Venue(cluster, world_size), range(world_size), "world")
        self._busy_until = 0.0
        self._durations: dict[Movement, float] = {}

    def end(self, entry: Collective, start: float) -> float:
        """When a collective ends that all have come to at ``start``."""
        p, group = self.world_size, self.group
        if p == 1:
            return start
        if not entry.schedule:
            return start + group.alpha
        if start < self._busy_until:
            raise ValueError(
                f"{entry} begins while another collective is under way: a replay times only scripts in which one "
                'has the network for itself. Run the strategy itself, minidp.spawn(train, ranks, world="virtual")'
            )
        name = entry.schedule
        if name == "all_reduce":
            name = group.fastest(entry.length * entry.itemsize)
        try:
            waves(name, p)
        except KeyError:
            raise ValueError(
                f"{entry}: there is no such schedule; minidp.comm.schedules has their names"
            ) from None
        movement = Movement(name, entry.root, entry.length * p**entry.scale, entry.itemsize)
        if passes_one_by_one(group, movement):
            end = self._one_by_one(movement, start)
        else:
            if movement not in self._durations:
                self._durations[movement] = self._alone(movement)
            end = start + self._durations[movement]
        self._busy_until = end
        return end

    def _alone(self, movement: Movement) -> float:
        """Seconds that it takes on an idle network."""
        group, cluster = self.group, self.group.venue.cluster
        if movement.timed == "ring" and cluster.topology == Switch() and cluster.one_rank_a_node:
            # Its 2(p − 1) steps are alike: some rank always has a longest chunk. As waves they took O(p²).
            longest = -(-movement.length // group.size) * movement.itemsize
            return (group.size - 1) * (2 * (group.alpha + longest * group.beta) + longest * group.gamma)
        return by_waves(group, np.zeros(len(group.venue.network.free)), movement, 0.0)

    def _one_by_one(self, movement: Movement, start: float) -> float:
        """When it ends that begins at ``start``: message by message, as in the virtual world."""
        loop, meeting = self.group.venue.loop, Meeting(self.group, 0)
        loop.at(start, Transport(meeting, self.group.rounds(movement)).go_on)
        loop.run()
        return meeting.end
