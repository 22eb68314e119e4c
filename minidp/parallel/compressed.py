"""Synchronous data parallelism in which payloads travel in place of gradients: g' = compress(g) (article 3.4.1,
4.4).

    backward        g_i, times n_i
    step            Σ n_i;  then, parameter by parameter, what each rank has of the mean: n_i g_i / Σ n_i
                    is compressed, exchanged and added up:  ∇L' ≈ Σ_i n_i g_i / Σ n_i
                    w ← rule(w, ∇L'), the whole of it, the same on every rank

How a compressor's payloads are added up: ``minidp.compress.compressor``.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from minidp import trace
from minidp.backend import item, to_numpy
from minidp.comm import CollectiveMismatch, Communicator
from minidp.comm.reduction import is_half, sum_dtype
from minidp.compress import Compressor, Pruned, magnitude_masks, resolved
from minidp.compress.compressor import State
from minidp.parallel.blocks import Trouble, first_not_finite, share_of_mean
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.reducer import CommReducer
from minidp.parallel.slabs import Flat, Slabs, private
from minidp.parallel.state import StateDict


class CompressedDataParallel(DataParallel):
    """See ``DataParallel``, which yields this class where ``compress`` is given, in every world.

    Guarantees across ranks: the same bits of w after every step, since all add up the same payloads in the same
    order. NaN or infinity is found before anything is compressed: NonFiniteGradient on all ranks, and residuals
    stay as they are. (A sum that overflows though each gradient is finite is found afterwards: what was compressed
    has left the residuals by then.)

    Cost of a step, c bytes of payloads, N ranks: sent 2(N−1)/N c where payloads are summed (see
    ``minidp.compress.compressor``) or parts have owners, (N−1) c where they are gathered; one or two exchanges a
    parameter, after backward (nothing is hidden behind it, and ``bucket_cap_mb`` changes nothing). Each rank
    updates all of w. Memory a rank: (3 + slots)Ψ, Ψ for residuals with error feedback, and in a step some arrays
    of the largest parameter's size.

    A device's gradients are compressed on the device, but the host waits for it: compressors look at their numbers
    before they pack them, and NaN is found before it gets into a residual, not a step later. Payloads that are
    summed, or have one size on all ranks, travel as arrays of the device do; others through the host's memory.
    """

    compressor: Compressor
    prunes = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._mask()  # where a compressor came with masks

    def _start(self, comm: Communicator) -> tuple[Slabs, list[tuple[int, int]], list[Flat]]:
        slabs = self._replicate(self.optimizer.slots)
        self._moving = comm.duplicate(f"{self.label} payloads")  # its traffic is that of the gradients
        self._exchanged = self._moving.traffic
        assert self._compress is not None
        self._use(resolved(self._compress, self.seed, comm.rank))
        own = slabs.grads[0]
        mean = private(own.size, sum_dtype(own.dtype), comm.device)
        places = [(s.name, slice(s.offset, s.offset + s.size), s.shape) for s in self.layout.segments]
        self._views = [(name, mean[place].reshape(shape)) for name, place, shape in places]
        return slabs, [(0, self.layout.size)], [mean]

    def _use(self, compressor: Compressor) -> None:
        self.compressor = compressor
        self._reducer = CommReducer(self._moving, compressor.steady)

    def _reduce_and_update(self, samples: int) -> None:
        own = self._own
        self.layout.zero_unwritten(own)
        total = 0
        with self._replica.one_verdict():
            total = sum(self._all_finite(samples, own))
        if total == 0:
            return
        self._gather_layers()
        (mean,) = self._parts
        share_of_mean(own, total, mean)
        with trace.span("compress", "compute"):  # but for what the reducer waits
            for name, view in self._views:
                view[...] = self.compressor.exchange(view, name, self._reducer)
        # Halves can hold a mean of halves, but not all that compressors make of it.
        with self._replica.one_verdict():
            beyond = first_not_finite(mean.astype(own.dtype)) if is_half(own.dtype) and self.check_finite else -1
            if beyond >= 0:
                raise self._not_finite(beyond, -1, float(item(mean[beyond])))
        with trace.span("update", "compute"):
            self._average_and_update(1)

    def _tell(self, trouble: Trouble | None) -> None:
        if trouble is not None:  # all ranks see the same sum
            raise self._not_finite(trouble.element, -1, trouble.value)

    # -- pruning of the model --------------------------------------------------------------------------

    def prune(self, density: float, scope: Literal["global", "each"] = "global") -> dict[str, np.ndarray]:
        """Keep only the largest weights, the part ``density`` of all matrices' (see `magnitude_masks`). The masks.

        The others are 0 from now on, as is their part of the optimizer's state: their gradients do not travel, and
        no rule moves what has none. The masks are the same on all ranks, and part of checkpoints. May be called
        again, with a lower density. Residuals begin anew. Sends nothing, but collective: all ranks prune between
        the same steps.
        """
        self._check_not_released()
        if self.in_step:
            raise RuntimeError("prune in the middle of a step: call strategy.step() or discard() first")
        asked = f"prune({density!r}, {scope!r})"
        for rank, theirs in enumerate(self.comm.all_gather_object(asked, "prune")):
            if theirs != asked:
                raise CollectiveMismatch(
                    f"rank {rank} called {theirs}, rank {self.comm.rank} {asked}: all ranks must prune alike"
                )
        state = self.model.state_dict()
        masks = magnitude_masks({s.name: state[s.name] for s in self.layout.segments}, density, scope)
        before = self.compressor.masks if isinstance(self.compressor, Pruned) else {}
        if any((mask & ~before[name]).any() for name, mask in masks.items() if name in before):
            raise ValueError(
                f"density={density!r}: less than that is left already; what is pruned does not come back"
            )
        inner = self.compressor.inner if isinstance(self.compressor, Pruned) else self.compressor
        inner.load_state_dict({k: calls for k, calls in inner.state_dict().items() if k.startswith("calls/")})
        self._use(Pruned(inner, masks))
        self._mask()
        return masks

    def _mask(self) -> None:
        """Zero what the masks leave out: of w, and of the optimizer's state."""
        if not isinstance(self.compressor, Pruned):
            return
        state = self.model.state_dict()
        kept = {slot: dict(of_slot) for slot, of_slot in self.optimizer_state().items()}
        for segment in self.layout.segments:
            mask = self.compressor.masks.get(segment.name)
            if mask is not None:
                state |= dict.fromkeys(segment.names, np.where(mask, state[segment.name], 0))
                for of_slot in kept.values():
                    of_slot[segment.name] = np.where(mask, to_numpy(of_slot[segment.name]), 0)
        self._put(state, kept)
        self.discard()

    def load_state_dict(self, state: StateDict) -> None:
        super().load_state_dict(state)
        self._mask()  # what is pruned stays so, whatever it was given

    # -- state -----------------------------------------------------------------------------------------

    def restore_compressor(self, state: State) -> None:
        pruned = isinstance(self.compressor, Pruned)
        if not pruned and any(name.startswith("mask/") for name in state):
            self._use(Pruned(self.compressor, {}))
        self.compressor.load_state_dict(state)
        self._use(self.compressor)  # sizes are told anew
