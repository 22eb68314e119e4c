"""Batch normalisation over the batches of all ranks: with it N workers equal one, as without it they can't."""

from __future__ import annotations

from typing import Any

import numpy as np

from minidp import trace
from minidp.backend import Array, array_module, asarray, to_numpy
from minidp.comm import Communicator
from minidp.nn import Module
from minidp.nn.batch_norm import BatchNorm
from minidp.nn.normalization import Pool
from minidp.parallel.moments import as_row, combine


class SyncBatchNorm(BatchNorm):
    """`nn.BatchNorm` whose μ and σ² in training are those of all ranks' batches together; collective there.

    Forward and backward equal those of one worker with the whole batch, for shares of any sizes, none included:
    μ = Σ b_i μ_i / B, σ² = Σ b_i (σ_i² + (μ_i − μ)²) / B. Every rank must run the same forwards and backwards, one
    without samples too. Losses must be weighted by samples, as strategies do. Not with ``micro_shards``, which
    are computed one after the other. Without a strategy the buffers move by the moments of all ranks, on each.

    Args:
        num_features, eps, momentum: see `nn.BatchNorm2d`. Inputs (n, c, ...) of any number of axes.
        comm: the ranks; a duplicate is made, collectively.

    Cost of a forward: 8 (1 + 2c) bytes of each rank gathered by all; of a backward: an all-reduce of 16c bytes.
    Source: Peng et al., "MegDet", CVPR 2018, section 3.2.
    """

    def __init__(
        self, num_features: int, comm: Communicator, eps: float = 1e-5, momentum: float | None = 0.1
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self._ranks: _Ranks | None = _Ranks(comm.duplicate("SyncBatchNorm"))

    @property
    def world_size(self) -> int:
        """Over how many ranks; of a copy 0."""
        return 0 if self._ranks is None else self._ranks.world_size

    def __getstate__(self) -> dict[str, Any]:
        """A copy can evaluate; it belongs to no ranks with which it could train."""
        return {**super().__getstate__(), "_ranks": None}

    @classmethod
    def convert(cls, model: Module, comm: Communicator) -> Module:
        """Put one in place of each BatchNorm of `model`, with its parameters and buffers; returns the model.

        Collective. If the model itself is a BatchNorm, its successor is returned.

        Raises RuntimeError if a strategy trains the model: convert first, then build the strategy.
        """
        if any(isinstance(module, BatchNorm) and module.followed for module in model.modules()):
            raise RuntimeError("a strategy trains this model already: convert it first, then build the strategy")
        if isinstance(model, BatchNorm):
            return model if isinstance(model, cls) else cls._successor(model, comm)
        successors: dict[Module, SyncBatchNorm] = {}  # a tied layer has one
        for module in list(model.modules()):
            for name, child in module._children():
                if isinstance(child, BatchNorm) and not isinstance(child, cls):
                    if child not in successors:
                        successors[child] = cls._successor(child, comm)
                    setattr(module, name, successors[child])
        return model

    @classmethod
    def _successor(cls, norm: BatchNorm, comm: Communicator) -> SyncBatchNorm:
        new = cls(norm.num_features, comm, norm.eps, norm.momentum)
        new.weight, new.bias, new.training = norm.weight, norm.bias, norm.training
        for name in norm._buffers:
            setattr(new, name, getattr(norm, name))
        return new

    def pool(self) -> Pool:
        if self._ranks is None:
            raise RuntimeError(
                "a copy of a SyncBatchNorm has no ranks to train with: evaluate it (model.eval()), or load its "
                "state_dict() into one that is built with a comm"
            )
        return self._ranks


class _Ranks:
    """See `Pool`. Sums are in float64 and in order of rank."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self.world_size = comm, comm.world_size

    def moments(self, count: int, mean: Array, var: Array) -> tuple[int, Array, Array]:
        xp, mine = array_module(mean), as_row(count, mean, var)
        rows = np.zeros((self._comm.world_size, len(mine)))
        with trace.span("wait for batch statistics", "wait"):
            self._comm.all_gather(rows, mine)
        total, *moments = combine(rows)
        if total == 1:
            raise ValueError(
                "SyncBatchNorm: one value a channel has no variance, so a batch of one sample on all ranks "
                "together can't be normalised: give 2 or more, or call model.eval() if this is no training"
            )
        return total, asarray(moments[0], xp, mean.dtype), asarray(moments[1], xp, mean.dtype)

    def total(self, *sums: Array) -> tuple[Any, ...]:
        both = np.stack([to_numpy(x) for x in sums]).astype(np.float64)
        with trace.span("wait for batch statistics", "wait"):
            self._comm.all_reduce(both)
        return tuple(asarray(x, array_module(sums[0]), sums[0].dtype) for x in both)
