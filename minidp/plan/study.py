"""The plan's figures: one step of synchronous data parallelism on each number of ranks, on the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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

    params: int
    flops_per_sample: float
    layers: int = 32
    batch: int = 1
    global_batch: int | None = None
    gradient_bytes: int = 4
    bucket_mb: float = 25

    @property
    def scaling(self) -> str:
        return "weak" if self.global_batch is None else "strong"

    @property
    def layer_params(self) -> int:
        """Of each layer: what does not divide evenly is rounded up."""
        return -(-self.params // self.layers)

    def samples(self, ranks: int) -> int:
        """Of the fullest of that many ranks, in a step."""
        return self.batch if self.global_batch is None else -(-self.global_batch // ranks)

    def step_samples(self, ranks: int) -> int:
        """Of all ranks, in a step."""
        return self.batch * ranks if self.global_batch is None else self.global_batch


@dataclass(frozen=True)
class Point:
    """One line of the plan. Times in seconds."""

    ranks: int
    step_s: float
    compute_s: float
    """Of the fullest rank in a step, alone."""
    samples_per_s: float
    efficiency: float
    """Samples a second, over ``ranks`` times those of one rank (of strong scaling, where the job is)."""
    gain: float | None
    """Samples a second that each added rank adds, over those that one gave before; None for the first point."""

    @property
    def waiting_s(self) -> float:
        """What computing does not hide; rounding apart. (With jitter a rank may be lucky, and this negative.)"""
        waiting_s = self.step_s - self.compute_s
        return waiting_s if abs(waiting_s) > 1e-9 * self.step_s else 0.0


def study(job: Job, cluster: Cluster, ranks: Sequence[int], steps: int = 1) -> list[Point]:
    """A point for each number of ranks (ascending), each on as much of the cluster as it needs.

    ``cluster.nodes`` is replaced. One rank, which the others are measured by, is no straggler; its jitter is that
    of rank 0 in each point, so no efficiency is above 1. ``steps`` are averaged: more than one says more only with
    jitter. Cost: less than a second for 10 000 ranks on a flat switch.
    """
    points: list[Point] = []
    alone = _point(job, replace(cluster, stragglers={}), 1, steps, None, points)
    for p in ranks:
        points.append(_point(job, cluster, p, steps, alone, points))
    return points


def pays_up_to(points: Sequence[Point], worth: float) -> int | None:
    """The number of ranks beyond which adding more does not pay; None if it does up to the last of ``points``.

    It pays if each added rank gives at least ``worth`` of what one gave before, in samples a second. A number of
    ranks that does not pay may be passed over: 100 samples are no faster on 64 ranks than on 60, but on 100.
    """
    best = points[0]
    for point in points[1:]:
        if _gain(best, point.ranks, point.samples_per_s) >= worth:
            best = point
    return None if best is points[-1] else best.ranks


def _gain(before: Point, ranks: int, samples_per_s: float) -> float:
    added = (samples_per_s - before.samples_per_s) / (ranks - before.ranks)
    return added / (before.samples_per_s / before.ranks)


def _point(
    job: Job, cluster: Cluster, ranks: int, steps: int, alone: Point | None, points: Sequence[Point]
) -> Point:
    flops = job.flops_per_sample * job.samples(ranks) / job.layers
    layers = [Layer(job.layer_params, flops / 3, flops * 2 / 3)] * job.layers
    # SGD with momentum in float32: w, g and the momentum read, w and the momentum written.
    update = Compute(1, 4 * job.params, 5 * 4 * job.params)
    script = described_step(layers, job.bucket_mb, job.gradient_bytes, update)
    timing = replay(script, replace(cluster, nodes=_nodes(cluster, ranks)), ranks, steps)
    rate = job.step_samples(ranks) / timing.step_s
    efficiency = rate / (alone.samples_per_s * ranks) if alone else 1.0
    gain = _gain(points[-1], ranks, rate) if points else None
    return Point(ranks, timing.step_s, timing.compute_s, rate, efficiency, gain)


def _nodes(cluster: Cluster, ranks: int) -> int:
    """As many as the ranks and all stragglers need, and as the topology can wire."""
    nodes = max(-(-ranks // cluster.ranks_per_node), 1, *(node + 1 for node in cluster.stragglers))
    return cluster.topology.room_for(nodes)  # type: ignore[union-attr]
