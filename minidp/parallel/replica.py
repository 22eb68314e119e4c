"""What the ranks that hold one replica of a model together must agree about: one norm, one verdict.

In data parallelism a rank has a whole replica. Where a replica is spread over stages and parts (`HybridParallel`),
its ranks make each step together or not at all, and a gradient that is clipped is the whole gradient.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from minidp.backend import array_module
from minidp.comm import Communicator
from minidp.nn import Layout
from minidp.parallel.blocks import Trouble
from minidp.parallel.errors import NonFiniteGradient
from minidp.parallel.slabs import Flat


class Replica:
    """The ranks of one replica; by default there is one, which agrees with itself at no cost.

    Args:
        comm: the ranks, or None.
        ranks: by index along the data-parallel axis, the ranks that users know.
        counted_elsewhere: names of parameters of which others hold copies, and one of them counts the squares.
    """

    def __init__(
        self,
        comm: Communicator | None = None,
        ranks: Sequence[int] = (),
        counted_elsewhere: Collection[str] = (),
    ) -> None:
        self._comm = None if comm is None or comm.world_size == 1 else comm
        self._ranks, self._elsewhere = ranks, counted_elsewhere
        self._mine: list[int] = []  # pieces of the norm that this rank counts
        self._pieces: list[int] = []  # how many, of each rank
        self._layers = False

    def prepare(self, layout: Layout, pieces: Sequence[tuple[int, int]], layers: bool) -> None:
        """Tell what is trained here: its layout, the pieces of its norm, whether layers gather statistics."""
        if self._comm is None:
            self._layers = layers
            return
        names = [layout.names_at(lo, hi)[0] for lo, hi in pieces]
        self._mine = [i for i, name in enumerate(names) if name not in self._elsewhere]
        self._pieces = self._comm.all_gather_int(len(self._mine), "HybridParallel(…) pieces")
        self._layers = any(self._comm.all_gather_int(layers, "HybridParallel(…) layers"))

    @property
    def gathers(self) -> bool:
        """Whether there are layers, on any of the ranks, that gather statistics."""
        return self._layers

    @contextmanager
    def one_verdict(self) -> Iterator[None]:
        """NonFiniteGradient that the block raises on one of the ranks is raised by all, at the block's end.

        Collective. Nothing may be committed before. If several raise, it is the first rank's.
        """
        mine = None
        try:
            yield
        except NonFiniteGradient as error:
            mine = error
            if 0 <= error.rank < len(self._ranks):
                mine = error.at_rank(self._ranks[error.rank])
        if self._comm is not None:
            told = self._comm.all_gather_int(mine is not None, "step/verdict")
            if any(told):
                mine = self._comm.broadcast_object(mine, told.index(1), "step/not finite")
        if mine is not None:
            raise mine

    def everybodys(self, squares: Flat) -> Flat:
        """The squares of all pieces of the whole gradient, in order of rank, copies once; the same on all ranks.

        Without tensor parallelism that is the order of the model, and a norm has the bits that it has on one rank.
        Collective.
        """
        if self._comm is None:
            return squares
        xp = array_module(squares)
        own = xp.zeros(max(self._pieces), squares.dtype)
        own[: len(self._mine)] = squares[self._mine]
        rows = xp.empty((len(self._pieces), own.size), squares.dtype)
        self._comm.all_gather(rows, own)
        whole: Flat = xp.concatenate([row[:count] for row, count in zip(rows, self._pieces)])
        return whole


def raise_first(
    comm: Communicator, layout: Layout, elements: Sequence[int], mine: Trouble | None, step: int
) -> NoReturn:
    """All ranks raise the same: the first element's trouble, told by the rank that found it. Collective.

    Args:
        elements: by rank, 1 + the first element in which that rank has found trouble, or 0.
        mine: this rank's trouble.
    """
    finder = min((element, rank) for rank, element in enumerate(elements) if element)[1]
    trouble: Trouble = comm.broadcast_object(mine, finder)
    (name, *_) = layout.names_at(trouble.element, trouble.element + 1)
    raise NonFiniteGradient(name, trouble.rank, step, trouble.value)
