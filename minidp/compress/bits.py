"""Real bits: small whole numbers, and positions, packed as densely as their number allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minidp.backend import Array, array_module, asarray

# Of each byte its bits, one to a byte, as one number of 64 bits: eight numbers are looked up at once.
_EIGHTS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).view(np.uint64).reshape(-1)


def pack(codes: Array, bits: int) -> Array:
    """The lowest ``bits`` bits of uint8 numbers, flat: all lowest ones, eight to a byte, then the next ones, …

    A byte holds its first number in its highest bit. Eight bits are the numbers themselves.
    """
    if bits == 8:
        return codes
    xp = array_module(codes)
    return xp.concatenate([xp.packbits(codes & (1 << plane)) for plane in range(bits)])


def unpack(data: Array, bits: int, count: int) -> Array:
    """The numbers again: uint8, shape (count,)."""
    if bits == 8:
        return data
    xp, stride = array_module(data), -(-count // 8)
    eights = xp.zeros(stride, np.uint64)
    for plane in range(bits):
        eights |= like(_EIGHTS << plane, data).take(data[plane * stride : (plane + 1) * stride])
    return eights.view(np.uint8)[:count]


def unpack_signed(data: Array, bits: int, count: int) -> Array:
    """What `pack` was given as int8 seen as uint8: −2^(bits−1) … 2^(bits−1) − 1."""
    codes = unpack(data, bits, count)
    if bits == 8:
        return codes.view(np.int8)
    sign = np.uint8(1 << (bits - 1))
    return (codes ^ sign).view(np.int8) - np.int8(sign)


# --- positions --------------------------------------------------------------------------------------------------

# Of k positions among d the densest of three forms, which both sides know from k and d:
#   a bitmap                                                          d / 8 bytes
#   blocks of 255: how many there are in each, then where each is     d / 255 + k
#   blocks of 65535, the same in two bytes                            2 (d / 65535 + k)
# A block is one shorter than its numbers reach, so that a full one can be counted in as many bits.
_BLOCKS: dict[int, Any] = {255: np.uint8, 65535: np.uint16}


def _block(k: int, d: int) -> int:
    """The length of a block in the densest form; 0: a bitmap."""
    blocks = [(np.dtype(kind).itemsize * (-(-d // block) + k), block) for block, kind in _BLOCKS.items()]
    return min((-(-d // 8), 0), *blocks)[1]


def pack_positions(where: Array, d: int) -> Array:
    """Ascending positions below d, int64, without repetition: uint8 or uint16, flat."""
    xp, k = array_module(where), where.size
    block = _block(k, d)
    if k in (0, d):  # nothing need be said
        return xp.empty(0, np.uint8)
    if not block:
        bitmap = xp.zeros(d, bool)
        bitmap[where] = True
        return xp.packbits(bitmap)
    kind = _BLOCKS[block]
    counts = xp.bincount(where // block, minlength=-(-d // block))
    return xp.concatenate([counts.astype(kind), (where % block).astype(kind)])


def unpack_positions(data: Array, k: int, d: int) -> Array:
    """The positions again: int64, shape (k,)."""
    xp = array_module(data)
    block = _block(k, d)
    if k in (0, d):
        return xp.arange(k, dtype=np.int64)
    if not block:
        return xp.flatnonzero(xp.unpackbits(data)[:d])
    counts = data[: -(-d // block)]
    starts = xp.arange(counts.size, dtype=np.int64) * block
    repeats = counts if xp is np else counts.tolist()  # CuPy's takes a list
    return xp.repeat(starts, repeats) + data[counts.size :]


# --- whole numbers of any kind of number ------------------------------------------------------------------------


def whole(x: Array, function: Callable[[Any], int], fast: str) -> Array:
    """``function``, which makes a number whole, of each element: by ``xp.<fast>``, or for objects one by one."""
    if np.dtype(x.dtype).hasobject:
        return np.frompyfunc(function, 1, 1)(x)
    return getattr(array_module(x), fast)(x)


def like(values: Any, array: Array) -> Array:
    """Host values as an array beside ``array``."""
    return asarray(values, array_module(array))
