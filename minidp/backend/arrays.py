"""Which array library an array belongs to, and moves between host and device.

Arrays are ``numpy.ndarray``, ``cupy.ndarray``, or any type made known by `register_array_type`. Code that
handles them asks `array_module` for the module ``xp`` and calls ``xp.exp(x)``: the same line then runs on
each of them. CuPy is never imported here; it is found only after somebody else imported it.
"""

from __future__ import annotations

import sys
from typing import Any, TypeAlias

import numpy as np

from minidp.backend.counting import count_move

Array: TypeAlias = Any  # numpy.ndarray, cupy.ndarray, or a registered type

array_types: dict[type, Any] = {np.ndarray: np}  # array type → its module; read by the hot paths of autograd


def register_array_type(array_type: type, module: Any) -> None:
    """Make `module` the array module of all arrays whose type is exactly `array_type`.

    The module speaks NumPy's words (``matmul``, ``exp``, ``empty_like`` …) and has ``asnumpy(x)``, which
    copies to the host as ``cupy.asnumpy`` does, and optionally ``synchronize()``, and CuPy's ``RawModule`` if
    CUDA kernels can run on its arrays.
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
    """Return `x` on the host: `x` itself if it is a NumPy array, else a copy of what the device holds.

    The copy waits until the device has computed `x`.
    """
    xp = array_module(x)
    if xp is np:
        return np.asarray(x)
    host: np.ndarray = xp.asnumpy(x)
    count_move(to_host=host.nbytes)
    return host


def asarray(x: Any, xp: Any, dtype: Any = None) -> Array:
    """Return `x` as an array of the module `xp`, moved between host and device if need be.

    `x` may be an array of any module or Python data. Nothing is copied if `x` already is what is asked for.
    """
    home = find_module(x)
    if home is xp:
        return xp.asarray(x, dtype=dtype)
    if home is not None and home is not np:
        x = to_numpy(x)
    moved = xp.asarray(x, dtype=dtype)
    if xp is not np:
        array_types.setdefault(type(moved), xp)  # this may be the first array of its kind
        count_move(to_device=moved.nbytes)
    return moved


def item(x: Array) -> Any:
    """The only element of `x` as a Python number; of a device's array, a move that waits for the device."""
    if not isinstance(x, np.ndarray | np.generic):
        count_move(to_host=x.dtype.itemsize)
    return x.item()


def synchronize(xp: Any) -> None:
    """Wait until everything that was asked of the device is done. NumPy never runs ahead: no wait."""
    if xp is np:
        return
    if hasattr(xp, "synchronize"):
        xp.synchronize()
    elif hasattr(xp, "cuda"):
        xp.cuda.get_current_stream().synchronize()
