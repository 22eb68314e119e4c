"""The machine room as numbers: nodes, their speed, the network between them, who is slow, who is unsteady."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from minidp import backend
from minidp.sim.topology import Topology, make_topology

_MOST = 10_000_000  # nodes, and ranks of a node: a list of more takes the memory of a laptop
_WILD = 5.0  # beyond this jitter most factors are 0 to rounding


@dataclass(frozen=True)
class Cluster:
    """Machines that need not exist. Immutable; ``dataclasses.replace`` makes a variation of one.

    Args:
        nodes: machines; rank r lives on node ``r // ranks_per_node``.
        flops: floating-point operations a second, of each rank.
        op_overhead_s: seconds that every counted operation costs besides, whatever its size.
        memory_bytes_per_s: speed at which operations read and write their arrays; None: memory costs nothing.
        reduce_bytes_per_s: speed at which received bytes are added up (1/γ); None: adding costs nothing.
        latency_s: of a message between two nodes (α).
        bandwidth_bytes_per_s: of a node's port, each way (1/β). One full-duplex port a node: what several
            messages want of a port they get one after another.
        ranks_per_node: ranks that share a node's port. Each computes at ``flops``.
        stragglers: node → factor: it computes that many times slower (below 1: faster).
        jitter: spread of the computing time: each stretch of computing between two waits takes
            exp(jitter·z − jitter²/2) times as long, z normal, so its mean stays. 0: none.
        seed: of the jitter. Every rank has a stream of its own.
        topology: ``"switch"`` (flat, never a bottleneck), ``"ring"`` (neighbours only; messages hop),
            ``"fat_tree"`` or ``FatTree(leaf, oversubscription)``; see ``minidp.sim.topology``.
        placement: the node of each rank, in place of ``r // ranks_per_node``.
        local_latency_s, local_bandwidth_bytes_per_s: between ranks of one node, which do not use the port.
            Bandwidth None: that of the memory, or none is needed.

    Computing costs ``(operations · op_overhead_s + FLOPs / flops + bytes / memory_bytes_per_s) · straggler ·
    jitter``, with what ``backend.meter`` has counted.

    Raises ValueError for what no machine can be.
    """

    nodes: int
    flops: float = 1e12
    op_overhead_s: float = 0.0
    memory_bytes_per_s: float | None = None
    reduce_bytes_per_s: float | None = None
    latency_s: float = 5e-6
    bandwidth_bytes_per_s: float = 1.25e9
    ranks_per_node: int = 1
    stragglers: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    seed: int = 0
    topology: str | Topology = "switch"
    placement: tuple[int, ...] | None = None
    local_latency_s: float = 0.0
    local_bandwidth_bytes_per_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("nodes", "ranks_per_node"):
            object.__setattr__(self, name, _whole(name, getattr(self, name), 1, _MOST))
        object.__setattr__(self, "seed", _whole("seed", self.seed, 0))
        # Floats: a float32 or a Decimal among them would spread to every clock.
        for name in ("flops", "bandwidth_bytes_per_s"):
            object.__setattr__(self, name, _positive(name, getattr(self, name)))
        for name in ("memory_bytes_per_s", "reduce_bytes_per_s", "local_bandwidth_bytes_per_s"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _positive(name, getattr(self, name)))
        for name in ("latency_s", "local_latency_s", "op_overhead_s", "jitter"):
            object.__setattr__(self, name, _not_negative(name, getattr(self, name)))
        if self.jitter > _WILD:
            raise ValueError(f"jitter={self.jitter}: give at most {_WILD:g}; 0.1 is a usual machine, 1 a wild one")
        if not isinstance(self.stragglers, Mapping):
            raise ValueError(f"stragglers={self.stragglers!r}: give a mapping node → factor, such as {{3: 5.0}}")
        for node, factor in self.stragglers.items():
            if _whole("a straggler's node", node, 0) >= self.nodes:
                raise ValueError(f"straggler {node} is beyond the cluster: its nodes are 0 to {self.nodes - 1}")
            if math.isinf(_positive(f"the factor of straggler {node}", factor)):
                raise ValueError(f"the factor of straggler {node} is infinite: a node that never ends is no node")
        object.__setattr__(self, "stragglers", {int(k): float(v) for k, v in self.stragglers.items()})
        if self.placement is not None:
            nodes = tuple(_whole("a node of placement", node, 0, self.nodes - 1) for node in self.placement)
            object.__setattr__(self, "placement", nodes)
        object.__setattr__(self, "topology", make_topology(self.topology, self.nodes))

    # -- who lives where ---------------------------------------------------------------------------------

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node if self.placement is None else self.placement[rank]

    @property
    def one_rank_a_node(self) -> bool:
        """Whether rank r is alone on node r."""
        return self.ranks_per_node == 1 and self.placement is None

    def local_rank(self, rank: int) -> int:
        """The number of a rank among those of its node."""
        if self.placement is None:
            return rank % self.ranks_per_node
        return self.placement[:rank].count(self.placement[rank])

    def with_servers(self, workers: int, servers: int) -> Cluster:
        """This cluster for ``workers`` ranks and then ``servers``: on further nodes; or, where the nodes are only
        enough for the workers, beside these, server j on the node of worker j · workers // servers (modulo that).
        """
        most = self.nodes * self.ranks_per_node
        if self.placement is not None or not servers or not workers <= most < workers + servers:
            return self
        nodes = [self.node_of(rank) for rank in range(workers)]
        beside = [nodes[j * workers // servers % workers] for j in range(servers)]
        return replace(self, placement=(*nodes, *beside))

    def check_ranks(self, world_size: int) -> None:
        """Raise ValueError if that many ranks do not fit."""
        if self.placement is not None and world_size > len(self.placement):
            raise ValueError(
                f"{world_size} ranks, and placement= has nodes for {len(self.placement)}: give one each"
            )
        if self.placement is None and world_size > self.nodes * self.ranks_per_node:
            raise ValueError(
                f"{world_size} ranks do not fit into a cluster of {self.nodes} nodes × {self.ranks_per_node} "
                "ranks: give it more nodes= or ranks_per_node="
            )

    # -- what computing costs ----------------------------------------------------------------------------

    def compute_s(self, operations: float, flops: float, nbytes: float = 0.0, rank: int | None = None) -> Any:
        """Seconds for that much work, without jitter: on ``rank``, or on a node that is no straggler.

        The three may be arrays of one shape: then so is the result.
        """
        seconds = operations * self.op_overhead_s + flops / self.flops
        if self.memory_bytes_per_s is not None:
            seconds = seconds + nbytes / self.memory_bytes_per_s
        return seconds if rank is None else seconds * self.slowness(rank)

    def slowness(self, rank: int) -> float:
        """How many times longer than on an ordinary node computing takes on ``rank``."""
        return self.stragglers.get(self.node_of(rank), 1.0)

    def jitter_factors(self, rank: int) -> Jitter:
        """The stream of factors by which this rank's stretches of computing are longer or shorter."""
        return Jitter(self.jitter, self.seed, rank)

    # -- what communication costs ------------------------------------------------------------------------

    @property
    def seconds_per_byte(self) -> float:
        """β."""
        return 1 / self.bandwidth_bytes_per_s

    @property
    def reduce_seconds_per_byte(self) -> float:
        """γ."""
        return 0.0 if self.reduce_bytes_per_s is None else 1 / self.reduce_bytes_per_s

    @property
    def local_seconds_per_byte(self) -> float:
        speed = self.local_bandwidth_bytes_per_s or self.memory_bytes_per_s
        return 0.0 if speed is None else 1 / speed


class Jitter:
    """Factors of mean 1, log-normal, from the generator at (seed, "jitter", rank): the same on every run."""

    def __init__(self, spread: float, seed: int, rank: int) -> None:
        self._spread = spread
        self._generator = backend.generator(seed, "jitter", rank) if spread else None

    def next(self) -> float:
        if self._generator is None:
            return 1.0
        z = float(self._generator.standard_normal())
        return math.exp(self._spread * z - self._spread**2 / 2)


def _whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or np.ndim(value) != 0:
        raise ValueError(f"{name}={value!r}: give a whole number")
    if value < least:
        raise ValueError(f"{name}={value}: give at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name}={value}: give at most {most}")
    return int(value)


def _positive(name: str, value: Any) -> float:
    number = _number(value)
    if not number > 0 or math.isinf(1 / number):
        raise ValueError(f"{name}={value!r}: give a positive number")
    return number


def _not_negative(name: str, value: Any) -> float:
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={value!r}: give a number that is finite and not negative")
    return number


def _number(value: Any) -> float:
    """As a float; NaN if it is no real number, or too large for one."""
    if isinstance(value, bool | str | bytes) or np.ndim(value) != 0 or np.iscomplexobj(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
