"""Hybrid parallelism: the model parallel inside a node, the data between nodes (article 3.4.3).

    tensor parallel      each layer cut over the tp ranks of a stage               tensor_parallel, parallelize
    pipeline parallel    the layers cut into pp stages, the batch into pieces      stages, pipeline
    data parallel        dp replicas of all that, each with a shard of the data    data_parallel

The three are made one after the other: the model is rewritten, so that this rank has its part of its stage; a
schedule takes micro-batches through the stages; and what then is left, a model with gradients that dp ranks have
computed of different samples, is just what `DataParallel` averages and updates. It does so here, along dp.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from minidp.autograd import Tensor
from minidp.compress import Compressor, resolved
from minidp.nn import Layout, Module
from minidp.optim import Optimizer
from minidp.parallel import pipeline_schedules
from minidp.parallel.agreement import agree, check_free, check_norms, check_parameters, describe
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.mesh import Mesh
from minidp.parallel.micro_batches import MicroBatches
from minidp.parallel.parallelize import parallelize, whole_or_not
from minidp.parallel.pipeline import Pipeline
from minidp.parallel.replica import Replica
from minidp.parallel.stages import chain, check_whole, keep_stage, stage_bounds
from minidp.parallel.state import StateDict, Stateful
from minidp.parallel.whole import Whole


class HybridParallel(Stateful):
    """Trains one model over a mesh of ranks: dp replicas, each in pp stages, each stage in tp parts.

    The loop is that of all strategies, with ``forward_backward``; all ranks of a replica get the same batch
    (``strategy.shard``). Built by all ranks; collective.

    Args:
        model: the whole model, built alike on every rank: a Sequential, a GPT, or what `chain` and `cut_layers`
            have been taught. It is rewritten in place, to this rank's part of it; Parameters of other stages are
            emptied.
        optimizer: built from ``model.parameters()``; its state is made for this rank's part only.
        mesh: the ranks.
        micro_batches: into how many pieces a batch is cut, which follow each other through the stages. The first
            batch must be cut into equal ones; later ones, such as an epoch's last, need not. None: 4 a stage,
            equal or not, and one if there is one stage.
        schedule: ``"1f1b"`` or ``"gpipe"`` (`pipeline_schedules`).
        example: one batch as it will be trained on, such as ``x[:1]``: to count the FLOPs that stages are balanced
            by, where the first layer does not tell what it takes.
        compress, accumulation_steps, bucket_cap_mb, clip_norm, check_finite: as of `DataParallel`, along dp. The
            norm is that of the whole gradient; a step is committed by all ranks or by none.

    Attributes:
        layers: names of the pieces that stages are made of, first to last.
        bounds: (lo, hi) of each stage's.

    Guarantees: the model trained is rank 0's, the same as `DataParallel` would train on dp ranks with as many
    accumulation steps as micro-batches, to rounding (sums over tp ranks are in another order), dropout included;
    with tp=1 to the bit. Parameters that are not cut are the same on all tp ranks, bit
    for bit. `state_dict`, ``save`` and ``load`` are of the whole model: a checkpoint fits any mesh, and any other
    strategy.

    An exception in forward or backward on one rank ends the run, since the others of its replica wait for it; a
    NonFiniteGradient is raised on all ranks, and `discard` lets them go on.

    Cost of a step: along dp, of this rank's part d_cut/T + d_whole of the parameters, what `DataParallel` says;
    along tp, see the layers; along pp, a message each way for each micro-batch. Idle: (pp − 1)/(m + pp − 1) of the
    time, for m micro-batches. Memory: parameters, gradients and state of this rank's part; activations of at most
    pp micro-batches (``"gpipe"``: m).

    Raises ValueError, with the numbers that would fit, where layers, heads, features or batches can't be cut so.
    Sources: Shoeybi et al., "Megatron-LM", 2019; Huang et al., "GPipe", 2019; Narayanan et al., SC 2021.
    """

    label = "HybridParallel"

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        mesh: Mesh,
        *,
        micro_batches: int | None = None,
        schedule: str = "1f1b",
        example: Any = None,
        compress: Compressor | str | None = None,
        accumulation_steps: int = 1,
        bucket_cap_mb: float = 25,
        clip_norm: float | None = None,
        check_finite: bool = True,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(
                f"accumulation_steps={accumulation_steps}: at least one forward_backward makes a step"
            )
        self.model, self.optimizer, self.mesh = model, optimizer, mesh
        self._batches = MicroBatches(micro_batches, mesh)
        self.micro_batches = self._batches.count
        self.accumulation_steps = accumulation_steps
        self.schedule = pipeline_schedules.get(schedule, mesh.pp, self.micro_batches)
        self.comm = mesh.world.duplicate(self.label)
        check_free(model)
        check_whole(model)
        check_parameters(model, optimizer)
        check_norms(model, mesh.dp)
        dense, described = Layout(model), None if compress is None else resolved(compress).describe()
        options = (
            f"{mesh}, micro_batches={self.micro_batches} ({'given' if self._batches.asked_for else 'usual'}), "
            f"schedule={schedule}, compress={described}, accumulation_steps={accumulation_steps}, "
            f"bucket_cap_mb={bucket_cap_mb}, clip_norm={clip_norm}, check_finite={check_finite}"
        )
        agree(self.comm, (dense.describe(), repr(model), describe(optimizer, dense), options), self.label)
        self._same_everywhere()
        at = mesh.coordinates
        with whole_or_not(model):
            self.whole = Whole(model, mesh)
            units = chain(model, mesh.tp > 1)
            self.layers = tuple(unit.name for unit in units)
            self.bounds = stage_bounds(model, units, mesh, example)
            cuts = parallelize(model, mesh.tensor)
            self.whole.spread(keep_stage(model, units, self.bounds, at.pp), cuts)
            copies = [name for name, _ in model.named_parameters() if name not in cuts] if at.tp else []
            self._inner = DataParallel(
                model,
                optimizer.only(model.parameters()),
                mesh.data,
                compress=compress,
                accumulation_steps=accumulation_steps * self.micro_batches,
                bucket_cap_mb=bucket_cap_mb,
                clip_norm=clip_norm,
                check_finite=check_finite,
                replica=Replica(mesh.replica, [mesh.rank_of(d, at.pp, at.tp) for d in range(mesh.dp)], copies),
            )
        lo, hi = self.bounds[at.pp]
        self.layout = self._inner.layout
        self.compressor = self._inner.compressor
        self.cut_by = "ranks" if mesh.tp == mesh.pp == 1 else f"{mesh}, stages {self.bounds}"
        self._pipeline = Pipeline(mesh.pipeline, units[lo:hi], self._inner)
        self._brought: tuple[StateDict, dict[str, StateDict]] | None = None

    @property
    def updates(self) -> int:  # type: ignore[override]
        """Steps that have been made, with those of a checkpoint."""
        return self._inner.updates

    @property
    def seed(self) -> int:  # type: ignore[override]
        """Of dropout's masks, the same on all ranks."""
        return self._inner.seed

    def _same_everywhere(self) -> None:
        """Rank 0's model, buffers and seed to everybody, while all have the whole of it."""
        for array in (*(p.data for p in self.model.parameters()), *self.model.buffers()):
            self.comm.broadcast(array, 0)
        self.model.init_seed = self.comm.broadcast_object(self.model.init_seed, 0, f"{self.label}(…)")

    # -- the loop --------------------------------------------------------------------------------------

    @property
    def shard(self) -> tuple[int, int]:
        """(index, count) along dp: what a DataLoader needs. All ranks of a replica get the same batches."""
        return self.mesh.shard

    def forward_backward(self, x: Any, y: Any, loss_fn: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """The loss of this replica's batch, on all its ranks, and this rank's part of its gradient ∇L_i, weighted
        with the number of samples. Collective among the replica's ranks.

        Args:
            x, y: inputs and targets, the same on all of them, with the same length along axis 0 (0 is allowed).
            loss_fn: ``loss_fn(model(x), y)`` is a mean over the batch.

        Returns: shape (), without a graph. ValueError if the batch can't be cut into equal micro-batches, or is
        not the same on all ranks of the replica (of the first one).
        """
        self._check_backward()
        batches = self._batches.of(x, y, self.updates)
        try:
            return self._pipeline.run(self.schedule, batches, loss_fn)
        except BaseException as error:
            self._inner._poison = error
            raise

    def predict(self, x: Any) -> Tensor:
        """The model's result for inputs ``x``, the same on all ranks of the replica, without a graph; in
        evaluation after ``model.eval()``. Collective among them."""
        return self._pipeline.predict(x)

    def backward(self, loss: Tensor, samples: int) -> None:
        """See `Strategy.backward`; without a pipeline only, in which ``forward_backward`` runs the stages."""
        if self.mesh.pp > 1:
            raise RuntimeError(
                f"backward of a loss in a pipeline of {self.mesh.pp} stages, of which each rank has one: call "
                "strategy.forward_backward(x, y, loss_fn), which takes the batch through all of them"
            )
        if self._inner._backwards == self._inner.accumulation_steps:
            raise RuntimeError(
                f"backward was called {self._inner._backwards + 1} times before step(), and "
                f"accumulation_steps={self.accumulation_steps} with micro_batches={self.micro_batches} make "
                f"{self._inner._backwards}: call step()"
            )
        self._inner.backward(loss, samples)

    def step(self) -> None:
        """∇L = Σ n_i ∇L_i / Σ n_i along dp;  w ← w − η ∇L, of this rank's part. Collective, on all ranks or none.

        See `Strategy.step`; ranks in errors are those of the mesh."""
        self._inner.step()

    def discard(self) -> None:
        """Forget the gradients of the step that has begun, and a failure in it. Not collective."""
        self._inner.discard()

    def _check_backward(self) -> None:
        if self._inner._backwards + self.micro_batches > self._inner.accumulation_steps:
            times = self._inner._backwards // self.micro_batches + 1
            raise RuntimeError(
                f"forward_backward was called {times} times before step(): give the strategy "
                f"accumulation_steps={times} if the gradients shall add up, or call step()"
            )
        self._inner._check_backward()

    # -- what it counts --------------------------------------------------------------------------------

    @property
    def metrics(self) -> dict[str, float]:
        """See `Strategy.metrics` (bytes of gradients and parameters, along dp). Besides, of this rank: all bytes
        sent along each axis; seconds that it has waited for messages of other stages, has computed, and was in
        ``forward_backward`` (``pipeline_s``: on the first stage that is what a pipeline takes, and 1 − all stages'
        work over so much for each is its idle share); and the most micro-batches whose activations it kept."""
        along = {f"{axis}_bytes_sent": float(sent) for axis, sent in self.mesh.traffic().items()}
        pipeline = self._pipeline
        stages = {
            "pipeline_wait_s": pipeline.waited_s,
            "pipeline_work_s": pipeline.worked_s,
            "pipeline_s": pipeline.lasted_s,
            "most_activations": float(pipeline.most_kept),
        }
        return self._inner.metrics | along | stages

    @property
    def staleness_counts(self) -> dict[int, int]:
        """Empty: no gradient is late."""
        return self._inner.staleness_counts

    def memory(self) -> dict[str, int]:
        """See `DataParallel.memory`: of this rank's part."""
        return self._inner.memory()

    @property
    def in_step(self) -> bool:
        return self._inner.in_step

    # -- the whole model -------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """The whole model, dotted names to host arrays, on every rank. Collective."""
        return self.whole.gather(self._inner.state_dict())

    def load_state_dict(self, state: StateDict) -> None:
        self._check_not_released()
        values = self.checked_model(self.group.broadcast_object(state, 0, "load_state_dict"))
        self._inner.load_state_dict(self.whole.parts(values))

    def checked_model(self, state: Mapping[str, Any]) -> StateDict:
        return self.whole.checked(state)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.whole.shapes

    def consolidate(self) -> None:
        self._inner.consolidate()
        names = list(self.whole.shapes)
        state = {slot: self.whole.gather(of, names) for slot, of in self._inner.optimizer_state().items()}
        self._brought = self.whole.gather(self.model.state_dict()), state

    def forget(self) -> None:
        self._brought = None

    def model_state(self) -> StateDict:
        assert self._brought is not None
        return self._brought[0]

    def optimizer_state(self) -> Mapping[str, StateDict]:
        assert self._brought is not None
        return self._brought[1]

    def restore(self, model: StateDict, state: Mapping[str, StateDict], updates: int, seed: int) -> None:
        parts = {slot: self.whole.parts(of_slot) for slot, of_slot in state.items()}
        self._inner.restore(self.whole.parts(model), parts, updates, seed)

    def restore_compressor(self, state: StateDict) -> None:
        self._inner.restore_compressor(state)

    def release(self) -> None:
        """Let go of the model, which stays this rank's part of it. Not collective."""
        self._inner.release()
        self._released = True

    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        parts = None if state is None else {slot: self.whole.parts(of) for slot, of in state.items()}
        self._inner._put(self.whole.parts(values), parts)
