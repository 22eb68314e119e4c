"""Batch normalisation, and the running statistics that it leaves for evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias
from weakref import ReferenceType, ref

import numpy as np

from minidp.autograd import Tensor
from minidp.backend import Array, array_module, asarray
from minidp.nn.module import Module
from minidp.nn.normalization import BatchNorm as Operation
from minidp.nn.normalization import Moments, Pool
from minidp.nn.parameter import Parameter

Record: TypeAlias = Callable[[int, Array, Array], object]


class BatchNorm(Module):
    """x̂ · weight + bias with x̂ = (x − μ) / √(σ² + eps), for each channel; what `BatchNorm1d` and `2d` share.

    In training μ and σ² are those of the batch: of all samples and places in it. In evaluation they are the
    running statistics, the buffers running_mean and running_var (c,), which training moves towards those of the
    batch by `momentum` (None: their mean over all updates); σ² unbiased there, as in PyTorch. Names as there too,
    with num_batches_tracked, shape ().

    Under a strategy there is one such move a step, by the statistics of the step's whole batch, whatever its cut:
    σ² = Σ n_i (σ_i² + (μ_i − μ)²) / Σ n_i. So all ranks hold the same buffers, equal to those of one worker on the
    same activations. Activations themselves are normalised by each rank's own batch (or micro-shard), so N workers
    do not equal one with the whole batch, but one that takes N parts of it. `parallel.SyncBatchNorm` equals both.

    Raises ValueError in training for a batch with a single value a channel: its σ² says nothing. A batch of 0
    samples is none of training's concern: nothing changes.
    """

    dims: ClassVar[tuple[int, ...]] = ()
    """How many dimensions inputs may have; any if empty."""
    shapes: ClassVar[str] = "(n, c, ...)"

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float | None = 0.1) -> None:
        if num_features < 1:
            raise ValueError(f"{type(self).__name__}: num_features={num_features}: give 1 or more")
        if not eps > 0:
            raise ValueError(f"{type(self).__name__}: eps={eps}: give a small positive number")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"{type(self).__name__}: momentum={momentum}: give a share from 0 to 1, or None")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = Parameter(np.ones(num_features, dtype=np.float32))
        self.bias = Parameter(np.zeros(num_features, dtype=np.float32))
        self.register_buffer("running_mean", np.zeros(num_features, dtype=np.float32))
        self.register_buffer("running_var", np.ones(num_features, dtype=np.float32))
        self.register_buffer("num_batches_tracked", np.zeros((), dtype=np.int64))
        self._follower: ReferenceType[Record] | None = None

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        return np.full(self.num_features, float(name == "weight"))

    def follow(self, record: Record | None) -> None:
        """From now on tell `record` (count, μ, σ²) of each batch of training, instead of moving the buffers.

        For as long as somebody else holds it: a strategy does. None: move them again.
        """
        self._follower = None if record is None else ref(record)

    @property
    def followed(self) -> bool:
        """Whether somebody else takes care of the buffers."""
        return self._follower is not None and self._follower() is not None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles belong to no strategy."""
        return {**vars(self), "_follower": None}

    def forward(self, x: Any) -> Tensor:
        shape = x.shape
        if (self.dims and len(shape) not in self.dims) or len(shape) < 2 or shape[1] != self.num_features:
            raise ValueError(
                f"{type(self).__name__}({self.num_features}): inputs must have shape {self.shapes} with "
                f"c = {self.num_features}, not {tuple(shape)}"
            )
        if not self.training:
            moments = self.running_mean, self.running_var
            return Operation.apply(x, self.weight, self.bias, eps=self.eps, moments=moments)
        pool = self.pool()
        if pool is None and int(np.prod(shape)) == self.num_features:
            raise ValueError(
                f"{self._path or type(self).__name__}: one value a channel has no variance, so a batch of one "
                "sample can't be normalised: give every rank (and micro-shard) batches of 2 samples or more in "
                "training, or call model.eval() if this is no training"
            )
        return Operation.apply(x, self.weight, self.bias, eps=self.eps, pool=pool, record=self._seen)

    def _seen(self, own: Moments, together: Moments) -> None:
        record = None if self._follower is None else self._follower()
        if record is None:
            self.update_running(*together)
        else:
            record(*own)

    def pool(self) -> Pool | None:
        """Who normalises together with this layer: nobody."""
        return None

    def update_running(self, count: int, mean: Array, var: Array) -> None:
        """Move the running statistics towards those of `count` values a channel; σ² biased; nothing for none."""
        if not count:
            return
        self.num_batches_tracked += 1
        share = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = var * (count / max(1, count - 1))
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running[...] = running * (1 - share) + asarray(new, array_module(running)) * share

    running_mean: Array
    running_var: Array
    num_batches_tracked: Array

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps:g}, momentum={self.momentum}"


class BatchNorm1d(BatchNorm):
    """`BatchNorm` of (n, c), or of sequences (n, c, length)."""

    dims = (2, 3)
    shapes = "(n, c) or (n, c, length)"


class BatchNorm2d(BatchNorm):
    """`BatchNorm` of images (n, c, height, width)."""

    dims = (4,)
    shapes = "(n, c, height, width)"
