"""A device without a device: an array type that refuses to mix with NumPy exactly as CuPy's does.

`DeviceArray` is no subclass of numpy.ndarray. NumPy's functions and operators, conversions and assignments
between the two raise TypeError; only `asnumpy` and `asarray` cross. Full reductions stay on the "device" as
0-d arrays, and each read of a scalar (`item`, `float`, `bool` …), which would make a GPU wait, is counted.
The module `xp` offers what NumPy and CuPy share and nothing more: a ufunc takes `out` and `dtype`, no `order`.
Everything is computed by NumPy underneath, so results are equal to NumPy's to the bit.

Within ``kernels()``, and on a ``DoubleDevice(kernels=True)``, the module has CuPy's `RawModule`, too: what has
CUDA kernels then runs them, compiled for the host (`host_cuda`), with their own order of sums.
"""

from __future__ import annotations

import mmap
import operator
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np

from minidp.backend import Device, register_array_type
from tests import host_cuda

scalar_reads = 0


def read_scalar(array: DeviceArray) -> Any:
    global scalar_reads
    scalar_reads += 1
    return array._host.item()


class Flags:
    """CuPy's flags: no `writeable` among them."""

    def __init__(self, flags: Any) -> None:
        self.c_contiguous, self.f_contiguous = flags.c_contiguous, flags.f_contiguous


class DeviceArray:
    __array_priority__ = 100  # as cupy.ndarray
    __hash__ = None

    def __init__(self, host: np.ndarray) -> None:
        assert type(host) is np.ndarray
        self._host = host

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    nbytes = property(lambda self: self._host.nbytes)
    itemsize = property(lambda self: self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    flags = property(lambda self: Flags(self._host.flags))
    T = property(lambda self: wrap(self._host.T))
    data = property(lambda self: SimpleNamespace(ptr=self._host.ctypes.data))

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __array_ufunc__(self, ufunc: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"numpy.{ufunc.__name__} was called on a device array")

    def __array_function__(self, function: Any, *args: Any) -> Any:
        raise TypeError(f"numpy.{function.__name__} was called on a device array")

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: Any) -> DeviceArray:
        return wrap(self._host[unwrap_index(index)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[unwrap_index(index)] = unwrap(value)

    def item(self) -> Any:
        return read_scalar(self)

    def __float__(self) -> float:
        return float(read_scalar(self))

    def __int__(self) -> int:
        return int(read_scalar(self))

    def __bool__(self) -> bool:
        return bool(read_scalar(self))

    def tolist(self) -> Any:
        return self._host.tolist()

    def get(self) -> np.ndarray:
        return self._host.copy()


def wrap(host: Any) -> DeviceArray:
    return DeviceArray(np.asarray(host))  # a full reduction stays an array, of 0 dimensions


def unwrap(value: Any) -> Any:
    """The host data of a device array; numbers and NumPy scalars pass; arrays of NumPy are refused."""
    if isinstance(value, DeviceArray):
        return value._host
    if isinstance(value, np.ndarray | list | tuple) or hasattr(value, "requires_grad"):
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def unwrap_index(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(unwrap_index(i) for i in index)
    if isinstance(index, np.ndarray):
        raise TypeError("a device array was indexed by a NumPy array")
    return index._host if isinstance(index, DeviceArray) else index


def _quietly(function: Any) -> Any:
    """A GPU has no floating-point warnings."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            return function(*args, **kwargs)

    return call


def _operator(name: str) -> Any:
    function = _quietly(getattr(operator, name))

    def forward(self: DeviceArray, other: Any) -> Any:
        if isinstance(other, DeviceArray | int | float | np.generic):
            return wrap(function(self._host, unwrap(other)))
        if getattr(other, "__array_priority__", 0) > 100:
            return NotImplemented  # as CuPy leaves it to the other's __radd__
        raise TypeError(f"Unsupported type {type(other)}")

    def reflected(self: DeviceArray, other: Any) -> Any:
        return wrap(function(unwrap(other), self._host))

    def in_place(self: DeviceArray, other: Any) -> Any:
        _quietly(getattr(operator, "i" + name.strip("_"), function))(self._host, unwrap(other))
        return self

    return forward, reflected, in_place


def _unary(function: Any) -> Any:
    return lambda self: wrap(function(self._host))


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "floordiv", "mod", "lshift", "rshift"):
    _forward, _reflected, _in_place = _operator(_name)
    setattr(DeviceArray, f"__{_name}__", _forward)
    setattr(DeviceArray, f"__r{_name}__", _reflected)
    setattr(DeviceArray, f"__i{_name}__", _in_place)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(DeviceArray, f"__{_name}__", _operator(_name)[0])
for _name in ("or_", "and_", "xor"):
    _forward, _reflected, _in_place = _operator(_name)
    setattr(DeviceArray, f"__{_name.strip('_')}__", _forward)
    setattr(DeviceArray, f"__i{_name.strip('_')}__", _in_place)
for _name in ("neg", "abs", "invert"):
    setattr(DeviceArray, f"__{_name}__", _unary(getattr(operator, _name)))


def _method(name: str, allowed: tuple[str, ...]) -> Any:
    def method(self: DeviceArray, *args: Any, **kwargs: Any) -> DeviceArray:
        assert set(kwargs) <= set(allowed), f"CuPy's ndarray.{name} takes no {set(kwargs) - set(allowed)}"
        args = tuple(a._host if isinstance(a, DeviceArray) else a for a in args)
        out = kwargs.get("out")
        if out is not None:
            kwargs["out"] = unwrap(out)
        result = _quietly(getattr(self._host, name))(*args, **kwargs)
        return out if out is not None else wrap(result)

    return method


_METHODS = {
    "sum": ("axis", "dtype", "out", "keepdims"),
    "mean": ("axis", "dtype", "out", "keepdims"),
    "std": ("axis", "dtype", "out", "ddof", "keepdims"),
    "max": ("axis", "out", "keepdims"),
    "min": ("axis", "out", "keepdims"),
    "any": ("axis", "out", "keepdims"),
    "all": ("axis", "out", "keepdims"),
    "argmax": ("axis", "out", "keepdims"),
    "argsort": ("axis", "kind"),
    "astype": ("dtype", "copy"),
    "reshape": (),
    "transpose": (),
    "swapaxes": (),
    "ravel": (),
    "take": ("axis", "out"),
    "copy": (),
}
for _name, _allowed in _METHODS.items():
    setattr(DeviceArray, _name, _method(_name, _allowed))


class Ufunc:
    """An elementwise function: arrays of the device and numbers in, `out` and `dtype` as only options."""

    def __init__(self, ufunc: Any) -> None:
        self.ufunc = ufunc

    def __call__(self, *args: Any, out: Any = None, dtype: Any = None) -> DeviceArray:
        assert any(isinstance(a, DeviceArray) for a in args), "no device array among the arguments"
        options = {} if dtype is None else {"dtype": dtype}
        if out is not None:
            assert isinstance(out, DeviceArray), "out must be a device array"
            options["out"] = out._host
        result = _quietly(self.ufunc)(*(unwrap(a) for a in args), **options)
        return out if out is not None else wrap(result)

    def reduceat(self, array: DeviceArray, indices: DeviceArray, axis: int = 0) -> DeviceArray:
        return wrap(self.ufunc.reduceat(array._host, indices._host, axis=axis))

    def at(self, array: DeviceArray, index: Any, value: Any) -> None:
        self.ufunc.at(array._host, unwrap_index(index), unwrap(value))


def aligned_view(self: DeviceArray, dtype: Any = None) -> DeviceArray:
    """A GPU reads numbers only at multiples of their size: CuPy makes such a view, and its kernels fail."""
    host = self._host.view() if dtype is None else self._host.view(dtype)
    assert host.size == 0 or host.ctypes.data % host.itemsize == 0, (
        f"{host.dtype} at an address it can't be read at"
    )
    return wrap(host)


DeviceArray.view = aligned_view


def asarray(x: Any, dtype: Any = None) -> DeviceArray:
    """From the host (a copy, as a transfer is one) or the device."""
    if isinstance(x, DeviceArray):
        return x if dtype is None or x.dtype == dtype else x.astype(dtype)
    host = np.array(x, dtype=dtype)
    if host.dtype.hasobject:
        raise ValueError(f"Unsupported dtype {host.dtype}")
    return DeviceArray(host)


def ascontiguousarray(x: DeviceArray, dtype: Any = None) -> DeviceArray:
    """`x` itself if it is that already; never from the host, of which CuPy would make a copy silently."""
    assert isinstance(x, DeviceArray), "no device array"
    host = np.ascontiguousarray(x._host, dtype=dtype)
    return x if host is x._host else DeviceArray(host)


def as_strided(x: DeviceArray, shape: Any, strides: Any) -> DeviceArray:
    """A view of a contiguous array. NumPy and CuPy read whatever lies there; here it must be inside."""
    assert isinstance(x, DeviceArray), "no device array"
    assert x.flags.c_contiguous, "strides of something else"
    last = sum((n - 1) * step for n, step in zip(shape, strides)) + x.dtype.itemsize
    assert x.size == 0 or 0 < last <= x.nbytes, "a view beyond the array"
    return DeviceArray(np.lib.stride_tricks.as_strided(x._host, shape, strides))


def dot(a: DeviceArray, b: DeviceArray) -> DeviceArray:
    """Stays on the device."""
    return wrap(_quietly(np.dot)(a._host, b._host))


def clip(a: DeviceArray, a_min: Any, a_max: Any, out: DeviceArray | None = None) -> DeviceArray:
    result = np.clip(a._host, unwrap(a_min), unwrap(a_max), out=None if out is None else out._host)
    return wrap(result) if out is None else out


def stable(kind: str | None) -> str:
    """CuPy sorts by radix or merge: equal elements stay in order, and no other ``kind`` is taken."""
    if kind not in (None, "stable"):
        raise ValueError("kind can only be None or 'stable'")
    return "stable"


def argsort(a: DeviceArray, axis: int = -1, kind: str | None = None) -> DeviceArray:
    return wrap(np.argsort(a._host, axis=axis, kind=stable(kind)))


def sort(a: DeviceArray, axis: int = -1, kind: str | None = None) -> DeviceArray:
    return wrap(np.sort(a._host, axis=axis, kind=stable(kind)))


def partition(a: DeviceArray, kth: int) -> DeviceArray:
    """Only the element at ``kth`` is where sorting would put it; of the others only the side is said."""
    host = np.sort(a._host)
    return wrap(np.concatenate([host[:kth][::-1], host[kth : kth + 1], host[kth + 1 :][::-1]]))


def repeat(a: DeviceArray, repeats: int | list[int]) -> DeviceArray:
    if isinstance(repeats, DeviceArray):
        raise ValueError("cupy.ndarray cannot be specified as `repeats` argument.")
    assert isinstance(repeats, int | list | tuple), "repeats: int, list or tuple"
    return wrap(np.repeat(a._host, repeats))


def packbits(a: DeviceArray, bitorder: str = "big") -> DeviceArray:
    """No ``axis``: of the flat array."""
    if a.dtype.kind not in "biu":
        raise TypeError("Expected an input array of integer or boolean data type")
    return wrap(np.packbits(a._host.ravel(), bitorder=bitorder))


def unpackbits(a: DeviceArray, bitorder: str = "big") -> DeviceArray:
    """No ``axis``, no ``count``."""
    return wrap(np.unpackbits(a._host.ravel(), bitorder=bitorder))


def qr(a: DeviceArray) -> tuple[DeviceArray, DeviceArray]:
    q, r = np.linalg.qr(a._host)
    return wrap(q), wrap(r)


def _like(function: Any) -> Any:
    return lambda x, dtype=None: wrap(function(x._host, dtype=dtype))


def _made(function: Any) -> Any:
    return lambda *args, **kwargs: wrap(function(*args, **kwargs))


_UFUNCS = ["add", "subtract", "multiply", "divide", "negative", "exp", "log", "sqrt", "tanh"]
_UFUNCS += ["maximum", "minimum", "reciprocal", "matmul", "copysign", "isfinite", "isinf", "square"]
_UFUNCS += ["fmin", "rint", "floor", "sign", "nextafter", "right_shift", "bitwise_and"]
xp = SimpleNamespace(
    __name__="device_double",
    ndarray=DeviceArray,
    asarray=asarray,
    array=lambda x, copy=True: asarray(x).copy() if isinstance(x, DeviceArray) else asarray(x),
    asnumpy=lambda x: x.get(),
    synchronize=lambda: None,
    abs=Ufunc(np.absolute),
    ascontiguousarray=ascontiguousarray,
    lib=SimpleNamespace(stride_tricks=SimpleNamespace(as_strided=as_strided)),
    flatnonzero=lambda x: wrap(np.flatnonzero(unwrap(x))),
    where=lambda c, a, b: wrap(np.where(unwrap(c), unwrap(a), unwrap(b))),
    broadcast_to=lambda x, shape: wrap(np.broadcast_to(x._host, shape)),
    zeros_like=_like(np.zeros_like),
    empty_like=_like(np.empty_like),
    full_like=lambda x, value, dtype=None: wrap(np.full_like(x._host, value, dtype=dtype)),
    dot=dot,
    clip=clip,
    argsort=argsort,
    sort=sort,
    partition=partition,
    repeat=repeat,
    packbits=packbits,
    unpackbits=unpackbits,
    bincount=lambda x, weights=None, minlength=None: wrap(np.bincount(unwrap(x), unwrap(weights), minlength or 0)),
    concatenate=lambda arrays, axis=0: wrap(np.concatenate([a._host for a in arrays], axis=axis)),
    count_nonzero=lambda x: wrap(np.count_nonzero(x._host)),
    linalg=SimpleNamespace(qr=qr),
    **{name: _made(getattr(np, name)) for name in ("zeros", "ones", "empty", "full", "arange")},
    **{name: Ufunc(getattr(np, name)) for name in _UFUNCS},
)

register_array_type(DeviceArray, xp)


class DoubleDevice(Device):
    """A device whose arrays are the double's, and whose memory other processes can open, as a GPU's by CUDA's IPC.

    Without ``shareable`` only this process sees its memory. It computes at once, so that order needs no events;
    but it counts them, and a read of shared memory is in order only if every rank's event has been recorded, and
    waited for, since it was written.
    """

    name = "double"

    def __init__(self, shareable: bool = True, places: int = 1, kernels: bool = False) -> None:
        self.shareable, self.places, self.kernels = shareable, places, kernels
        self.started_by: int | None = None
        self.recorded = self.waited = 0
        self._mine: dict[bytes, Any] = {}

    @property
    def xp(self) -> Any:
        return xp

    def start(self, local_rank: int = 0) -> None:
        if self.kernels:
            xp.RawModule = host_cuda.RawModule
        if self.started_by is None:
            self.started_by = local_rank

    def identity(self) -> str:
        assert self.started_by is not None, "a device is started before it is used"
        return f"double {self.started_by % self.places}"

    def share(self, nbytes: int) -> tuple[DeviceArray, bytes]:
        file = os.memfd_create("double")
        weakref.finalize(self, os.close, file)
        os.ftruncate(file, max(1, nbytes))
        array = DeviceArray(np.frombuffer(mmap.mmap(file, max(1, nbytes)), np.uint8)[:nbytes])
        handle = f"/proc/{os.getpid()}/fd/{file}".encode() if self.shareable else b"none %d" % file
        self._mine[handle] = array
        return array, handle

    def open(self, handle: bytes, nbytes: int) -> DeviceArray:
        if handle in self._mine:
            return self._mine[handle]
        if handle.startswith(b"none"):
            raise OSError("this double's memory is its own")
        with open(handle, "r+b") as file:
            return DeviceArray(np.frombuffer(mmap.mmap(file.fileno(), nbytes), np.uint8))

    def new_event(self) -> tuple[int, bytes]:
        return 0, b"event"

    def open_event(self, handle: bytes) -> int:
        return 0

    def record(self, event: Any) -> None:
        self.recorded += 1

    def wait(self, event: Any) -> None:
        self.waited += 1


@contextmanager
def kernels() -> Iterator[None]:
    """Within the block CUDA kernels run, as they do on a GPU."""
    before = vars(xp).copy()
    xp.RawModule = host_cuda.RawModule
    try:
        yield
    finally:
        if "RawModule" not in before:
            del xp.RawModule
