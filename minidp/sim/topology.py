"""How nodes are wired: which links a message from one node to another passes.

A topology numbers its links and says, for a pair of nodes, which of them a message takes, in order. A link is a
queue with a speed: what passes through it goes one after another. Three wirings:

    Switch()    every node's port into one switch that is never a bottleneck
    FatTree(leaf, oversubscription)
                nodes in groups of ``leaf`` behind a switch; between groups, an uplink and a downlink a group with
                leaf / oversubscription times a port's bandwidth
    Ring()      each node wired to its two neighbours, each way; others are reached by hops

Links 0 … nodes−1 are what leaves a node, nodes … 2·nodes−1 what enters it (Ring: to the right, to the left).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any


class Topology(ABC):
    """A wiring; see the module. ``speeds`` and ``latencies`` are relative to a port's bandwidth and latency."""

    def check(self, nodes: int) -> None:  # noqa: B027
        """Raise ValueError if that many nodes can't be wired so."""

    def room_for(self, nodes: int) -> int:
        """The least number of nodes, that many or more, that can be wired so."""
        return nodes

    def links(self, nodes: int) -> int:
        """How many links there are."""
        return 2 * nodes

    def path(self, src: int, dst: int, nodes: int) -> tuple[int, ...]:
        """The links from node ``src`` to another node ``dst``, in the order in which they are passed."""
        return src, nodes + dst

    def speed(self, link: int, nodes: int) -> float:
        """The link's bandwidth in ports' bandwidths."""
        return 1.0

    @abstractmethod
    def latency(self, link: int, nodes: int) -> float:
        """What passing the link adds to a message's way, in latencies."""


@dataclass(frozen=True)
class Switch(Topology):
    """One flat switch: a message waits for its sender's port and its receiver's, for nothing else."""

    def latency(self, link: int, nodes: int) -> float:
        return float(link < nodes)  # one latency a message: behind the sender's port


@dataclass(frozen=True)
class FatTree(Topology):
    """Two levels of switches. With oversubscription 1 it is as good as a flat one, with 4 a group's way out has
    a quarter of what its nodes can send together.

    Args:
        leaf: nodes in a group. Must divide the nodes of the cluster.
        oversubscription: at least 1.
    """

    leaf: int = 8
    oversubscription: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.leaf, int) or isinstance(self.leaf, bool) or self.leaf < 1:
            raise ValueError(f"FatTree: leaf={self.leaf!r} must be a whole number of nodes, at least 1")
        ratio = self.oversubscription
        if not isinstance(ratio, int | float) or not 1 <= ratio < math.inf:
            raise ValueError(f"FatTree: oversubscription={ratio!r} must be a finite number, at least 1")

    def room_for(self, nodes: int) -> int:
        return -(-nodes // self.leaf) * self.leaf

    def check(self, nodes: int) -> None:
        if nodes % self.leaf:
            raise ValueError(
                f"FatTree: groups of leaf={self.leaf} nodes do not fit: they must divide {nodes} nodes"
            )

    def links(self, nodes: int) -> int:
        return 2 * nodes + 2 * (nodes // self.leaf)

    def path(self, src: int, dst: int, nodes: int) -> tuple[int, ...]:
        group, other = src // self.leaf, dst // self.leaf
        if group == other:
            return src, nodes + dst
        up = 2 * nodes + group
        down = 2 * nodes + nodes // self.leaf + other
        return src, up, down, nodes + dst

    def speed(self, link: int, nodes: int) -> float:
        return self.leaf / self.oversubscription if link >= 2 * nodes else 1.0

    def latency(self, link: int, nodes: int) -> float:
        return float(link < nodes)


@dataclass(frozen=True)
class Ring(Topology):
    """Neighbours are wired, each way; a message to another node hops the shorter way round, a latency a hop."""

    def room_for(self, nodes: int) -> int:
        return max(nodes, 2)  # of two, both ways lead to the other

    def check(self, nodes: int) -> None:
        if nodes < 2:
            raise ValueError(f"Ring: {nodes} node can't be wired to neighbours; give at least 2 nodes")

    def path(self, src: int, dst: int, nodes: int) -> tuple[int, ...]:
        right = (dst - src) % nodes
        if right <= nodes - right:
            return tuple((src + hop) % nodes for hop in range(right))
        return tuple(nodes + (src - hop) % nodes for hop in range(nodes - right))

    def latency(self, link: int, nodes: int) -> float:
        return 1.0


NAMES: dict[str, Topology] = {"switch": Switch(), "ring": Ring(), "fat_tree": FatTree()}


def make_topology(topology: Any, nodes: int) -> Topology:
    """The topology of that name, or the one given; ValueError if there is none, or if it does not fit."""
    if isinstance(topology, str) and topology in NAMES:
        topology = NAMES[topology]
    if not isinstance(topology, Topology):
        raise ValueError(
            f"unknown topology {topology!r}; valid: {', '.join(map(repr, NAMES))}, or minidp.sim.FatTree(leaf=8, "
            "oversubscription=4)"
        )
    topology.check(nodes)
    return topology
