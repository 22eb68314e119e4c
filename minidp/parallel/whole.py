"""The whole of a model that is spread over a mesh: what it consists of, who has which part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from minidp.backend import Array, to_numpy
from minidp.nn import Module
from minidp.nn.module import fitted, state_targets
from minidp.parallel.cuts import Cut
from minidp.parallel.mesh import Mesh
from minidp.parallel.stages import stage_at
from minidp.parallel.state import StateDict


@dataclass(frozen=True)
class Place:
    """Of one entry of the model's state: shape and dtype of the whole, its stage, how it is cut there."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stage: int
    cut: Cut | None


class Whole:
    """The state of a model, by name, in the order of the model that is not spread.

    Args:
        model: while it is whole.
        mesh: over which it is to be spread.

    `spread` tells afterwards who has what. Collective operations go along the mesh's axes: each array for itself,
    no more of it on the way than one whole array.
    """

    def __init__(self, model: Module, mesh: Mesh) -> None:
        self._mesh = mesh
        self._like: dict[str, np.ndarray] = {}  # shapes and dtypes without memory; tied names have one object
        kinds: dict[int, np.ndarray] = {}
        for name, array in state_targets(model).items():
            zero = np.zeros((), array.dtype)
            self._like[name] = kinds.setdefault(id(array), np.broadcast_to(zero, array.shape))
        self.shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
        self.places: dict[str, Place] = {}

    def spread(self, stage_of: dict[str, int], cuts: Mapping[str, Cut]) -> None:
        """It is spread now: the stage of each module, and how Parameters are cut, by name, for this tp index."""
        for name, like in self._like.items():
            self.places[name] = Place(like.shape, like.dtype, stage_at(name, stage_of), cuts.get(name))

    def mine(self, name: str) -> bool:
        """Whether this rank has (its part of) it."""
        return self.places[name].stage == self._mesh.coordinates.pp

    def checked(self, state: Mapping[str, Any]) -> StateDict:
        """``state`` in the model's dtypes; ValueError lists all that does not fit the whole model."""
        return fitted(self._like, state)

    def parts(self, state: Mapping[str, np.ndarray]) -> StateDict:
        """Of arrays of wholes this rank's parts. Not collective."""
        parts = {}
        for name, array in state.items():
            if self.mine(name):
                cut = self.places[name].cut
                parts[name] = array if cut is None else cut.part(array)
        return parts

    def gather(self, parts: Mapping[str, Array], names: list[str] | None = None) -> StateDict:
        """The whole of every entry (or of ``names``) on every rank, on the host. Collective."""
        if names is None:
            names = list(self.places)
        return {name: self._gathered(name, parts.get(name)) for name in names}

    def _gathered(self, name: str, part: Array | None) -> np.ndarray:
        place = self.places[name]
        whole = np.zeros(place.shape, place.dtype)
        if self.mine(name):
            assert part is not None
            whole = self._joined(place, np.array(to_numpy(part), order="C"))  # of 0 dimensions, too
        if self._mesh.pp > 1:
            self._mesh.pipeline.broadcast(whole, place.stage)
        return whole

    def _joined(self, place: Place, part: np.ndarray) -> np.ndarray:
        cut = place.cut
        if cut is None:
            return part
        sizes = [int(np.prod(cut.shape(index))) for index in range(cut.count)]
        mine = np.zeros(max(sizes), part.dtype)
        mine[: part.size] = part.reshape(-1)
        everybodys = np.empty((cut.count, max(sizes)), part.dtype)
        self._mesh.tensor.all_gather(everybodys, mine)
        shaped = [row[:size].reshape(cut.shape(i)) for i, (row, size) in enumerate(zip(everybodys, sizes))]
        return cut.join(shaped)
