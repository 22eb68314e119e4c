"""What all strategies have in common: the life of one step, from the first backward to the update."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal
from weakref import ref

import numpy as np

from minidp import trace
from minidp.autograd import Tensor, no_grad
from minidp.backend import array_module, asarray, item
from minidp.comm import Communicator, Traffic
from minidp.data.sharding import cut
from minidp.nn import Layout, Module
from minidp.optim import Optimizer
from minidp.parallel.agreement import (
    agree,
    check_alone,
    check_free,
    check_numbers,
    check_parameters,
    describe,
    owners,
)
from minidp.parallel.blocks import first_not_finite
from minidp.parallel.errors import CorruptGradient, NonFiniteGradient
from minidp.parallel.layer_state import LayerState
from minidp.parallel.slabs import Slabs
from minidp.parallel.state import StateDict, Stateful

__all__ = ["StateDict", "Strategy"]

WHOLE = (int, np.integer)


class Strategy(Stateful):
    """Trains ``model`` together with the other ranks of ``comm``. Built by all ranks; collective.

    The loop is the same for every strategy::

        for x, y in loader.epoch(epoch):
            loss = strategy.forward_backward(x, y, F.cross_entropy)
            strategy.step()

    Guarantees: after construction the model lies on ``comm.device``, and every rank holds rank 0's parameters and
    buffers, whatever it was built with. One ``step`` is one update. After an exception in forward or backward,
    ``step`` raises until ``discard`` is called.

    Raises:
        CollectiveMismatch: the ranks' models or optimizers differ.
        ValueError: the model belongs to another strategy, or the optimizer's parameters are not the model's.
        TypeError: a model of Python objects (Fractions) where models are to lie on a device.
    """

    together: bool = True
    """Whether a step is one of all ranks; otherwise each makes its own, and batch norm goes by its own batches."""

    _in_traces = "backward"
    """What traces call the next one."""

    late: bool = False
    """Whether a step is committed before it is known to be good (``late.py``)."""

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        check_finite: bool = True,
        leaves: int = 1,
    ) -> None:
        if accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={accumulation_steps}: at least one backward makes a step")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm={clip_norm}: give a positive norm, or None for no clipping")
        self.model, self.optimizer = model, optimizer
        self.accumulation_steps, self.clip_norm, self.check_finite = accumulation_steps, clip_norm, check_finite
        self.layout = Layout(model)
        if np.dtype(self.layout.dtype).hasobject:
            self.check_finite = False  # Fractions can't be infinite, and NumPy can't ask them
        check_free(model)
        if not self.together:
            check_alone(model, self.label)
        check_parameters(model, optimizer)
        if not comm.device.on_host:
            check_numbers(model, comm.device)
            model.to(comm.device)
        # A duplicate, so that the user's own collectives can't come between ours.
        self.comm = comm.duplicate(self.label)
        mine = self.layout.describe(), repr(model), describe(optimizer, self.layout), self._options()
        agree(self.comm, mine, self.label)
        self.seed: int = self.comm.broadcast_object(model.init_seed, 0, f"{self.label}(…)")
        owners[model] = ref(self)
        self.updates = 0
        self._exchanged = Traffic(parent=self.comm.traffic)
        self._staleness: Counter[int] = Counter()
        self._leaves = leaves  # micro-shards that this rank's batch is cut into
        self._most_backwards = accumulation_steps * leaves  # that make a full step
        self._backwards = self._samples = 0
        self._layers = LayerState(model, self.comm, self.seed, leaves, self.together)  # of any forward

    # -- the loop --------------------------------------------------------------------------------------

    @property
    def shard(self) -> tuple[int, int]:
        """(index, count) on the data-parallel axis: what a DataLoader needs to give this rank its share."""
        return self.comm.rank, self.comm.world_size

    def forward_backward(self, x: Any, y: Any, loss_fn: Callable[[Tensor, Any], Tensor]) -> Tensor:
        """The loss of this rank's batch, and its gradient ∇L_i, weighted with its number of samples.

        Args:
            x, y: inputs and targets, arrays with the same length along axis 0 (0 is allowed).
            loss_fn: ``loss_fn(model(x), y)`` is a mean over the batch.

        Returns: the loss on this rank, shape (), without a graph. Sent: nothing, but by `SyncBatchNorm`.
        """
        if self._leaves == 1:
            return self._forward_backward(x, y, loss_fn)
        total: Any = 0
        for start, stop in cut(len(x), self._leaves):
            loss = self._forward_backward(x[start:stop], y[start:stop], loss_fn)
            total = total + loss.data * (stop - start)
        return Tensor(asarray(total / max(1, len(x)), array_module(loss.data), loss.dtype))

    def _forward_backward(self, x: Any, y: Any, loss_fn: Callable[[Tensor, Any], Tensor]) -> Tensor:
        self._check_backward()
        try:
            if isinstance(x, np.ndarray) and x.dtype.kind == "f":
                x = self.comm.device.asarray(x)  # once, however often the model uses it; see Function.moves
            with trace.span("forward", "compute"):
                loss = loss_fn(self.model(x), y)
        except BaseException as error:
            self._poison = error
            raise
        self.backward(loss, samples=len(x))
        return loss.detach()

    def predict(self, x: Any) -> Tensor:
        """The model's result for inputs ``x``, without a graph; in evaluation after ``model.eval()``."""
        with no_grad():
            result: Tensor = self.model(x)
        return result

    def backward(self, loss: Tensor, samples: int, gradient: Any = None) -> None:
        """Add n_i ∇L_i to this rank's gradients: ``loss`` is a mean over ``samples`` items (tokens, for text).

        ``gradient`` is for pipelines: ``loss`` then is no loss but what was sent to the next stage, and this what
        has come back, n_i ∂L_i/∂``loss``.

        May be called ``accumulation_steps`` times before ``step``. With 0 samples it adds zeros. With
        ``micro_shards=V`` each call is one micro-shard, V/N make a backward of this rank's batch: forward,
        backward, forward, backward, as dropout counts them.
        """
        self._check_backward()
        if not isinstance(samples, WHOLE) or samples < 0:
            raise ValueError(f"samples={samples!r}: the number of items that the loss is a mean over, 0 or more")
        try:
            with trace.span(self._in_traces, "compute"):
                if gradient is None:
                    loss.backward(gradient=int(samples))
                elif loss.requires_grad:  # else nothing of this stage is learnt
                    loss.backward(gradient)
        except BaseException as error:
            self._poison = error
            raise
        self._backwards += 1
        self._samples += int(samples)

    def step(self) -> None:
        """∇L = Σ n_i ∇L_i / Σ n_i ;  w ← w − η ∇L ; synchronise. Collective.

        Without a backward this rank takes part with 0 samples. If no rank has any, there is no gradient: the
        step counts, nothing changes. Afterwards all ranks hold the same parameters, bit for bit.

        Raises: NonFiniteGradient on all ranks (with ``check_finite``; on a device perhaps of the step before),
            CorruptGradient (with ``checksum``), RuntimeError after a failed backward, CommError. The parameters
            are then those of the last good step.
        """
        if self._poison is not None:
            raise RuntimeError(
                f"a forward or backward of this step failed ({type(self._poison).__name__}: {self._poison}), so "
                "its gradients are incomplete: call strategy.discard(), then go on with the next batch"
            ) from self._poison
        if self._backwards == 0 and any(segment.parameter.grad is not None for segment in self.layout.segments):
            raise RuntimeError(
                "there are gradients that the strategy knows nothing of: call strategy.backward(loss, samples=n) "
                "in place of loss.backward(), so that they can be weighted with n"
            )
        if self._backwards % self._leaves:
            raise RuntimeError(
                f"backward was called {self._backwards} times: here {self._leaves} micro-shards make this rank's "
                "batch. Call strategy.forward_backward(x, y, loss_fn), which cuts it, or backward once for each"
            )
        try:
            with np.errstate(all="ignore"):  # NaN and infinity are looked for, not stumbled over
                self._reduce_and_update(self._samples)
            self._layers.commit()
        except (NonFiniteGradient, CorruptGradient) as error:
            self._poison = error
            raise
        self.updates += 1
        self._start_step()
        self.comm.progress(self.updates)

    def discard(self) -> None:
        """Forget the gradients of the step that has begun, and a failure in it. Not collective."""
        self._check_not_released()
        self._poison = None
        self._start_step()

    def _start_step(self) -> None:
        self._backwards = self._samples = 0
        self._layers.begin(self.updates)
        self._start_gradients()

    def prune(self, density: float, scope: Literal["global", "each"] = "global") -> dict[str, np.ndarray]:
        """See ``CompressedDataParallel.prune``."""
        raise RuntimeError(
            "weights can be pruned where only some gradients need to travel: build the strategy as "
            'DataParallel(…, compress="none"), or with another compressor'
        )

    # -- what it counts --------------------------------------------------------------------------------

    @property
    def in_step(self) -> bool:
        """Whether this rank has begun a step: there was a backward, or a failure, since the last one."""
        return self._backwards > 0 or self._poison is not None

    @property
    def metrics(self) -> dict[str, float]:
        """Counts: steps, with those of a checkpoint; bytes of gradients and parameters that this rank has sent and
        received since construction (``comm.traffic`` has all); mean and maximum of ``staleness_counts``."""
        late = self._staleness
        return {
            "steps": self.updates,
            "bytes_sent": self._exchanged.bytes_sent,
            "bytes_received": self._exchanged.bytes_received,
            "staleness_mean": sum(tau * count for tau, count in late.items()) / max(1, late.total()),
            "staleness_max": float(max(late, default=0)),
        }

    @property
    def staleness_counts(self) -> dict[int, int]:
        """{τ: count}: how many of this rank's gradients since construction met a w that had been updated τ times
        since they were computed from it. Empty where no gradient can be late."""
        return dict(sorted(self._staleness.items()))

    # -- for subclasses --------------------------------------------------------------------------------

    @abstractmethod
    def _start_gradients(self) -> None:
        """Make ready for the first gradient of a step, which is stored, not added."""

    @abstractmethod
    def _reduce_and_update(self, samples: int) -> None:
        """Average over ranks and update; all ranks or none. With samples, gather what ``_layers`` have."""

    def _check_gradient(self, gradient: np.ndarray) -> None:
        """Raise NonFiniteGradient for this rank's own gradient, where ranks step alone. Waits for a device."""
        element = first_not_finite(gradient)
        if element >= 0:
            raise self._not_finite(element, self.comm.rank, float(item(gradient[element])))

    def _all_finite(self, samples: int, gradient: np.ndarray) -> list[int]:
        """Everybody's number of samples; with ``check_finite``, NonFiniteGradient on all ranks, the same, if the
        flat gradient of any holds NaN or infinity. Collective; waits for a device."""
        bad = first_not_finite(gradient) if self.check_finite and samples else -1
        told = self.comm.all_gather_int(samples if bad < 0 else -1 - bad, "step/gradients")
        if min(told) < 0:
            element, rank = min((-1 - number, rank) for rank, number in enumerate(told) if number < 0)
            value = self.comm.broadcast_object(float(item(gradient[element])), rank, "step/not finite")
            raise self._not_finite(element, rank, value)
        return told

    def _not_finite(self, element: int, rank: int, value: float) -> NonFiniteGradient:
        """What to raise for an element of the flat gradient."""
        (name, *_) = self.layout.names_at(element, element + 1)
        return NonFiniteGradient(name, rank, self.updates, value)

    def _broadcast_rest(self) -> None:
        """Rank 0's buffers and frozen parameters to everybody: what the layout leaves outside."""
        inside = {id(segment.parameter) for segment in self.layout.segments}
        frozen = [p.data for p in self.model.parameters() if id(p) not in inside]
        for array in (*frozen, *self.model.buffers()):
            self.comm.broadcast(array, 0)

    def _replicate(self, slots: tuple[str, ...]) -> Slabs:
        """A w of this rank's own with rank 0's values, and its gradients; rank 0's buffers, too. Collective."""
        slabs = Slabs(self.layout, slots, None, self.comm.device, self.late)
        self._broadcast_rest()
        self.layout.pack(slabs.params[1])
        self.comm.broadcast(slabs.params[1], 0)
        slabs.bind_grads(0)
        slabs.flip()
        return slabs

    def _options(self) -> tuple[Any, ...]:
        """What else all ranks must agree about."""
        return self.accumulation_steps, self.clip_norm, self.check_finite

    def _check_backward(self) -> None:
        if self._poison is not None:
            text = "an earlier forward or backward of this step failed: call strategy.discard() first"
            raise RuntimeError(text) from self._poison
        if self._backwards == self._most_backwards:
            times = self._backwards // self._leaves + 1
            each = f", {self._leaves} micro-shards each," if self._leaves > 1 else ""
            raise RuntimeError(
                f"backward was called {times} times{each} before step(): give the strategy "
                f"accumulation_steps={times} if the gradients shall add up, or call step()"
            )
