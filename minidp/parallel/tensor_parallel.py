"""Layers whose parameters are cut over the ranks of a group: tensor parallelism (Shoeybi et al., "Megatron-LM",
2019).

    ColumnParallelLinear     Y_i = X A_i + b_i          each rank makes some of the features       f before it
    RowParallelLinear        Y = Σ_i X_i A_i + b        each rank has some of the inputs           g after it
    ParallelMLP              the two in a row, and between them what acts on each feature by itself

and, in files of their own, attention by heads and embeddings by rows (`parallel_attention`, `parallel_embedding`).
What f and g are is told in `conjugate`. (A linear layer's weight is stored as (out, in) = Aᵀ, as in PyTorch:
columns of A are its rows.) Every layer gives what the dense one gives, to rounding, and has its initial values: a
seed means the same model, however it is cut. All are collective: every rank of the group calls them with the same
input, but for `RowParallelLinear`, which gets its part.

``X.of(layer, comm)`` takes over a dense layer's Parameters, each cut to this rank's part. `parallelize` does so to
a whole model.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np

from minidp.autograd import Tensor
from minidp.comm import Communicator
from minidp.nn import Linear, Module, Parameter, Sequential
from minidp.nn import functional as F
from minidp.nn.init import fan_in_uniform
from minidp.nn.transformer import ACTIVATIONS
from minidp.parallel.conjugate import copy_to_ranks, join_ranks, sum_over_ranks
from minidp.parallel.cuts import Cut


class ParallelModule(Module):
    """A layer of which this rank has parts. ``cuts`` tells, by name, how its own Parameters are cut."""

    cuts: dict[str, Cut]
    comm: Communicator

    def take_over(self, layer: Module) -> None:
        """Hold the Parameters of a dense layer, each cut to this rank's part; their identity stays."""
        for name, parameter in layer._own_parameters():
            if name in self.cuts:
                self.cuts[name].apply(parameter)
            setattr(self, name, parameter)
        self.training = layer.training

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"a {type(self).__name__} can't be copied or pickled: it belongs to the ranks with its other parts. "
            "Take strategy.state_dict(), and load it into a dense model"
        )


class _ParallelLinear(ParallelModule):
    """What both linear layers have in common."""

    axis = 0  # of the weight, along which it is cut

    def __init__(self, in_features: int, out_features: int, comm: Communicator, bias: bool) -> None:
        self.in_features, self.out_features, self.comm = in_features, out_features, comm
        weight = Cut((out_features, in_features), self.axis, comm.rank, comm.world_size)
        self.cuts = {"weight": weight}
        if self.axis == 0:
            self.cuts["bias"] = Cut((out_features,), 0, comm.rank, comm.world_size)
        self.weight = Parameter(np.zeros(weight.shape(), dtype=np.float32))
        lengths = self.cuts["bias"].shape() if self.axis == 0 else (out_features,)
        self.bias = Parameter(np.zeros(lengths, dtype=np.float32)) if bias else None
        self.initialize(0)

    @classmethod
    def of(cls, linear: Linear, comm: Communicator, **options: Any) -> Self:
        """The same layer, cut: it takes over the Parameters."""
        layer = cls(linear.in_features, linear.out_features, comm, bias=linear.bias is not None, **options)
        layer.take_over(linear)
        return layer

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        shape = (self.out_features, self.in_features) if name == "weight" else (self.out_features,)
        whole = fan_in_uniform(rng, shape, self.in_features)
        return self.cuts[name].part(whole) if name in self.cuts else whole

    def extra_repr(self) -> str:
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self.in_features}, {self.out_features}, part {self.comm.rank} of {self.comm.world_size}{bias}"


class ColumnParallelLinear(_ParallelLinear):
    """Y_i = X A_i + b_i: (..., in_features), the same on all ranks → (..., this rank's part of out_features).

    Args:
        in_features, out_features: of the whole layer.
        comm: the T ranks.
        gather_output: join all ranks' parts: (..., out_features), the same on all. Parts may then differ by one.

    Sent: in backward an all-reduce of ∂X, which nothing is without; with ``gather_output`` an all-gather of Y.
    Weight (out_features/T, in_features), bias (out_features/T,). ValueError if T does not divide out_features.
    """

    axis = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        comm: Communicator,
        bias: bool = True,
        gather_output: bool = False,
    ) -> None:
        self.gather_output = gather_output
        check_parts("ColumnParallelLinear", "out_features", out_features, comm.world_size, equal=not gather_output)
        super().__init__(in_features, out_features, comm, bias)

    def forward(self, x: Any) -> Tensor:
        y = F.linear(copy_to_ranks(x, self.comm), self.weight, self.bias)
        return join_ranks(y, self.out_features, self.comm) if self.gather_output else y


class RowParallelLinear(_ParallelLinear):
    """Y = Σ_i X_i A_i + b: (..., this rank's part of in_features) → (..., out_features), the same on all ranks.

    Args:
        in_features, out_features: of the whole layer.
        comm: the T ranks.

    The bias is not cut, and added once, after the sum. Sent: in forward an all-reduce of Y. Weight (out_features,
    in_features/T). ValueError if T does not divide in_features.
    """

    axis = 1

    def __init__(self, in_features: int, out_features: int, comm: Communicator, bias: bool = True) -> None:
        check_parts("RowParallelLinear", "in_features", in_features, comm.world_size)
        super().__init__(in_features, out_features, comm, bias)

    def forward(self, x: Any) -> Tensor:
        mine = self.weight.shape[1]
        if x.shape[-1] != mine:
            raise ValueError(
                f"RowParallelLinear: this rank has {mine} of {self.in_features} input features, and was given "
                f"{x.shape[-1]}: give it what a ColumnParallelLinear without gather_output returns"
            )
        y = sum_over_ranks(F.linear(x, self.weight), self.comm)
        return y if self.bias is None else y + self.bias


class ParallelMLP(Sequential):
    """(..., in_features) → (..., out_features), `hidden` features between, of which each rank has some.

    Layers "0" ColumnParallelLinear, "1" the activation (``"gelu"``, ``"gelu_tanh"`` or ``"relu"``), "2"
    RowParallelLinear: names, initial values and results of ``nn.Sequential(Linear, activation, Linear, seed=)``.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        out_features: int,
        comm: Communicator,
        activation: str = "gelu",
        seed: int = 0,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"ParallelMLP: activation={activation!r}: valid: {', '.join(ACTIVATIONS)}")
        super().__init__(
            ColumnParallelLinear(in_features, hidden, comm),
            ACTIVATIONS[activation](),
            RowParallelLinear(hidden, out_features, comm),
            seed=seed,
        )


def put(module: Module, name: str, layer: Module) -> None:
    """Let ``layer`` take the place of a child, whatever that was."""
    setattr(module, name, layer)


def check_parts(layer: str, what: str, size: int, parts: int, equal: bool = True) -> None:
    """ValueError, with the numbers that would fit, unless ``size`` can be cut into that many parts."""
    if size < 1:
        raise ValueError(f"{layer}: {what}={size}: give 1 or more")
    if size % parts == 0 or (not equal and size >= parts):
        return
    if not equal:
        raise ValueError(f"{layer}: {what}={size} can't be cut into {parts} parts: take at most tp={size}")
    sizes = ", ".join(str(tp) for tp in range(1, size + 1) if size % tp == 0)
    below, above = size - size % parts, size - size % parts + parts
    near = " or ".join(str(n) for n in (below, above) if n)
    raise ValueError(
        f"{layer}: {what}={size} does not divide into {parts} equal parts: take tp of {sizes}, or {what}={near}"
    )
