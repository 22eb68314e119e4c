"""An operation: a class whose instance is one application of it, forward and backward side by side."""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from minidp.backend import Array, array_module, array_types, asarray, current_meter, find_module

if TYPE_CHECKING:
    from minidp.autograd.tensor import Tensor

grad_enabled: ContextVar[bool] = ContextVar("minidp_grad_enabled", default=True)


class Function:
    """A differentiable operation on raw arrays, and, once applied, a node of the graph.

    A subclass writes two methods, one beside the other::

        class Exp(Function):
            def forward(self, x):
                self.saved = y = self.xp.exp(x)
                return y

            def backward(self, grad):
                return grad * self.saved

    and is called as ``Exp.apply(tensor)``. `forward` gets the arrays behind the tensors (numbers and raw
    arrays arrive as they are, keyword options too). `backward` gets ∂loss/∂output and returns ∂loss/∂input,
    one per input (a tuple if there are several), None where ``self.needs[k]`` is False.

    Attributes: `xp` the array module; `inputs` what `apply` was given; `needs` whether each input needs a
    gradient, all False when nothing is recorded; `saved` what forward keeps for backward. A graph is used
    once, so backward may overwrite the arrays in `saved` that forward made itself.

    Arrays of the host and of a device don't mix: that is a TypeError, so that nothing moves unseen. The exceptions
    are operations where a batch meets parameters; they say so by `moves`.
    """

    __slots__ = ("inputs", "needs", "saved", "xp")

    fresh: ClassVar[bool] = False
    """True promises that backward returns new arrays (or slots), held by nobody else: no copy is needed."""

    moves: ClassVar[bool] = False
    """True: inputs on the host that need no gradient go to the device where the others lie."""

    fused: ClassVar[type[Function] | None] = None
    """The same operation for devices that run CUDA kernels, a subclass (`nn.fused`); None: it runs as it is. Not
    inherited."""

    inputs: tuple[Any, ...] | None
    needs: list[bool]
    saved: Any
    xp: Any

    def forward(self, *arrays: Any, **options: Any) -> Array:
        raise NotImplementedError

    def backward(self, grad: Array) -> Any:
        raise NotImplementedError

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        """Estimate the floating-point operations (forward, backward) from the shapes of output and inputs.

        By default an elementwise operation: one per element of the larger of output and input, and as many
        for each gradient.
        """
        size = out.size
        for x in inputs:
            size = max(size, getattr(x, "size", 1))
        return float(size), float(size * sum(self.needs))

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        """Estimate the bytes read and written (forward, backward); given what `flops` is given.

        By default each array is touched once: forward reads the inputs and writes the output, backward reads
        output's gradient and inputs, and writes the gradients that are needed. An operation that passes over
        its arrays more often, or moves nothing, says so. Asked for only while somebody measures: 0.5 µs.
        """
        touched, gradients = out.nbytes, 0
        for x, needed in zip(inputs, self.needs):
            size = nbytes_of(x)
            touched += size
            if needed:
                gradients += size
        return touched, touched + gradients

    @classmethod
    def apply(cls, *inputs: Any, **options: Any) -> Tensor:
        """Run forward on `inputs` (tensors, raw arrays, numbers); record the node if a gradient will flow."""
        arrays, needs = [], []
        for x in inputs:
            is_tensor = isinstance(x, Tensor)
            arrays.append(x.data if is_tensor else x)
            needs.append(is_tensor and x.requires_grad)
        record = True in needs and grad_enabled.get()
        number_first = len(arrays) > 1 and not hasattr(arrays[0], "shape")  # as in 2 / x
        xp = array_module(arrays[number_first])
        if len(array_types) > 1:  # there are arrays of a device about
            if cls.moves:
                xp = meet(arrays, needs)
            if xp is not np and hasattr(xp, "RawModule"):
                cls = cls.__dict__.get("fused") or cls  # not inherited: what derives from it does something else
        fn = cls()
        fn.needs = needs if record else [False] * len(needs)
        fn.xp = xp
        data = fn.forward(*arrays, **options)
        if type(data) not in array_types:  # a full reduction gives NumPy's scalar, or a lone Fraction
            data = xp.asarray(data)
        meter = current_meter()
        if meter is not None:
            meter.count(fn.flops(data, *arrays)[0], fn.traffic(data, *arrays)[0])
        out = Tensor.__new__(Tensor)
        out.data = data
        out.requires_grad = record
        out._grad = None
        if record:
            fn.inputs = inputs
            out.grad_fn = fn
        else:  # fn, and all that it saved, ends here
            out.grad_fn = None
        return out

    def grad_out(self, k: int) -> Array | None:
        """Return the array to write the gradient of input `k` into, or None: then make a new one.

        It is the slot of a bound Parameter, if nothing was written to it in this step. Computing straight
        into it (``xp.matmul(..., out=self.grad_out(1))``) saves a copy of the size of the parameter.
        """
        assert self.inputs is not None
        tensor = self.inputs[k]
        return None if tensor._grad_written else tensor._grad_slot

    def fit(self, k: int, grad: Array) -> Array:
        """Undo the broadcasting of input `k`: sum `grad`, of the output's shape, to the input's shape."""
        assert self.inputs is not None
        if type(grad) not in array_types:  # the product of two 0-d arrays is a scalar
            grad = self.xp.asarray(grad)
        return unbroadcast(grad, self.inputs[k].data.shape)


def meet(arrays: list[Any], needs: list[bool]) -> Any:
    """The array module of these arrays; those of the host are moved to the others' device, in place."""
    xp = next((home for home in map(find_module, arrays) if home not in (None, np)), np)
    if xp is not np:
        for i, x in enumerate(arrays):
            if isinstance(x, np.ndarray) and not needs[i]:
                arrays[i] = asarray(x, xp)
    return xp


def unbroadcast(grad: Array, shape: tuple[int, ...]) -> Array:
    """Sum `grad` over the axes along which an array of `shape` was broadcast to ``grad.shape``.

    A copy along an axis in forward is a sum along that axis in backward.
    """
    if grad.shape == shape:
        return grad
    leading = grad.ndim - len(shape)
    stretched = tuple(i for i, n in enumerate(shape, leading) if n == 1 and grad.shape[i] != 1)
    return grad.sum(axis=(*range(leading), *stretched), keepdims=True).reshape(shape)


def nbytes_of(x: Any) -> int:
    """Bytes of an array or of a tensor's; 0 for a number."""
    return getattr(x.data if isinstance(x, Tensor) else x, "nbytes", 0)


def rows(x: Array) -> Array:
    """View `x` of shape (..., features) as (rows, features); rows may be 0."""
    return x if x.ndim == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# Last, because the two need each other: an operation makes tensors, a tensor's methods are operations.
from minidp.autograd.tensor import Tensor  # noqa: E402
