"""Layers for images: (n, channels, height, width), whatever their order in memory (`autograd.images`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minidp.autograd import Tensor
from minidp.autograd.images import Pair, check_padding, check_window, pair
from minidp.nn import functional
from minidp.nn.init import fan_in_uniform
from minidp.nn.module import Module
from minidp.nn.parameter import Parameter


class Conv2d(Module):
    """(n, in_channels, h, w) → (n, out_channels, h', w'), h' = ⌊(h + 2 padding − kernel_size) / stride⌋ + 1.

    kernel_size, stride and padding are numbers, or pairs (rows, columns). weight (out, in, rows, columns) and
    bias (out,) as in PyTorch; both start as U(±1/√(in · rows · columns)), float32.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Pair,
        stride: Pair = 1,
        padding: Pair = 0,
        bias: bool = True,
    ) -> None:
        if in_channels < 1 or out_channels < 1:
            raise ValueError(f"Conv2d: channels must be positive, not {in_channels} → {out_channels}")
        check_window("Conv2d", kernel_size, stride, padding)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = pair(kernel_size), pair(stride), pair(padding)
        self.weight = Parameter(np.zeros((out_channels, in_channels, *self.kernel_size), dtype=np.float32))
        self.bias = Parameter(np.zeros(out_channels, dtype=np.float32)) if bias else None
        self.initialize(0)

    def initial(self, name: str, rng: np.random.Generator) -> np.ndarray:
        shape = self.weight.shape if name == "weight" else (self.out_channels,)
        return fan_in_uniform(rng, shape, self.in_channels * math.prod(self.kernel_size))

    def forward(self, x: Any) -> Tensor:
        return functional.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}" + ("" if self.bias is not None else ", bias=False")
        )


class _Pool2d(Module):
    def __init__(self, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> None:
        name = type(self).__name__
        stride = kernel_size if stride is None else stride
        check_window(name, kernel_size, stride, padding)
        self.kernel_size, self.stride, self.padding = pair(kernel_size), pair(stride), pair(padding)
        check_padding(name, self.kernel_size, self.padding)

    def extra_repr(self) -> str:
        return f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"


class MaxPool2d(_Pool2d):
    """The largest value of each window; windows side by side unless `stride` says otherwise."""

    def forward(self, x: Any) -> Tensor:
        return functional.max_pool2d(x, self.kernel_size, self.stride, self.padding)


class AvgPool2d(_Pool2d):
    """The mean of each window, padding counted as 0; windows side by side unless `stride` says otherwise."""

    def forward(self, x: Any) -> Tensor:
        return functional.avg_pool2d(x, self.kernel_size, self.stride, self.padding)
