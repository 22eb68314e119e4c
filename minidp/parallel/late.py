"""Data parallelism on a device: the host asks for a whole step and waits for none of it.

To see whether the averaged gradient is finite, the host would have to wait for it, in every step, and the device
then for the host. Here the device looks, and the host reads what it has found one step later, when that has long
been done:

    step t          sum, look, update into the other buffer, flip; what was found sets out for the host
    step t + 1      read what was found in step t. Nothing: go on. Else: flip back, as if step t had not been, and
                    raise NonFiniteGradient on all ranks; the batch of step t + 1 is lost with it

So a bad step is still committed by no rank, since w and the optimizer's state have two buffers; only between the
two steps the model computes with parameters that may be NaN. Whoever looks at the state (``state_dict``, ``save``)
is told before; whoever evaluates the model, or releases the strategy, calls ``state_dict`` first. The running
statistics of batch norm are exchanged on the host, which waits for them, in step t: they are not taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from minidp.backend import Array, sums
from minidp.backend.device import Later
from minidp.parallel.blocks import Block
from minidp.parallel.bucketed import KINDS, BucketedDataParallel
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.errors import NonFiniteGradient
from minidp.parallel.slabs import Flat
from minidp.parallel.state import StateDict

_log = logging.getLogger("minidp.parallel")
NOTHING = 2**63 - 1
NOBODY = 1023  # as rank: only the sum is not finite


class Found:
    """What a device has found in the sums of a step: the code of the first element that is not finite."""

    def __init__(self, xp: Any) -> None:
        self._xp = xp
        self._code = xp.full(1, NOTHING, np.int64)
        self._coming: Later | None = None

    def look(self, summed: Flat, parts: list[Flat], first: int, offset: int) -> None:
        """Let the device look at a block's sum, from element ``offset`` on, of parts of rank ``first`` …"""
        if not sums.look(summed, parts, first, offset, self._code):
            code = plain_look(summed, parts, first, offset, self._xp)
            self._code[...] = self._xp.minimum(self._code, code)

    def send(self, device: Any) -> None:
        """The step is over: what was found sets out for the host, and the next step's begins with nothing."""
        self._coming = device.later(self._code)
        self._code[...] = NOTHING

    def read(self) -> int:
        """The code of the step before, 0 if there is none to tell of. Waits for that step's end on the device."""
        coming, self._coming = self._coming, None
        code = NOTHING if coming is None else int(coming.get()[0])
        return 0 if code == NOTHING else code


def plain_look(summed: Flat, parts: list[Flat], first: int, offset: int, xp: Any) -> Array:
    """What ``sums.cu``'s kernel does, in whole arrays: the code, int64, of shape (1,)."""
    bad = ~xp.isfinite(summed)
    at = bad.argmax().reshape(1)
    values = [summed.take(at), *(part.take(at).astype(summed.dtype) for part in parts)]
    ranks = [NOBODY, *range(first, first + len(parts))]
    code = xp.full(1, NOTHING, np.int64)
    for value, rank in reversed(list(zip(values[1:], ranks[1:]))):
        code = xp.where(xp.isfinite(value), code, (at + offset) * 4096 + rank * 4 + kind_of(value, xp))
    of_sum = (at + offset) * 4096 + NOBODY * 4 + kind_of(values[0], xp)
    return xp.where(bad.take(at), xp.minimum(code, of_sum), NOTHING)


def kind_of(value: Array, xp: Any) -> Array:
    """1 for NaN, 2 for ∞, 3 for −∞."""
    return xp.where(value != value, 1, xp.where(value > 0, 2, 3))


class Late(DataParallel):
    """What both of the classes below do late."""

    late = True

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._found = Found(self.comm.device.xp)

    def _reduce_and_update(self, samples: int) -> None:
        self._take_back("step/found")
        super()._reduce_and_update(samples)

    def _average_and_update(self, total: int) -> None:
        super()._average_and_update(total)
        if self.check_finite:
            self._found.send(self.comm.device)

    def _take_back(self, what: str) -> None:
        """If a rank has found something in the step before, undo that step and raise. Collective."""
        if not self.check_finite:
            return
        try:
            with self._replica.one_verdict():
                self._raise_found_before(what)
        except NonFiniteGradient:
            self._slabs.flip()
            self.updates -= 1
            raise

    def _raise_found_before(self, what: str) -> None:
        told = self.comm.all_gather_int(self._found.read(), what)
        if any(told):
            element, rest = divmod(min(filter(None, told)), 4096)
            rank, kind = divmod(rest, 4)
            (name, *_) = self.layout.names_at(element, element + 1)
            raise NonFiniteGradient(name, -1 if rank == NOBODY else rank, self.updates - 1, KINDS[kind])

    # -- who looks at the state is told before -------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """See ``Strategy.state_dict``. NonFiniteGradient on all ranks, once, if the last step was bad: it has been
        taken back then. Gradients of a step that has begun are of no use: call ``discard()``."""
        self._tell_before("state_dict/found")
        return super().state_dict()

    def consolidate(self) -> None:
        self._tell_before("save/found")
        super().consolidate()

    def _tell_before(self, what: str) -> None:
        try:
            self._take_back(what)
        except NonFiniteGradient as error:
            if self.in_step:
                self._poison = error  # its gradients are of parameters that are no more
            else:
                self._start_step()  # the masks of the step that comes are those of its number
            raise

    def load_state_dict(self, state: StateDict) -> None:
        """See ``Strategy.load_state_dict``. A bad step before it is taken back, and that is told in the log."""
        try:
            self._take_back("load_state_dict/found")
        except NonFiniteGradient as error:
            _log.warning("taken back before load_state_dict: %s", error)
        super().load_state_dict(state)

    def restore(self, model: StateDict, state: Mapping[str, StateDict], updates: int, seed: int) -> None:
        self._found.read()  # all that is replaced need not be finite
        super().restore(model, state, updates, seed)


class LateDataParallel(Late):
    """See ``DataParallel``, which yields this class for ranks that see each other's memory of a device.

    Two meetings on the host a step and one more to tell what was found; between them each rank's stream waits for
    the others' (``comm/device_memory.py``). Cost of the update: all gradients of the slice are read once, w, state
    and their sum read and written once.
    """

    def _look(self, block: Block, summed: Flat) -> None:
        self._found.look(summed, block.parts, 0, block.lo)


class LateBucketedDataParallel(Late, BucketedDataParallel):
    """See ``BucketedDataParallel``, of which this is the form for devices: with NCCL buckets travel on a stream
    beside backward, and no host waits for a device (hosts meet once a bucket); else through the host's memory.
    """

    def _average_and_update(self, total: int) -> None:
        super()._average_and_update(total)
        self._slabs.flip()

    def _look(self, block: Block, summed: Flat) -> None:
        self._found.look(summed, [self._own[block.lo : block.hi]], self.comm.rank, block.lo)
