"""Arrays of a device in collectives of the host: copied out, reduced or moved there, and copied in again.

The way that always works: any world, any operation, any algorithm. The copies go through page-locked memory, where
the device has it; and the sums are the host's, in its order, with its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from minidp.backend import Array, Device
from minidp.comm.communicator import Communicator
from minidp.comm.reduction import ReduceOp
from minidp.comm.work import Work


class Staged:
    """The collectives of ``host`` for arrays of ``device``. With ``async_op`` what is sent is what the array held
    at the call; it comes back in ``wait``."""

    name = "host memory"
    shares_memory = False

    def __init__(self, host: Communicator, device: Device) -> None:
        self.host, self.device = host, device

    def all_reduce(self, x: Array, op: ReduceOp, algorithm: str | None, async_op: bool) -> Work | None:
        return self.run(lambda h: self.host.all_reduce(h, op, algorithm), (x,), async_op=async_op)

    def reduce_scatter(self, out: Array, x: Array, op: ReduceOp, async_op: bool) -> Work | None:
        return self.run(lambda o, h: self.host.reduce_scatter(o, h, op), (out, x), reads=(1,), async_op=async_op)

    def all_gather(self, out: Array, x: Array, async_op: bool) -> Work | None:
        return self.run(self.host.all_gather, (out, x), reads=(1,), async_op=async_op)

    def broadcast(self, x: Array, src: int, async_op: bool) -> Work | None:
        mine = self.host.rank == src
        return self.run(
            lambda h: self.host.broadcast(h, src), (x,), (0,) if mine else (), () if mine else (0,), async_op
        )

    def reduce(self, x: Array, dst: int, op: ReduceOp, async_op: bool) -> Work | None:
        writes = (0,) if self.host.rank == dst else ()
        return self.run(lambda h: self.host.reduce(h, dst, op), (x,), writes=writes, async_op=async_op)

    def all_to_all(self, out: Array, x: Array, async_op: bool) -> Work | None:
        return self.run(self.host.all_to_all, (out, x), reads=(1,), async_op=async_op)

    def run(
        self,
        call: Callable[..., Any],
        arrays: Sequence[Array],
        reads: Sequence[int] = (0,),
        writes: Sequence[int] = (0,),
        async_op: bool = False,
    ) -> Work | None:
        """``call`` on the host's copies of ``arrays``: those of ``reads`` are copied out first, those of
        ``writes`` come back."""
        coming = {i: self.device.later(arrays[i]) for i in reads}

        def finish() -> None:
            hosts = [coming[i].get() if i in coming else np.empty(x.shape, x.dtype) for i, x in enumerate(arrays)]
            call(*hosts)
            for i in writes:
                self.device.put(arrays[i], hosts[i])

        if async_op:
            return self.host._defer(finish)
        finish()
        return None

    def in_turn(self) -> None:
        """What was begun, and nobody has waited for, comes before what this rank asks its device from now on."""
        self.host.run_all()

    def meeting(self) -> None:
        """This rank is about to meet the others, on the host: nothing of the device is shared or ordered."""

    def met(self) -> None:
        """It has met them."""

    def close(self) -> None:
        """Give back what of the device was taken for this. Not collective."""

    def split(self, host: Communicator, ranks: Sequence[int]) -> Staged:
        """The same for ``host``, a group of those ranks of this one."""
        return Staged(host, self.device)


class Afterwards(Work):
    """A work of the host, and what is to be done when it is finished."""

    def __init__(self, work: Work, then: Callable[[], Any]) -> None:
        self._work, self._then = work, then
        self._done, self._value = False, None

    def wait(self) -> Any:
        if not self._done:
            self._value = self._work.wait()
            self._then()
            self._done = True
        return self._value
