"""Tensor: an array that remembers how it was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minidp.autograd import ops
from minidp.autograd.engine import backward
from minidp.autograd.function import Function, grad_enabled
from minidp.backend import Array, array_module, array_types, asarray, find_module, item, to_numpy

Axis = int | tuple[int, ...] | None


class Tensor:
    """An array (`data`), and, if it needs a gradient, the operation that made it (`grad_fn`).

    `data` is the raw array, of NumPy, CuPy or a registered type; it may be re-pointed at another array of the
    same shape. Operators take tensors, raw arrays and Python numbers on either side. A leaf (`grad_fn` is
    None) with ``requires_grad=True`` collects its gradient in `grad` when `backward` is called.

    The constructor does not copy; `minidp.tensor` does.
    """

    __slots__ = ("__weakref__", "_grad", "data", "grad_fn", "requires_grad")

    __array_priority__ = 1000  # array + tensor is left to the tensor, by NumPy and by CuPy

    data: Array
    requires_grad: bool
    grad_fn: Function | None
    _grad: Array | None

    # Only an nn.Parameter may have a slot for its gradient, or hooks: on others the engine reads constants.
    _grad_slot: Array | None = None
    _grad_written: bool = False
    _hooks: list[Callable[[Any], None]] | None = None

    def __init__(self, data: Array, requires_grad: bool = False) -> None:
        if isinstance(data, Tensor):
            data = data.data
        elif type(data) not in array_types:
            data = asarray(data, array_module(data))
        if requires_grad and data.dtype.kind not in "fO":
            raise TypeError(f"only floating-point tensors have gradients; this one is {data.dtype}")
        self.data = data
        self.requires_grad = requires_grad
        self.grad_fn = None
        self._grad = None

    # ── what is inside ──────────────────────────────────────────────────────────────────────────────────

    @property
    def shape(self) -> tuple[int, ...]:
        shape: tuple[int, ...] = self.data.shape
        return shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return len(self.data.shape)

    @property
    def size(self) -> int:
        return int(self.data.size)

    @property
    def is_leaf(self) -> bool:
        return self.grad_fn is None

    def __len__(self) -> int:
        if not self.data.shape:
            raise TypeError("len() of a 0-d tensor")
        return int(self.data.shape[0])

    def numpy(self) -> np.ndarray:
        """Return the data on the host: the array itself (no copy) if it lives there already."""
        return to_numpy(self.data)

    def item(self) -> Any:
        """Return the only element as a Python number (waits for the device)."""
        return item(self.data)

    def detach(self) -> Tensor:
        """Return a tensor on the same data that is no part of the graph."""
        return Tensor(self.data)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if not isinstance(self.data, np.ndarray):
            raise TypeError("this tensor lives on a device: ask for .numpy() to copy it to the host")
        return np.array(self.data, dtype=dtype, copy=copy)

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if spec else str(self)

    def __repr__(self) -> str:
        tail = ", requires_grad=True" if self.requires_grad else ""
        body = np.array2string(self.numpy(), separator=", ", prefix="tensor(", threshold=200)
        return f"tensor({body}, dtype={self.dtype}{tail})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles hold the data alone: graph, gradient and slot belong to this process."""
        return type(self), (self.data, self.requires_grad)

    # ── gradients ───────────────────────────────────────────────────────────────────────────────────────

    @property
    def grad(self) -> Tensor | None:
        """The gradient collected so far, as a Tensor that shares its memory, or None.

        May be set to None or to an array or tensor of the same shape, which is copied.
        """
        return None if self._grad is None else Tensor(self._grad)

    @grad.setter
    def grad(self, value: Any) -> None:
        self._grad = None if value is None else self._like(value)

    def _like(self, value: Any) -> Array:
        """A copy of the gradient `value` in this tensor's dtype; ValueError if the shapes differ."""
        array = value.data if isinstance(value, Tensor) else value
        if array.shape != self.data.shape:
            raise ValueError(f"gradient of shape {array.shape} for a tensor of shape {self.data.shape}")
        return array.astype(self.data.dtype)

    def _accumulate(self, grad: Array, fresh: bool) -> None:
        """Add `grad` to the collected gradient of this leaf.

        `fresh` says that nobody else holds `grad`. Otherwise the first one is copied, so that the collected
        gradient never is an alias and later ones can be added in place.
        """
        if self._grad is not None:
            self._grad += grad
        else:
            self._grad = grad if fresh else grad.copy()

    def backward(self, gradient: Any = None) -> None:
        """Add the gradient of this tensor to the ``.grad`` of every leaf it depends on.

        `gradient` is what the derivative is multiplied with: an array or tensor of this tensor's shape, or,
        for a tensor of one element, a number (1 if left out). The graph is used up: a second pass raises.
        """
        backward(self, gradient.data if isinstance(gradient, Tensor) else gradient)

    # ── arithmetic ──────────────────────────────────────────────────────────────────────────────────────

    def __add__(self, other: Any) -> Tensor:
        return ops.Add.apply(self, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Tensor:
        return ops.Sub.apply(self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return ops.Sub.apply(other, self)

    def __mul__(self, other: Any) -> Tensor:
        return ops.Mul.apply(self, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> Tensor:
        return ops.Div.apply(self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return ops.Div.apply(other, self)

    def __neg__(self) -> Tensor:
        return ops.Neg.apply(self)

    def __pow__(self, exponent: float) -> Tensor:
        return ops.Pow.apply(self, exponent=exponent)

    def __matmul__(self, other: Any) -> Tensor:
        return ops.MatMul.apply(self, other)

    def __rmatmul__(self, other: Any) -> Tensor:
        return ops.MatMul.apply(other, self)

    def exp(self) -> Tensor:
        return ops.Exp.apply(self)

    def log(self) -> Tensor:
        return ops.Log.apply(self)

    def sqrt(self) -> Tensor:
        return ops.Sqrt.apply(self)

    # ── reductions and shapes ───────────────────────────────────────────────────────────────────────────

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.Sum.apply(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The mean over `axis` (all by default). Over 0 elements it is 0: empty shards are no exception."""
        return ops.Mean.apply(self, axis=axis, keepdims=keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        """The largest element over `axis`; the gradient is shared equally by elements that tie."""
        return ops.Max.apply(self, axis=axis, keepdims=keepdims)

    def reshape(self, *shape: Any) -> Tensor:
        return ops.Reshape.apply(self, shape=shape[0] if len(shape) == 1 else shape)

    def flatten(self, start_dim: int = 0) -> Tensor:
        """Merge the axes from `start_dim` on into one."""
        return ops.Flatten.apply(self, start_dim=start_dim)

    def transpose(self, *axes: Any) -> Tensor:
        """Permute the axes as ``numpy.transpose`` does; without arguments, reverse them."""
        return ops.Transpose.apply(self, axes=(axes[0] if len(axes) == 1 else axes) or None)

    @property
    def T(self) -> Tensor:  # noqa: N802
        return self.transpose()

    def __getitem__(self, index: Any) -> Tensor:
        return ops.GetItem.apply(self, index=index)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def tensor(data: Any, requires_grad: bool = False) -> Tensor:
    """Return a new Tensor on a copy of `data` (numbers, nested lists, an array of any module, a tensor).

    Arrays keep their dtype; Python floats become float32, Python ints int64, as in PyTorch.
    """
    if isinstance(data, Tensor):
        data = data.data
    xp = find_module(data)
    if xp is not None:
        return Tensor(xp.array(data, copy=True), requires_grad)
    array = np.asarray(data)
    narrow = array.dtype == np.float64 and not hasattr(data, "dtype")  # other libraries' arrays keep theirs too
    return Tensor(array.astype(np.float32 if narrow else array.dtype), requires_grad)


@contextmanager
def no_grad() -> Iterator[None]:
    """Within the block, or the function it decorates (``@no_grad()``), nothing is recorded for backward.

    The switch is a context variable: it is restored whatever happens in the block, and does not leak into
    other threads, tasks or virtual ranks.
    """
    token = grad_enabled.set(False)
    try:
        yield
    finally:
        grad_enabled.reset(token)


def is_grad_enabled() -> bool:
    """Return whether operations are recorded at this point of the program."""
    return grad_enabled.get()
