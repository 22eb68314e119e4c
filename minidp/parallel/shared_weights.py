"""One w in memory that all ranks write without a lock; and what can be counted of that, without a lock either."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from minidp.backend import item
from minidp.comm import Communicator
from minidp.comm.on_device import DeviceCommunicator
from minidp.nn import Layout
from minidp.nn.layout import ALIGNMENT_BYTES
from minidp.parallel.slabs import read_only

STEPS, WRITES, MARK = range(3)  # columns of the tally
NEEDS_SHARED = (
    'Updates without a lock need one w that all ranks share: spawn them with world="process" or world="virtual", '
    "on processors or on devices that see each other's memory, or train by DataParallel, which can send messages"
)
COUNTER = np.dtype(np.int64)  # 32 bits are full after 2³¹ writes of one element: a run of days gets there


class SharedWeights:
    """The flat w of ``layout``, zeroed, and its counters. Made collectively by the ranks of ``comm``.

    A write of an element is lost when another rank that had read the element before writes it afterwards. Nobody
    sees that happen. But a counter beside each element, read and written when the element is, loses as many: so
    ``lost``, Σ of what the ranks have written − Σ counters, tells how many. In the virtual world an element and
    its counter are touched at one moment, and the number is exact. In the process world they are touched one
    after the other: two races of about the same length, an estimate. With gradients that are 1 everywhere w tells
    the truth: of nine runs of two processes, which lost 15 to 46 % of their writes, none differed from it by more
    than 0.5 % of the writes.

    Attributes:
        w: shape (size,), the layout's dtype.
        counters: shape (size,), int64; None without ``count_lost``.
        tally: shape (world_size, 8), int64: a row a rank, which that rank alone writes. Columns: the STEPS and the
            WRITES of elements that it has made.

    Ranks whose models lie on a device have w and the counters there, and the tally on the host: so STEPS and
    WRITES are those that the host has asked for, of which the device may have some before it still.

    Memory of all ranks together, Ψ elements of s bytes: Ψs for w, 8Ψ for the counters.
    Raises ValueError on all ranks where ``comm.allocate`` gives each rank memory of its own, or none.
    """

    def __init__(self, layout: Layout, comm: Communicator, count_lost: bool) -> None:
        self._layout, self._rank = layout, comm.rank
        host = comm
        if isinstance(comm, DeviceCommunicator):
            host = comm.host
            if host.shares_memory and not comm.shares_memory:
                raise ValueError(f"ranks see no memory of each other on {comm.device.name}. {NEEDS_SHARED}")
        counted = layout.size * COUNTER.itemsize * count_lost
        shared = comm.allocate(layout.nbytes + counted if comm.rank == 0 else 0)[0]
        self.w: npt.NDArray[Any] = shared[: layout.nbytes].view(layout.dtype)
        self.counters: npt.NDArray[np.int64] | None = shared[layout.nbytes :].view(COUNTER) if count_lost else None
        # A cache line of the tally a rank: else those who count would take it from each other all the time.
        tally = host.allocate(comm.world_size * ALIGNMENT_BYTES if comm.rank == 0 else 0)[0]
        self.tally: npt.NDArray[np.int64] = tally.view(COUNTER).reshape(comm.world_size, -1)
        self.tally[comm.rank, MARK] = 1
        comm.barrier()
        if not self.tally[:, MARK].all():
            raise ValueError(f"{type(host).__name__} gives each rank memory of its own. {NEEDS_SHARED}")

    @property
    def readable(self) -> npt.NDArray[Any]:
        """w, read-only (but a device's)."""
        view: npt.NDArray[Any] = read_only(self.w)
        return view

    def steps(self) -> int:
        """How many steps all ranks have written."""
        return int(self.tally[:, STEPS].sum())

    def written(self) -> int:
        """How many writes of an element all ranks have made, lost ones included."""
        return int(self.tally[:, WRITES].sum())

    def lost(self) -> int:
        """How many of these writes were overwritten by a rank that had not read them. Cost: reads all counters.

        Never negative. While others are in a step, what they are just writing counts as lost.
        """
        assert self.counters is not None
        # Without padding, which is no element. Counters first, since writes are told before they are made.
        told = sum(int(item(self.counters[s.offset : s.offset + s.size].sum())) for s in self._layout.segments)
        return self.written() - told
