"""Dropout whose masks are a function of (seed, layer, update, rank, call), so that runs can be repeated."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any, Self

from minidp.autograd import Tensor
from minidp.autograd.tensor import tensor
from minidp.nn import functional
from minidp.nn.module import Module


class DropoutScope:
    """What dropout masks depend on besides the layer: `seed`, update index and rank (or micro-shard index).

    As a context manager it holds for the block. It counts the calls of each layer, so a layer that is called
    twice in one update draws two masks.
    """

    __slots__ = ("_calls", "_tokens", "rank", "seed", "update")

    def __init__(self, seed: int = 0, update: int = 0, rank: int = 0) -> None:
        self.seed, self.update, self.rank = seed, update, rank
        self._calls: dict[tuple[int, str], int] = {}
        self._tokens: list[Token[DropoutScope | None]] = []

    def next_call(self, layer: str) -> int:
        """Return how often `layer` has drawn a mask for this rank in this scope before; count this time."""
        key = self.rank, layer
        call = self._calls.get(key, 0)
        self._calls[key] = call + 1
        return call

    def begin(self, update: int) -> None:
        """Go on to another update: its masks differ, and each layer's calls are counted from 0 again."""
        self.update = update
        self._calls.clear()

    def __enter__(self) -> Self:
        self._tokens.append(_scope.set(self))
        return self

    def __exit__(self, *exc: object) -> None:
        _scope.reset(self._tokens.pop())


_scope: ContextVar[DropoutScope | None] = ContextVar("minidp_dropout_scope", default=None)


def dropout_scope(seed: int = 0, update: int = 0, rank: int = 0) -> DropoutScope:
    """Fix the dropout masks of a block: ``with nn.dropout_scope(seed=0, update=t, rank=comm.rank): ...``.

    The masks are equal for equal (seed, update, rank), whatever ran before. Strategies set it; `rank` is the
    micro-shard's index where there are micro-shards. Outside of any scope all three are 0 and each layer
    counts its own calls, so successive calls differ.
    """
    return DropoutScope(seed, update, rank)


class Dropout(Module):
    """In training, zero each element with chance `p` and scale the others by 1/(1−p); identity in evaluation."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"Dropout: p is a probability, not {p}")
        self.p = p
        self._own_scope = DropoutScope()

    def follow(self, scope: DropoutScope) -> None:
        """Outside of any ambient scope, draw the masks of `scope`: a strategy sets it for its model's layers."""
        self._own_scope = scope

    def forward(self, x: Any) -> Tensor:
        if not self.training or self.p == 0:
            return x if isinstance(x, Tensor) else tensor(x)
        scope = _scope.get() or self._own_scope
        key = ("dropout", self._path, scope.update, scope.rank, scope.next_call(self._path))
        return functional.dropout(x, self.p, key=key, seed=scope.seed)

    def extra_repr(self) -> str:
        return f"p={self.p}"
