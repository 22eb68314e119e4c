"""Hogwild! (article 3.3.2): no server, no lock; all ranks update one w, and sometimes overwrite each other.

    forward, backward   of the w that lies there, while others write it: ∇L_i of this rank's batch
    support             the elements at which ∇L_i is not 0
    read                w of the support, and how often it was written
    update              w' = rule(w, n_i ∇L_i / n̄): this rank's learning rate, this rank's state
    write               w' of the support. Whoever has written there since the read has lost that

A dense ``w -= η g`` would write the zeros as well, and with them old values over what others wrote: it is the
support that makes the idea work. Where it is all of w (an MLP), only luck keeps updates apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from minidp import trace
from minidp.autograd import Tensor
from minidp.backend import array_module, item
from minidp.comm import Communicator
from minidp.nn import Module
from minidp.optim import Optimizer
from minidp.parallel.blocks import Block, cut_blocks, divided, sum_in_order
from minidp.parallel.buffers import mean_buffers
from minidp.parallel.shared_weights import STEPS, WRITES, SharedWeights
from minidp.parallel.slabs import Slabs
from minidp.parallel.strategy import StateDict, Strategy


class Hogwild(Strategy):
    """Every rank steps for itself, on one w that all share: ranks wait for nobody.

    A step is w ← w − η n_i ∇L_i / n̄ (or another rule of ``optim``) on the support of ∇L_i, with this rank's n_i
    samples. So N ranks' steps together move w about N times as far as one synchronous step: compare at η/N.

    Args:
        model, optimizer: built alike on every rank; the optimizer from ``model.parameters()``.
        comm: ranks that share memory: of the process world, or of the virtual one.
        accumulation_steps: backwards that may be added up before a step.
        check_finite: raise NonFiniteGradient, on this rank, before anything is written of a gradient with NaN or
            infinity.
        nominal_batch: n̄, the samples of a full step. None: those of this rank's first step that has any. Give it
            where ranks' batches differ in size on purpose, or where a training may go on with a short batch.
        count_lost: count lost updates (``metrics``). Makes a step, forward and backward included, of two ranks on
            two cores 5 to 8 % longer for an MLP of 2,400 weights, 6 to 21 % for one of 1.1 million; and the time
            between reading and writing w, in which updates can be lost.

    Guarantees: one w, rank 0's at first; ``state_dict`` is the same on all ranks. Updates with disjoint supports
    are all there, to the bit, in whatever order they came. Otherwise each element is what some rank has written
    last, and other updates may be missing in it. A rank without samples writes nothing. Ranks may make different
    numbers of steps. A process run can't be repeated; a virtual one is the same to the bit. There a rank reads a
    block of w when the block's update begins and writes it when that ends, by the clock: so equal ranks without
    jitter, in lock step, lose all but one of N updates of an element.

    The optimizer's state is private, and moves only where w does: momentum and weight decay rest where the
    gradient is 0, as in torch's SparseAdam. t counts this rank's steps. One rank alone, on full batches, has the
    bits of ``DataParallel``: by plain SGD always, by other rules where no gradient is 0.

    Cost of a step: no message and no wait; a pass over the whole gradient, which finds its support, the rest in
    proportion to that. By SGD, of 1.1 million weights, on one rank, without counting: 1.0 ms where no gradient is
    0; 3.8 ms where a quarter of them is, so that indices cost more than they save; ``DataParallel`` takes 0.6 ms.
    Traffic: what this rank writes, once for each peer, and what the peers write. Memory, Ψ elements of s bytes: Ψs
    of all ranks together (and 8Ψ with ``count_lost``), (2 + slots) Ψs a rank.
    On a device all of it lies there. The host waits for it, to see whether the gradient is finite and how many
    elements support it; what it counts as written may still be under way.

    Raises ValueError if the ranks, or their devices, share no memory, TypeError for Python objects (Fractions):
    they can't lie there.

    Source: Niu, Recht, Ré & Wright, "Hogwild!: A Lock-Free Approach to Parallelizing Stochastic Gradient Descent",
    NIPS 2011: algorithm 1 in section 3; section 2 for problems whose gradients are sparse.
    """

    label = "Hogwild"
    together = False
    private_state = True

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        *,
        accumulation_steps: int = 1,
        check_finite: bool = True,
        nominal_batch: int | None = None,
        count_lost: bool = True,
    ) -> None:
        if nominal_batch is not None and nominal_batch < 1:
            raise ValueError(f"nominal_batch={nominal_batch}: the samples of a full step, at least one")
        if any(np.dtype(parameter.dtype).hasobject for parameter in model.parameters()):
            raise TypeError("Hogwild: the parameters hold Python objects, which can't lie in shared memory")
        self.nominal_batch, self.count_lost = nominal_batch, count_lost
        super().__init__(model, optimizer, comm, accumulation_steps, check_finite=check_finite)
        self._shared = SharedWeights(self.layout, self.comm, count_lost)
        # Gradient and state; its params: w as it was read.
        self._own = Slabs(self.layout, optimizer.slots, None, comm.device)
        self._blocks = cut_blocks(self.layout, optimizer, self._own, [(0, self.layout.size)], self._own.grads, 0)
        ends = [(s.offset, s.offset + s.size) for s in self.layout.segments]
        # Elements of each block, without the padding between parameters.
        self._sizes = [sum(max(0, min(b.hi, hi) - max(b.lo, lo)) for lo, hi in ends) for b in self._blocks]
        self._begun = self._received = 0
        self._own_samples = 0  # since all ranks had the same buffers
        self._broadcast_rest()
        if self.comm.rank == 0:
            self.layout.pack(self._shared.w)
        self.comm.barrier()
        self.layout.point(self.layout.views(self._shared.readable))
        self._own.bind_grads(0)
        self._start_gradients()

    # -- a step ----------------------------------------------------------------------------------------

    def forward_backward(self, x: Any, y: Any, loss_fn: Callable[[Tensor, Any], Tensor]) -> Tensor:
        self._look()
        return super().forward_backward(x, y, loss_fn)

    def _start_gradients(self) -> None:
        self.layout.clear_written()
        self._look()

    def _look(self) -> None:
        """What comes now reads w as all have written it until now; a step's first look is its gradient's age."""
        self.comm.settle()
        if self._backwards == 0:
            self._begun = self._shared.steps()

    def _reduce_and_update(self, samples: int) -> None:
        if samples == 0:
            return
        if self.nominal_batch is None:
            self.nominal_batch = samples
        self.layout.zero_unwritten(self._own.grads[0])
        self._layers.gather(self.check_finite, self.updates)
        if self.check_finite:
            self._check_gradient(self._own.grads[0])
        with trace.span("update", "compute"):
            self.comm.settle()
            staleness = self._shared.steps() - self._begun  # this rank has written none in between
            hyper = [self.optimizer.hyper(group, self.updates) for group in range(len(self.optimizer.groups))]
            written = sum(
                self._update(block, size, self.nominal_batch, hyper[block.group])
                for block, size in zip(self._blocks, self._sizes)
            )
        self._shared.tally[self.comm.rank, STEPS] += 1
        self._own_samples += samples
        self._staleness[staleness] += 1
        self._count_traffic(written)

    def _update(self, block: Block, size: int, nominal: int, hyper: Mapping[str, Any]) -> int:
        """w ← rule(w, n_i ∇L_i / n̄) where this block's gradient is not 0; how many elements that are."""
        shared, (gradient,), all_state = self._shared.w[block.lo : block.hi], block.parts, block.state[0]
        found = gradient != 0
        xp = array_module(gradient)
        count = int(np.count_nonzero(found) if xp is np else item(xp.count_nonzero(found)))
        if count == 0:
            return 0
        whole = count == size
        at: Any = ... if whole else xp.flatnonzero(found)
        state = {slot: array[at] for slot, array in all_state.items()}  # views if whole, else copies
        # Read: w and its counter at one moment, as near as can be.
        if whole:
            w = block.params[0]
            w[...] = shared
        else:
            w = shared[at]
        counters = self._shared.counters
        if counters is not None:
            counted = counters[block.lo : block.hi][at] + 1
        mean = block.mean[: w.size]
        self.optimizer.update(
            w,
            divided(sum_in_order([gradient[at]], mean), nominal, mean, w.dtype),  # half precision in float32
            state,
            w,
            state,
            lr=hyper["lr"],
            t=self.updates,
            hyper=hyper,
            scratch=tuple(array[: w.size] for array in block.scratch),
        )
        self.optimizer.count_update(w.size, w.itemsize)
        self.comm.settle()  # what others have read and written in the meantime is lost, to them or to us
        self._shared.tally[self.comm.rank, WRITES] += count
        shared[at] = w
        if counters is not None:
            counters[block.lo : block.hi][at] = counted
        if not whole:
            for slot, array in all_state.items():
                array[at] = state[slot]
        return count

    # -- what it counts --------------------------------------------------------------------------------

    def _count_traffic(self, written: int) -> None:
        """Zero-copy: each peer reads what this rank wrote, and this rank what the peers did."""
        comm, itemsize = self.comm, self.layout.itemsize
        received = self._shared.written() - int(self._shared.tally[comm.rank, WRITES])
        peers = comm.world_size - 1
        self._exchanged.add(written * peers * itemsize, (received - self._received) * itemsize, peers)
        self._received = received

    @property
    def metrics(self) -> dict[str, float]:
        """See ``Strategy.metrics``; staleness counts steps that others wrote between the w that a gradient is of
        and the w that it changed (a forward outside of ``forward_backward``: from the end of the step before).

        Of all ranks since construction: ``updates_written``, writes of an element; ``lost_updates``, those of them
        that another rank overwrote without having read them (with ``count_lost``). See ``SharedWeights``: final
        when nobody is in a step.
        """
        lost = {"lost_updates": self._shared.lost()} if self.count_lost else {}
        return {
            **super().metrics,
            "updates_written": self._shared.written(),
            **lost,
        }

    # -- state -----------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """The full model, dotted names to host arrays: the same on every rank. Collective: waits for all ranks.

        Buffers, which each rank has moved by its own batches, become their mean first: see ``mean_buffers``.
        """
        self.comm.all_gather_int(0, "state_dict")
        self.consolidate()
        state = self.model.state_dict()
        self.comm.all_gather_int(0, "state_dict")  # whoever goes on writes what others may still be copying
        return state

    def consolidate(self) -> None:
        mean_buffers(self.comm, self.model, self._own_samples)
        self._own_samples = 0

    def optimizer_state(self) -> Mapping[str, StateDict]:
        names = [segment.name for segment in self.layout.segments]
        return {slot: dict(zip(names, self.layout.views(array))) for slot, (array, _) in self._own.state.items()}

    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        # All ranks have met in the caller: nobody is in a step.
        self._put_rest(values)
        self._own_samples = 0
        self._own.stage(values, state)
        if self.comm.rank == 0:
            self._shared.w[...] = self._own.params[0]
        self.comm.all_gather_int(0, "load_state_dict")

    def _options(self) -> tuple[Any, ...]:
        return *super()._options(), self.nominal_batch, self.count_lost
