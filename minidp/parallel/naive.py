"""Synchronous data parallelism as the article writes it: literal replicas, parameter by parameter.

Every rank keeps its own copy of w. After backward each gradient is summed over the ranks by messages through
queues, divided by the number of samples, and every rank applies the same update. It is the reference that
``DataParallel`` is tested against, bit for bit, and what to read first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from minidp.backend import Array, array_module, asarray, item, to_numpy
from minidp.comm import Communicator
from minidp.comm.reduction import sum_dtype
from minidp.nn import Module
from minidp.optim import Optimizer
from minidp.parallel.buckets import pieces
from minidp.parallel.errors import NonFiniteGradient
from minidp.parallel.norms import norm_on
from minidp.parallel.strategy import StateDict, Strategy


class NaiveDataParallel(Strategy):
    """See ``DataParallel``: the same arguments and results, slowly.

    Cost of a step, n bytes of gradients: sent (N−1)n a rank, in one message a parameter and peer. On a device each
    goes through the host's memory and back, and with ``check_finite`` is waited for once more.
    """

    label = "NaiveDataParallel"

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        comm: Communicator,
        *,
        accumulation_steps: int = 1,
        clip_norm: float | None = None,
        check_finite: bool = True,
    ) -> None:
        super().__init__(model, optimizer, comm, accumulation_steps, clip_norm, check_finite)
        for segment in self.layout.segments:
            segment.parameter.data = comm.device.xp.ascontiguousarray(segment.parameter.data)
            self.comm.broadcast(segment.parameter.data, 0)  # the same w everywhere
        self._broadcast_rest()
        self._start_gradients()
        self._state = [
            {slot: comm.device.xp.zeros(segment.size, segment.parameter.dtype) for slot in optimizer.slots}
            for segment in self.layout.segments
        ]

    def optimizer_state(self) -> Mapping[str, StateDict]:
        return {
            slot: {
                segment.name: state[slot].reshape(segment.shape)
                for segment, state in zip(self.layout.segments, self._state)
            }
            for slot in self.optimizer.slots
        }

    def _put(self, values: StateDict, state: Mapping[str, StateDict] | None) -> None:
        self.model.load_state_dict(values)
        if state is not None:
            for slot, arrays in self.optimizer_state().items():
                for name, array in arrays.items():
                    array[...] = asarray(state[slot][name], array_module(array))

    def _start_gradients(self) -> None:
        for segment in self.layout.segments:
            segment.parameter.grad = None

    def _reduce_and_update(self, samples: int) -> None:
        count = np.array([samples])
        self.comm.all_reduce(count, algorithm="direct")
        total = int(count[0])  # Σ n_i
        if total == 0:
            return
        self._layers.gather(self.check_finite, self.updates)
        gradients = [self._mean_gradient(i, total) for i in range(len(self.layout.segments))]  # ∇L
        if self.clip_norm is not None:
            scale = self._clip_scale(gradients, self.clip_norm)
            gradients = [gradient * scale for gradient in gradients]
        for i, gradient in enumerate(gradients):
            self._update(i, gradient)  # w ← w − η ∇L

    def _mean_gradient(self, i: int, total: int) -> Array:
        """Σ n_i ∇L_i / Σ n_i of one parameter, flat. Direct: everybody's, added in order of rank."""
        parameter = self.layout.segments[i].parameter
        xp = array_module(parameter.data)
        own = xp.zeros(parameter.shape, parameter.dtype) if parameter.grad is None else parameter.grad.data
        wide = sum_dtype(own.dtype)  # half precision is summed in float32
        gradient = own.reshape(-1).astype(wide)
        sent, received = self.comm.traffic.bytes_sent, self.comm.traffic.bytes_received
        self.comm.all_reduce(gradient, algorithm="direct")
        self._exchanged.bytes_sent += self.comm.traffic.bytes_sent - sent
        self._exchanged.bytes_received += self.comm.traffic.bytes_received - received
        gradient /= total
        if self.check_finite and not item(xp.isfinite(gradient).all()):
            self._raise_non_finite(i, own)
        return gradient.astype(own.dtype, copy=False)

    def _update(self, i: int, gradient: Array) -> None:
        segment, state = self.layout.segments[i], self._state[i]
        w = segment.parameter.data.reshape(-1)  # a view: the constructor has made the parameters contiguous
        hyper = self.optimizer.hyper(self.optimizer.group_of(segment.parameter), self.updates)
        scratch = tuple(array_module(w).empty_like(w) for _ in range(self.optimizer.scratch))
        self.optimizer.update(
            w, gradient, state, w, state, lr=hyper["lr"], t=self.updates, hyper=hyper, scratch=scratch
        )
        self.optimizer.count_update(w.size, w.itemsize)

    def _clip_scale(self, gradients: list[Array], clip_norm: float) -> Any:
        xp, size = self.comm.device.xp, self.layout.size
        flat = xp.zeros(size, self.layout.dtype)
        for view, gradient in zip(self.layout.views(flat), gradients):
            view.reshape(-1)[...] = gradient
        norm = norm_on(xp, pieces(self.layout, 0, size), [(0, size)])
        return norm.clip_scale(norm.squares(flat), clip_norm, self.layout.dtype)

    def _raise_non_finite(self, i: int, own: Array) -> None:
        """All ranks see the same sum, so all come here."""
        found = [float(x) for x in to_numpy(own).reshape(-1) if not np.isfinite(x)][:1]
        for rank, values in enumerate(self.comm.all_gather_object(found)):
            if values:
                raise NonFiniteGradient(self.layout.segments[i].name, rank, self.updates, values[0])
        raise NonFiniteGradient(self.layout.segments[i].name, -1, self.updates, float("inf"))
