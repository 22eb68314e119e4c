"""Pruning of the model (剪枝): weights that are 0 and stay 0, whose gradients need not travel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal
from zlib import crc32

import numpy as np

from minidp.backend import Array, array_module, asarray, to_numpy
from minidp.compress.bits import like, pack, unpack
from minidp.compress.compressor import Compressor, Payload, Reducer, State, chosen
from minidp.compress.sparsify import checked_density, largest_positions
from minidp.compress.wrapper import Wrapper

Masks = dict[str, np.ndarray]


def magnitude_masks(
    weights: Mapping[str, Array], density: float, scope: Literal["global", "each"] = "global"
) -> Masks:
    """Which weights stay: the part ``density`` of all, those of the largest magnitude; of equal ones the first.

    Args:
        weights: name → array, as of ``state_dict()``. Only matrices and kernels are pruned, not vectors: biases
            and norms are few, and each matters.
        scope: ``"global"``: of all weights together; ``"each"``: this part of each array.

    Returns name → bool array, True where a weight stays; only of what is pruned. A function of the weights alone:
    ranks with the same weights get the same masks. Source: Han et al., "Learning both Weights and Connections",
    NIPS 2015.
    """
    checked_density(density)
    if scope not in ("global", "each"):
        raise ValueError(f'scope={scope!r}: give "global" or "each"')
    matrices = {name: to_numpy(array) for name, array in weights.items() if array.ndim >= 2}
    if not matrices:
        return {}
    if scope == "each":
        return {name: _mask(array.reshape(-1), density).reshape(array.shape) for name, array in matrices.items()}
    mask = _mask(np.concatenate([array.reshape(-1) for array in matrices.values()]), density)
    ends = np.cumsum([array.size for array in matrices.values()])[:-1]
    return {name: part.reshape(array.shape) for (name, array), part in zip(matrices.items(), np.split(mask, ends))}


def _mask(flat: np.ndarray, density: float) -> np.ndarray:
    mask = np.zeros(flat.size, bool)
    mask[largest_positions(flat, max(1, round(density * flat.size)))] = True
    return mask


class Pruned(Wrapper):
    """A compressor that is given, of each array, only what a mask keeps; the rest is 0 and does not travel.

    Args:
        inner: what compresses the kept numbers, as one vector an array; PowerSGD gets a matrix with zeros.
        masks: name → bool array, the same on all ranks; arrays without one are given as they are.

    Masks are part of ``state_dict``, a bit a number.
    """

    def __init__(self, inner: Compressor, masks: Mapping[str, np.ndarray]) -> None:
        super().__init__(inner)
        self.masks = {name: np.asarray(mask, bool) for name, mask in masks.items()}

    def compress(self, array: Array, key: str) -> Payload:
        return replace(self.inner.compress(self._kept(array, key), key), shape=array.shape)

    def decompress(self, payload: Payload) -> Array:
        return self._spread(self.inner.decompress(self._inside(payload)), payload.key, payload.shape)

    def exchanged(self, array: Array, key: str, reducer: Reducer) -> tuple[Array, Payload | None]:
        total, mine = self.inner.exchanged(self._kept(array, key), key, reducer)
        return self._spread(total, key, array.shape), None if mine is None else replace(mine, shape=array.shape)

    def combine(self, payloads: Sequence[Payload]) -> Array:
        total = self.inner.combine([self._inside(payload) for payload in payloads])
        return self._spread(total, payloads[0].key, payloads[0].shape)

    def _inside(self, payload: Payload) -> Payload:
        """As the inner compressor made it."""
        mask = self.masks.get(payload.key)
        if mask is None or self.needs_shape(mask.shape):
            return payload
        return replace(payload, shape=(int(np.count_nonzero(mask)),))

    def _kept(self, array: Array, key: str) -> Array:
        mask = self.masks.get(key)
        if mask is None:
            return array
        if mask.shape != array.shape:
            raise ValueError(f"{key} has shape {array.shape}, its mask {mask.shape}")
        mask = like(mask, array)
        return array_module(array).where(mask, array, 0) if self.needs_shape(array.shape) else array[mask]

    def _spread(self, flat: Array, key: str, shape: tuple[int, ...]) -> Array:
        mask = self.masks.get(key)
        if mask is None:
            return flat
        xp = array_module(flat)
        if self.needs_shape(shape):
            return xp.where(like(mask, flat), flat, 0)
        whole = xp.zeros(shape, flat.dtype)
        whole[asarray(mask, xp)] = flat
        return whole

    def describe(self) -> tuple[Any, ...]:
        masks = [(name, mask.shape, crc32(np.packbits(mask).tobytes())) for name, mask in self.masks.items()]
        return (*super().describe(), *masks)

    def state_dict(self) -> State:
        packed = {f"mask/{name}": pack(mask.reshape(-1).view(np.uint8), 1) for name, mask in self.masks.items()}
        shapes = {f"shape/{name}": np.array(mask.shape, np.int64) for name, mask in self.masks.items()}
        return self.inner.state_dict() | packed | shapes

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        packed, shapes = chosen(state, "mask"), chosen(state, "shape")
        self.inner.load_state_dict({k: v for k, v in state.items() if k not in packed and k not in shapes})
        self.masks = {}
        for place, data in packed.items():
            name = place.removeprefix("mask/")
            shape = tuple(int(n) for n in shapes[f"shape/{name}"])
            self.masks[name] = unpack(data, 1, int(np.prod(shape))).astype(bool).reshape(shape)

    @property
    def spec(self) -> str:
        return self.inner.spec
