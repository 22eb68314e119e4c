"""The flat w and gradient as servers send and take them: on the host, wherever the model lies."""

from __future__ import annotations

import numpy as np

from minidp.backend import Device
from minidp.parallel.slabs import Flat, Slabs


class Mirror:
    """A worker's w and gradient on the host. Where the model lies there, they are its own, and nothing is copied.

    On a device a step moves the gradient out once, which waits for backward, and w in once, which waits for
    nothing. Memory: Ψ elements for w, and Ψ for the gradient while it is used.

    Attributes:
        w: where the servers' answer is received; `show` gives it to the model.
    """

    def __init__(self, slabs: Slabs, device: Device) -> None:
        self._slabs, self._device = slabs, device
        w = slabs.params[0]
        self.w: Flat = w if device.on_host else np.zeros(w.shape, w.dtype)

    def gradient(self) -> Flat:
        """This step's. It may be overwritten by the next call."""
        own = self._slabs.grads[0]
        return own if self._device.on_host else self._device.later(own).get()

    def look(self) -> Flat:
        """``w``, after it has become the model's."""
        if not self._device.on_host:
            self.w[...] = self._device.later(self._slabs.params[0]).get()
        return self.w

    def show(self) -> None:
        """The model's parameters become ``w``."""
        if not self._device.on_host:
            self._device.put(self._slabs.params[0], self.w)
