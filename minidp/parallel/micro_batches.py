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

    If ``count`` is given, batches must be cut equally, for a schedule counts on equal ones; but the last batch of
    an epoch may be shorter than those before it, and is cut as equally as can be. Gradients are weighted by
    samples, so the sum is right in any case.
    """

    def __init__(self, count: int | None, mesh: Mesh) -> None:
        if count is not None and (isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 1):
            raise ValueError(f"micro_batches={count!r}: give a whole number of at least 1, or None")
        self.count = int(count or (1 if mesh.pp == 1 else PER_STAGE * mesh.pp))
        self._largest = 0 if count is not None else None  # batch so far, where such must be cut equally
        self._replica = mesh.replica
        self._compared = mesh.replica.world_size == 1

    def of(self, x: Any, y: Any) -> list[tuple[Any, Any]]:
        """(x, y) of each. The first time collective in the replica. ValueError: see `HybridParallel`."""
        pieces = self._cut(len(x))
        if not self._compared:
            self._compare(x)
        return [(x[lo:hi], y[lo:hi]) for lo, hi in pieces]

    def _cut(self, samples: int) -> list[tuple[int, int]]:
        """Where micro-batches begin and end."""
        m = self.count
        if self._largest is not None and samples >= self._largest:
            if samples % m:
                fits = ", ".join(str(n) for n in range(1, samples + 1) if samples % n == 0)
                near = " or ".join(str(n) for n in (samples - samples % m, samples - samples % m + m) if n)
                raise ValueError(
                    f"a batch of {samples} samples does not split into micro_batches={m} equal ones: take "
                    f"{fits} of them, or a batch of {near} samples"
                )
            self._largest = samples
        return cut(samples, m)

    def _compare(self, x: Any) -> None:
        """See, once, that all ranks of the replica got the same batch. Collective among them."""
        array = np.asarray(to_numpy(x.data if isinstance(x, Tensor) else x))
        plain = array.dtype.hasobject
        content = repr(array.tolist()).encode() if plain else np.ascontiguousarray(array).tobytes()
        digest = int.from_bytes(blake2b(content, digest_size=7).digest())
        if len(set(self._replica.all_gather_int(digest, "forward_backward batches"))) > 1:
            raise ValueError(
                "the ranks of one replica were given different batches: build the DataLoader with "
                "shard=strategy.shard, which is the same for all of them, and the same seed"
            )
        self._compared = True
