"""Reverse-mode differentiation over arrays: a tape made of the operations themselves.

    >>> import minidp
    >>> x = minidp.tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad.numpy()
    array([2., 4., 6.], dtype=float32)

`function` is one operation, `ops` the operations, `engine` the backward pass, `tensor` what users hold,
`gradcheck` the proof.
"""

from minidp.autograd.function import Function, unbroadcast
from minidp.autograd.gradcheck import gradcheck
from minidp.autograd.tensor import Tensor, is_grad_enabled, no_grad, tensor

__all__ = ["Function", "Tensor", "gradcheck", "is_grad_enabled", "no_grad", "tensor", "unbroadcast"]
