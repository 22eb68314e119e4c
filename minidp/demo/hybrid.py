"""``--strategy hybrid``: one model on a mesh of workers, beside the same model on one worker."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console

import minidp
from minidp import data, parallel, trace
from minidp.comm import Communicator
from minidp.demo import hybrid_report
from minidp.demo.report import relative_difference
from minidp.demo.train import OPTIMIZERS, Job, evaluate
from minidp.demo.words import write
from minidp.launch import cores
from minidp.nn import functional as F

AXES = "dp", "tp", "pp"
FEW_STEPS = 10  # after which w is compared in float64 and in float32: rounding alone is left, before it grows


@dataclass(frozen=True)
class Plan:
    """How the workers share the work."""

    dp: int
    tp: int
    pp: int
    micro_batches: int | None
    schedule: str

    def alone(self) -> Plan:
        return replace(self, dp=1, tp=1, pp=1, micro_batches=None)


@dataclass
class Part:
    """What one rank brings home. Times in seconds of the world's clock; bytes are of one step."""

    layers: tuple[str, ...]
    """The units of its stage."""
    parameters: int
    memory: dict[str, int]
    micro_batches: int
    kept: int
    """Micro-batches, at most, whose activations it kept."""
    sent: dict[str, float]
    steps: int
    epoch_s: list[float]
    waited_s: float
    worked_s: float
    lasted_s: float
    loss: float
    accuracy: float
    state: dict[str, np.ndarray] = field(default_factory=dict)
    events: list[trace.Event] = field(default_factory=list)


def run(console: Console, args: Namespace, job: Job) -> int:
    """Train with one worker and with all, and compare. 2 if the model can't be shared out so."""
    plan = Plan(args.dp, args.tp, args.pp, args.micro_batches, args.schedule or "1f1b")
    hybrid_report.introduce(console, args, job, plan)
    try:
        many = _spawn(train, args, plan, job)
    except minidp.RankFailed as failed:
        if not isinstance(failed.__cause__, ValueError):
            raise
        sys.stderr.write(f"minidp.demo: {failed.__cause__}\n")
        return 2
    (one,) = _spawn(train, args, plan.alone(), job)
    # Micro-batches, and parts of layers, make other sums than one worker does.
    few = [_spawn(begin, args, each, job)[0] for each in (plan.alone(), plan)]
    outcome = outcome_of(args, job, plan, one, many, [relative_difference(*states) for states in zip(*few)])
    hybrid_report.show(console, outcome, job.task.classes)
    events = [event for part in many for event in part.events]
    if args.cluster is not None and plan.pp > 1:
        hybrid_report.show_timeline(console, events, plan)
    if args.plot:
        step = hybrid_report.one_step(events, plan)
        trace.plot_timeline(step, args.plot, title=hybrid_report.title(outcome))
        console.print(f"Timeline: {args.plot}")
    write(console, args.json, outcome)
    if args.trace:
        trace.write_chrome(args.trace, events)
        console.print(f"Trace of all ranks: {args.trace} (open it at https://ui.perfetto.dev)")
    return 0


def _spawn(function: Any, args: Namespace, plan: Plan, job: Job) -> list[Any]:
    workers = plan.dp * plan.tp * plan.pp
    if args.cluster is None:
        return minidp.spawn(function, workers, job, plan, device=args.device, blas_threads=1)
    nodes = {} if workers > 1 else {"nodes": 1, "topology": "switch", "stragglers": {}}
    cluster = replace(args.cluster, **nodes)
    return minidp.spawn(function, workers, job, plan, world="virtual", device=args.device, cluster=cluster)


def built(comm: Communicator, job: Job, plan: Plan, dtype: str = "float32") -> parallel.HybridParallel:
    model = job.task.build().initialize(job.seed).astype(dtype)
    optimizer = OPTIMIZERS[job.optimizer](model.parameters(), lr=job.lr)
    mesh = parallel.Mesh(comm, dp=plan.dp, tp=plan.tp, pp=plan.pp)
    example = job.task.load()[0][:1][0]
    return parallel.HybridParallel(
        model, optimizer, mesh, micro_batches=plan.micro_batches, schedule=plan.schedule, example=example
    )


def loader_of(job: Job, strategy: parallel.HybridParallel) -> data.DataLoader:
    return data.DataLoader(
        job.load()[0],
        global_batch_size=job.global_batch_size,
        shard=strategy.shard,
        shuffle=True,
        seed=job.seed,
    )


def train(comm: Communicator, job: Job, plan: Plan) -> Part:
    train_set, test_set = job.load()
    strategy = built(comm, job, plan)
    loader = loader_of(job, strategy)
    recorder = trace.Recorder(comm.rank, comm.now, comm.device.clock(comm.now))
    epoch_s, total = [], len(loader) * job.epochs
    comm.barrier()
    before = strategy.metrics  # making the parts of the model has sent bytes, too
    for epoch in range(job.epochs):
        with trace.recording(recorder) if epoch == job.epochs - 1 else nullcontext():
            start = comm.now()
            for x, y in loader.epoch(epoch):
                loss = strategy.forward_backward(x, y, F.cross_entropy)
                strategy.step()
            comm.device.synchronize()
            epoch_s.append(comm.now() - start)
        comm.progress(strategy.updates, total, f"epoch {epoch + 1}, loss {float(loss):.3f}")
    metrics, steps = strategy.metrics, strategy.updates
    state = strategy.state_dict()
    dense = job.task.build()
    dense.load_state_dict(state)
    everybody = comm.rank, comm.world_size
    loss_sum, _, seen = evaluate(comm, dense, train_set, everybody)
    _, correct, count = evaluate(comm, dense, test_set, everybody)
    recorder.settle()
    lo, hi = strategy.bounds[strategy.mesh.coordinates.pp]
    return Part(
        layers=strategy.layers[lo:hi],
        parameters=sum(segment.size for segment in strategy.layout.segments),
        memory=strategy.memory(),
        micro_batches=strategy.micro_batches,
        kept=int(metrics["most_activations"]),
        sent={axis: (metrics[of] - before[of]) / steps for axis in AXES for of in [f"{axis}_bytes_sent"]},
        steps=steps,
        epoch_s=epoch_s,
        waited_s=metrics["pipeline_wait_s"],
        worked_s=metrics["pipeline_work_s"],
        lasted_s=metrics["pipeline_s"],
        loss=loss_sum / seen,
        accuracy=correct / count,
        state=state if comm.rank == 0 else {},
        events=recorder.events,
    )


def begin(comm: Communicator, job: Job, plan: Plan) -> list[dict[str, np.ndarray]]:
    """w after a few steps in float64, and in float32."""
    return [_begin(comm, job, plan, dtype) for dtype in ("float64", "float32")]


def _begin(comm: Communicator, job: Job, plan: Plan, dtype: str) -> dict[str, np.ndarray]:
    strategy = built(comm, job, plan, dtype)
    loader = loader_of(job, strategy)
    while strategy.updates < FEW_STEPS:
        epoch, step = divmod(strategy.updates, len(loader))
        for x, y in islice(loader.epoch(epoch, step), FEW_STEPS - strategy.updates):
            strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()
    return strategy.state_dict()


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
    args: Namespace, job: Job, plan: Plan, one: Part, many: Sequence[Part], few: Sequence[float]
) -> Outcome:
    """``few``: the relative differences after few steps, in float64 and in float32."""
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
        steps_per_s_one_worker=_steps_per_s(one),
        steps_per_s=_steps_per_s(many[0]),
        loss_one_worker=one.loss,
        loss=many[0].loss,
        test_accuracy_one_worker=one.accuracy,
        test_accuracy=many[0].accuracy,
        relative_difference=relative_difference(one.state, many[0].state),
        few_steps=FEW_STEPS,
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


def _steps_per_s(part: Part) -> float:
    return part.steps / len(part.epoch_s) / median(part.epoch_s)
