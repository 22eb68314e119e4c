"""Parcels: the payloads of all parameters that a server has elements of, in one message."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from minidp.compress import Compressor, ErrorFeedback, Payload, PowerSGD, Pruned, resolved
from minidp.nn import Layout
from minidp.parallel.slabs import Flat

HEAD = np.dtype(np.uint32)  # of the bytes of an array, where a compressor's payloads are not all of one size


class Part(NamedTuple):
    """Elements lo … hi of a server's slice, of one parameter."""

    key: str
    lo: int
    hi: int


def parts_of(layout: Layout, server: int, lo: int, hi: int) -> tuple[Part, ...]:
    """The parts of the slice ``lo`` … ``hi`` of the flat parameters: keys are names, with the server's number
    where a parameter is cut."""
    parts = []
    for segment in layout.segments:
        start, stop = max(lo, segment.offset), min(hi, segment.offset + segment.size)
        if start < stop:
            whole = stop - start == segment.size
            parts.append(Part(segment.name if whole else f"{segment.name}[{server}]", start - lo, stop - lo))
    return tuple(parts)


class Parcel:
    """Packs slices of one server, on one side; unpacks them on the other.

    Wire: the payloads' arrays, part after part, in bytes; in front of all, where sizes vary, those of each array.

    Args:
        compressor: this side's own.
        parts: the same on both sides.
        dtype: of the slice.
    """

    def __init__(self, compressor: Compressor, parts: Sequence[Part], dtype: np.dtype[np.generic]) -> None:
        if dtype.hasobject:
            raise TypeError(
                "what goes to servers compressed is packed to bytes: Python objects (Fractions) have none"
            )
        self.compressor, self._parts = compressor, parts
        sample = deepcopy(compressor)  # what payloads look like; its calls are not the compressor's
        self._like = [sample.compress(np.zeros(hi - lo, dtype), key) for key, lo, hi in parts]
        self._sizes = np.array([array.nbytes for like in self._like for array in like.arrays], HEAD)

    def pack(self, flat: Flat) -> Flat:
        """``flat``, a slice, as bytes."""
        payloads = [self.compressor.compress(flat[lo:hi], key) for key, lo, hi in self._parts]
        arrays = [array for payload in payloads for array in payload.arrays]
        if not self.compressor.steady:
            arrays.insert(0, np.array([array.nbytes for array in arrays], HEAD))
        return np.concatenate([array.view(np.uint8) for array in arrays]) if arrays else np.empty(0, np.uint8)

    def unpack(self, data: Flat, out: Flat) -> Flat:
        """The slice that `pack` was given, as far as compression lets through, in ``out``."""
        sizes = self._sizes
        if not self.compressor.steady:
            sizes, data = data[: sizes.nbytes].view(HEAD), data[sizes.nbytes :]
        edges = pairwise([0, *np.cumsum(sizes).tolist()])
        out[...] = 0  # padding between parameters
        for (key, lo, hi), like in zip(self._parts, self._like):
            arrays = tuple(data[start:stop].view(array.dtype) for array, (start, stop) in zip(like.arrays, edges))
            out[lo:hi] = self.compressor.decompress(Payload(arrays, like.shape, like.dtype, key))
        return out


def checked_for_servers(
    compress: Compressor | str | None, argument: str, backup_workers: int = 0
) -> Compressor | None:
    """A compressor that servers can use. ValueError for one that needs all ranks at once, and for a memory of what
    was in gradients that are dropped for being late."""
    if compress is None:
        return None
    try:
        compressor = resolved(compress)
    except ValueError as error:
        raise ValueError(str(error).replace("compress=", f"{argument}=", 1)) from None
    inner = compressor
    while isinstance(inner, ErrorFeedback | Pruned):
        if backup_workers and isinstance(inner, ErrorFeedback):
            raise ValueError(
                f"{argument}={compressor.spec!r}, backup_workers={backup_workers}: late gradients are dropped, "
                "and error feedback would bring back a part of them: leave one out"
            )
        inner = inner.inner
    if isinstance(inner, PowerSGD):
        raise ValueError(
            f"{argument}={compressor.spec!r}: PowerSGD needs the sum of all ranks' P before it knows Q, and "
            "servers get gradients one by one: use it with DataParallel, or give another compressor"
        )
    return compressor
