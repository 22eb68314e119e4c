"""The plan's figures: one step of synchronous data parallelism on each number of ranks, on the virtual clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from minidp.comm.rehearsal import Compute
from minidp.parallel.timing import Layer, described_step, replay
from minidp.sim import Cluster


@dataclass(frozen=True)
class Job:
    """What is trained.

    Args:
        params: parameters of the model.
        flops_per_sample: of forward and backward together; backward counts twice as much as forward.
        layers: that the parameters are spread over evenly; gradients become ready layer by layer.
        batch: samples of a rank in a step (weak scaling), or
        global_batch: samples of a step over all ranks (strong scaling); the fullest rank counts.
        gradient_bytes: of an element as it travels: 4 for float32, 2 for half precision.
        bucket_mb: gradients leave in buckets of at most this size (2^20 bytes), at least a layer.
    """

    params: float
    flops_per_sample: float
    layers: int = 32
    batch: float = 1
    global_batch: int | None = None
    gradient_bytes: int = 4
    bucket_mb: float = 25

    def samples(self, ranks: int) -> float:
        """Of the fullest of that many ranks."""
        return self.batch if self.global_batch is None else math.ceil(self.global_batch / ranks)


@dataclass(frozen=True)
class Point:
    """One line of the plan. Times in seconds."""

    ranks: int
    step_s: float
    compute_s: float  # of the fullest rank, alone
    samples_per_s: float
    efficiency: float  # samples a second, over those of as many ranks that do not talk
    gain: float | None  # samples a second added a rank added, over those of the ranks before; None: the first

    @property
    def waiting_s(self) -> float:
        """What computing does not hide."""
        return self.step_s - self.compute_s


def study(job: Job, cluster: Cluster, ranks: Sequence[int], steps: int = 1) -> list[Point]:
    """A point for each number of ranks, each on as much of the cluster as it needs (``nodes`` is replaced).

    Cost: less than a second for 10 000 ranks on a flat switch.
    """
    points: list[Point] = []
    alone = _samples_per_s(job, cluster, 1, steps)[0]
    for p in ranks:
        rate, step_s, compute_s = _samples_per_s(job, cluster, p, steps)
        gain = None
        if points:
            last = points[-1]
            gain = (rate - last.samples_per_s) / (p - last.ranks) / (last.samples_per_s / last.ranks)
        points.append(Point(p, step_s, compute_s, rate, rate / (alone * p), gain))
    return points


def pays_up_to(points: Sequence[Point], worth: float) -> int | None:
    """The number of ranks beyond which a gain is less than ``worth``, or None."""
    for before, point in pairwise(points):
        if point.gain is not None and point.gain < worth:
            return before.ranks
    return None


def _samples_per_s(job: Job, cluster: Cluster, ranks: int, steps: int) -> tuple[float, float, float]:
    """(samples a second, seconds a step, those of them that the fullest rank computes)."""
    samples = job.samples(ranks)
    size = math.ceil(job.params / job.layers)
    flops = job.flops_per_sample * samples / job.layers
    update = Compute(
        1, 4 * job.params, 5 * 4 * job.params
    )  # SGD with momentum in float32: 3 arrays read, 2 written
    layers = [Layer(size, flops / 3, flops * 2 / 3)] * job.layers
    script = described_step(layers, job.bucket_mb, job.gradient_bytes, update)
    machine = replace(cluster, nodes=_nodes(cluster, ranks))
    timing = replay(script, machine, ranks, steps)
    total = job.global_batch if job.global_batch is not None else samples * ranks
    return total / timing.step_s, timing.step_s, timing.compute_s


def _nodes(cluster: Cluster, ranks: int) -> int:
    """As many as the ranks need: of a fat tree, whole groups; of a ring at least two."""
    nodes = -(-ranks // cluster.ranks_per_node)
    leaf = getattr(cluster.topology, "leaf", 1)
    return max(-(-nodes // leaf) * leaf, 2, *(node + 1 for node in cluster.stragglers))
