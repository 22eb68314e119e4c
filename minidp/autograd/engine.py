"""The backward pass: walk the graph from the loss to the leaves and add up gradients."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from minidp.autograd.underway import under_way
from minidp.backend import Array, array_types, asarray, current_meter

if TYPE_CHECKING:
    from minidp.autograd.function import Function
    from minidp.autograd.tensor import Tensor


def backward(root: Tensor, gradient: Any = None) -> None:
    """Add d(root · gradient)/d(leaf) to the ``.grad`` of each leaf that `root` depends on.

    A node runs when the gradients of all its consumers have arrived (Kahn's order), so each runs once and no
    recursion limits the depth. The graph is used up: what it saved is freed, a second pass raises.

    Errors: RuntimeError if `root` needs no gradient, is not a scalar and no `gradient` is given, or its graph
    was used already; ValueError if `gradient` has another shape than `root`.
    """
    grad = _seed(root, gradient)
    if root.grad_fn is None:
        root._accumulate(grad, fresh=False)
        return
    try:
        _walk(root.grad_fn, grad)
    finally:
        under_way.node = None


def _walk(root: Function, grad: Array) -> None:
    """From the node `root`, whose gradient is `grad`, to the leaves."""
    waiting, uses = _consumers(root)
    grads: dict[Function, Array] = {root: grad}
    ready = [root]
    meter = current_meter()
    while ready:
        fn = ready.pop()
        under_way.node = fn
        grad = grads.pop(fn)
        results = fn.backward(grad)
        inputs = fn.inputs
        assert inputs is not None
        if meter is not None:
            meter.count(fn.flops(grad, *inputs)[1], fn.traffic(grad, *inputs)[1])
        if type(results) is not tuple:
            results = (results,)
        for needed, tensor, g in zip(fn.needs, inputs, results):
            if not needed:
                continue
            if type(g) not in array_types:  # a full reduction gives NumPy's scalar, or a lone Fraction
                g = asarray(g, fn.xp)
            if g.dtype != tensor.data.dtype:  # float32 leaves of a float64 sum get float32 gradients
                g = g.astype(tensor.data.dtype)
            parent = tensor.grad_fn
            if parent is None:
                tensor._accumulate(g, fn.fresh)
                if tensor._hooks is not None:
                    uses[tensor] -= 1
                    if uses[tensor] == 0:
                        for hook in tensor._hooks:
                            hook(tensor)
                continue
            if parent in grads:
                grads[parent] = grads[parent] + g  # never in place: an operation may have handed on an alias
            else:
                grads[parent] = g
            waiting[parent] -= 1
            if waiting[parent] == 0:
                ready.append(parent)
        fn.inputs = fn.saved = None


def _seed(root: Tensor, gradient: Any) -> Array:
    """The gradient that enters at the root, as an array of the root's shape and dtype."""
    data = root.data
    if not root.requires_grad:
        raise RuntimeError(
            "backward() of a tensor that needs no gradient: nothing that it was computed from has "
            "requires_grad=True, or it was computed under no_grad()"
        )
    xp = array_types[type(data)]
    if gradient is None:
        gradient = 1
    elif type(gradient) in array_types:
        if gradient.shape != data.shape:
            raise ValueError(f"gradient of shape {gradient.shape} for a tensor of shape {data.shape}")
        return asarray(gradient, xp, data.dtype)
    if data.size != 1:
        raise RuntimeError(
            f"backward() of a tensor of shape {data.shape}: only a scalar has one gradient; "
            "sum() it first, or give backward(gradient) an array of that shape"
        )
    if data.dtype == object:
        gradient = Fraction(gradient)  # an int would turn into a float at the first division
    if xp is not np:
        return xp.full(data.shape, gradient, dtype=data.dtype)  # made there; an array of the host would be moved
    return np.asarray(gradient, dtype=data.dtype).reshape(data.shape)


def _consumers(root: Function) -> tuple[dict[Function, int], dict[Tensor, int]]:
    """Count the gradients that each node, and each leaf with a hook, will receive in this pass."""
    waiting: dict[Function, int] = {root: 0}
    uses: dict[Tensor, int] = {}
    found = [root]
    while found:
        fn = found.pop()
        if fn.inputs is None:
            raise RuntimeError(
                "backward() through a graph that was used already: its saved arrays are freed. "
                "Compute the loss again, or add the losses and call backward once"
            )
        for needed, tensor in zip(fn.needs, fn.inputs):
            if not needed:
                continue
            parent = tensor.grad_fn
            if parent is None:
                if tensor._hooks is not None:
                    uses[tensor] = uses.get(tensor, 0) + 1
            elif parent in waiting:
                waiting[parent] += 1
            else:
                waiting[parent] = 1
                found.append(parent)
    return waiting, uses
