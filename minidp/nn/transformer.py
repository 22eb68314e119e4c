"""Attention as a layer, and the block that transformers are stacks of."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from minidp.autograd import Tensor
from minidp.nn import functional
from minidp.nn.attention import SelfAttention
from minidp.nn.dropout import Dropout
from minidp.nn.layers import GELU, LayerNorm, Linear, ReLU
from minidp.nn.module import Module
from minidp.nn.parameter import Parameter

ACTIVATIONS: dict[str, Callable[[], Module]] = {
    "gelu": GELU,
    "gelu_tanh": partial(GELU, "tanh"),
    "relu": ReLU,
}


class MultiHeadAttention(Module):
    """Attention of `num_heads` groups of features side by side (Vaswani et al. 2017): (b, t, e) → (b, t, e).

    ``layer(x)`` lets the places of x attend to each other; ``layer(query, key, value)`` those of query (b, t, e)
    to others (b, s, e). With `causal`, place t sees 0 … t only. `dropout` is on the shares.

    Parameters as PyTorch's MultiheadAttention has them: in_proj_weight (3e, e) and in_proj_bias (3e,) make
    queries, keys and values (weights by Glorot's uniform, bias 0, as there); out_proj is a `Linear`.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, causal: bool = False, dropout: float = 0.0, bias: bool = True
    ) -> None:
        if embed_dim < 1 or num_heads < 1:
            raise ValueError(f"MultiHeadAttention: embed_dim={embed_dim}, num_heads={num_heads}: give 1 or more")
        if embed_dim % num_heads:
            raise ValueError(
                f"MultiHeadAttention: {num_heads} heads do not divide embed_dim={embed_dim} into equal parts: "
                f"take one of {', '.join(str(h) for h in range(1, embed_dim + 1) if embed_dim % h == 0)} heads"
            )
        self.embed_dim, self.num_heads, self.causal = embed_dim, num_heads, causal
        self.width = embed_dim  # of all heads that are here, together
        self.in_proj_weight = Parameter(np.zeros((3 * embed_dim, embed_dim), dtype=np.float32))
        self.in_proj_bias = Parameter(np.zeros(3 * embed_dim, dtype=np.float32)) if bias else None
        self.out_proj = Linear(embed_dim, embed_dim, bias)
        self.dropout = Dropout(dropout)
        self.initialize(0)

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        if name == "in_proj_bias":
            return np.zeros(3 * self.embed_dim)
        bound = math.sqrt(6 / (4 * self.embed_dim))  # fan in e, fan out 3e (Glorot & Bengio 2010)
        return rng.uniform(-bound, bound, (3 * self.embed_dim, self.embed_dim))

    def forward(self, query: Any, key: Any = None, value: Any = None) -> Tensor:
        for x in (query, key, value):
            if x is not None and (len(x.shape) != 3 or x.shape[2] != self.embed_dim):
                raise ValueError(
                    f"MultiHeadAttention: inputs must have shape (batch, length, {self.embed_dim}), not {x.shape}"
                )
        if key is None and value is None and not (self.training and self.dropout.p):
            packed = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            mixed = SelfAttention.apply(packed, heads=self.num_heads, causal=self.causal)
            return self.out_proj(mixed)  # type: ignore[no-any-return]
        return self._in_parts(query, query if key is None else key, value)

    def _in_parts(self, query: Any, key: Any, value: Any) -> Tensor:
        """The same, step by step: for other keys than one's own, and for dropout."""
        width, heads = self.width, self.num_heads
        parts: list[Tensor] = []
        for i, x in enumerate((query, key, key if value is None else value)):
            part = slice(i * width, (i + 1) * width)
            bias = None if self.in_proj_bias is None else self.in_proj_bias[part]
            y = functional.linear(x, self.in_proj_weight[part], bias)
            parts.append(y.reshape(*y.shape[:2], heads, width // heads).transpose(0, 2, 1, 3))
        drop = self.dropout if self.training and self.dropout.p else None
        q, k, v = parts
        y = functional.scaled_dot_product_attention(q, k, v, self.causal, drop)
        b, _, t, _ = y.shape
        return self.out_proj(y.transpose(0, 2, 1, 3).reshape(b, t, width))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, {self.num_heads}, causal={self.causal}"


class TransformerBlock(Module):
    """x ← x + attention(norm1(x));  x ← x + linear2(σ(linear1(norm2(x)))): (b, t, embed_dim) → the same.

    Normalised before each part rather than after, which trains without warm-up (Xiong et al. 2020). Its state
    fits PyTorch's TransformerEncoderLayer(norm_first=True, batch_first=True) of the same sizes.

    Args:
        embed_dim, num_heads: of the attention; `causal`: no place sees later ones.
        dim_feedforward: width inside, 4 · embed_dim if not given.
        dropout: on the shares of attention, inside, and on both parts' results, in training.
        activation: ``"gelu"``, ``"gelu_tanh"`` (the approximation that GPT-2 uses) or ``"relu"``.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dim_feedforward: int | None = None,
        dropout: float = 0.0,
        activation: str = "gelu",
        causal: bool = True,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"TransformerBlock: activation={activation!r}: valid: {', '.join(ACTIVATIONS)}")
        inside = 4 * embed_dim if dim_feedforward is None else dim_feedforward
        self.self_attn = MultiHeadAttention(embed_dim, num_heads, causal, dropout)
        self.linear1, self.linear2 = Linear(embed_dim, inside), Linear(inside, embed_dim)
        self.norm1, self.norm2 = LayerNorm(embed_dim), LayerNorm(embed_dim)
        self.activation = ACTIVATIONS[activation]()
        self.dropout, self.dropout1, self.dropout2 = Dropout(dropout), Dropout(dropout), Dropout(dropout)
        self.initialize(0)

    def forward(self, x: Any) -> Tensor:
        x = x + self.dropout1(self.self_attn(self.norm1(x)))
        inside = self.dropout(self.activation(self.linear1(self.norm2(x))))
        return x + self.dropout2(self.linear2(inside))  # type: ignore[no-any-return]
