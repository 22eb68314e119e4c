"""A server's slice of w: what is done to it when gradients come. Arithmetic alone, no messages.

The rules of optim run here, on flat slices, as they run on a rank's slice in ``DataParallel``: the same sums in
the same order, so that with staleness 0 the bits are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidp.comm.reduction import sum_dtype
from minidp.optim import Optimizer
from minidp.parallel.blocks import BLOCK_BYTES, divided, exact_scale, first_not_finite, sum_in_order
from minidp.parallel.delay import Correction, slowed
from minidp.parallel.parcels import Parcel
from minidp.parallel.slabs import Flat, private


@dataclass(frozen=True)
class Rule:
    """How gradients are applied.

    Attributes:
        optimizer: without its parameters.
        staleness_aware: a gradient that is τ updates late moves w by η / τ.
        correction: what makes a late gradient less wrong; None: it is applied as it is.
        votes: gradients are signs, and together the sign of their sum (majority vote).
    """

    optimizer: Optimizer
    staleness_aware: bool = False
    correction: Correction | None = None
    votes: bool = False


class ServedSlice:
    """Elements lo … hi of the flat parameters, their optimizer state, and what each worker has of them.

    Args:
        lo, hi: of the layout's flat array.
        runs: (lo, hi, group) of the same elements, by groups of the optimizer's parameters.
        dtype: of parameters and gradients.
        rule: how gradients are applied.
        workers: who will push, numbered from 0.
        keeps: whether to remember the w that each worker was given. It need not where w can't change before all
            have received it and nobody asks for it later.

    Attributes:
        w: shape (hi − lo,).
        version: updates so far; also the index t of the next for the optimizer.
        pulled: of each worker, the version that it was given last.
        given: of each worker, that w itself.
    """

    def __init__(
        self,
        lo: int,
        hi: int,
        runs: Sequence[tuple[int, int, int]],
        dtype: np.dtype[Any],
        rule: Rule,
        workers: int,
        keeps: bool,
    ) -> None:
        self.lo, self.hi, self.rule = lo, hi, rule
        size, optimizer = hi - lo, rule.optimizer
        self.w: Flat = private(size, dtype)
        self.state: dict[str, Flat] = {slot: private(size, dtype) for slot in optimizer.slots}
        self.version = 0
        self.pulled = [0] * workers
        self.given: list[Flat] = [private(size, dtype) if keeps else self.w for _ in range(workers)]
        self._keeps = keeps
        length = BLOCK_BYTES // dtype.itemsize
        self._blocks = [
            (slice(at - lo, min(at + length, stop) - lo), group)
            for start, stop, group in runs
            for at in range(start, stop, length)
        ]
        self._work = np.empty(length, sum_dtype(dtype))
        self._scratch = tuple(np.empty(length, dtype) for _ in range(optimizer.scratch))

    def give(self, worker: int) -> Flat:
        """What ``worker`` is to receive; it stays as it is until the worker is given something again."""
        self.pulled[worker] = self.version
        given = self.given[worker]
        if self._keeps:
            given[...] = self.w
        return given

    def give_change(self, worker: int, parcel: Parcel) -> Flat:
        """The same as a parcel: by how much w differs from what ``worker`` was given before.

        What is lost in packing is still missing in what it was given, so the next change has it.
        """
        if first_not_finite(self.w) >= 0:
            raise FloatingPointError(
                f"after update #{self.version} w is NaN or infinite on this server: lower the learning rate"
            )
        self.pulled[worker] = self.version
        given, change = self.given[worker], self.w - self.given[worker]
        packed = parcel.pack(change)
        given += parcel.unpack(packed, change)
        return packed

    def staleness(self, worker: int) -> int:
        """τ: the updates since ``worker`` was given what it computes from."""
        return self.version - self.pulled[worker]

    def update(self, parts: Sequence[Flat], total: Any, worker: int | None = None) -> None:
        """w ← rule(w, Σ parts / total): one update.

        Args:
            parts: gradients of this slice, each weighted with its number of samples; summed in this order.
            total: a number > 0. For plain SGD of one worker's n_i ∇L_i it is n̄, of all workers' Σ n_i.
            worker: whose gradient it is, where it may be late; None: everybody's, of which none is.
        """
        rule, optimizer = self.rule, self.rule.optimizer
        late = 0 if worker is None else self.staleness(worker)
        correction = rule.correction if worker is not None else None
        scale = exact_scale(total, self.w.dtype) if correction is None else 1
        hypers = [optimizer.hyper(group, self.version) for group in range(len(optimizer.groups))]
        for place, group in self._blocks:
            w, length = self.w[place], place.stop - place.start
            g = sum_in_order([part[place] for part in parts], self._work[:length])
            if rule.votes:
                g = np.sign(g, out=self._work[:length])
            if scale == 1:
                g = divided(g, total, self._work[:length], w.dtype)
            if correction is not None and worker is not None:
                g = _same_shape(correction(g, w, self.given[worker][place], self.lo + place.start), w)
            hyper = hypers[group]
            optimizer.update(
                w,
                g,
                state := {slot: array[place] for slot, array in self.state.items()},
                w,
                state,
                lr=slowed(hyper["lr"], late) if rule.staleness_aware else hyper["lr"],
                t=self.version,
                hyper=hyper,
                scratch=tuple(array[:length] for array in self._scratch),
                scale=scale,
            )
            optimizer.count_update(g.size, g.itemsize)
        self.version += 1

    def skip(self) -> None:
        """An update without a gradient: it counts, nothing changes."""
        self.version += 1

    def put(self, w: Flat, state: Mapping[str, Flat] | None, updates: int | None) -> None:
        """Go on from these values; None: as they are. Nobody computes meanwhile."""
        self.w[...] = w
        for slot, values in (state or {}).items():
            self.state[slot][...] = values
        if updates is not None:
            self.version = updates
        for worker in range(len(self.pulled)):
            self.give(worker)


def _same_shape(g: Flat, w: Flat) -> Flat:
    """What a correction has made, which may be the user's."""
    if getattr(g, "shape", None) != w.shape:
        found = f"shape {g.shape}" if hasattr(g, "shape") else type(g).__name__
        raise ValueError(f"delay_compensation returned {found} for a gradient of shape {w.shape}: return as many")
    return g
