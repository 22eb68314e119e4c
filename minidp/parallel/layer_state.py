"""What layers keep besides parameters, so that ranks neither differ nor depend on their number by it.

Dropout: masks are functions of seed, update and rank (or micro-shard). Batch normalisation: each rank's batches
have statistics of their own; once a step those of all ranks move every rank's running statistics alike.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from minidp.backend import Array
from minidp.backend.device import Later
from minidp.comm import Communicator
from minidp.nn import Dropout, DropoutScope, Module
from minidp.nn.batch_norm import BatchNorm
from minidp.parallel.errors import NonFiniteGradient
from minidp.parallel.moments import Rows, as_row, combine, filled_row, joined


class LayerState:
    """The layers of `model` that have such a state, for as long as a strategy trains it.

    Args:
        comm: the ranks that train together.
        seed: of the masks, the same on all ranks.
        leaves: micro-shards of this rank; 1 where there are none, and the rank is one itself.
        together: whether all ranks make a step together; otherwise each rank's statistics are of its own batches.
    """

    def __init__(self, model: Module, comm: Communicator, seed: int, leaves: int, together: bool) -> None:
        self._comm, self._first, self._together = comm, comm.rank * leaves, together
        self._masks = DropoutScope(seed, rank=self._first)
        for module in model.modules():
            if isinstance(module, Dropout):
                module.follow(self._masks)
        norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
        self._names, self._norms = list(norms), list(norms.values())
        ends = np.cumsum([1 + 2 * norm.num_features for norm in self._norms], dtype=int).tolist()
        # A row a leaf, in it (count, μ, σ²) of each layer: what its batches of this step have been together.
        self._rows: Rows = np.zeros((leaves, ends[-1] if ends else 0))
        # (leaf, layer, count, (μ, σ²)) of batches, on their way to the host: forward does not wait for a device.
        self._coming: list[tuple[int, int, int, Later]] = []
        self._places = [slice(start, end) for start, end in zip([0, *ends], ends)]
        self._gathered: Rows | None = None
        self._leaf = 0
        # Held here and nowhere else: if the strategy is no more, layers keep their statistics themselves again.
        self._records = [partial(self._record, i) for i in range(len(self._norms))]
        for norm, record in zip(self._norms, self._records):
            norm.follow(record)

    @property
    def gathers(self) -> bool:
        """Whether there is anything to gather."""
        return bool(self._norms)

    def begin(self, update: int) -> None:
        """A new step: its masks differ, and no batch has been seen."""
        self._masks.begin(update)
        if self._norms:
            self._rows[...] = 0
            self._coming.clear()
            self._gathered = None
        self.at_leaf(0)

    def at_leaf(self, leaf: int) -> None:
        """From now on forwards are those of this rank's micro-shard `leaf`."""
        self._leaf = leaf
        self._masks.rank = self._first + leaf

    def reseed(self, seed: int) -> None:
        self._masks.seed = seed

    def gather(self, check_finite: bool, update: int) -> None:
        """Get every leaf's statistics of this step, in order of leaf. Collective, if there are such layers and
        ranks step together.

        Before the update is committed, so that afterwards nobody has to be waited for: a step is whole, or has not
        been. With `check_finite`, NonFiniteGradient on all ranks if a rank has seen NaN or infinity.

        They are exchanged on the host, which waits for a device's forwards, not for what came after them.
        """
        if not self._norms:
            return
        self._take_in()
        rows = self._rows.copy()
        if self._together:
            rows = np.zeros((self._comm.world_size * len(self._rows), self._rows.shape[1]))
            self._comm.all_gather(rows, self._rows)
        if check_finite and not np.isfinite(rows).all():
            at, leaf = (int(i) for i in np.argwhere(~np.isfinite(rows.T))[0])  # the first layer's: it has spread
            layer = next(i for i, place in enumerate(self._places) if at < place.stop)
            rank = leaf // len(self._rows) if self._together else self._comm.rank
            value = float(rows[leaf, at])
            raise NonFiniteGradient(self._names[layer], rank, update, value, what="batch's statistics")
        self._gathered = rows

    def commit(self) -> None:
        """Move the running statistics by what was gathered: all leaves together, summed in order of leaf."""
        if self._gathered is not None:
            for norm, place in zip(self._norms, self._places):
                norm.update_running(*combine(self._gathered[:, place]))

    def release(self) -> None:
        for norm in self._norms:
            norm.follow(None)

    def _record(self, layer: int, count: int, mean: Array, var: Array) -> None:
        self._coming.append((self._leaf, layer, count, self._comm.device.later(joined(mean, var))))

    def _take_in(self) -> None:
        """Combine what has come, in the order of the forwards."""
        for leaf, layer, count, moments in self._coming:
            row = self._rows[leaf, self._places[layer]]
            own = filled_row(count, moments.get())
            row[...] = as_row(*combine(np.stack([row, own]))) if row[0] else own
        self._coming.clear()
