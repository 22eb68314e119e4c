"""Attention of which each rank has some of the heads: columns before, rows after (Shoeybi et al. 2019, section
3)."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from minidp.autograd import Tensor
from minidp.autograd.tensor import tensor
from minidp.backend import array_module
from minidp.comm import Communicator
from minidp.data.sharding import cut
from minidp.nn import Dropout, MultiHeadAttention
from minidp.parallel.conjugate import copy_to_ranks
from minidp.parallel.cuts import Cut
from minidp.parallel.tensor_parallel import ParallelModule, RowParallelLinear, check_parts, put


class ParallelAttention(MultiHeadAttention, ParallelModule):
    """`nn.MultiHeadAttention` of which each rank has num_heads / T heads; the same arguments, and the ranks.

    Sent: an all-reduce of (b, t, e) in forward and one in backward (three, where keys and values are given, too).
    ValueError if T does not divide num_heads.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        comm: Communicator,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        parts = comm.world_size
        check_parts("ParallelAttention", "num_heads", num_heads, parts)
        super().__init__(embed_dim, num_heads, causal, dropout, bias)
        self.comm = comm
        self.num_heads, self.width = num_heads // parts, embed_dim // parts
        self.cuts = {
            "in_proj_weight": Cut((3 * embed_dim, embed_dim), 0, comm.rank, parts, blocks=3),
            "in_proj_bias": Cut((3 * embed_dim,), 0, comm.rank, parts, blocks=3),
        }
        for name, parameter in self._own_parameters():
            self.cuts[name].apply(parameter)
        put(self, "out_proj", RowParallelLinear.of(self.out_proj, comm))
        self.dropout = PartDropout(dropout, 1, num_heads, comm)

    @classmethod
    def of(cls, layer: MultiHeadAttention, comm: Communicator) -> Self:
        """The same layer, cut: it takes over the Parameters."""
        parallel = cls(
            layer.embed_dim, layer.num_heads, comm, layer.causal, layer.dropout.p, layer.in_proj_bias is not None
        )
        parallel.take_over(layer)
        put(parallel, "out_proj", RowParallelLinear.of(layer.out_proj, comm))
        return parallel

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        whole = super().initial(name, rng)
        return self.cuts[name].part(whole) if self.width < self.embed_dim else whole

    def forward(self, query: Any, key: Any = None, value: Any = None) -> Tensor:
        inputs = (x if x is None else copy_to_ranks(x, self.comm) for x in (query, key, value))
        return super().forward(*inputs)

    def extra_repr(self) -> str:
        heads = self.num_heads * self.comm.world_size
        part = f"part {self.comm.rank} of {self.comm.world_size}"
        return f"{self.embed_dim}, {heads}, causal={self.causal}, {part}"


class PartDropout(Dropout):
    """`nn.Dropout` on a part of an activation: the part, along `axis`, of the mask that the whole would get.

    So ranks drop different elements where they hold different ones, the cut model drops what the dense one drops,
    and a number of ranks more or less changes nothing. Each rank draws the whole mask.

    Args:
        p: the chance to drop an element.
        axis: along which the activation is cut.
        size: of the whole along it.
        comm: the ranks.
    """

    def __init__(self, p: float, axis: int, size: int, comm: Communicator) -> None:
        super().__init__(p)
        self.axis, self.size, self.comm = axis, size, comm

    @classmethod
    def of(cls, layer: Dropout, axis: int, size: int, comm: Communicator) -> Self:
        """The same layer for a part of the activations."""
        part = cls(layer.p, axis, size, comm)
        part.training = layer.training
        return part

    def forward(self, x: Any) -> Tensor:
        if not self.training or self.p == 0:
            return super().forward(x)
        x = x if isinstance(x, Tensor) else tensor(x)
        axis = self.axis % x.ndim
        shape = (*x.shape[:axis], self.size, *x.shape[axis + 1 :])
        xp = array_module(x.data)
        mask = super().forward(Tensor(xp.ones(shape, dtype=x.dtype))).data
        lo, hi = cut(self.size, self.comm.world_size)[self.comm.rank]
        dropped: Tensor = x * Tensor(mask[(*[slice(None)] * axis, slice(lo, hi))])
        return dropped
