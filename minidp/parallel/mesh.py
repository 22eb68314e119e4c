"""A mesh: ranks laid out along three axes, one for each way to share the work (article 3.4.3).

    dp   data parallel       other samples, the same part of the model     talks once a step, whole gradients
    pp   pipeline parallel   other layers of the same model                talks once a micro-batch, activations
    tp   tensor parallel     other parts of the same layers                talks in each layer, activations, waits

Whoever talks most sits closest: along tp neighbours have neighbouring ranks, then along pp, then along dp,

    rank = (dp index · pp + pp index) · tp + tp index

so that, with tp · pp ranks on each node, the model is parallel inside nodes and data between them, as the article
has it (Narayanan et al., SC 2021, section 3, measure why).
"""

from __future__ import annotations

from typing import NamedTuple

from minidp.comm import Communicator


class Coordinates(NamedTuple):
    """Where a rank sits: its index along each axis."""

    dp: int
    pp: int
    tp: int


class Mesh:
    """The ranks of ``comm`` as a dp × pp × tp mesh. Built by all ranks; collective.

    Args:
        comm: as many ranks as dp · tp · pp. Of each communicator below the mesh has one of its own, so what goes
            along it can't come between the user's collectives.
        dp, tp, pp: sizes of the axes.

    Attributes:
        coordinates: of this rank.
        world: all ranks.
        data: those that differ from this one in dp only, in order of it; `tensor` and `pipeline` likewise.
        replica: those that differ from this one in pp and tp only: together they hold one copy of the model.

    Raises ValueError, on all ranks, with the sizes that would fit, if the product is not the number of ranks.
    """

    def __init__(self, comm: Communicator, dp: int = 1, tp: int = 1, pp: int = 1) -> None:
        for name, size in (("dp", dp), ("tp", tp), ("pp", pp)):
            if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
                raise ValueError(f"Mesh: {name}={size!r}: give a whole number of at least 1")
        if dp * tp * pp != comm.world_size:
            raise ValueError(_does_not_fit(dp, tp, pp, comm.world_size))
        self.dp, self.tp, self.pp = int(dp), int(tp), int(pp)
        self.coordinates = at = self.coordinates_of(comm.rank)
        self.world = comm.duplicate("Mesh")
        self.tensor = self._along("tp", at.dp * pp + at.pp, at.tp)
        self.pipeline = self._along("pp", at.dp * tp + at.tp, at.pp)
        self.data = self._along("dp", at.pp * tp + at.tp, at.dp)
        self.replica = self._along("replica", at.dp, at.pp * tp + at.tp)

    def _along(self, axis: str, color: int, key: int) -> Communicator:
        group = self.world.split(color, key, f"Mesh {axis}")
        assert group is not None
        return group

    @property
    def shard(self) -> tuple[int, int]:
        """(index, count) along dp: what a DataLoader needs. Tensor and pipeline neighbours see the same batch."""
        return self.coordinates.dp, self.dp

    def coordinates_of(self, rank: int) -> Coordinates:
        """Of any rank of the mesh."""
        rest, tp = divmod(rank, self.tp)
        dp, pp = divmod(rest, self.pp)
        return Coordinates(dp, pp, tp)

    def rank_of(self, dp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """The rank that sits there."""
        for name, index, size in (("dp", dp, self.dp), ("pp", pp, self.pp), ("tp", tp, self.tp)):
            if not 0 <= index < size:
                raise ValueError(f"{name}={index}: this mesh has {name} 0 to {size - 1}")
        return (dp * self.pp + pp) * self.tp + tp

    def traffic(self) -> dict[str, int]:
        """Bytes that this rank has sent along each axis."""
        return {
            "dp": self.data.traffic.bytes_sent,
            "tp": self.tensor.traffic.bytes_sent,
            "pp": self.pipeline.traffic.bytes_sent,
        }

    def __repr__(self) -> str:
        return f"Mesh(dp={self.dp}, tp={self.tp}, pp={self.pp})"


def _does_not_fit(dp: int, tp: int, pp: int, ranks: int) -> str:
    """What is wrong, and what would fit, one axis changed at a time if that is possible."""
    product = dp * tp * pp
    fits = [
        f"{name}={ranks // (product // size)}"
        for name, size in (("dp", dp), ("tp", tp), ("pp", pp))
        if ranks % (product // size) == 0
    ]
    divisors = ", ".join(str(n) for n in range(1, ranks + 1) if ranks % n == 0)
    would = f"{' or '.join(fits)} would fit" if fits else f"each must be a divisor of {ranks}: {divisors}"
    return (
        f"Mesh: dp={dp} × tp={tp} × pp={pp} = {product} ranks, but the communicator has {ranks}: "
        f"{would}; or start {product} ranks"
    )
