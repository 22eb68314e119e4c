"""Parameter: a tensor that a module learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from minidp.autograd import Tensor, tensor
from minidp.backend import Array


class Parameter(Tensor):
    """A leaf tensor that `Module.parameters` finds. Its identity never changes, only its `data` is re-pointed.

    The constructor copies `data` (an array, a tensor, Python numbers). ``requires_grad=False`` freezes it.

    A strategy may give it a *slot*: `_grad_slot`, a C-contiguous array that backward writes its gradient into,
    usually a view of one flat slab of all gradients. The first gradient of a step is stored, later ones are
    added; `_grad_written` tells which is next, and whoever owns the slab resets it (`Layout.clear_written`).
    """

    __slots__ = ("_grad_slot", "_grad_written", "_hooks")

    _grad_slot: Array | None
    _grad_written: bool
    _hooks: list[Callable[[Any], None]] | None

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(tensor(data).data, requires_grad)
        self._grad_slot = None
        self._grad_written = False
        self._hooks = None

    @property
    def grad(self) -> Tensor | None:
        """The gradient collected so far, as a Tensor that shares its memory, or None."""
        if self._grad_slot is None:
            return None if self._grad is None else Tensor(self._grad)
        return Tensor(self._grad_slot) if self._grad_written else None

    @grad.setter
    def grad(self, value: Any) -> None:
        if self._grad_slot is None:
            self._grad = None if value is None else self._like(value)
            return
        if value is not None:
            self._grad_slot[...] = self._like(value)
        self._grad_written = value is not None

    def _accumulate(self, grad: Array, fresh: bool) -> None:
        slot = self._grad_slot
        if slot is None:
            super()._accumulate(grad, fresh)
        elif self._grad_written:
            slot += grad
        else:
            if grad is not slot:  # an operation that asked for grad_out() has written it already
                slot[...] = grad
            self._grad_written = True

    def release(self) -> None:
        """Leave the slabs: private copies of the data, and of the gradient if there is one."""
        grad = self.grad
        self.data = self.data.copy()
        self._grad_slot = None
        self._grad_written = False
        self.grad = grad

    def register_post_accumulate_grad_hook(self, hook: Callable[[Parameter], None]) -> Callable[[], None]:
        """Call ``hook(parameter)`` in each backward pass once its whole gradient is in ``parameter.grad``.

        A parameter that is used several times is reported once, after the last use. Returns a function that
        removes the hook.
        """
        if self._hooks is None:
            self._hooks = []
        hooks = self._hooks
        hooks.append(hook)

        def remove() -> None:
            hooks.remove(hook)
            if not hooks:
                self._hooks = None

        return remove

    def __repr__(self) -> str:
        frozen = "" if self.requires_grad else ", frozen"
        return f"Parameter(shape={self.shape}, dtype={self.dtype}{frozen})"
