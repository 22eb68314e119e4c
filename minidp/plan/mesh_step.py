"""A step of one mesh: the model cut into stages, each stage's seconds, and the order in which all of it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from minidp.comm.rehearsal import Collective, Compute
from minidp.parallel import pipeline_schedules
from minidp.parallel.pipeline_schedules import PipelineSchedule
from minidp.parallel.stages import balanced
from minidp.parallel.timing import Layer, described_step
from minidp.plan.axes import Clock, Mesh
from minidp.plan.transformer import Part, Transformer


class Rule(NamedTuple):
    """An optimizer in numbers: arrays of state, FLOPs an element."""

    slots: int
    flops: int


OPTIMIZERS = {"sgd": Rule(0, 2), "momentum": Rule(1, 4), "adam": Rule(2, 12)}


@dataclass(frozen=True)
class Work:
    """What a step does, whatever the mesh. See `rank_meshes`."""

    model: Transformer
    global_batch: int
    micro_batches: int
    schedule: str
    optimizer: str
    element_bytes: int
    bucket_mb: float

    def samples(self, dp: int) -> int:
        """Of a micro-batch."""
        return self.global_batch // (dp * self.micro_batches)

    def update(self, parameters: int) -> Compute:
        """As `Optimizer.count_update` counts it."""
        slots, flops = OPTIMIZERS[self.optimizer]
        return Compute(1, flops * parameters, (3 + 2 * slots) * parameters * self.element_bytes)


# --- stages -----------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """A layer on one rank: seconds of computing and of communication along tp, of a micro-batch, each way."""

    part: Part
    forward_s: float
    backward_s: float
    forward_tensor_s: float
    backward_tensor_s: float


class Stage(NamedTuple):
    """One rank of a stage: its layers from input to output."""

    pieces: list[Piece]
    blocks: int
    output: int
    """Elements that it sends on and keeps, for backward begins there; 0 for the last."""

    @property
    def parameters(self) -> int:
        return sum(piece.part.parameters for piece in self.pieces)

    @property
    def forward_s(self) -> float:
        return sum(piece.forward_s + piece.forward_tensor_s for piece in self.pieces)

    @property
    def backward_s(self) -> float:
        return sum(piece.backward_s + piece.backward_tensor_s for piece in self.pieces)

    @property
    def tensor_s(self) -> float:
        return sum(piece.forward_tensor_s + piece.backward_tensor_s for piece in self.pieces)

    def kept_bytes(self, element_bytes: int) -> int:
        """Of a micro-batch that has gone forward and not yet back."""
        elements = self.output + sum(piece.part.kept for piece in self.pieces)
        return elements * element_bytes + sum(piece.part.kept_indices for piece in self.pieces)


def stages_of(work: Work, clock: Clock, mesh: Mesh) -> list[Stage]:
    """The model cut into stages as `HybridParallel` cuts it."""
    _, tp, pp = mesh
    model, size, samples = work.model, work.element_bytes, work.samples(mesh.dp)
    tokens = samples * model.context
    reduce_s = clock.tensor(tp, "all_reduce", tokens * model.embed, size)
    gather_s = clock.tensor(tp, "all_gather", tp * tokens * -(-model.vocab // tp), size)

    def piece(part: Part, forward_tensor_s: float = 0.0, backward_tensor_s: float = 0.0) -> Piece:
        forward_s, backward_s = (float(clock.cluster.compute_s(1, flops)) for flops in part[1:3])
        return Piece(part, forward_s, backward_s, forward_tensor_s, backward_tensor_s)

    pieces = [
        piece(model.embedding(tp, samples), reduce_s),
        *[piece(model.block(tp, samples), 2 * reduce_s, 2 * reduce_s)] * model.layers,
        piece(model.norm(samples)),
        piece(model.head(tp, samples), gather_s, reduce_s),
    ]
    bounds = cut_units(tuple(model.units), pp)
    output = tokens * model.embed
    return [
        Stage(pieces[lo:hi], len(range(max(lo, 1), min(hi, model.layers + 1))), output * (hi < len(pieces)))
        for lo, hi in bounds
    ]


@lru_cache(maxsize=64)
def cut_units(flops: tuple[float, ...], stages: int) -> list[tuple[int, int]]:
    """`balanced`, which many meshes ask for alike."""
    return balanced(flops, stages)


# --- time -------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Seconds of a step, and what it consists of, see `meshes`."""

    step_s: float
    compute_s: float
    tensor_s: float
    idle_s: float
    data_s: float


class Run(NamedTuple):
    """A stage in a step: when its last backward begins and ends, the most micro-batches under way in it."""

    last_backward: float
    end: float
    most: int


def times_of(work: Work, clock: Clock, mesh: Mesh, stages: Sequence[Stage]) -> tuple[Times, list[Run]]:
    """When all is done, and what each stage did."""
    dp, tp, pp = mesh
    m = work.micro_batches
    message = stages[0].output * work.element_bytes
    onward, back = clock.messages(tp, pp, message), clock.messages(tp, pp, message, backwards=True)
    runs = run(pipeline_schedules.get(work.schedule, pp, m), stages, onward, back)
    pipeline_s = max(each.end for each in runs)
    known = [gradients_known(work, clock, dp, stage, each) for stage, each in zip(stages, runs)]
    updates = [float(clock.cluster.compute_s(*work.update(stage.parameters))) for stage in stages]
    step_s = max(when + update for when, update in zip(known, updates))
    tensor_s = m * sum(stage.tensor_s for stage in stages) / pp
    busy_s = m * sum(stage.forward_s + stage.backward_s for stage in stages) / pp
    compute_s = busy_s - tensor_s + sum(updates) / pp
    data_s = max(0.0, max(known) - pipeline_s)
    idle_s = step_s - compute_s - tensor_s - data_s
    return Times(step_s, compute_s, tensor_s, max(0.0, idle_s) if pp > 1 else 0.0, data_s), runs


def run(
    schedule: PipelineSchedule, stages: Sequence[Stage], onward: Sequence[float], back: Sequence[float]
) -> list[Run]:
    """What each stage does in a schedule.

    ``onward[s]``: seconds of activations from stage s to s + 1; ``back[s]``: of gradients from s + 1 to s. Some
    pairs of stages share a node, others do not.
    """
    forward_s, backward_s = [stage.forward_s for stage in stages], [stage.backward_s for stage in stages]

    def transfer_s(source: int, target: int) -> float:
        return onward[source] if source < target else back[target]

    spans = pipeline_schedules.timetable(schedule, forward_s, backward_s, transfer_s)
    last = {span.action.stage: span for span in spans}
    most = schedule.most_in_flight()
    return [Run(last[s].start, last[s].end, most[s]) for s in range(schedule.stages)]


def gradients_known(work: Work, clock: Clock, dp: int, stage: Stage, run: Run) -> float:
    """When a stage's last bucket is back from the replicas: buckets leave while the last backward runs."""
    if dp == 1:
        return run.end
    layers = [  # "FLOPs" that are seconds
        Layer(piece.part.parameters, 0.0, piece.backward_s + piece.backward_tensor_s) for piece in stage.pieces
    ]
    now, back = run.last_backward, 0.0
    for entry in described_step(layers, work.bucket_mb, work.element_bytes):
        if isinstance(entry, Compute):
            now += entry.flops
        elif isinstance(entry, Collective) and entry.schedule:
            back = max(back, now) + clock.data(dp, entry.length, work.element_bytes)
    return max(back, now + clock.count(dp))  # Σ n_i
