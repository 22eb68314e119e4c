"""The floor of the house: which array library, moves between libraries, random numbers, the meter.

Arrays are ``numpy.ndarray``, ``cupy.ndarray``, or any type made known by `register_array_type`. Code that
handles them asks `array_module` for the module ``xp`` and calls ``xp.exp(x)``: the same line then runs on
each of them. CuPy is never imported here; it is found only after somebody else imported it.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

import numpy as np

__all__ = [
    "Array",
    "Meter",
    "array_module",
    "array_types",
    "asarray",
    "count",
    "current_meter",
    "find_module",
    "generator",
    "meter",
    "register_array_type",
    "seed_sequence",
    "synchronize",
    "to_numpy",
]

Array: TypeAlias = Any  # numpy.ndarray, cupy.ndarray, or a registered type

array_types: dict[type, Any] = {np.ndarray: np}  # array type → its module; read by the hot paths of autograd


def register_array_type(array_type: type, module: Any) -> None:
    """Make `module` the array module of all arrays whose type is exactly `array_type`.

    The module speaks NumPy's words (``matmul``, ``exp``, ``empty_like`` …) and has ``asnumpy(x)``, which
    copies to the host as ``cupy.asnumpy`` does, and optionally ``synchronize()``.
    """
    array_types[array_type] = module


def array_module(x: Array) -> Any:
    """Return the module whose functions work on `x`: ``numpy``, ``cupy`` or a registered one.

    Raises TypeError for anything that is not an array (lists and numbers included).
    """
    if type(x) is np.ndarray:  # decided first: 60 ns, where a search through the types takes 1.4 µs
        return np
    xp = find_module(x)
    if xp is None:
        raise TypeError(
            f"expected an array, found {type(x).__name__}: make one by minidp.tensor(...) or numpy.asarray(...)"
        )
    return xp


def find_module(x: Any) -> Any:
    """Return the array module of `x`, or None if `x` is no array of a known module."""
    kind = type(x)
    if kind in array_types:
        return array_types[kind]
    if isinstance(x, np.ndarray | np.generic):
        return np
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        register_array_type(kind, cupy)
        return cupy
    return None


def to_numpy(x: Array) -> np.ndarray:
    """Return `x` on the host: `x` itself if it is a NumPy array, else a copy of what the device holds."""
    xp = array_module(x)
    host: np.ndarray = np.asarray(x) if xp is np else xp.asnumpy(x)
    return host


def asarray(x: Any, xp: Any, dtype: Any = None) -> Array:
    """Return `x` as an array of the module `xp`, moved between host and device if need be.

    `x` may be an array of any module or Python data. Nothing is copied if `x` already is what is asked for.
    """
    if xp is np and find_module(x) not in (None, np):
        x = to_numpy(x)
    return xp.asarray(x, dtype=dtype)


def synchronize(xp: Any) -> None:
    """Wait until everything that was asked of the device is done. NumPy never runs ahead: no wait."""
    if xp is np:
        return
    if hasattr(xp, "synchronize"):
        xp.synchronize()
    elif hasattr(xp, "cuda"):
        xp.cuda.get_current_stream().synchronize()


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """Return the random generator at `key` in the tree that grows from `seed`.

    ``generator(0, "init", "0.weight")`` is the same stream in every process, whatever was drawn before:
    no global generator is read or written. Strings enter by their CRC-32 (Python's own ``hash`` differs
    between processes). Different keys, also one that continues another, give independent streams.
    """
    return np.random.default_rng(seed_sequence(seed, *key))


def seed_sequence(seed: int, *key: int | str) -> np.random.SeedSequence:
    """What the generator at `key` grows from: for other kinds of generators than NumPy's default."""
    path = tuple(zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in key)
    return np.random.SeedSequence(int(seed), spawn_key=path)


class Meter:
    """Counts what was computed: `operations`, `flops` (floating-point operations) and `nbytes` (memory traffic).

    An operation is an application of a Function, each way, or an update. Traffic is bytes of arrays read and
    written; it and FLOPs are estimated from shapes. The virtual world turns the three into time.
    """

    __slots__ = ("flops", "nbytes", "operations", "outer")

    def __init__(self, outer: Meter | None = None) -> None:
        self.operations: int = 0
        self.flops: float = 0.0
        self.nbytes: float = 0.0
        self.outer = outer

    def count(self, flops: float = 0.0, nbytes: float = 0.0) -> None:
        """Add one operation: `flops`, and `nbytes` bytes read and written; here and on each enclosing meter."""
        m: Meter | None = self
        while m is not None:
            m.operations += 1
            m.flops += flops
            m.nbytes += nbytes
            m = m.outer

    def __repr__(self) -> str:
        return f"Meter(operations={self.operations}, flops={self.flops:g}, nbytes={self.nbytes:g})"


_meter: ContextVar[Meter | None] = ContextVar("minidp_meter", default=None)
current_meter = _meter.get  # None when nobody measures: then the meter costs this one call


@contextmanager
def meter() -> Iterator[Meter]:
    """Measure the block: ``with meter() as m: ...`` leaves the counts in `m`. Meters may be nested."""
    m = Meter(outer=_meter.get())
    token = _meter.set(m)
    try:
        yield m
    finally:
        _meter.reset(token)


def count(flops: float = 0.0, nbytes: float = 0.0) -> None:
    """Tell the current meter, if there is one, of one operation: `flops`, and `nbytes` bytes read and written."""
    m = _meter.get()
    if m is not None:
        m.count(flops, nbytes)
