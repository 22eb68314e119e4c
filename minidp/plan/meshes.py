"""Which dp × tp × pp serves a transformer best on given machines: a step of each, timed, and what it needs.

    one micro-batch     along tp, forward: in each block 2 all-reduces of activations, in the embedding 1, and an
                        all-gather of the logits; backward: 2 a block, 1 before the head (Shoeybi et al. 2019)
    the pipeline        a schedule's actions, each when its stage is free and its message there (`timetable`)
    the last backward   gradients leave in buckets along dp, as in `described_step`: bucket k is back at
                        max(back_{k−1}, ready_k) + comm_k
    the update          of each rank's own part

Parts of a step, all ranks' mean: step = compute + tensor + idle + data, where idle is what stages wait for each
other and for messages between them, data what backward does not hide. Narayanan et al., SC 2021, section 3, reason
about the same; here every message is timed on the virtual network instead (`axes`).

Left out: jitter and stragglers; that messages of different axes hinder each other; what `HybridParallel` tells in
single numbers. Of groups along dp that share a port, those of other stages set out at the same time. As everywhere
in the virtual world an all-reduce takes the algorithm that is fastest where nothing else is under way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from minidp.parallel import pipeline_schedules
from minidp.plan.axes import Clock, Mesh
from minidp.plan.mesh_step import OPTIMIZERS, Stage, Work, stages_of, times_of
from minidp.plan.transformer import Transformer, divisors, in_words
from minidp.sim import Cluster


@dataclass(frozen=True)
class MeshPoint:
    """A line of the plan. Seconds of a step; bytes of the rank that needs most."""

    dp: int
    tp: int
    pp: int
    step_s: float
    samples_per_s: float
    efficiency: float
    """Of an ideal machine, where all ranks share the model's FLOPs equally and never wait."""
    compute_s: float
    tensor_s: float
    """Communication along tp, which everybody waits for."""
    idle_s: float
    data_s: float
    """Communication along dp that backward does not hide."""
    stages: tuple[int, ...]
    """Blocks of each."""
    parameter_bytes: int
    gradient_bytes: int
    state_bytes: int
    """Of the optimizer."""
    activation_bytes: int
    """Kept for backward by the micro-batches that the schedule lets be under way at a time."""
    fits: bool

    @property
    def mesh(self) -> Mesh:
        return Mesh(self.dp, self.tp, self.pp)

    @property
    def memory_bytes(self) -> int:
        return self.parameter_bytes + self.gradient_bytes + self.state_bytes + self.activation_bytes


class Impossible(NamedTuple):
    """Meshes that can't be, and why."""

    meshes: tuple[Mesh, ...]
    reason: str


def all_meshes(world_size: int) -> list[Mesh]:
    """Every dp · tp · pp = world_size."""
    return [
        Mesh(world_size // (tp * pp), tp, pp) for tp in divisors(world_size) for pp in divisors(world_size // tp)
    ]


def rank_meshes(
    transformer: Transformer,
    cluster: Cluster,
    world_size: int,
    *,
    global_batch: int,
    meshes: Iterable[Sequence[int]] | None = None,
    micro_batches: int = 8,
    schedule: str = "1f1b",
    optimizer: str = "adam",
    element_bytes: int = 4,
    memory_per_rank: float | None = None,
    bucket_mb: float = 25,
) -> tuple[list[MeshPoint], list[Impossible]]:
    """Points, the fastest first, those that do not fit into memory last; and the meshes that can't be.

    Args:
        transformer, cluster: what is trained, and where; its topology must have room for the ranks.
        global_batch: samples of a step.
        meshes: (dp, tp, pp) each; all if not given.
        micro_batches: that each replica's batch is cut into, with one stage, too.
        schedule: of `pipeline_schedules`.
        optimizer: "sgd", "momentum" or "adam".
        element_bytes: of parameters, gradients, state and activations.
        memory_per_rank: bytes; without it everything fits.
        bucket_mb: see `Job`.

    Memory is that of arrays, without work arrays and copies under way. Cost: for 64 ranks less than a second.

    Raises ValueError for ranks that do not fit into the cluster, for one with jitter or stragglers, for a mesh of
    another number of ranks, and for names that there are none of.
    """
    if cluster.jitter or cluster.stragglers:
        raise ValueError("rank_meshes: give a cluster without jitter and stragglers: all ranks count as alike")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer={optimizer!r}: there are {', '.join(map(repr, OPTIMIZERS))}")
    if global_batch < 1 or element_bytes < 1:
        raise ValueError(f"global_batch={global_batch}, element_bytes={element_bytes}: give at least 1")
    pipeline_schedules.get(schedule, 1, micro_batches)
    clock, memory = Clock(cluster, world_size), math.inf if memory_per_rank is None else memory_per_rank
    work = Work(transformer, global_batch, micro_batches, schedule, optimizer, element_bytes, bucket_mb)
    points, impossible = [], dict[str, list[Mesh]]()
    for mesh in all_meshes(world_size) if meshes is None else (Mesh(*mesh) for mesh in meshes):
        if mesh.dp * mesh.tp * mesh.pp != world_size or min(mesh) < 1:
            raise ValueError(f"{mesh} is {mesh.dp * mesh.tp * mesh.pp} ranks, not {world_size}")
        reason = why_not(transformer, mesh, global_batch, micro_batches)
        if reason:
            impossible.setdefault(reason, []).append(mesh)
        else:
            points.append(_point(work, clock, mesh, memory))
    points.sort(key=lambda point: (not point.fits, point.step_s, point.memory_bytes, point.mesh))
    return points, [Impossible(tuple(several), reason) for reason, several in impossible.items()]


def why_not(transformer: Transformer, mesh: Mesh, global_batch: int, micro_batches: int) -> str | None:
    """Why a mesh can't be, with the numbers that would do; None if it can."""
    dp, tp, pp = mesh
    if transformer.heads % tp:
        fits = in_words(divisors(transformer.heads))
        return f"{transformer.heads} heads can't be cut into tp = {tp} equal parts: {fits} would do"
    if transformer.vocab < tp:
        return f"{transformer.vocab} tokens of the vocabulary are fewer than tp = {tp} parts"
    if len(transformer.units) < pp:
        chain = f"embedding, {transformer.layers} layers, norm and head"
        return f"{chain} make no pp = {pp} stages: at most {len(transformer.units)} would do"
    if global_batch % dp:
        fits = in_words(divisors(global_batch))
        return f"{global_batch} samples do not divide into dp = {dp} equal shards: {fits} would do"
    if global_batch // dp % micro_batches:
        each, m = global_batch // dp, micro_batches
        fits = in_words(divisors(each))
        return f"{each} samples a replica, with dp = {dp}, make no {m} equal micro-batches: {fits} would do"
    return None


def _point(work: Work, clock: Clock, mesh: Mesh, memory: float) -> MeshPoint:
    stages = stages_of(work, clock, mesh)
    times, runs = times_of(work, clock, mesh, stages)
    rule, parameters = OPTIMIZERS[work.optimizer], work.model.parameters
    flops = work.model.flops(work.global_batch) + rule.flops * parameters
    ideal_s = flops / clock.cluster.flops / clock.world_size

    def needs(stage: Stage, under_way: int) -> tuple[int, int, int, int]:
        held = stage.parameters * work.element_bytes
        return held, held, rule.slots * held, under_way * stage.kept_bytes(work.element_bytes)

    memories = [needs(stage, run.most) for stage, run in zip(stages, runs)]
    fullest = max(memories, key=sum)
    return MeshPoint(
        *mesh,
        step_s=times.step_s,
        samples_per_s=work.global_batch / times.step_s,
        efficiency=ideal_s / times.step_s,
        compute_s=times.compute_s,
        tensor_s=times.tensor_s,
        idle_s=times.idle_s,
        data_s=times.data_s,
        stages=tuple(stage.blocks for stage in stages),
        parameter_bytes=fullest[0],
        gradient_bytes=fullest[1],
        state_bytes=fullest[2],
        activation_bytes=fullest[3],
        fits=sum(fullest) <= memory,
    )
