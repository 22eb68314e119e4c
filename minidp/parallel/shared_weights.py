"""One w in memory that all ranks write without a lock; and what can be counted of that, without a lock either."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from minidp.comm import Communicator
from minidp.nn import Layout
from minidp.nn.layout import ALIGNMENT_BYTES

STEPS, WRITES, MARK = range(3)  # columns of the tally
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

    Memory of all ranks together, Ψ elements of s bytes: Ψs for w, 8Ψ for the counters.
    Raises ValueError on all ranks where ``comm.allocate`` gives each rank memory of its own.
    """

    def __init__(self, layout: Layout, comm: Communicator, count_lost: bool) -> None:
        self._layout, self._rank = layout, comm.rank
        # A cache line of the tally a rank: else those who count would take it from each other all the time.
        needs = (layout.nbytes, layout.size * COUNTER.itemsize * count_lost, comm.world_size * ALIGNMENT_BYTES)
        shared = comm.allocate(sum(needs) if comm.rank == 0 else 0)[0]
        w, counters, tally = np.split(shared, np.cumsum(needs)[:-1])
        self.w: npt.NDArray[Any] = w.view(layout.dtype)
        self.counters: npt.NDArray[np.int64] | None = counters.view(COUNTER) if count_lost else None
        self.tally: npt.NDArray[np.int64] = tally.view(COUNTER).reshape(comm.world_size, -1)
        self.tally[comm.rank, MARK] = 1
        comm.barrier()
        if not self.tally[:, MARK].all():
            raise ValueError(
                f"{type(comm).__name__} gives each rank memory of its own, and updates without a lock need one w "
                'that all ranks share: spawn them with world="process" or world="virtual", or train by '
                "DataParallel, which can send messages"
            )

    @property
    def readable(self) -> npt.NDArray[Any]:
        """w, read-only."""
        view = self.w.view()
        view.flags.writeable = False
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
        told = sum(int(self.counters[s.offset : s.offset + s.size].sum()) for s in self._layout.segments)
        return self.written() - told
