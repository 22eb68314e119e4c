"""The figures of ``--strategy hybrid``: of each rank, and of all together beside one."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minidp.demo.report import relative_difference
from minidp.demo.train import Job
from minidp.launch import cores

if TYPE_CHECKING:
    from minidp.demo.hybrid import Part, Plan

AXES = "dp", "tp", "pp"


@dataclass(frozen=True)
class Seat:
    """Where a rank sits in the mesh, and what it holds and sends there."""

    rank: int
    node: int | None
    """Of a virtual cluster."""
    dp: int
    pp: int
    tp: int
    layers: tuple[str, ...]
    parameters: int
    memory: dict[str, int]
    most_activations: int
    """Micro-batches whose activations it kept at a time."""
    bytes_per_step: dict[str, float]
    pipeline_wait_s: float


@dataclass(frozen=True)
class Outcome:
    """The demo's figures, as ``--json`` writes them; times are medians over epochs."""

    model: str
    dataset: str
    world: str
    device: str
    dp: int
    tp: int
    pp: int
    micro_batches: int
    schedule: str
    global_batch_size: int
    optimizer: str
    lr: float
    epochs: int
    steps: int
    cores: int
    ranks: list[Seat]
    parameters_one_worker: int
    parameters: int
    """That a rank computes with, at most."""
    memory_one_worker: dict[str, int]
    memory: dict[str, float]
    """Of a rank, on average."""
    most_activations: int
    bytes_per_step: dict[str, float]
    """Sent along each axis by a rank, at most."""
    idle_share: float | None
    """Of the stages' time from the first forward to the last backward; None without a pipeline."""
    idle_share_formula: float | None
    steps_per_s_one_worker: float
    steps_per_s: float
    loss_one_worker: float
    loss: float
    test_accuracy_one_worker: float
    test_accuracy: float
    relative_difference: float
    few_steps: int
    relative_difference_float64: float
    """After so many steps."""
    relative_difference_float32: float
    """After as many."""


def outcome_of(
    args: Namespace, job: Job, plan: Plan, one: Part, many: Sequence[Part], steps: int, few: Sequence[float]
) -> Outcome:
    """``few``: the relative differences after so many ``steps``, in float64 and in float32."""
    ranks, m, p = len(many), many[0].micro_batches, plan.pp
    # Of each replica the first stage tells how long a pipeline takes: its backward is the last.
    whole = sum(part.lasted_s for rank, part in enumerate(many) if rank // plan.tp % p == 0) * p
    idle = 1 - sum(part.worked_s for part in many) / whole
    return Outcome(
        model=job.task.model,
        dataset=job.task.dataset,
        world=args.world,
        device=args.device.name,
        dp=plan.dp,
        tp=plan.tp,
        pp=plan.pp,
        micro_batches=m,
        schedule=plan.schedule,
        global_batch_size=job.global_batch_size,
        optimizer=job.optimizer,
        lr=job.lr,
        epochs=job.epochs,
        steps=many[0].steps,
        cores=cores(),
        ranks=[_seat(args, plan, rank, part) for rank, part in enumerate(many)],
        parameters_one_worker=one.parameters,
        parameters=max(part.parameters for part in many),
        memory_one_worker=one.memory,
        memory={what: sum(part.memory[what] for part in many) / ranks for what in one.memory},
        most_activations=max(part.kept for part in many),
        bytes_per_step={axis: max(part.sent[axis] for part in many) for axis in AXES},
        idle_share=idle if p > 1 else None,
        idle_share_formula=(p - 1) / (m + p - 1) if p > 1 else None,
        steps_per_s_one_worker=one.steps_per_s,
        steps_per_s=many[0].steps_per_s,
        loss_one_worker=one.loss,
        loss=many[0].loss,
        test_accuracy_one_worker=one.accuracy,
        test_accuracy=many[0].accuracy,
        relative_difference=relative_difference(one.state, many[0].state),
        few_steps=steps,
        relative_difference_float64=few[0],
        relative_difference_float32=few[1],
    )


def _seat(args: Namespace, plan: Plan, rank: int, part: Part) -> Seat:
    rest, tp = divmod(rank, plan.tp)
    dp, pp = divmod(rest, plan.pp)
    return Seat(
        rank=rank,
        node=None if args.cluster is None else args.cluster.node_of(rank),
        dp=dp,
        pp=pp,
        tp=tp,
        layers=part.layers,
        parameters=part.parameters,
        memory=part.memory,
        most_activations=part.kept,
        bytes_per_step=part.sent,
        pipeline_wait_s=part.waited_s,
    )
