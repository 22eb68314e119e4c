"""Local SGD (article 3.3.2): each rank trains a replica of its own; every H steps the replicas are averaged.

    H times         w_i ← rule(w_i, ∇L_i): this rank's samples, this rank's optimizer state; nothing is sent
    then            w = Σ n_i w_i / Σ n_i, with the samples n_i that each rank has used in these H steps

With an outer optimizer (DiLoCo) the mean is not taken as it is, but as a direction in which to step:

    then            Δ = θ − Σ n_i w_i / Σ n_i;  θ ← outer rule(θ, Δ);  w_i = θ

For plain SGD with H = 1 that is ``DataParallel``: Σ n_i (w − η ∇L_i) / Σ n_i = w − η Σ n_i ∇L_i / Σ n_i. A rule
with a state, such as momentum, differs from it even then: each rank's has seen that rank's gradients only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minidp import trace
from minidp.backend import HOST, Device, array_module, asarray
from minidp.comm import Communicator
from minidp.comm.reduction import sum_dtype
from minidp.nn import Layout, Module
from minidp.optim import Adam, Optimizer
from minidp.parallel.agreement import check_parameters, describe
from minidp.parallel.blocks import Block, cut_blocks, divided, exact_scale, sum_in_order
from minidp.parallel.buckets import pieces
from minidp.parallel.buffers import least_weights, mean_buffers
from minidp.parallel.norms import norm_on
from minidp.parallel.slabs import Flat, Slabs
from minidp.parallel.strategy import WHOLE, StateDict, Strategy


class LocalSGD(Strategy):
    """N replicas that train apart and meet every H steps: an H-th of the bytes, and of the waiting.

    Args:
        model, optimizer: built alike on every rank; the optimizer from ``model.parameters()``.
        comm: the ranks that train together; of any world.
        sync_every: H. Replicas drift apart in between, so that larger is cheaper, not better.
        outer: a second rule of ``optim``, also from ``model.parameters()``, for which Δ is the gradient and t the
            number of averagings. ``SGD(lr=1)`` is None, to rounding; DiLoCo's is ``SGD(lr=0.7, momentum=0.9,
            nesterov=True)``.
        accumulation_steps: backwards that may be added up before a step.
        clip_norm: scale the gradient of each rank's step down to this 2-norm if it is longer: each rank its own.
        check_finite: raise NonFiniteGradient, on this rank alone, rather than make a step whose gradient holds NaN
            or infinity; nothing has changed then. The others learn of it when they meet: as RankFailed, if the
            error ends this rank. To leave out the batch, catch it, then call ``discard()`` and ``step()``: a step
            without samples, so that this rank has made as many as the others when they average.

    Guarantees across ranks: after every H-th step, ``save``, ``load`` and ``load_state_dict`` all hold the same
    parameters and buffers, bit for bit; the H steps are counted from there. In between ``state_dict`` is the mean
    of the replicas as of now (without an outer step), the same on all ranks, and the training does not notice.
    Without any samples since the last averaging nothing changes. The optimizer's state is never averaged or sent
    (but for ``save``); the outer one's is replicated. All ranks must make the same number of steps. Dropout and
    batch norm are each rank's own; buffers are averaged with the parameters (see ``buffers.py``).

    Cost, Ψ elements of s bytes: of a local step nothing is sent; of an averaging one all-reduce of Ψs bytes (half
    precision travels in float32: s = 4), of one number and of the buffers. The same for each ``state_dict`` and
    ``save``. ``bytes_sent`` of ``metrics`` is what averagings of parameters have sent; ``averagings`` counts them.
    Memory a rank: (2 + slots) Ψs, with ``outer`` (4 + slots + outer slots) Ψs; during an averaging Ψs more. On a
    device the host waits for it in each step, with ``check_finite``, and where buffers are averaged, on the host.

    Raises: ValueError if ``sync_every`` is not a whole number ≥ 1 or ``outer`` has other parameters;
    CollectiveMismatch on all ranks if they differ in any of it; TypeError for what takes square roots (Adam,
    ``clip_norm``) of Python objects (Fractions).

    Sources: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
    2017 (weights n_i); Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019;
    Douillard et al., "DiLoCo", 2023 (outer rule).
    """

    label = "LocalSGD"
    together = False
    private_state = True

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        sync_every: int,
        *,
        outer: Optimizer | None = None,
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        check_finite: bool = True,
    ) -> None:
        if not isinstance(sync_every, WHOLE) or sync_every < 1:
            raise ValueError(f"sync_every={sync_every!r}: after how many steps to average, a whole number ≥ 1")
        self.sync_every, self.outer = int(sync_every), outer
        self._check_arithmetic(model, optimizer, clip_norm)
        super().__init__(model, optimizer, comm, accumulation_steps, clip_norm, check_finite)
        self._replica = Replica(self.layout, optimizer, comm.device)
        self._moving = self.comm.duplicate(f"{self.label} averages")  # its traffic is that of the parameters
        self._exchanged = self._moving.traffic
        self._steps = self._used = 0  # of this rank since the last averaging: steps, samples
        self._averagings = 0
        self._broadcast_rest()
        self.layout.pack(self._replica.w)
        self.comm.broadcast(self._replica.w, 0)
        self._replica.slabs.bind_grads(0)
        self._replica.slabs.flip()
        self._agreed = None if outer is None else Replica(self.layout, outer, comm.device)  # θ
        self._settle()
        self._start_gradients()

    def _check_arithmetic(self, model: Module, optimizer: Optimizer, clip_norm: float | None) -> None:
        if self.outer is not None:
            try:
                check_parameters(model, self.outer)
            except ValueError as error:
                raise ValueError(f"outer: {error}") from None
        if any(np.dtype(parameter.dtype).hasobject for parameter in model.parameters()):
            rooted = [type(rule).__name__ for rule in (optimizer, self.outer) if isinstance(rule, Adam)]
            rooted += [] if clip_norm is None else ["clip_norm"]
            if rooted:
                raise TypeError(f"{rooted[0]} takes square roots, which Python objects (Fractions) do not have")

    def _options(self) -> tuple[Any, ...]:
        outer = None if self.outer is None else describe(self.outer, self.layout)
        return *super()._options(), f"sync_every={self.sync_every}", f"outer={outer}"

    # -- a step ----------------------------------------------------------------------------------------

    def step(self) -> None:
        """w_i ← w_i − η ∇L_i; after every H-th, average. Collective only then.

        Without a backward this rank's step is one with 0 samples: it counts, and nothing changes.

        Raises: NonFiniteGradient on this rank (with ``check_finite``), RuntimeError after a failed backward: then
            the step has not been made. CommError where ranks meet: this rank's own step has been made then.
        """
        super().step()
        self._steps += 1
        if self._steps >= self.sync_every:
            self._average()

    def _start_gradients(self) -> None:
        self.layout.clear_written()

    def _reduce_and_update(self, samples: int) -> None:
        if samples == 0:
            return
        self.layout.zero_unwritten(self._replica.gradient)
        self._layers.gather(self.check_finite, self.updates)
        if self.check_finite:
            self._check_gradient(self._replica.gradient)
        with trace.span("update", "compute"):
            self._replica.update(samples, self.updates, self.clip_norm)
        self._used += samples

    # -- an averaging ----------------------------------------------------------------------------------

    def _average(self) -> None:
        """Replicas become their mean, or what the outer rule makes of it; buffers their mean. Collective."""
        with trace.span("average", "wait"), np.errstate(all="ignore"):
            mean = self._mean(self._moving, "step/average")
            if mean is not None:
                if self._agreed is None:
                    self._replica.w[...] = mean
                else:
                    self._step_outside(self._agreed, mean)
                self._averagings += 1
            mean_buffers(self.comm, self.model, self._used)
        self._settle()

    def _mean(self, comm: Communicator, what: str) -> Flat | None:
        """Σ n_i w_i / Σ n_i, in order of rank, half precision in float32; None if nobody has used a sample.

        Multiplied before the sum and divided after it: shares n_i / Σ n_i, rounded, would not make up 1, and
        every averaging would shift the scale of w the same way.
        """
        counts = self.comm.all_gather_int(self._used, what)
        if not any(counts):
            return None
        weights, total = least_weights(counts)
        w = self._replica.w
        xp = array_module(w)
        mean: Flat = xp.multiply(w, weights[comm.rank], dtype=sum_dtype(w.dtype))
        comm.all_reduce(mean)
        xp.divide(mean, total, out=mean)
        return mean

    def _step_outside(self, agreed: Replica, mean: Flat) -> None:
        """Δ = θ − mean;  θ ← outer rule(θ, Δ);  w_i = θ."""
        array_module(mean).subtract(agreed.w, mean, out=agreed.gradient)
        agreed.update(1, self.outer_updates)
        self._replica.w[...] = agreed.w
        self.outer_updates += 1

    def _settle(self) -> None:
        """All ranks hold the same w: from here steps and samples are counted, and Δ is measured."""
        self._steps = self._used = 0
        if self._agreed is not None:
            self._agreed.w[...] = self._replica.w

    @property
    def metrics(self) -> dict[str, float]:
        return {**super().metrics, "averagings": self._averagings}

    # -- state -----------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """The mean of all ranks' models as of now, the same on every rank; nothing changes by it. Collective."""
        self._check_not_released()
        own = [self._replica.w, *self.model.buffers()]
        kept = [array.copy() for array in own]
        try:
            with np.errstate(all="ignore"):
                mean = self._mean(self.comm, "state_dict")
                if mean is not None:
                    self._replica.w[...] = mean
            mean_buffers(self.comm, self.model, self._used)
            return self.model.state_dict()
        finally:
            for array, values in zip(own, kept):
                array[...] = values

    def consolidate(self) -> None:
        self._average()

    def optimizer_state(self) -> Mapping[str, StateDict]:
        """This rank's own, by slot and parameter; views where it lies. Not collective."""
        return self._replica.state()

    def outer_state(self) -> Mapping[str, StateDict]:
        return {} if self._agreed is None else self._agreed.state()

    def restore_outer(self, state: Mapping[str, StateDict], updates: int) -> None:
        self.outer_updates = updates
        for slot, values in self.outer_state().items():
            for name, array in values.items():
                array[...] = asarray(state[slot][name], array_module(array)) if state else 0

    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        self._put_rest(values)
        self._replica.slabs.stage(values, state)
        self._replica.slabs.flip()
        self._settle()


class Replica:
    """A w of this rank's own and the rule that moves all of it, with the bits of ``DataParallel`` on one rank.

    Attributes:
        slabs: where all of it lies.
        w, gradient: shape (layout.size,), of the layout's dtype; ``gradient`` may hold anything after an update.
    """

    def __init__(self, layout: Layout, optimizer: Optimizer, device: Device = HOST) -> None:
        self.layout, self.optimizer = layout, optimizer
        self.slabs = Slabs(layout, optimizer.slots, None, device)
        self.w, self.gradient = self.slabs.params[0], self.slabs.grads[0]  # w has one buffer
        self._blocks = cut_blocks(layout, optimizer, self.slabs, [(0, layout.size)], self.slabs.grads, 0)
        self._norm = norm_on(device.xp, pieces(layout, 0, layout.size), [(0, layout.size)])

    def update(self, total: int, t: int, clip_norm: float | None = None) -> None:
        """w ← rule(w, gradient / total), its update number ``t``."""
        if clip_norm is not None:
            self._clip(total, clip_norm)
            total = 1
        scale = exact_scale(total, self.w.dtype)
        hyper = [self.optimizer.hyper(group, t) for group in range(len(self.optimizer.groups))]
        for block in self._blocks:  # each while it is in the cache
            gradient = self._mean(block, total, scale)
            state, group = block.state[0], hyper[block.group]
            w, scratch = block.params[0], block.scratch
            self.optimizer.update(
                w, gradient, state, w, state, lr=group["lr"], t=t, hyper=group, scratch=scratch, scale=scale
            )
            self.optimizer.count_update(gradient.size, gradient.itemsize)

    def _mean(self, block: Block, total: int, scale: float) -> Flat:
        """The gradient / total; where there is a scale, that is yet to be multiplied by."""
        summed = sum_in_order(block.parts, block.mean)
        return divided(summed, total, block.mean, self.w.dtype) if scale == 1 else summed

    def _clip(self, total: int, clip_norm: float) -> None:
        """gradient ← gradient / total, scaled down to the norm."""
        scale, multiply = exact_scale(total, self.w.dtype), array_module(self.w).multiply
        for block in self._blocks:
            (part,) = block.parts
            multiply(self._mean(block, total, scale), scale, out=part)
        shrink = self._norm.clip_scale(self._norm.squares(self.gradient), clip_norm, self.w.dtype)
        multiply(self.gradient, shrink, out=self.gradient)

    def state(self) -> Mapping[str, StateDict]:
        """The rule's state by slot and parameter, views."""
        names = [segment.name for segment in self.layout.segments]
        return {slot: dict(zip(names, self.layout.views(array))) for slot, (array, _) in self.slabs.state.items()}
