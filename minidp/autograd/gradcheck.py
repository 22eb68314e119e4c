"""Check a derivative against finite differences, along a random direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minidp.autograd.tensor import Tensor
from minidp.backend import Array, generator


def gradcheck(
    function: Callable[..., Tensor], *inputs: Array, eps: float = 1e-6, tolerance: float = 1e-6, seed: int = 0
) -> None:
    """Raise AssertionError unless the gradient of `function` at `inputs` is right.

    The output is made a scalar by random weights u, the inputs move along random directions v, and
    Σ ∂(u·f)/∂x · v is compared with (u·f(x + εv) − u·f(x − εv)) / 2ε: two evaluations, however many elements
    there are, and a wrong element is missed with probability zero (Autograd's and JAX's method).

    `inputs` are float64 NumPy arrays, away from kinks by more than `eps`; each must get a gradient of its own
    shape. `tolerance` is relative to 1 + |numeric|.
    """
    rng = generator(seed, "gradcheck")
    directions = [rng.standard_normal(x.shape) for x in inputs]
    tensors = [Tensor(x, requires_grad=True) for x in inputs]
    out = function(*tensors)
    weights = rng.standard_normal(out.shape)
    out.backward(weights)
    owner = getattr(function, "__self__", None)  # of Square.apply, the class
    name = owner.__name__ if isinstance(owner, type) else getattr(function, "__name__", repr(function))
    arguments = ", ".join(f"{x.dtype}{list(x.shape)}" for x in inputs)

    def moved(step: float) -> Any:
        return (weights * function(*(Tensor(x + step * v) for x, v in zip(inputs, directions))).numpy()).sum()

    analytic = 0.0
    for k, (x, tensor, direction) in enumerate(zip(inputs, tensors, directions)):
        if tensor.grad is None or tensor.grad.shape != x.shape:
            found = "no gradient" if tensor.grad is None else f"a gradient of shape {tensor.grad.shape}"
            raise AssertionError(f"gradcheck of {name}({arguments}): argument {k} got {found}")
        analytic += float((tensor.grad.numpy() * direction).sum())
    numeric = float((moved(eps) - moved(-eps)) / (2 * eps))
    if not abs(analytic - numeric) <= tolerance * (1 + abs(numeric)):  # written so that NaN fails
        raise AssertionError(
            f"gradcheck of {name}({arguments}): analytic {analytic!r}, numeric {numeric!r}, "
            f"difference {analytic - numeric:.3g}\narguments: "
            + ", ".join(np.array2string(x, threshold=20) for x in inputs)
        )
