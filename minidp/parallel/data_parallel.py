"""Synchronous data parallelism (article 3.1, 3.3.1): averaged gradients, the same update everywhere.

``naive.py`` beside this file is the article's text as code. This one does the same sums in the same order, bit
for bit, without copying: gradients lie in shared memory, each rank adds up its own slice of everybody's, applies
the update to that slice of the one shared copy of w, and two barriers make it a step.

    backward        g_i, times n_i, written into rank i's slab
    barrier         everybody's gradients are there, and Σ n_i is known
    my slice        g = (Σ_i n_i g_i) / Σ n_i, in order of rank;  w' = rule(w, g) into the other buffer
    barrier         all slices are written: flip, w' is w

``bucketed.py`` is the same for ranks that share no memory, ``compressed.py`` for payloads in place of gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import repeat
from typing import Any, Self

from minidp import trace
from minidp.autograd import Tensor
from minidp.backend import array_module
from minidp.comm import Communicator
from minidp.compress import Compressor, resolved
from minidp.nn import Module
from minidp.optim import Optimizer
from minidp.parallel.blocks import Block, Trouble, cut_blocks, divided, exact_scale, find_trouble, sum_in_order
from minidp.parallel.buckets import make_buckets, pieces, slices
from minidp.parallel.errors import CorruptGradient
from minidp.parallel.micro_shards import Leaves, OneBlasThread, add_in_tree, check_model, leaves_of
from minidp.parallel.norms import norm_on
from minidp.parallel.replica import Replica, raise_first
from minidp.parallel.seals import Seals
from minidp.parallel.slabs import Flat, Slabs
from minidp.parallel.strategy import StateDict, Strategy


class DataParallel(Strategy):
    """N replicas, N shards, one model: N workers equal one worker.

    Args:
        model, optimizer: built alike on every rank; the optimizer from ``model.parameters()``.
        comm: the ranks that train together. Where they share no memory (``not comm.shares_memory``) this class
            yields a ``BucketedDataParallel``: the same in messages; and where models lie on a device, what is
            like either and does not wait for it (``late.py``).
        compress: what gradients travel as: the name of a compressor, such as ``"topk:0.01+ef"``, or one of
            ``minidp.compress``. This class then yields a ``CompressedDataParallel``. Not with ``micro_shards``.
        accumulation_steps: backwards that may be added up before a step.
        micro_shards: V, a power of two that the number of ranks divides: the bits of w are then the same for every
            such number, on one machine and library build (see ``micro_shards.py``). The global batch must be the
            same, too: ``DataLoader(global_batch_size=)``. Until ``release`` this process runs BLAS in one thread.
        bucket_cap_mb: gradients leave in buckets of about this size: in shared memory all in ``step``, in messages
            during the last backward. Their order is fixed, and the result does not depend on this number.
        clip_norm: scale the averaged gradient down to this 2-norm if it is longer.
        check_finite: raise NonFiniteGradient, on all ranks, rather than commit a step whose averaged gradient
            holds NaN or infinity. (An update can still overflow where the learning rate is absurd.) Of models on a
            device it is raised by the next ``step``, ``state_dict`` or ``save``, which take the bad step back.
        checksum: raise CorruptGradient, on all ranks, if a rank's gradients have changed in shared memory after
            its backward. Costs two barriers more and reading all gradients on every rank, from a device by moving
            them to the host. Where they travel in messages there is nothing to check: what leaves is a copy.
        replica: the ranks that share a replica with this one, where `HybridParallel` spreads it.

    Cost of a step, Ψ elements of s bytes: sent 2(N−1)/N Ψs a rank (its gradients that peers read, and its slice
    of w that they read), two barriers (one more with ``clip_norm``, and one with batch norm, whose statistics are
    gathered: ``layer_state.py``), the update done once instead of N times.
    Memory: see ``slabs.py``. Sources: Li et al., VLDB 2020; Rajbhandari et al., "ZeRO", SC 2020 (sharded update).
    """

    label = "DataParallel"

    def __new__(cls, model: Module, optimizer: Optimizer, comm: Communicator, **options: Any) -> Self:
        from minidp.parallel.variants import variant_of  # late: they are subclasses

        variant = variant_of(cls, comm, options.get("compress") is not None)
        return super().__new__(variant)  # type: ignore[return-value]

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        *,
        compress: Compressor | str | None = None,
        micro_shards: int | None = None,
        accumulation_steps: int = 1,
        bucket_cap_mb: float = 25,
        clip_norm: float | None = None,
        check_finite: bool = True,
        checksum: bool = False,
        replica: Replica | None = None,
    ) -> None:
        self.bucket_cap_mb, self.micro_shards, self.checksum = bucket_cap_mb, micro_shards, checksum
        self._replica = replica or Replica()
        self._blas: OneBlasThread | None = None
        leaves = 1 if micro_shards is None else leaves_of(micro_shards, comm.world_size)
        if micro_shards is not None:
            if compress is not None:
                raise ValueError(f"micro_shards={micro_shards} gives exact bits, compress={compress!r} does not")
            check_model(model)
        self._compress = compress
        self._described = None if compress is None else resolved(compress).describe()  # names are checked here
        super().__init__(model, optimizer, comm, accumulation_steps, clip_norm, check_finite, leaves)
        self.buckets = make_buckets(self.layout, bucket_cap_mb)
        self._slabs, self._slices, self._parts = self._start(comm)
        of_norm = pieces(self.layout, 0, self.layout.size)
        self._norm = norm_on(comm.device.xp, of_norm, self._slices)
        self._replica.prepare(self.layout, of_norm, self._layers.gathers)
        # One gradient slab: what this rank adds up is the whole.
        self._alone = len(self._slabs.grads) == 1
        # Whether w is updated in place: then all gradients are looked at before any of it is written.
        self._one_buffer = self._slabs.params[0] is self._slabs.params[1]
        self._own = self._slabs.grads[0 if self._alone else self.comm.rank]
        upper = 0 if micro_shards is None else len(self._parts).bit_length() - 2
        self._blocks = cut_blocks(self.layout, self.optimizer, self._slabs, self._slices, self._parts, upper)
        self._mine = sum(hi - lo for lo, hi in self._slices)  # elements
        self._hyper: list[dict[str, Any]] = []  # of each parameter group, in this step
        self._scale = 1.0
        self._seals = Seals(self.comm, self._slabs.grads, self._own) if checksum else None
        self._troubles: list[Trouble] = []  # of this rank's blocks, in this step
        self._tree: Leaves | None = None
        if leaves > 1:
            self._tree = Leaves(self.layout, self._own, leaves, accumulation_steps, comm.device)
        if micro_shards is not None:
            self._blas = OneBlasThread()

    def _start(self, comm: Communicator) -> tuple[Slabs, list[tuple[int, int]], list[Flat]]:
        """Slabs with rank 0's w in them; which slices this rank sums and updates; the gradients to be summed."""
        slabs = Slabs(self.layout, self.optimizer.slots, self.comm, self.comm.device, self.late)
        self._broadcast_rest()
        if self.comm.rank == 0:
            self.layout.pack(slabs.params[1])
        slabs.bind_grads(self.comm.rank)
        self.comm.barrier()
        slabs.flip()
        rank, world_size = self.comm.rank, self.comm.world_size
        return slabs, [slices(self.layout, bucket, world_size)[rank] for bucket in self.buckets], slabs.grads

    def optimizer_state(self) -> Mapping[str, StateDict]:
        now, names = self._slabs.current, [segment.name for segment in self.layout.segments]
        return {
            slot: dict(zip(names, self.layout.views(buffers[now]))) for slot, buffers in self._slabs.state.items()
        }

    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        self._put_rest(values)
        if self.comm.rank == 0 or self._alone:
            self._slabs.stage(values, state)
        self.comm.all_gather_int(0, "load_state_dict")
        self._slabs.flip()

    def _options(self) -> tuple[Any, ...]:
        return (*super()._options(), self.bucket_cap_mb, self.micro_shards, self.checksum, self._described)

    def memory(self) -> dict[str, int]:
        """Bytes of this rank's arrays: see `Slabs.memory`; and of those that gradients travel in."""
        travel = [part for part in self._parts if all(part is not grad for grad in self._slabs.grads)]
        own = self._slabs.memory(0 if self._alone else self.comm.rank)
        return own | {"communication": sum(part.nbytes for part in travel)}

    def release(self) -> None:
        super().release()
        if self._blas is not None:
            self._blas.let_go()
            self._blas = None

    # -- a step ----------------------------------------------------------------------------------------

    def _start_gradients(self) -> None:
        if self._seals is not None:
            self._seals.begin()
        if self._tree is None:
            self.layout.clear_written()
        else:
            self._tree.begin()

    def backward(self, loss: Tensor, samples: int, gradient: Any = None) -> None:
        super().backward(loss, samples, gradient)
        last = self._backwards == self._most_backwards
        if self._tree is not None:
            if last:
                self._add_leaves()
            else:
                self._tree.next()
                self._layers.at_leaf(self._tree.current)
        if self._seals is not None and last:
            self.layout.zero_unwritten(self._own)
            self._seals.seal()

    def _check_backward(self) -> None:
        super()._check_backward()
        if self._blas is not None:
            self._blas.enforce()

    def discard(self) -> None:
        if isinstance(self._poison, CorruptGradient):
            self._own[...] = 0  # what was changed may lie where no gradient is written
        super().discard()

    def _add_leaves(self) -> None:
        """The last micro-shard of the step has come."""
        if self._tree is not None and self._backwards:
            self.layout.zero_unwritten(self._tree.buffer)
            self._tree.finish(0, self.layout.size)
            self._tree.show()

    def _reduce_and_update(self, samples: int) -> None:
        if self._backwards < self._most_backwards:
            self._add_leaves()
        self.layout.zero_unwritten(self._own)
        mine = 0 if self._seals is None else self._seals.seal()
        with trace.span("wait for gradients", "wait"):
            total = sum(self.comm.all_gather_int(samples, "step/gradients"))  # Σ n_i
        if self._seals is not None:
            self._seals.verify(mine, self.updates)
        if total == 0:
            return
        self._gather_layers()
        with trace.span("reduce and update", "compute"):
            self._average_and_update(total)
        self._count_traffic()
        if not self._one_buffer:
            with trace.span("wait for parameters", "wait"):
                self._judge()
        self._slabs.flip()

    def _gather_layers(self) -> None:
        """Everybody's statistics, before the update is committed. Collective, if there are any."""
        if self._replica.gathers:
            with self._replica.one_verdict():
                self._layers.gather(self.check_finite, self.updates)

    def _judge(self) -> None:
        """NonFiniteGradient on all ranks, of all the replicas, if one has found something in a sum. Collective."""
        with self._replica.one_verdict():
            self._tell(min(self._troubles, default=None))

    def _tell(self, trouble: Trouble | None) -> None:
        """A committed step is one that no rank found fault with: 0 from everybody. Collective."""
        elements = self.comm.all_gather_int(0 if trouble is None else 1 + trouble.element, "step/parameters")
        if any(elements):
            raise_first(self.comm, self.layout, elements, trouble, self.updates)

    def _average_and_update(self, total: int) -> None:
        """∇L and w' of this rank's blocks. With ``_troubles`` in them w' is void, if there are two buffers."""
        self._troubles.clear()
        self._scale = exact_scale(total, self.layout.dtype)
        self._hyper = [self.optimizer.hyper(group, self.updates) for group in range(len(self.optimizer.groups))]
        gradients: Iterable[Flat] = map(self._reduce, self._blocks, repeat(total))
        if self._one_buffer:
            gradients = list(gradients)
            self._judge()
        if self.clip_norm is not None:
            gradients = self._clipped(gradients, self.clip_norm)
        for block, gradient in zip(self._blocks, gradients):  # each while it is in the cache
            self._update(block, gradient)

    def _reduce(self, block: Block, total: int) -> Flat:
        """∇L = Σ n_i ∇L_i / Σ n_i on this block, in order of rank; half precision is summed in float32.

        Where the division is exact it is left to the update, as its ``scale``: the same bits, a pass less.
        """
        out, parts = block.mean, block.parts
        if len(parts) > 2 and self.micro_shards is not None:
            summed = add_in_tree(parts, (out, *block.upper))
        else:
            summed = sum_in_order(parts, out)
        if self.check_finite:
            self._look(block, summed)
        if self._scale != 1:
            return summed
        return divided(summed, total, out, block.params[0].dtype)

    def _look(self, block: Block, summed: Flat) -> None:
        """Note what is not finite in the sum of a block. Waits for a device."""
        self._troubles += find_trouble(block, summed)

    def _update(self, block: Block, gradient: Flat) -> None:
        """w' ← rule(w, ∇L) on this block, from the current buffers into the others."""
        now, after = self._slabs.current, 1 - self._slabs.current
        hyper = self._hyper[block.group]
        self.optimizer.update(
            block.params[now],
            gradient,
            block.state[now],
            block.params[after],
            block.state[after],
            lr=hyper["lr"],
            t=self.updates,
            hyper=hyper,
            scratch=block.scratch,
            scale=self._scale,
        )
        self.optimizer.count_update(gradient.size, gradient.itemsize)

    def _clipped(self, gradients: Iterable[Flat], clip_norm: float) -> list[Flat]:
        """The mean, scaled down to the norm. Collective.

        My slice of the mean replaces my slice of my own gradients: nobody else reads that place.
        """
        mine, multiply = self._own, array_module(self._own).multiply
        for block, gradient in zip(self._blocks, gradients):
            multiply(gradient, self._scale, out=mine[block.lo : block.hi])
        squares = self._norm.squares(mine)
        if not self._alone:
            self.comm.all_reduce(squares)  # each piece has one rank that is not zero there: exact
        squares = self._replica.everybodys(squares)
        self._scale = 1.0
        scale = self._norm.clip_scale(squares, clip_norm, self.layout.dtype)
        clipped = [mine[block.lo : block.hi] for block in self._blocks]
        for gradient in clipped:
            multiply(gradient, scale, out=gradient)
        return clipped

    def _count_traffic(self) -> None:
        """Zero-copy: peers read my gradients outside my slice, and each reads my slice of w."""
        peers = self.comm.world_size - 1
        each_way = (self.layout.size - self._mine + self._mine * peers) * self.layout.itemsize
        self._exchanged.add(each_way, each_way, 2 * peers)
