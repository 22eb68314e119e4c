"""Synchronous data parallelism over messages: buckets leave while backward still runs.

What ``DataParallel`` is where the ranks share no memory. Each rank has its own w, optimizer state and gradients,
flat; nothing is updated once for all. Backward fills the gradients from the last layer to the first, and a copy
of each bucket leaves as soon as its last gradient is there, so that it travels while the layers before it are
computed (Li et al., "PyTorch Distributed", VLDB 2020, section 3.2):

    backward        g_i, times n_i; bucket k leaves when it is complete and buckets 0 … k−1 have left
    step            Σ n_i leaves, the buckets come back as Σ_i n_i g_i;  g = (Σ_i n_i g_i) / Σ n_i
                    w ← rule(w, g), the whole of it, the same on every rank

Bucket k is back at max(back_{k−1}, ready_k) + comm_k; only what backward could not hide is waited for.
"""

from __future__ import annotations

import math
from typing import Any

from minidp import trace
from minidp.autograd import Tensor
from minidp.comm import Communicator
from minidp.comm.reduction import sum_dtype
from minidp.comm.work import Work
from minidp.nn import Layout, Parameter
from minidp.parallel.blocks import Trouble
from minidp.parallel.buckets import Bucket
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.errors import NonFiniteGradient
from minidp.parallel.slabs import Flat, Slabs, private

VOID = -(2**62)  # in place of n_i: this rank has discarded what had left; no sum of sizes makes up for it
KINDS = (0.0, math.nan, math.inf, -math.inf)  # by index: a number that is said in an integer


class BucketedDataParallel(DataParallel):
    """See ``DataParallel``, which yields this class where memory is not shared: the same arguments, and the same
    bits of w after every step.

    Guarantees across ranks: all-reduces are begun in the order of the buckets, whatever order the gradients come
    in and whichever parameters a rank has not used. A step is committed by all ranks or by none: every rank holds
    the same sum and decides alike.

    Cost of a step, Ψ elements of s bytes (half precision travels in float32: s = 4): one all-reduce a bucket, Ψs
    bytes together; an all-gather of one number, which is hidden behind the last bucket; no barrier. Each rank
    updates all of w: N times the arithmetic of the shared slabs. Memory a rank: (3 + slots)Ψ, the third for what
    travels: it comes back as the sum, and the rank's own gradients are still needed where a step is discarded.
    ``bytes_sent`` of ``metrics`` is what the all-reduces of buckets have counted.

    Hooks are on the parameters only during the last backward of a step, and run after the user's own: these may
    still change gradients. After that backward it is too late, for they have left.
    """

    def _start(self, comm: Communicator) -> tuple[Slabs, list[tuple[int, int]], list[Flat]]:
        slabs = self._replicate(self.optimizer.slots)
        # Duplicates: what is in flight holds up no other collective, and Σ n_i does not queue behind the buckets.
        self._moving = comm.duplicate(f"{self.label} buckets")
        self._counting = comm.duplicate(f"{self.label} samples")
        self._exchanged = self._moving.traffic
        # Whose sums are the upper levels of the tree of micro-shards: ranks 0 and 1, 2 and 3, then pairs of pairs.
        self._order = None if self.micro_shards is None else "recursive_doubling"
        own = slabs.grads[0]
        travels = private(own.size, sum_dtype(own.dtype), comm.device)  # wide enough for the sum
        self._views = [(own[b.lo : b.hi], travels[b.lo : b.hi]) for b in self.buckets]
        self._home = _homes(self.layout, self.buckets)  # of each parameter, the index of its bucket
        self._missing: list[set[Parameter]] = []  # of each bucket, whose gradients this backward still owes
        self._left: list[Work] = []  # this step's buckets that have left, in order
        self._void: list[Work] = []  # those of a discarded step, and its count
        return slabs, [(0, self.layout.size)], [travels]

    def backward(self, loss: Tensor, samples: int, gradient: Any = None) -> None:
        if self._backwards != self._most_backwards - 1:
            super().backward(loss, samples, gradient)
            return
        self._missing = [set() for _ in self.buckets]
        for parameter, k in self._home.items():
            self._missing[k].add(parameter)
        removers = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._home]
        try:
            super().backward(loss, samples, gradient)
        finally:
            for remove in removers:
                remove()
        self._send_rest()

    def _add_leaves(self) -> None:
        self._send_rest()  # which adds them bucket by bucket
        if self._tree is not None:
            self._tree.show()

    def discard(self) -> None:
        """Forget the gradients of the step that has begun, and a failure in it. Not collective.

        What has left can't be called back. It is declared void, and all ranks send once more: those that have
        discarded nothing the same gradients, this rank those of its next batch.
        """
        if self._left:
            self._send_rest()
            self._void = [*self._left, self._count(VOID)]
            self._left = []
        super().discard()

    # -- what leaves, and when -------------------------------------------------------------------------

    def _arrived(self, parameter: Parameter) -> None:
        """Backward has added the last piece of a gradient: send all buckets whose turn it is."""
        k, missing = self._home[parameter], self._missing
        if k < len(self._left):
            raise RuntimeError(
                f"a gradient of shape {parameter.shape} came after its bucket had left: an operation runs a "
                "backward of its own, which has reported it before. With accumulation_steps one higher than the "
                "number of backwards all gradients leave in step()"
            )
        missing[k].discard(parameter)
        while len(self._left) < len(missing) and not missing[len(self._left)]:
            self._send()

    def _send(self) -> None:
        """Begin the all-reduce of the next bucket."""
        bucket = self.buckets[len(self._left)]
        if self._tree is not None and self._backwards > 0:
            self._tree.finish(bucket.lo, bucket.hi)
        own, travels = self._views[bucket.index]
        while self._void:  # then all ranks have come to the discarded step, and its buffers are free
            self._void.pop(0).wait()
        travels[...] = own
        work = self._moving.all_reduce(travels, algorithm=self._order, async_op=True)
        assert work is not None
        self._left.append(work)

    def _send_rest(self) -> None:
        """Nothing more will be added: send the buckets of parameters that this rank has not used."""
        if len(self._left) < len(self.buckets):
            self.layout.zero_unwritten(self._own if self._tree is None else self._tree.buffer)
        while len(self._left) < len(self.buckets):
            self._send()

    def _count(self, samples: int) -> Work:
        return self._counting.all_gather_int(samples, "step/gradients", async_op=True)

    # -- the step --------------------------------------------------------------------------------------

    def _reduce_and_update(self, samples: int) -> None:
        total = self._meet(samples)
        if total == 0:
            return
        self._gather_layers()
        with trace.span("update", "compute"):
            self._average_and_update(total)

    def _tell(self, trouble: Trouble | None) -> None:
        if trouble is not None:  # all ranks see the same sum
            self._raise_found(trouble.element, trouble.value)

    def _meet(self, samples: int) -> int:
        """Σ n_i, and the sum of the gradients where they travel. Collective."""
        while True:
            self._send_rest()
            count = self._count(samples)
            for work in self._left:
                work.wait()
            total: int = sum(count.wait())
            self._left.clear()
            if total >= 0:
                return total

    def _raise_found(self, element: int, value: float) -> None:
        """All ranks come here: who brought it? Collective."""
        mine = float(self._own[element])
        kind = [math.isfinite(mine), math.isnan(mine), mine > 0, True].index(True)
        kinds = self.comm.all_gather_int(kind, "step/not finite")
        rank = next((rank for rank, kind in enumerate(kinds) if kind), -1)
        (name, *_) = self.layout.names_at(element, element + 1)
        raise NonFiniteGradient(name, rank, self.updates, value if rank < 0 else KINDS[kinds[rank]])


def _homes(layout: Layout, buckets: list[Bucket]) -> dict[Parameter, int]:
    """Which bucket each parameter is in: both are numbered along the layout, the buckets from its end."""
    homes, k = {}, 0
    for segment in reversed(layout.segments):
        while segment.offset < buckets[k].lo:
            k += 1
        homes[segment.parameter] = k
    return homes
