"""Pipeline parallelism: each rank of a group has a stage of the model, and micro-batches pass through them.

Forward, a stage sends its results to the next one; backward, the gradient of what it was given to the one before.
Which micro-batch's turn it is, and in which direction, a schedule tells (`pipeline_schedules`); here it is run.

    forward    x arrives from stage s − 1 (the first stage takes it from the batch);  h = stage(x);  h leaves, or
               on the last stage L = loss(h, y)
    backward   ∂L/∂h arrives from stage s + 1 (the last one begins with L);  ∂L/∂w is added;  ∂L/∂x leaves

Sends do not wait for the receiver, so a stage computes while its messages travel. Sources: see
`pipeline_schedules`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minidp import trace
from minidp.autograd import Tensor, no_grad, tensor
from minidp.backend import Array, array_module, asarray
from minidp.comm import Communicator
from minidp.comm.work import Work
from minidp.parallel.pipeline_schedules import PipelineSchedule
from minidp.parallel.stages import Unit
from minidp.parallel.strategy import Strategy

MOST_AXES = 8
FORWARD, BACKWARD, RESULT = range(3)  # tags
WAITS = "wait for activations", "wait for gradients", "wait for the result"
HEADER = len(WAITS)  # added to a tag: the message in front, which tells dtype and shape


class Pipeline:
    """One rank's stage of it.

    Args:
        comm: the stages, in order.
        units: those of this stage, run one after the other.
        strategy: adds gradients up, and knows how often.
    """

    def __init__(self, comm: Communicator, units: Sequence[Unit], strategy: Strategy) -> None:
        self.comm, self.stage, self.stages = comm, comm.rank, comm.world_size
        self._units, self._strategy = units, strategy
        self._leaving: dict[int, list[Work]] = {}  # by receiver: the last message, which may still be on its way
        self.waited_s = self.worked_s = self.lasted_s = 0.0
        self.most_kept = 0
        """Micro-batches, at most, whose activations this stage kept at the same time."""

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    def run(
        self,
        schedule: PipelineSchedule,
        batches: Sequence[tuple[Any, Any]],
        loss_fn: Callable[[Tensor, Any], Tensor],
    ) -> Tensor:
        """Forward and backward of all micro-batches: Σ n_j L_j / Σ n_j, on every stage, without a graph.
        Collective.

        Args:
            batches: (x, y) of each micro-batch, on all stages: the first one looks at x, the last one at y.
        """
        now = self.comm.now
        begun, worked = now(), 0.0
        kept: dict[int, tuple[Any, Tensor]] = {}  # by micro-batch: what came in, what became of it
        losses: list[tuple[Array, int]] = []
        for _, _, j, kind in schedule.of_stage(self.stage):
            x, y = batches[j]
            if kind == "forward":
                given = x if self.first else self._receive(self.stage - 1, FORWARD)
                start = now()
                with trace.span(f"F{j}" if self.stages > 1 else "forward", "compute"):
                    result = self._through(given)
                    if self.last:
                        result = loss_fn(result, y)
                        losses.append((result.data, len(x)))
                worked += now() - start
                if not self.last:
                    self._send(result.data, self.stage + 1, FORWARD)
                kept[j] = given, result
                self.most_kept = max(self.most_kept, len(kept))
            else:
                given, result = kept.pop(j)
                gradient = None
                if not self.last:
                    gradient = self._comm_recv(self._like(result), self.stage + 1, BACKWARD)
                if self.stages > 1:
                    self._strategy._in_traces = f"B{j}"
                start = now()
                self._strategy.backward(result, len(x), gradient)
                worked += now() - start
                if not self.first:
                    self._send_gradient(given)
        self.worked_s += worked
        self.lasted_s += now() - begun  # of the first stage, whose backward is the last, that is the whole
        self._all_left()
        mean = _mean(losses) if self.last else None
        return Tensor(mean if self.stages == 1 else self._from_last(mean))

    def predict(self, x: Any) -> Tensor:
        """The last stage's result for x, on every stage, without a graph. Collective."""
        with no_grad():
            result = self._through(x if self.first else self._receive(self.stage - 1, FORWARD))
        if not self.last:
            self._send(result.data, self.stage + 1, FORWARD)
            self._all_left()
        return Tensor(self._from_last(result.data))

    # -- computing -------------------------------------------------------------------------------------

    def _through(self, x: Any) -> Any:
        if isinstance(x, np.ndarray) and x.dtype.kind == "f":
            x = self.comm.device.asarray(x)  # once, however often the model uses it; see Function.moves
        for unit in self._units:
            x = unit.forward(x)
        return x if isinstance(x, Tensor) else tensor(x)

    # -- messages --------------------------------------------------------------------------------------

    def _send(self, x: Array, dst: int, tag: int) -> None:
        """Send an array of a shape that the receiver does not know, when the message before it has left."""
        self._left(dst)
        header = np.zeros(2 + MOST_AXES, np.int64)
        header[:2] = int.from_bytes(x.dtype.str.encode().ljust(8)), x.ndim
        header[2 : 2 + x.ndim] = x.shape
        self._leaving[dst] = [
            self.comm.send(header, dst, tag + HEADER, async_op=True),
            self.comm.send(x, dst, tag, async_op=True),
        ]

    def _receive(self, src: int, tag: int) -> Tensor:
        """What ``_send`` has sent, as the leaf of a graph of this stage's own."""
        header = self._comm_recv(np.empty(2 + MOST_AXES, np.int64), src, tag + HEADER)
        dtype = np.dtype(int(header[0]).to_bytes(8).decode().strip())
        shape = tuple(header[2 : 2 + int(header[1])].tolist())
        x = self._comm_recv(self._empty(shape, dtype), src, tag)
        return Tensor(x, requires_grad=dtype.kind in "fO")

    def _comm_recv(self, x: Array, src: int, tag: int) -> Array:
        start = self.comm.now()
        with trace.span(WAITS[tag % HEADER], "wait"):
            self.comm.recv(x, src, tag)
        self.waited_s += self.comm.now() - start
        return x

    def _send_gradient(self, given: Tensor) -> None:
        """∂L/∂x back to where x has come from; zeros if nothing depends on it."""
        gradient = given.grad
        x = self.comm.device.xp.zeros_like(given.data) if gradient is None else gradient.data
        self._left(self.stage - 1)
        self._leaving[self.stage - 1] = [
            self.comm.send(x if x.flags.c_contiguous else x.copy(), self.stage - 1, BACKWARD, async_op=True)
        ]

    def _left(self, dst: int) -> None:
        """Wait until the last message to that stage has left."""
        for work in self._leaving.pop(dst, ()):
            work.wait()

    def _all_left(self) -> None:
        """Wait until all messages have left: what they were sent from may change afterwards."""
        with trace.span("wait until sent", "wait"):
            for dst in list(self._leaving):
                self._left(dst)

    def _like(self, result: Tensor) -> Array:
        return self._empty(result.shape, result.dtype)

    def _empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        xp = np if dtype.hasobject else self.comm.device.xp
        x: Array = xp.empty(shape, dtype)
        return x

    def _from_last(self, x: Array | None) -> Array:
        """The last stage's array on every stage; what others give is not looked at. Collective."""
        if self.last:
            assert x is not None
            for dst in range(self.stages - 1):
                self._send(x, dst, RESULT)
            self._all_left()
            return x
        return self._receive(self.stages - 1, RESULT).data


def _mean(losses: Sequence[tuple[Array, int]]) -> Array:
    """Σ n_j L_j / Σ n_j, in the losses' dtype, of 0 dimensions; added up in float64, for halves are soon too
    small."""
    (first, _), *others = losses
    samples = sum(count for _, count in losses)
    if not others or not samples:
        return first
    wide = object if first.dtype.hasobject else np.float64
    total: Any = 0
    for loss, count in losses:
        if count:  # what a loss of no samples is, may be no number, or no Fraction
            total = total + loss.astype(wide) * count
    return asarray(total / samples, array_module(first), first.dtype)
