"""An embedding of which each rank has some of the rows (Shoeybi et al. 2019, section 3, "vocabulary parallel")."""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from minidp.autograd import Tensor
from minidp.autograd.function import Function
from minidp.backend import Array, array_module
from minidp.comm import Communicator
from minidp.nn import Embedding, Parameter
from minidp.nn import functional as F
from minidp.nn.activations import check_tokens
from minidp.parallel.conjugate import sum_over_ranks
from minidp.parallel.cuts import Cut
from minidp.parallel.tensor_parallel import ParallelModule, check_parts


class VocabParallelEmbedding(ParallelModule):
    """`nn.Embedding` of which each rank has some rows, as equal in number as can be; tokens (...) → (..., dim).

    A rank gives zeros for the tokens of others, and the sum over ranks is the row of the one that has it: the
    dense layer's bits. Sent: an all-reduce of the result, in forward. ValueError if there are fewer rows than
    ranks.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, comm: Communicator, std: float = 1.0) -> None:
        check_parts("VocabParallelEmbedding", "num_embeddings", num_embeddings, comm.world_size, equal=False)
        self.num_embeddings, self.embedding_dim, self.std, self.comm = num_embeddings, embedding_dim, std, comm
        self.cuts = {"weight": Cut((num_embeddings, embedding_dim), 0, comm.rank, comm.world_size)}
        self.weight = Parameter(np.zeros(self.cuts["weight"].shape(), dtype=np.float32))
        self.initialize(0)

    @classmethod
    def of(cls, layer: Embedding, comm: Communicator) -> Self:
        """The same layer, cut: it takes over the Parameter."""
        parallel = cls(layer.num_embeddings, layer.embedding_dim, comm, layer.std)
        parallel.take_over(layer)
        return parallel

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        part: np.ndarray = self.cuts[name].part(rng.normal(0, self.std, self.cuts[name].whole))
        return part

    def forward(self, tokens: Any) -> Tensor:
        xp = array_module(self.weight.data)
        tokens = tokens.data if isinstance(tokens, Tensor) else tokens
        tokens = check_tokens(self.cuts["weight"].whole, tokens, xp)
        ((lo, hi),) = self.cuts["weight"].bounds()
        others = (tokens < lo) | (tokens >= hi)
        rows = F.embedding(xp.where(others, 0, tokens - lo), self.weight)
        wrong = (tokens < 0) | (tokens >= self.num_embeddings)  # which only a device can have let pass
        return sum_over_ranks(_ZeroWhere.apply(rows, others=others, wrong=wrong), self.comm)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, part {self.comm.rank} of {self.comm.world_size}"


class _ZeroWhere(Function):
    """Rows with zeros where `others` is True, NaN where `wrong` is. Not a product: 0 · NaN is not 0."""

    fresh = True

    def forward(self, rows: Array, others: Array, wrong: Array) -> Array:
        self.saved = others
        number = rows.dtype.type if rows.dtype.kind == "f" else int
        kept = self.xp.where(others[..., None], number(0), rows)
        return kept if rows.dtype.kind != "f" else self.xp.where(wrong[..., None], number("nan"), kept)

    def backward(self, grad: Array) -> Any:
        return self.xp.where(self.saved[..., None], grad.dtype.type(0) if grad.dtype.kind == "f" else 0, grad)
