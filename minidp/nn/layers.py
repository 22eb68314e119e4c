"""The layers. Each accepts tensors and raw arrays, and batches of 0 samples."""

from __future__ import annotations

from collections.abc import Iterator
from numbers import Integral
from typing import Any

import numpy as np

from minidp.autograd import Tensor
from minidp.nn import functional
from minidp.nn.init import fan_in_uniform
from minidp.nn.module import Module
from minidp.nn.parameter import Parameter


class Linear(Module):
    """x Wᵀ + b: (..., in_features) → (..., out_features). weight (out, in) and bias (out,) as in PyTorch.

    Both start as U(±1/√in_features), float32; inputs of another dtype are cast to that of the weight.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        if in_features < 1 or out_features < 1:
            raise ValueError(f"Linear: features must be positive, not {in_features} → {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(np.zeros((out_features, in_features), dtype=np.float32))
        self.bias = Parameter(np.zeros(out_features, dtype=np.float32)) if bias else None
        self.initialize(0)

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        shape = (self.out_features, self.in_features) if name == "weight" else (self.out_features,)
        return fan_in_uniform(rng, shape, self.in_features)

    def forward(self, x: Any) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}" + ("" if self.bias is not None else ", bias=False")


class Embedding(Module):
    """A learnt row for each token: integers (...) in 0 … num_embeddings − 1 → (..., embedding_dim).

    weight (num_embeddings, embedding_dim) starts as N(0, std²), std = 1 as in PyTorch. IndexError names a token
    that is out of range.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = 1.0) -> None:
        if num_embeddings < 1 or embedding_dim < 1:
            raise ValueError(f"Embedding: sizes must be positive, not {num_embeddings} × {embedding_dim}")
        self.num_embeddings, self.embedding_dim, self.std = num_embeddings, embedding_dim, std
        self.weight = Parameter(np.zeros((num_embeddings, embedding_dim), dtype=np.float32))
        self.initialize(0)

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        return rng.normal(0, self.std, self.weight.shape)

    def forward(self, tokens: Any) -> Tensor:
        return functional.embedding(tokens, self.weight)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class LayerNorm(Module):
    """(x − μ) / √(σ² + eps) · weight + bias, μ and σ² of each sample's last axes, which are `normalized_shape`.

    A number stands for one axis. weight starts as ones, bias as zeros, both of `normalized_shape`, float32.
    """

    def __init__(self, normalized_shape: int | tuple[int, ...], eps: float = 1e-5) -> None:
        one = isinstance(normalized_shape, Integral)
        shape = (int(normalized_shape),) if one else tuple(normalized_shape)  # type: ignore[arg-type]
        if not shape or min(shape) < 1:
            raise ValueError(f"LayerNorm: normalized_shape={normalized_shape}: give positive sizes")
        if not eps > 0:
            raise ValueError(f"LayerNorm: eps={eps}: give a small positive number")
        self.normalized_shape, self.eps = shape, eps
        self.weight = Parameter(np.ones(shape, dtype=np.float32))
        self.bias = Parameter(np.zeros(shape, dtype=np.float32))

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        return np.full(self.normalized_shape, float(name == "weight"))

    def forward(self, x: Any) -> Tensor:
        return functional.layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps:g}"


class ReLU(Module):
    """max(x, 0)."""

    def forward(self, x: Any) -> Tensor:
        return functional.relu(x)


class Tanh(Module):
    """tanh(x)."""

    def forward(self, x: Any) -> Tensor:
        return functional.tanh(x)


class GELU(Module):
    """x · Φ(x); ``approximate="tanh"`` for the cheaper form that GPT-2 uses."""

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f'GELU: approximate must be "none" or "tanh", not {approximate!r}')
        self.approximate = approximate

    def forward(self, x: Any) -> Tensor:
        return functional.gelu(x, self.approximate)

    def extra_repr(self) -> str:
        return f"approximate={self.approximate!r}"


class Flatten(Module):
    """Merge the axes from `start_dim` on: (n, 1, 28, 28) → (n, 784)."""

    def __init__(self, start_dim: int = 1) -> None:
        self.start_dim = start_dim

    def forward(self, x: Any) -> Tensor:
        return functional.flatten(x, self.start_dim)

    def extra_repr(self) -> str:
        return f"start_dim={self.start_dim}"


class Identity(Module):
    """x itself: a place where a layer could be."""

    def forward(self, x: Any) -> Any:
        return x


class Sequential(Module):
    """The layers one after the other, named "0", "1", …; initialised with `seed`.

    Can be indexed and iterated, so it also serves as a list of modules.
    """

    def __init__(self, *layers: Module, seed: int = 0) -> None:
        for i, layer in enumerate(layers):
            if not isinstance(layer, Module):
                raise TypeError(f"Sequential: layer {i} is a {type(layer).__name__}, not a Module")
            setattr(self, str(i), layer)
        self._names = tuple(str(i) for i in range(len(layers)))
        self.initialize(seed)

    def forward(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Module:
        layer: Module = vars(self)[self._names[index]]
        return layer

    def __iter__(self) -> Iterator[Module]:
        return map(vars(self).__getitem__, self._names)
