"""A communicator for ranks whose arrays lie on a device. Arrays of the host it hands on as they are.

The world that the ranks live in stays what it is: who takes part, in which order, who is dead, what time it is,
and everything that is not an array, is the business of the host's communicator. Only the bytes of a device's
arrays may go another way, the *transport*:

    memory of the device that all ranks see     ranks share one GPU, or GPUs that see each other's memory
    NCCL                                         one rank a GPU
    host memory                                  what always works

Which one is chosen, and why, `choose_transport` tells.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from minidp.backend import Device
from minidp.comm.communicator import Communicator
from minidp.comm.device_memory import share
from minidp.comm.execute import Pieces
from minidp.comm.reduction import SUM, ReduceOp, check_op
from minidp.comm.staged import Afterwards, Staged
from minidp.comm.work import Work

Array = Any
"""An array of NumPy, or of the device."""


class DeviceCommunicator(Communicator):
    """The ranks of ``host``, whose arrays may lie on ``device``; see ``Communicator``.

    Collectives on the device's arrays are asked of the device and do not wait for it: the host meets the others,
    which finds what they disagree about and who is dead, and goes on. Sums are in order of rank, and the same bits
    as on the host, but with NCCL, which has an order of its own. ``send``, ``recv``, ``gather``, ``scatter``, and
    all that names an ``algorithm``, goes through the host's memory.
    """

    def __init__(self, host: Communicator, device: Device, transport: Staged) -> None:
        super().__init__()
        self.host, self.device, self.transport = host, device, transport
        self.rank, self.world_size, self.local_rank = host.rank, host.world_size, host.local_rank
        self.traffic, self.endpoint = host.traffic, host.endpoint
        self.shares_memory = host.shares_memory and transport.shares_memory
        self._staged = Staged(host, device)

    def __repr__(self) -> str:
        return f"DeviceCommunicator({self.host!r}, {self.device.describe()}, {self.transport.name})"

    # -- the world: the host's business ------------------------------------------------------------------

    def split(self, color: int | None, key: int = 0, name: str | None = None) -> Communicator | None:
        group = self.host.split(color, key, name)
        if group is None:
            return None
        ranks = group.all_gather_int(self.rank, "split")
        return DeviceCommunicator(group, self.device, self.transport.split(group, ranks))

    def now(self) -> float:
        return self.host.now()

    def settle(self) -> None:
        self.host.settle()

    def close(self) -> None:
        self.transport.close()
        self.host.close()

    def expendable(self, yes: bool) -> None:
        self.host.expendable(yes)

    def progress(self, done: int, total: int = 0, note: str | None = None) -> None:
        self.host.progress(done, total, note)

    def begin(self, operation: str, detail: str = "") -> int:
        return self.host.begin(operation, detail)

    def run_schedule(self, name: str, flat: Array | Pieces, op: ReduceOp | None, tag: int, root: int = 0) -> None:
        self.host.run_schedule(name, flat, op, tag, root)

    def broadcast_object(self, obj: Any, src: int = 0, what: str = "broadcast_object") -> Any:
        return self.host.broadcast_object(obj, src, what)

    def all_gather_object(self, obj: Any, what: str = "all_gather_object") -> list[Any]:
        return self.host.all_gather_object(obj, what)

    def run_oldest(self) -> None:
        self.host.run_oldest()

    def run_all(self) -> None:
        self.host.run_all()

    # -- meetings: what the host's are for the host, they are for the device ----------------------------------

    def barrier(self) -> None:
        self.host.run_all()  # it asks the device for more, which comes before this
        self.transport.meeting()
        self.host.barrier()
        self.transport.met()

    def all_gather_int(self, value: int, what: str = "all_gather_int", *, async_op: bool = False) -> Any:
        if async_op:
            return self.host._defer(lambda: self.all_gather_int(value, what))
        self.host.run_all()
        self.transport.meeting()
        everybody = self.host.all_gather_int(value, what)
        self.transport.met()
        return everybody

    def allocate(self, nbytes: int) -> list[npt.NDArray[np.uint8]]:
        """As everywhere, but memory of the device. MemoryError where ranks see no memory of each other."""
        if nbytes < 0:
            raise ValueError(f"allocate: nbytes={nbytes} must be 0 or more")
        if self.host.shares_memory and not self.shares_memory:
            raise MemoryError(
                f"allocate: arrays travel by {self.transport.name} here, and nothing would order what ranks write "
                "to memory that they share. Use collectives; comm.shares_memory says whether there is such memory"
            )
        try:
            views = share(self.host, self.device, nbytes)
        except OSError as error:
            raise MemoryError(f"allocate: {error}") from error
        self.barrier()
        return views

    # -- arrays ------------------------------------------------------------------------------------------

    def all_reduce(
        self, x: Array, op: ReduceOp = SUM, algorithm: str | None = None, *, async_op: bool = False
    ) -> Work | None:
        if not self.device.is_here(x):
            return self.host.all_reduce(x, op, algorithm, async_op=async_op)
        check_op(op, x.dtype)
        self._in_turn(async_op)
        if algorithm is not None:
            return self._staged.all_reduce(x, op, algorithm, async_op)
        return self.transport.all_reduce(x, op, None, async_op)

    def reduce_scatter(self, out: Array, x: Array, op: ReduceOp = SUM, *, async_op: bool = False) -> Work | None:
        if not self._here(out, x):
            return self.host.reduce_scatter(out, x, op, async_op=async_op)
        check_op(op, out.dtype)
        self._check_parts(out, x, "reduce_scatter(out, x)")
        self._in_turn(async_op)
        return self.transport.reduce_scatter(out, x, op, async_op)

    def all_gather(self, out: Array, x: Array, *, async_op: bool = False) -> Work | None:
        if not self._here(out, x):
            return self.host.all_gather(out, x, async_op=async_op)
        self._check_parts(x, out, "all_gather(out, x)")
        self._in_turn(async_op)
        return self.transport.all_gather(out, x, async_op)

    def broadcast(self, x: Array, src: int = 0, *, async_op: bool = False) -> Work | None:
        if not self.device.is_here(x):
            return self.host.broadcast(x, src, async_op=async_op)
        self._check_peer(src, "src")
        self._in_turn(async_op)
        return self.transport.broadcast(x, src, async_op)

    def reduce(self, x: Array, dst: int = 0, op: ReduceOp = SUM, *, async_op: bool = False) -> Work | None:
        if not self.device.is_here(x):
            return self.host.reduce(x, dst, op, async_op=async_op)
        self._check_peer(dst, "dst")
        check_op(op, x.dtype)
        self._in_turn(async_op)
        return self.transport.reduce(x, dst, op, async_op)

    def all_to_all(self, out: Array, x: Array, *, async_op: bool = False) -> Work | None:
        if not self._here(out, x):
            return self.host.all_to_all(out, x, async_op=async_op)
        self._in_turn(async_op)
        return self.transport.all_to_all(out, x, async_op)

    def gather(self, x: Array, dst: int = 0) -> Array | None:
        if not self.device.is_here(x):
            return self.host.gather(x, dst)
        self._in_turn(False)
        everybody = self.host.gather(self.device.later(x).get(), dst)
        return None if everybody is None else self.device.asarray(everybody)

    def scatter(self, x: Array | None, src: int = 0) -> Array:
        """As everywhere; where ``src`` has its array, there every rank gets its row."""
        here = self.host.broadcast_object(self.device.is_here(x), src, "scatter")
        if not here:
            return self.host.scatter(x, src)
        row = self.host.scatter(None if x is None or self.rank != src else self.device.later(x).get(), src)
        return self.device.asarray(row)

    # -- point to point --------------------------------------------------------------------------------

    def post_send(self, x: Array, dst: int, tag: int) -> Work:
        return self.host.post_send(self.device.later(x).get() if self.device.is_here(x) else x, dst, tag)

    def post_recv(self, x: Array, src: int, tag: int) -> Work:
        if not self.device.is_here(x):
            return self.host.post_recv(x, src, tag)
        arrived = np.empty(x.shape, x.dtype)
        return Afterwards(self.host.post_recv(arrived, src, tag), lambda: self.device.put(x, arrived))

    def _in_turn(self, async_op: bool) -> None:
        """Before this rank looks at the arrays of a collective: what nobody has waited for yet may write to them,
        and all ranks must run it at the same place, whenever each waits for it."""
        if not async_op:
            self.transport.in_turn()

    def _here(self, out: Array, x: Array) -> bool:
        """Whether both lie on the device; TypeError if one does."""
        here = self.device.is_here(out), self.device.is_here(x)
        if any(here) and not all(here):
            raise TypeError(
                f"out is a {type(out).__name__} and x a {type(x).__name__}: both must lie on the device, or both "
                "on the host"
            )
        return all(here)
