"""Layout: where each trainable parameter of a model lies in one flat array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minidp.backend import Array, array_module, asarray
from minidp.nn.parameter import Parameter

if TYPE_CHECKING:
    from minidp.nn.module import Module

ALIGNMENT_BYTES = 64  # a cache line: no two parameters share one, and SIMD loads are aligned


class Segment(NamedTuple):
    """The place of one parameter: elements offset … offset + size of the flat array, seen as `shape`."""

    name: str  # the first of its names
    names: tuple[str, ...]  # all of them: a tied parameter has several
    parameter: Parameter
    offset: int
    size: int
    shape: tuple[int, ...]


class Layout:
    """The order of a module's trainable parameters in a flat 1-d array ("slab"), and the views of it.

    Segments follow ``named_parameters()``; each starts at a multiple of 64 bytes and `size` is padded to 64
    bytes. A tied parameter has one segment with all its names; frozen parameters are left out. Padding is
    never written by anyone: it stays zero where it started as zero.

    Raises TypeError if the trainable parameters have more than one dtype.
    """

    def __init__(self, module: Module) -> None:
        names: dict[int, list[str]] = {}
        parameters: dict[int, Parameter] = {}
        for name, parameter in module.all_named_parameters():
            if parameter.requires_grad:
                names.setdefault(id(parameter), []).append(name)
                parameters[id(parameter)] = parameter
        dtypes: dict[np.dtype, str] = {}
        for key, parameter in parameters.items():
            dtypes.setdefault(np.dtype(parameter.dtype), names[key][0])
        if len(dtypes) > 1:
            found = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise TypeError(f'one dtype for all trainable parameters, please: {found}; use model.astype("…")')
        self.dtype: np.dtype = next(iter(dtypes), np.dtype(np.float32))
        self.itemsize: int = self.dtype.itemsize
        align = ALIGNMENT_BYTES // self.itemsize
        segments = []
        end = 0
        for key, p in parameters.items():
            segments.append(Segment(names[key][0], tuple(names[key]), p, end, p.size, p.shape))
            end += math.ceil(p.size / align) * align
        self.segments: tuple[Segment, ...] = tuple(segments)
        self.size: int = end
        self.nbytes: int = end * self.itemsize
        self._parameters = tuple(s.parameter for s in segments)

    def views(self, flat: Array) -> list[Array]:
        """Return one view of `flat`, a 1-d array of `size` elements, per segment, in the parameter's shape."""
        if flat.shape != (self.size,) or flat.dtype != self.dtype or not flat.flags.c_contiguous:
            raise ValueError(
                f"a contiguous 1-d array of {self.size} {self.dtype} elements is needed, "
                f"not one of shape {flat.shape} and dtype {flat.dtype}"
            )
        return [flat[s.offset : s.offset + s.size].reshape(s.shape) for s in self.segments]

    def point(self, views: Sequence[Array]) -> None:
        """Re-point each parameter's data at its view (of `views(flat)`). Copies nothing: cheap every step."""
        for parameter, view in zip(self._parameters, views, strict=True):
            parameter.data = view

    def point_grads(self, views: Sequence[Array]) -> None:
        """Give each parameter its view as gradient slot, and mark all of them as not written."""
        for parameter, view in zip(self._parameters, views, strict=True):
            parameter._grad_slot = view
            parameter._grad_written = False
            parameter._grad = None

    def release(self) -> None:
        """Give each parameter private copies of its data, and of its gradient if there is one."""
        for parameter in self._parameters:
            parameter.release()

    def pack(self, flat: Array) -> None:
        """Copy the current values of all parameters into `flat`, and zeros into its padding."""
        flat[...] = 0
        for view, parameter in zip(self.views(flat), self._parameters):
            view[...] = asarray(parameter.data, array_module(flat))

    def zero_unwritten(self, grad: Array) -> None:
        """Zero the segments of the flat gradient `grad` that backward did not write in this step."""
        for s in self.segments:
            if not s.parameter._grad_written:
                grad[s.offset : s.offset + s.size] = 0

    def clear_written(self) -> None:
        """Begin a new step: the next gradient of each parameter is stored, not added."""
        for parameter in self._parameters:
            parameter._grad_written = False

    def mark_written(self) -> None:
        """The next gradient of each parameter is added to what is there."""
        for parameter in self._parameters:
            parameter._grad_written = True

    def describe(self) -> tuple[tuple[str, tuple[int, ...], str], ...]:
        """Return (name, shape, dtype) of each segment: equal on two ranks iff their slabs fit together."""
        return tuple((s.name, s.shape, str(self.dtype)) for s in self.segments)

    def names_at(self, start: int, stop: int) -> list[str]:
        """Return the names of the parameters that have elements in ``flat[start:stop]``."""
        return [s.name for s in self.segments if max(s.offset, start) < min(s.offset + s.size, stop)]

    def __repr__(self) -> str:
        return f"Layout({len(self.segments)} parameters, {self.size} × {self.dtype}, {self.nbytes} bytes)"
