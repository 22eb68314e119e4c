"""Parameters, gradients and optimizer state as flat slabs in memory that all ranks share.

One copy of w and of the state serves all ranks, in two buffers each: a step reads the one and writes the other,
and the flip after the last barrier commits it. A rank that is killed at any moment leaves the last committed
step whole. Each rank has a gradient slab of its own, which the others read.

Memory, Ψ elements, all ranks together: 2Ψ for w, 2Ψ for each slot of the state, NΨ for gradients. A lone rank
has one buffer of each: nobody survives that rank, and a second would cost its caches 10 % of a step. Ranks that
share no memory are lone ranks here, each with a w of its own. (On a device a lone rank can have two, too: there a
step is committed before it is known to be good, and the other buffer is where to go back to; see ``late.py``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from minidp.backend import HOST, Device, array_module, asarray
from minidp.comm import Communicator
from minidp.nn import Layout
from minidp.nn.layout import ALIGNMENT_BYTES

Flat = npt.NDArray[Any]


class Slabs:
    """The slabs of one strategy, made collectively by the ranks of ``comm``, or, with None, by one for itself.

    Args:
        device: where they lie: ``comm.device``.
        spare: whether a lone rank has two buffers.

    Attributes:
        params: the two buffers of w, shape (size,), the layout's dtype; the same object where there is one.
        grads: every rank's gradient slab, in rank order.
        state: for each slot of the optimizer its two buffers.
        current: which buffer holds the committed step.
    """

    def __init__(
        self,
        layout: Layout,
        slots: tuple[str, ...],
        comm: Communicator | None,
        device: Device = HOST,
        spare: bool = False,
    ) -> None:
        self.layout = layout
        dtype, size = np.dtype(layout.dtype), layout.size
        copies = 2 if spare or (comm is not None and comm.world_size > 1) else 1
        buffers = copies * (1 + len(slots))
        # One allocation, with rank 0's share holding what there is one of: a peer's share is its gradients.
        if comm is None:
            views = [private((buffers + 1) * size, dtype, device)]
        else:
            common = buffers * layout.nbytes if comm.rank == 0 else 0
            views = [view.view(dtype) for view in comm.allocate(common + layout.nbytes)]
        shared = list(views[0][: buffers * size].reshape(buffers, size))
        self.grads: list[Flat] = [view[len(view) - size :] for view in views]
        pairs = [(shared[i], shared[i + copies - 1]) for i in range(0, buffers, copies)]
        self.params: tuple[Flat, Flat] = pairs[0]
        self.state: dict[str, tuple[Flat, Flat]] = dict(zip(slots, pairs[1:], strict=True))
        self.current = 0
        self._views = tuple(layout.views(read_only(buffer)) for buffer in self.params)

    def stage(self, values: Mapping[str, Flat], state: Mapping[str, Mapping[str, Flat]] | None = None) -> None:
        """Prepare the coming flip to change the parameters to ``values``, by name, and the state to ``state``, by
        slot and name; None: it stays. Arrays of the host will do on a device, too."""
        target = self.params[1 - self.current]
        xp = array_module(target)
        for segment, view in zip(self.layout.segments, self.layout.views(target)):
            view[...] = asarray(values[segment.name], xp)
        for slot, buffers in self.state.items():
            if state is None:
                buffers[1 - self.current][...] = buffers[self.current]
                continue
            for segment, view in zip(self.layout.segments, self.layout.views(buffers[1 - self.current])):
                view[...] = asarray(state[slot][segment.name], xp)

    def bind_grads(self, rank: int) -> None:
        """Let backward write its gradients straight into this rank's slab."""
        self.layout.point_grads(self.layout.views(self.grads[rank]))

    def memory(self, rank: int) -> dict[str, int]:
        """Bytes that this rank has allocated of it: its gradients, and rank 0 also what all have together."""
        buffers = {id(b): b for b in self.params} if rank == 0 else {}
        state = {id(b): b for pair in self.state.values() for b in pair} if rank == 0 else {}
        return {
            "parameters": sum(buffer.nbytes for buffer in buffers.values()),
            "gradients": self.grads[rank].nbytes,
            "optimizer": sum(buffer.nbytes for buffer in state.values()),
        }

    def flip(self) -> None:
        """Commit: the other buffer is w from now on, and the model's parameters are read-only views of it."""
        self.current = 1 - self.current
        self.layout.point(self._views[self.current])


def private(size: int, dtype: np.dtype[Any], device: Device = HOST) -> Flat:
    """Memory of this rank's own, zeroed, that begins at a cache line as shared memory does."""
    if not device.on_host:  # which sees to that itself
        zeros: Flat = device.xp.zeros(size, dtype)
        return zeros
    raw = np.zeros(size + ALIGNMENT_BYTES // dtype.itemsize, dtype)  # not bytes: Fractions are objects
    start = -raw.ctypes.data % ALIGNMENT_BYTES // dtype.itemsize
    return raw[start : start + size]


def read_only(flat: Any) -> Any:
    """A view that can't be written; of a device's array itself, for there are none."""
    if not isinstance(flat, np.ndarray):
        return flat
    view = flat.view()
    view.flags.writeable = False
    return view
