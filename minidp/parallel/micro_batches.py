"""How a replica's batch is cut into the micro-batches that follow each other through a pipeline."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np

from minidp.autograd import Tensor
from minidp.backend import to_numpy
from minidp.data.sharding import cut
from minidp.parallel.mesh import Mesh

PER_STAGE = (
    4  # if nobody says how many: then a stage idles for a fifth of the time (Huang et al. 2019, section 2.3)
)


class MicroBatches:
    """Cuts batches for one strategy.

    Args:
        count: into how many; None: 4 a stage, and one where there is one stage.
        mesh: whose replica gets each batch, the same on all its ranks.

    If ``count`` is given, the batch of the very first step must be cut equally, for a schedule counts on equal
    ones. Later ones need not, such as the last of an epoch: gradients are weighted by samples, so that the sum is
    right in any case.
    """

    def __init__(self, count: int | None, mesh: Mesh) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1):
            raise ValueError(f"micro_batches={count!r}: give a whole number of at least 1, or None")
        self.count = int(count or (1 if mesh.pp == 1 else PER_STAGE * mesh.pp))
        self.asked_for = count is not None
        self._replica = mesh.replica
        self._compared = mesh.replica.world_size == 1

    def of(self, x: Any, y: Any, updates: int) -> list[tuple[Any, Any]]:
        """(x, y) of each, after that many updates. The first time collective in the replica. ValueError: see
        `HybridParallel`."""
        samples, m = len(x), self.count
        if self.asked_for and not updates and samples % m:
            fits = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
            near = " or ".join(str(n) for n in (samples - samples % m, samples - samples % m + m) if n)
            raise ValueError(
                f"a batch of {samples} samples does not split into micro_batches={m} equal ones: take {fits} of "
                f"them, or a batch of {near} samples"
            )
        if not self._compared:
            self._compare(x, y)
        return [(x[lo:hi], y[lo:hi]) for lo, hi in cut(samples, m)]

    def _compare(self, *batch: Any) -> None:
        """See, once, that all ranks of the replica got the same batch. Collective among them."""
        digest = blake2b(digest_size=7)
        for part in batch:
            array = np.asarray(to_numpy(part.data if isinstance(part, Tensor) else part))
            digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes())
        mine = int.from_bytes(digest.digest())
        if len(set(self._replica.all_gather_int(mine, "forward_backward batches"))) > 1:
            raise ValueError(
                "the ranks of one replica were given different batches: build the DataLoader with "
                "shard=strategy.shard, which is the same for all of them, and the same seed"
            )
        self._compared = True
