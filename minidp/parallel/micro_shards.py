"""Micro-shards: the same bits of w for any number of ranks.

Floating-point sums depend on their order, and matrix products on their shapes. So with ``micro_shards=V`` the
global batch is cut into V micro-shards, whatever N is, each one's gradient n_v ∇L_v is computed by itself, and
all V are added in one binary tree:

    g0   g1    g2   g3    g4   g5    g6   g7        V = 8 leaves
      \\ /       \\ /        \\ /       \\ /
       +         +          +         +
         \\     /              \\     /
            +                    +                  on N = 2 ranks, up to here inside a rank
               \\             /
                      +                             and from here on across them

Rank r has the V/N leaves from r·V/N on: a subtree. The loader's recursive halving into N blocks, halved further
into V/N each, is its halving into V: the leaves are the same samples for every N.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import finalize

import numpy as np

from minidp.backend import HOST, Device, array_module
from minidp.comm.reduction import is_half
from minidp.nn import Layout, Module
from minidp.parallel.slabs import Flat, private
from minidp.parallel.sync_batch_norm import SyncBatchNorm


def leaves_of(micro_shards: Any, world_size: int) -> int:
    """V/N, the leaves of a rank. ValueError unless V is a power of two that N divides."""
    if not isinstance(micro_shards, int | np.integer) or isinstance(micro_shards, bool) or micro_shards < 1:
        raise ValueError(f"micro_shards={micro_shards!r}: give a power of two, such as 8, or None")
    if micro_shards & (micro_shards - 1):
        raise ValueError(f"micro_shards={micro_shards}: give a power of two, so that their sum is a binary tree")
    if micro_shards % world_size:
        raise ValueError(
            f"micro_shards={micro_shards} can't be shared by {world_size} ranks alike: train on a number of ranks "
            "that divides it, or give more micro-shards"
        )
    return int(micro_shards) // world_size


def check_model(model: Module) -> None:
    """Refuse what would make bits depend on the number of ranks, or need all of a batch at once."""
    for parameter in model.parameters():
        if is_half(parameter.dtype):
            raise TypeError(
                f"micro_shards with {parameter.dtype} parameters: half precision is summed in float32 across "
                'ranks, so the bits would depend on their number; train in float32 (model.astype("float32"))'
            )
    for name, module in model.named_modules():
        if isinstance(module, SyncBatchNorm):
            raise ValueError(
                f"micro_shards with a SyncBatchNorm ({name}): micro-shards are computed one after the other, so "
                "none can know the others' mean. Use nn.BatchNorm1d or 2d: each micro-shard for itself, for any N"
            )


class OneBlasThread:
    """While anybody in this process holds one, BLAS runs one thread: how it cuts sums over threads changes bits.

    ``enforce`` sees to it again (0.5 µs), as others may set numbers of threads too; the last one that is let go
    puts back what was last set.
    """

    _holders: ClassVar[int] = 0
    _libraries: ClassVar[list[Any]] = []
    _others: ClassVar[dict[int, int]] = {}  # what others have set, by index of the library

    def __init__(self) -> None:
        import threadpoolctl  # 4 ms, for this only

        cls = OneBlasThread
        if not cls._holders:
            cls._libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
        cls._holders += 1
        self.enforce()
        self.let_go = finalize(self, OneBlasThread._let_go)

    def enforce(self) -> None:
        for i, library in enumerate(self._libraries):
            threads = library.get_num_threads()
            if threads != 1:
                self._others[i] = threads
                library.set_num_threads(1)

    @classmethod
    def _let_go(cls) -> None:
        cls._holders -= 1
        if not cls._holders:
            for i, threads in cls._others.items():
                cls._libraries[i].set_num_threads(threads)
            cls._others.clear()


class Leaves:
    """The leaves of one rank, added up into its gradient slab while they come.

    Leaf j is written to a buffer of its own, never added to another by backward; then, for each bit of j that is
    set from the lowest on, the two subtrees that it completes are added, the right one into the left one. The
    first buffer is the slab. With one backward a leaf the buffers are a stack: log₂(V/N) more than the slab. If
    gradients accumulate, leaf j first adds up its own, so each needs a buffer: V/N − 1 more.

    Args:
        layout: whose parameters get the buffers as slots for their gradients.
        slab: where the sum is to be.
        count: leaves of this rank.
        rounds: how often each comes in a step, at most (``accumulation_steps``).
        device: where the slab lies.
    """

    def __init__(self, layout: Layout, slab: Flat, count: int, rounds: int, device: Device = HOST) -> None:
        self.layout, self.count, self._stacked = layout, count, rounds == 1
        buffers = count.bit_length() if self._stacked else count
        own = [private(layout.size, layout.dtype, device) for _ in range(buffers - 1)]
        self._buffers = [slab, *own]
        self._views = [layout.views(buffer) for buffer in self._buffers]
        self.begin()

    def begin(self) -> None:
        """A new step: the next backward is that of leaf 0."""
        self._passed = 0  # leaves, in all rounds
        self._summed: set[int] = set()  # where parts start that are in the slab
        self._write(0)

    @property
    def current(self) -> int:
        """The leaf whose backward is next, or under way."""
        return self._passed % self.count

    @property
    def buffer(self) -> Flat:
        """Where its gradient is written."""
        return self._buffers[self._place(self.current)]

    def next(self) -> None:
        """The backward of a leaf has ended, and another one follows."""
        self.layout.zero_unwritten(self.buffer)
        if self._stacked:
            self._merge(self.current, 0, self.layout.size)
        self._passed += 1
        self._write(self.current)
        if self._passed >= self.count:  # it has come before: this backward adds to it
            self.layout.mark_written()

    def finish(self, lo: int, hi: int) -> None:
        """No other leaf follows: let elements lo … hi of the slab be the sum, once."""
        if lo in self._summed:
            return
        self._summed.add(lo)
        for leaf in (self.count - 1,) if self._stacked else range(self.count):
            self._merge(leaf, lo, hi)

    def show(self) -> None:
        """All is in the slab: so is what ``parameter.grad`` says."""
        self._write(0)
        self.layout.mark_written()

    def _write(self, leaf: int) -> None:
        self.layout.point_grads(self._views[self._place(leaf)])

    def _place(self, leaf: int) -> int:
        """Of the subtree that starts with this leaf: on a stack, there is one below it for each bit."""
        return leaf.bit_count() if self._stacked else leaf

    def _merge(self, leaf: int, lo: int, hi: int) -> None:
        """Add the subtrees that are complete with this leaf."""
        size = 1
        while leaf & size:
            left = leaf & -2 * size  # where both together start
            into = self._buffers[self._place(left)][lo:hi]
            into += self._buffers[self._place(left + size)][lo:hi]
            size *= 2


def add_in_tree(parts: Sequence[Flat], work: Sequence[Flat]) -> Flat:
    """The upper levels: the sum of 2^k arrays, in ``work[0]``; ``work`` has k arrays, at least one."""
    add = array_module(work[0]).add
    if len(parts) == 2:
        add(parts[0], parts[1], out=work[0])
        return work[0]
    half = len(parts) // 2
    left = add_in_tree(parts[:half], work)
    right = add_in_tree(parts[half:], work[1:])
    add(left, right, out=left)
    return left
