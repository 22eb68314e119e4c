"""Checksums of gradients that lie in shared memory: what a rank has written is what the others read."""

from __future__ import annotations

from collections.abc import Sequence
from zlib import crc32

from minidp.backend import to_numpy
from minidp.comm import Communicator
from minidp.parallel.errors import CorruptGradient
from minidp.parallel.slabs import Flat


class Seals:
    """Of every rank's gradient slab, in rank order; the ``own`` one is sealed by its rank."""

    def __init__(self, comm: Communicator, slabs: Sequence[Flat], own: Flat) -> None:
        self._comm, self._slabs, self._own = comm, slabs, own
        self._crc: int | None = None

    def begin(self) -> None:
        """A new step: nothing is sealed."""
        self._crc = None

    def seal(self) -> int:
        """The checksum of this rank's gradients, taken when they are complete, once a step."""
        if self._crc is None:
            self._crc = crc32(to_numpy(self._own).data)
        return self._crc

    def verify(self, mine: int, step: int) -> None:
        """CorruptGradient on all ranks unless every rank's slab still has the checksum it computed. Collective."""
        sums = self._comm.all_gather_int(mine, "step/checksums")
        wrong = [rank for rank, slab in enumerate(map(to_numpy, self._slabs)) if crc32(slab.data) != sums[rank]]
        found = self._comm.all_gather_int(wrong[0] if wrong else -1, "step/verified")
        if max(found) >= 0:
            raise CorruptGradient(min(rank for rank in found if rank >= 0), step)
