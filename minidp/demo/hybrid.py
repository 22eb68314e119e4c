"""``--strategy hybrid``: one model on a mesh of workers, beside the same model on one worker."""

from __future__ import annotations

import sys
from argparse import Namespace
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
from minidp.demo import hybrid_report, page
from minidp.demo.curve import Curve, Moment
from minidp.demo.hybrid_outcome import AXES, outcome_of
from minidp.demo.report import relative_difference
from minidp.demo.train import OPTIMIZERS, Job, evaluate
from minidp.demo.words import told, write, write_trace
from minidp.nn import functional as F

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
    curve: list[Moment] = field(default_factory=list)

    @property
    def steps_per_s(self) -> float:
        """By the median epoch."""
        return self.steps / len(self.epoch_s) / median(self.epoch_s)


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
    outcome = outcome_of(
        args, job, plan, one, many, FEW_STEPS, [relative_difference(*states) for states in zip(*few)]
    )
    hybrid_report.show(console, outcome, job.task.classes)
    events = [event for part in many for event in part.events]
    if args.plot or args.report:
        step = hybrid_report.one_step(events, plan)
        picture = trace.plot_timeline(step, args.plot, hybrid_report.title(outcome))
    if args.report:
        curves = {"1 worker": one.curve, f"{len(many)} workers": many[0].curve}
        page.of_hybrid(console, args, outcome, curves, picture)
    if args.cluster is not None and plan.pp > 1:
        hybrid_report.show_timeline(console, events, plan)
    if args.plot:
        told(console, "Timeline", args.plot)
    write(console, args.json, outcome)
    write_trace(console, args.trace, events)
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
    epoch_s, total, curve = [], len(loader) * job.epochs, Curve(comm, job.curve)
    comm.barrier()
    before = strategy.metrics  # making the parts of the model has sent bytes, too
    for epoch in range(job.epochs):
        with trace.recording(recorder) if epoch == job.epochs - 1 else nullcontext():
            start = comm.now()
            for x, y in loader.epoch(epoch):
                loss = strategy.forward_backward(x, y, F.cross_entropy)
                strategy.step()
                curve.add(loss, y.size, strategy.updates)
            comm.device.synchronize()
            epoch_s.append(comm.now() - start)
        comm.progress(strategy.updates, total, f"epoch {epoch + 1}, loss {float(loss):.3f}")
    metrics, steps = strategy.metrics, strategy.updates
    state = strategy.state_dict()
    dense = job.task.build()
    dense.load_state_dict(state)
    (loss_sum, _, seen), (_, correct, count) = (
        evaluate(comm, dense, each, (comm.rank, comm.world_size)) for each in (train_set, test_set)
    )
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
        curve=curve.moments(),
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
