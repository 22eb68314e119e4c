"""Links between nodes, and how messages pass through them.

A message of n bytes takes a path of links. A link is a queue with a speed: what passes through it goes one after
another, first come, first served, n·β seconds each. Bytes flow on while the message is still coming in
(cut-through): on an idle path of latency α and even speed a message has arrived after α + nβ. When its first byte
leaves the sender's port, a message takes its place in the queues of the rest of its path; where it hops from node
to node (a ring), in each queue only when it gets there.
Through a trunk, a link faster than ports, messages of several ports flow side by side, each no faster than a port:
there only the work queues up, and a message is held back no longer than the trunk is behind with it.

    out-port of the sender's node → (links of the topology) → in-port of the receiver's node

Ranks of one node talk through lanes of their own. A message to oneself takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.sim.cluster import Cluster
from minidp.sim.loop import Loop
from minidp.sim.topology import Ring, Switch

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Hop(NamedTuple):
    link: int
    latency_s: float
    seconds_per_byte: float


Path = tuple[Hop, ...]


class Stage(NamedTuple):
    """One hop of many messages. Link −1: that message passes no link now."""

    links: Ints
    latency_s: Floats
    seconds_per_byte: Floats
    alone: bool  # no two share a link


class Network:
    """The links of a cluster that ``world_size`` ranks live on, and when each becomes free."""

    def __init__(self, cluster: Cluster, world_size: int) -> None:
        cluster.check_ranks(world_size)
        self.cluster, self.world_size = cluster, world_size
        links = cluster.topology.links(cluster.nodes)  # type: ignore[union-attr]
        self._lanes = links
        self.free: list[float] = [0.0] * (links + 2 * world_size)
        """For each link the time at which it has passed on all that it was given."""
        self._paths: dict[tuple[int, int], Path] = {}
        self.hops = isinstance(cluster.topology, Ring)
        """Whether messages hop, so that the rest of a path can't be known when the first byte leaves."""

    def path(self, src: int, dst: int) -> Path:
        """The links from rank ``src`` to rank ``dst``."""
        found = self._paths.get((src, dst))
        if found is None:
            found = self._paths[src, dst] = tuple(self._hops(src, dst))
        return found

    def _hops(self, src: int, dst: int) -> list[Hop]:
        cluster, topology, nodes = self.cluster, self.cluster.topology, self.cluster.nodes
        a, b = cluster.node_of(src), cluster.node_of(dst)
        if src == dst:
            return []
        if a == b:
            beta = cluster.local_seconds_per_byte
            out, into = self._lanes + src, self._lanes + self.world_size + dst
            return [Hop(out, cluster.local_latency_s, beta), Hop(into, 0.0, beta)]
        assert not isinstance(topology, str)
        return [
            Hop(link, cluster.latency_s * topology.latency(link, nodes), cluster.seconds_per_byte / speed)
            for link in topology.path(a, b, nodes)
            for speed in [topology.speed(link, nodes)]
        ]

    # -- a message ---------------------------------------------------------------------------------------

    def leave(self, path: Path, nbytes: float, time_s: float) -> tuple[float, float]:
        """Put a message into its sender's port at ``time_s``: when its first and its last byte leave."""
        if not path:
            return time_s, time_s
        link, _, beta = path[0]
        free = self.free
        start = free[link]
        if start < time_s:
            start = time_s
        end = free[link] = start + nbytes * beta
        return start, end

    def arrive(self, path: Path, nbytes: float, start: float, end: float) -> float:
        """Take a message, whose bytes leave from ``start`` to ``end``, through the rest: when its last arrives."""
        free = self.free
        if len(path) == 2:  # the usual case, unrolled: this is the innermost loop of every simulation
            latency = path[0][1]
            link, last_latency, beta = path[1]
            start += latency
            end += latency
            if free[link] > start:
                start = free[link]
            start += nbytes * beta
            if start < end:
                start = end
            free[link] = start
            return start + last_latency
        latency, port = 0.0, path[0][2] if path else 0.0
        for i, (link, own_latency, beta) in enumerate(path):
            if i:
                head, tail = start + latency, end + latency
                start = free[link] if free[link] > head else head
                end = start + nbytes * beta
                free[link] = end if beta < port else max(end, tail)
                if beta < port:  # a trunk
                    start = max(head, end - nbytes * port)
                end = max(end, tail)
            latency = own_latency
        return end + latency

    def follow(
        self, loop: Loop, path: Path, nbytes: float, start: float, end: float, known: Callable[[float], None]
    ) -> None:
        """`arrive` for any path, at the moment ``start``: calls ``known(arrival)`` as soon as that can be told."""
        if not self.hops or len(path) < 2:
            known(self.arrive(path, nbytes, start, end))
            return

        def hop(i: int, head: float, tail: float) -> None:
            link, latency, beta = path[i]
            begin = max(self.free[link], head)
            finish = self.free[link] = max(begin + nbytes * beta, tail)
            if i + 1 == len(path):
                known(finish + latency)
            else:
                on(i + 1, begin + latency, finish + latency)

        def on(i: int, head: float, tail: float) -> None:
            loop.at(head, lambda: hop(i, head, tail))

        on(1, start + path[0].latency_s, end + path[0].latency_s)

    # -- many messages at once ---------------------------------------------------------------------------

    def route(self, src: Ints, dst: Ints) -> list[Stage]:
        """The paths of many messages between different ranks, hop by hop, for `travel`."""
        cluster = self.cluster
        if isinstance(cluster.topology, Switch) and cluster.one_rank_a_node:
            ones, beta = np.ones(len(src)), cluster.seconds_per_byte
            columns = [(src, cluster.latency_s * ones, beta * ones), (cluster.nodes + dst, 0 * ones, beta * ones)]
        else:
            paths = [self.path(s, d) for s, d in zip(src.tolist(), dst.tolist())]
            none = Hop(-1, 0.0, 0.0)
            length = max(map(len, paths), default=0)
            # Shorter ones wait in the middle: so the links into nodes are passed last by all, in order.
            paths = [(*path[:1], *[none] * (length - len(path)), *path[1:]) for path in paths]
            rows = [zip(*(path[i] for path in paths)) for i in range(length)]
            columns = [(np.array(a), np.array(b, float), np.array(c, float)) for a, b, c in rows]
        return [Stage(*column, alone=_distinct(column[0])) for column in columns]

    @staticmethod
    def travel(free: Floats, route: list[Stage], nbytes: Ints, time_s: float) -> Floats:
        """Send messages at ``time_s``, all at once, in the order of their index: when each has arrived.

        The same as `leave` for each in turn, then `arrive` for each in order of (start, index), to the bit.
        Cost: a few vector operations a hop where no two messages share a link, else a loop over them.

        Args:
            free: when each link becomes free; changed in place.
            route: from `route`.
            nbytes: of each message, shape (messages,).
        """
        start = end = np.full(len(nbytes), time_s)
        latency: Floats | float = 0.0
        left = start  # when first bytes leave their port: in that order messages queue up behind it
        port = route[0].seconds_per_byte if route else 0.0
        for i, (links, own_latency, beta, alone) in enumerate(route):
            head, tail, takes, trunk = start + latency, end + latency, nbytes * beta, beta < port
            if alone and not trunk.any():
                start = np.maximum(head, free[links])
                end = np.maximum(start + takes, tail)
                free[links] = end
            else:
                start, end = head, tail
                order = np.argsort(left, kind="stable").tolist() if i else range(len(nbytes))
                _one_by_one(free, links, start, end, takes, np.where(trunk, nbytes * port, 0.0), order)
            if i == 0:
                left = start
            latency = own_latency
        return end + latency


def _distinct(links: Ints) -> bool:
    """Whether all have a link, each one of its own."""
    return bool((links >= 0).all()) and len(np.unique(links)) == len(links)


def _one_by_one(
    free: Floats, links: Ints, start: Floats, end: Floats, takes: Floats, flows: Floats, order: Iterable[int]
) -> None:
    """Pass messages through links that some of them share: ``start`` and ``end`` are changed in place.

    Through a trunk a message ``flows`` longer than it ``takes``; elsewhere ``flows`` is 0.
    """
    for m in order:
        link = links[m]
        if link >= 0:
            begin = max(start[m], free[link])
            done = begin + takes[m]
            if flows[m]:
                free[link] = done
                start[m] = max(start[m], done - flows[m])
            else:
                start[m], free[link] = begin, max(done, end[m])
            end[m] = max(done, end[m])
