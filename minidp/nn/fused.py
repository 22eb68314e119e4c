"""Operations as CUDA kernels: on a GPU each of these subclasses takes its operation's place.

The plain operations are right on every device, but a device's time goes into reading and writing memory, and each
line of theirs reads and writes whole arrays. A kernel does it once. `Function.apply` picks the subclass where
kernels run (`Function.fused`); for numbers that have none, such as half precision, it is the plain one.

This file: what all have in common, and activations. Beside it: `fused_linear`, `fused_rows` (softmax, losses,
normalisation, attention), `fused_embedding`, `fused_dropout`; each with its kernels in the ``.cu`` of that name.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from minidp.autograd.function import Function
from minidp.backend import Array, Kernels
from minidp.backend.kernels import Launcher
from minidp.nn.activations import GELU, ReLU, Tanh

KERNELS = Kernels(
    Path(__file__).with_suffix(".cu"),
    *("relu", "relu_backward", "tanh_forward", "tanh_backward", "gelu", "gelu_tanh"),
)


class Fused(Function):
    """Comes before the operation that it replaces: ``class FusedTanh(Fused, Tanh)``.

    A subclass writes `launch` and `launch_backward`, as forward and backward of an operation are written, and may
    say by `suits` which inputs are left to the plain ones.
    """

    library: ClassVar[Kernels] = KERNELS
    kernels: Launcher | None
    """For the type of these numbers; None: the plain operation runs, both ways."""

    def suits(self, *arrays: Any, **options: Any) -> Any:
        """The dtype in which to compute; None for the plain operation."""
        return arrays[0].dtype

    def launch(self, *arrays: Any, **options: Any) -> Array:
        raise NotImplementedError

    def launch_backward(self, grad: Array) -> Any:
        raise NotImplementedError

    def forward(self, *arrays: Any, **options: Any) -> Array:
        dtype = self.suits(*arrays, **options)
        self.kernels = None if dtype is None else self.library.on(self.xp, dtype)
        return (super().forward if self.kernels is None else self.launch)(*arrays, **options)

    def backward(self, grad: Array) -> Any:
        return (super().backward if self.kernels is None else self.launch_backward)(grad)

    def room(self, k: int, dtype: Any) -> Array:
        """Where to write the gradient of input `k`: its slot if that can be used, else a new array."""
        assert self.inputs is not None
        slot = self.grad_out(k)
        if slot is not None and slot.dtype == dtype and slot.flags.c_contiguous:
            return slot
        return self.xp.empty(self.inputs[k].shape, dtype=dtype)


def contiguous(x: Array, dtype: Any, xp: Any) -> Array:
    """`x` as a kernel needs it, which gets an address and nothing else; itself if it is so already."""
    x = x.astype(dtype, copy=False)
    return x if x.flags.c_contiguous else xp.ascontiguousarray(x)


def axes_in_memory(x: Array) -> list[int] | None:
    """The axes of `x` from the widest steps to the narrowest; None if that is the order they have.

    Images between convolutions lie as (c, h, w, n) and are seen as (n, c, h, w): where each element stands for
    itself they are taken as they lie, and nothing is copied.
    """
    return None if x.flags.c_contiguous else sorted(range(x.ndim), key=lambda axis: -x.strides[axis])


def turned(x: Array, axes: Sequence[int] | None) -> Array:
    return x if axes is None else x.transpose(*axes)


def turned_back(x: Array, axes: Sequence[int] | None) -> Array:
    return x if axes is None else x.transpose(*sorted(range(len(axes)), key=axes.__getitem__))


class Elementwise(Fused):
    """An activation whose backward needs its values: ``name(n, x, y)`` and ``name_back(n, y, grad, out)``."""

    names: ClassVar[tuple[str, str]]

    def launch(self, x: Array) -> Array:
        assert self.kernels is not None
        axes = axes_in_memory(x)
        x = contiguous(turned(x, axes), x.dtype, self.xp)
        y = self.xp.empty(x.shape, dtype=x.dtype)
        self.kernels.each(self.names[0], x.size, x, y)
        self.saved = y, axes
        return turned_back(y, axes)

    def launch_backward(self, grad: Array) -> Any:
        assert self.kernels is not None
        y, axes = self.saved
        grad = contiguous(turned(grad, axes), y.dtype, self.xp)
        out = self.xp.empty(y.shape, dtype=y.dtype)
        self.kernels.each(self.names[1], y.size, y, grad, out)
        return turned_back(out, axes)


class FusedReLU(Elementwise, ReLU):
    names = "relu", "relu_backward"


class FusedTanh(Elementwise, Tanh):
    names = "tanh_forward", "tanh_backward"


class FusedGELU(GELU):
    """Value and slope in one pass; backward is one product already."""

    def exact(self, x: Array) -> tuple[Array, Array]:
        return self.both("gelu", x) or super().exact(x)

    def tanh(self, x: Array) -> tuple[Array, Array]:
        return self.both("gelu_tanh", x) or super().tanh(x)

    def both(self, name: str, x: Array) -> tuple[Array, Array] | None:
        kernels = KERNELS.on(self.xp, x.dtype)
        if kernels is None:
            return None
        axes = axes_in_memory(x)
        x = contiguous(turned(x, axes), x.dtype, self.xp)
        y, slope = (self.xp.empty(x.shape, dtype=x.dtype) for _ in range(2))
        kernels.each(name, x.size, x, y, slope)
        return turned_back(y, axes), turned_back(slope, axes)


ReLU.fused, Tanh.fused, GELU.fused = FusedReLU, FusedTanh, FusedGELU
