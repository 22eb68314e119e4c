"""Sharded data parallelism: no rank keeps N times what one of N ranks needs (ZeRO, stages 1 and 2).

Every rank has the whole w, to compute with. Of the optimizer's state, and in stage 2 of the gradients, it keeps
its own share alone: one slice of each bucket.

    reduce-scatter    rank r gets Σ_i n_i g_i of its slices, added in order of rank
    update            w' ← rule(w, g) of its slices, with its share of the state
    all-gather        everybody gets everybody's slices of w'

An all-reduce is just that, a reduce-scatter and an all-gather, so that (but for padding) nothing more is sent than
without sharding; the update has moved in between, and is done once instead of N times.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minidp import trace
from minidp.autograd import Tensor
from minidp.backend import array_module, asarray, item
from minidp.comm import Communicator
from minidp.comm.reduction import sum_dtype
from minidp.nn import Module
from minidp.optim import Optimizer
from minidp.parallel.blocks import divided, exact_scale, first_not_finite
from minidp.parallel.buckets import make_buckets
from minidp.parallel.departures import Departures, StepLost
from minidp.parallel.shares import Rows, ShareNorm, Shares
from minidp.parallel.slabs import private, read_only
from minidp.parallel.strategy import StateDict, Strategy


class ShardedDataParallel(Strategy):
    """See ``DataParallel``: the same w after every step, bit for bit, in less memory. The same on a device
    (through NCCL, which sums in orders of its own, to rounding).

    Args:
        stage: 1, the optimizer's state is sharded; 2, gradients, too.
        model, optimizer, comm and the options: see ``DataParallel``.

    Memory a rank, Ψ elements of s bytes, all of it the rank's own (``memory`` counts it): stage 1 (2 + slots/N)
    Ψs, stage 2 (1 + (1 + slots)/N) Ψs; with Adam in float32 8Ψ + 8Ψ/N and 4Ψ + 12Ψ/N bytes, instead of 16Ψ.
    Besides, what one bucket travels in, 1 + 1/N times its size, or twice that of halves, which are summed (and in
    stage 2 kept) in float32; and in stage 2, during backward, the gradients of a bucket that is not complete: it
    saves memory where there are several buckets. Slices are of whole pieces of at most 1024 elements, so that a
    rank's share may differ from 1/N by a piece a bucket.

    Cost of a step: a reduce-scatter and an all-gather a bucket, together 2(N−1)/N Ψs bytes sent a rank where
    slices are equal; else they are padded, and ``bytes_sent`` of ``metrics`` has what was counted. Two meetings
    more, and with ``clip_norm`` an all-reduce of the pieces' squares. With ``check_finite`` each rank reads all
    its gradients once more, to be able to tell whose is bad, and a device is waited for once a bucket.

    Stage 2: gradients leave during each backward, bucket by bucket, in the order of the buckets, also those of
    parameters that this rank has not used, as zeros; ``parameter.grad`` is None afterwards. Therefore:

    - ``backward`` meets the other ranks: each of them is in a backward, too, or in ``step``. On a rank that makes
      no backward nothing else collective may come before ``step`` (CollectiveMismatch, CollectiveTimeout), and
      where layers meet in backward (``SyncBatchNorm``) all ranks must use the same parameters.
    - With ``accumulation_steps`` each backward's sum over ranks is added to the share, so that w equals that of
      ``DataParallel`` to rounding; each backward sends as much as one.
    - What has left can't be called back. If all ranks ``discard`` it, the step begins anew. If some do, perhaps
      after a failure, the others' gradients are lost with it: ``step`` raises RuntimeError on all ranks, nothing
      has changed, and all go on with ``discard`` and the next batch. Nobody hangs, as long as every rank calls
      ``step`` as often as the others, as in every strategy. What fails on a rank before its first bucket has
      left costs the other ranks nothing.

    There is one w, updated in place: after a CommError in ``step`` it may be of two steps; go on from a file.
    Checkpoints are those of ``DataParallel``; during ``save`` the host of rank 0 holds the whole state.

    Raises: ValueError for another stage; and see ``Strategy``.
    Source: Rajbhandari et al., "ZeRO", SC 2020, section 5 (P_os and P_os+g).
    """

    label = "ShardedDataParallel"

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        stage: int = 1,
        *,
        accumulation_steps: int = 1,
        bucket_cap_mb: float = 25,
        clip_norm: float | None = None,
        check_finite: bool = True,
    ) -> None:
        if isinstance(stage, bool) or stage not in (1, 2):
            raise ValueError(f"stage={stage!r}: 1 (the optimizer's state is sharded) or 2 (gradients, too)")
        self.stage, self.bucket_cap_mb = int(stage), bucket_cap_mb
        super().__init__(model, optimizer, comm, accumulation_steps, clip_norm, check_finite)
        layout, device = self.layout, comm.device
        dtype = np.dtype(layout.dtype)
        self.buckets = make_buckets(layout, bucket_cap_mb)
        self._shares = Shares(layout, self.buckets, self.comm.rank, self.comm.world_size)
        self._moving = self.comm.duplicate(f"{self.label} buckets")
        self._exchanged = self._moving.traffic
        self._rows = Rows(self._shares, self._moving, dtype, optimizer.scratch)
        self._w = private(layout.size, dtype, device)
        self._broadcast_rest()
        layout.pack(self._w)
        self.comm.broadcast(self._w, 0)
        layout.point(layout.views(read_only(self._w)))
        self._state = {slot: private(self._shares.size, dtype, device) for slot in optimizer.slots}
        self._whole: dict[str, np.ndarray] = {}  # on rank 0, between consolidate and forget
        if self.stage == 1:  # gradients of this rank; then the averaged ones, at the places of its slices
            self._gradients = private(layout.size, dtype, device)
            layout.point_grads(layout.views(self._gradients))
            self._sums = [self._gradients[lo:hi] for lo, hi in self._shares.mine]
        else:
            self._gradients = private(self._shares.size, sum_dtype(dtype), device)
            self._sums = self._shares.views(self._gradients)
        self._norm = ShareNorm(self._shares, device.xp, whole=self.stage == 1)
        self._stretches = self._rows.stretches(optimizer, self._w, self._sums, self._state)
        segments = [[s for s in layout.segments if b.lo <= s.offset < b.hi] for b in self.buckets]
        self._departures = Departures(self.comm, self._rows, segments, self._sums, self.check_finite)
        self._start_gradients()

    def _options(self) -> tuple[Any, ...]:
        return (*super()._options(), self.stage, self.bucket_cap_mb)

    def memory(self) -> dict[str, int]:
        """Bytes of the arrays that this rank holds now for its trainable parameters: ``parameters``, ``gradients``
        (also those that have not left yet), ``optimizer``, ``communication`` (what a bucket travels in)."""
        loose = [segment.parameter.grad for segment in self.layout.segments if self.stage == 2]
        state = [*self._state.values(), *self._whole.values()]
        return {
            "parameters": self._w.nbytes,
            "gradients": self._gradients.nbytes + sum(grad.data.nbytes for grad in loose if grad is not None),
            "optimizer": sum(array.nbytes for array in state),
            "communication": self._rows.nbytes,
        }

    # -- a step ----------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, samples: int, gradient: Any = None) -> None:
        if self.stage == 1:
            super().backward(loss, samples, gradient)
            return
        self._check_backward()
        with self._departures.round():
            super().backward(loss, samples, gradient)

    def discard(self) -> None:
        """Forget the gradients of the step that has begun, and a failure in it. Not collective. In stage 2 the
        step is lost for all ranks if some of them discard what has left, and some do not: see the class."""
        self._check_not_released()
        self._departures.discard()
        super().discard()

    def _start_gradients(self) -> None:
        if self.stage == 1:
            self.layout.clear_written()
        else:
            for segment in self.layout.segments:
                segment.parameter.grad = None

    def _reduce_and_update(self, samples: int) -> None:
        if self.stage == 2 and any(segment.parameter.grad is not None for segment in self.layout.segments):
            raise RuntimeError(
                "there are gradients that have not left: with stage=2 they leave in strategy.backward(loss, "
                "samples=n) alone. Call it in place of loss.backward(), or discard()"
            )
        with trace.span("wait for gradients", "wait"):
            try:
                total = self._departures.meet(samples)
            except StepLost as error:
                self._poison = error
                raise
        if total == 0:
            return
        self._layers.gather(self.check_finite, self.updates)
        scale = exact_scale(total, self.layout.dtype)
        with trace.span("average", "compute"):
            self._average(1 if scale != 1 else total)
        if self.check_finite:
            self._check_sums()  # before any of w is written
        with trace.span("update", "compute"):
            self._update(scale)
        with trace.span("wait for parameters", "wait"):
            for k in range(len(self.buckets)):
                if self._shares.width(k):
                    self._rows.gather(k, self._w)

    def _average(self, total: int) -> None:
        """Σ n_i ∇L_i / total, in order of rank, of my slices. Collective in stage 1."""
        if self.stage == 1:
            self._departures.send_all(total)
            return
        for summed in self._sums:
            mean = divided(summed, total, summed, np.dtype(self.layout.dtype))
            if mean is not summed:
                summed[...] = mean

    def _update(self, scale: float) -> None:
        """w' ← rule(w, ∇L) of my slices; the gradient is yet to be multiplied by ``scale``. Collective to clip."""
        multiply = array_module(self._w).multiply
        shrink = None
        if self.clip_norm is not None:
            for summed in self._sums:
                multiply(summed, scale, out=summed)
            scale, squares = 1, self._norm.squares(self._gradients)
            self.comm.all_reduce(squares)  # each piece has one rank that is not zero there: exact
            shrink = self._norm.clip_scale(squares, self.clip_norm, np.dtype(self.layout.dtype))
        hypers = [self.optimizer.hyper(group, self.updates) for group in range(len(self.optimizer.groups))]
        for group, w, gradient, state, work, scratch in self._stretches:
            if gradient.dtype != w.dtype:
                work[...] = gradient
                gradient = work
            if shrink is not None:
                multiply(gradient, shrink, out=gradient)
            hyper = hypers[group]
            self.optimizer.update(
                w,
                gradient,
                state,
                w,
                state,
                lr=hyper["lr"],
                t=self.updates,
                hyper=hyper,
                scratch=scratch,
                scale=scale,
            )
            self.optimizer.count_update(gradient.size, gradient.itemsize)

    def _check_sums(self) -> None:
        """NonFiniteGradient on all ranks if a slice of any has NaN or infinity. Collective; waits for a device."""
        bad: tuple[int, float] | None = None  # of my slices, the first
        for (lo, _), summed in reversed(list(zip(self._shares.mine, self._sums))):
            at = first_not_finite(summed)
            if at >= 0:
                bad = lo + at, float(item(summed[at]))
                break
        told = self.comm.all_gather_int(0 if bad is None else 1 + bad[0], "step/not finite")
        if not any(told):
            return
        element = min(filter(None, told)) - 1
        # Whoever brought NaN to a sum has no bad element before it: that would have spoilt an earlier sum.
        values = [None if it is None or it[0] != element else it[1] for it in (self._departures.brought, bad)]
        everybodys = self.comm.all_gather_object(values, "step/not finite")
        own, of_sum = zip(*everybodys)
        rank = next((rank for rank, value in enumerate(own) if value is not None), -1)
        raise self._not_finite(element, rank, own[rank] if rank >= 0 else next(v for v in of_sum if v is not None))

    # -- state -----------------------------------------------------------------------------------------

    def consolidate(self) -> None:
        for slot, share in self._state.items():
            whole = self._shares.gathered(self.comm, share)
            if whole is not None:
                self._whole[slot] = whole

    def forget(self) -> None:
        self._whole.clear()

    def optimizer_state(self) -> Mapping[str, StateDict]:
        names = [segment.name for segment in self.layout.segments]
        return {
            slot: dict(zip(names, self.layout.views(self._whole[slot]))) if slot in self._whole else {}
            for slot in self.optimizer.slots
        }

    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        self._put_rest(values)
        for segment, view in zip(self.layout.segments, self.layout.views(self._w)):
            view[...] = asarray(values[segment.name], array_module(view))
        whole = np.zeros(self.layout.size if state else 0, self.layout.dtype)
        for slot, share in self._state.items() if state else ():
            for segment, view in zip(self.layout.segments, self.layout.views(whole)):
                view[...] = state[slot][segment.name]  # type: ignore[index]
            self._shares.take(asarray(whole, array_module(share)), share)
