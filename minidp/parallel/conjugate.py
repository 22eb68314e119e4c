"""The functions in which tensor-parallel ranks meet, each with the one that it is backward of.

Two layers side by side, Y = σ(X A) B, cut so that each rank has columns A_i and rows B_i (Shoeybi et al.,
"Megatron-LM", 2019, section 3):

    X ─ f ─ X A_i ─ σ ─ (…) B_i ─ g ─ Y                        Y = Σ_i σ(X A_i) B_i

    f    forward   every rank's copy of X is used: nothing to do        backward   ∂X = Σ_i ∂X_i: all-reduce
    g    forward   Y = Σ_i Y_i: all-reduce                               backward   ∂Y_i = ∂Y: nothing to do

A value that is copied to all ranks has the sum of their gradients; a sum hands its gradient to all terms. Forward
of one is backward of the other: they are conjugate. So are joining parts of an axis and cutting it:

    join    forward   Y = [Y_1, …, Y_T]: all-gather                      backward   ∂Y_i = this rank's part of ∂Y

Between f and g ranks differ. Outside all hold the same, bit for bit, since all-reduce gives all the same bits:
so they need not tell each other anything about the layers that are not cut, forward, backward or update.
"""

from __future__ import annotations

from typing import Any

from minidp import trace
from minidp.autograd import Tensor
from minidp.autograd.function import Function, nbytes_of
from minidp.backend import Array
from minidp.comm import Communicator
from minidp.data.sharding import cut


def copy_to_ranks(x: Any, comm: Communicator) -> Tensor:
    """f: x, whose gradient will be the sum of all ranks'. Collective in backward, of x's bytes."""
    return _CopyToRanks.apply(x, comm=comm)


def sum_over_ranks(x: Any, comm: Communicator) -> Tensor:
    """g: the sum of all ranks' x, in order of rank, the same on all. Collective in forward, of x's bytes."""
    return _SumOverRanks.apply(x, comm=comm)


def join_ranks(x: Any, size: int, comm: Communicator) -> Tensor:
    """All ranks' x (..., own part) side by side along the last axis: (..., size), the same on all ranks.

    Parts are those that ``data.sharding.cut`` makes of ``size``. Collective in forward: each sends its part. In
    backward each rank takes its part of its own gradient, which must be the same on all.
    """
    return _JoinRanks.apply(x, size=size, comm=comm)


class _CopyToRanks(Function):
    def forward(self, x: Array, comm: Communicator) -> Array:
        self.saved = comm
        return x

    def backward(self, grad: Array) -> Any:
        return _summed(grad, self.saved, "∂X = Σ ∂X_i")

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0.0, 0.0

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0.0, 2.0 * out.nbytes


class _SumOverRanks(Function):
    def forward(self, x: Array, comm: Communicator) -> Array:
        return _summed(x, comm, "Y = Σ Y_i")

    def backward(self, grad: Array) -> Any:
        return grad

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0.0, 0.0

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 2.0 * out.nbytes, 0.0


class _JoinRanks(Function):
    fresh = True

    def forward(self, x: Array, size: int, comm: Communicator) -> Array:
        parts = cut(size, comm.world_size)
        self.saved = parts[comm.rank]
        if comm.world_size == 1:
            return x
        widest = max(hi - lo for lo, hi in parts)  # a collective's parts are equal: shorter ones are filled up
        own = self.xp.zeros((*x.shape[:-1], widest), dtype=x.dtype)
        own[..., : x.shape[-1]] = x
        everybodys = self.xp.empty((comm.world_size, *own.shape), dtype=x.dtype)
        with trace.span("Y = [Y_1 … Y_T]", "communication"):
            comm.all_gather(everybodys, own)
        return self.xp.concatenate([y[..., : hi - lo] for y, (lo, hi) in zip(everybodys, parts)], axis=-1)

    def backward(self, grad: Array) -> Any:
        lo, hi = self.saved
        return grad[..., lo:hi].copy()

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 0.0, 0.0

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        own = nbytes_of(inputs[0])
        return 2.0 * (own + out.nbytes), 2.0 * own


def _summed(x: Array, comm: Communicator, name: str) -> Array:
    """The sum over ranks, in a new array: ``x`` may belong to others."""
    if comm.world_size == 1:
        return x
    total: Array = x.copy()  # contiguous
    with trace.span(name, "communication"):
        comm.all_reduce(total)
    return total
