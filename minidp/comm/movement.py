"""What moves in a virtual group's collective: its messages by steps, as events or as vectors, and its traffic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from minidp.comm import costs, schedules
from minidp.comm.transfers import Message, chunk_bounds
from minidp.comm.venue import Venue
from minidp.comm.waves import Pattern, chunks, waves
from minidp.sim.network import Floats, Path, Stage

if TYPE_CHECKING:
    from minidp.comm.meeting import Meeting


MOST_DIRECT = 64  # ranks of a group: of more, p² messages take long to try


class Movement(NamedTuple):
    """What moves in a collective: the schedule ``timed``, ``length`` elements of ``itemsize`` bytes."""

    timed: str
    root: int
    length: int
    itemsize: int


class Traffics(NamedTuple):
    """Bytes sent and received and messages sent, by member."""

    sent: list[int]
    received: list[int]
    messages: list[int]


class Group:
    """Ranks that meet.

    Args:
        venue: where they are.
        ranks: the world rank of each member.
        name: for messages.

    ``alpha``, ``beta`` (seconds, and a byte) are what the cost model reckons with: those between nodes, or those
    inside a node if all members live on one. ``gamma``: seconds a byte that is added up.
    """

    def __init__(self, venue: Venue, ranks: Sequence[int], name: str) -> None:
        self.venue, self.ranks, self.name = venue, list(ranks), name
        self.size = len(self.ranks)
        cluster = venue.cluster
        nodes = len({cluster.node_of(rank) for rank in self.ranks})
        # Where some share a port, no formula tells what an algorithm takes: that depends on who sends to whom.
        self._shares_ports = 1 < nodes < self.size
        self._tried: dict[int, str] = {}
        if nodes == 1 and self.size > 1:
            self.alpha, self.beta = cluster.local_latency_s, cluster.local_seconds_per_byte
        else:
            self.alpha, self.beta = cluster.latency_s, cluster.seconds_per_byte
        self.gamma = cluster.reduce_seconds_per_byte
        self.meetings: dict[int, Meeting] = {}
        self._rounds: dict[Movement, list[Round]] = {}
        self._traffic: dict[Movement, Traffics] = {}
        self._routes: dict[Pattern, list[Stage]] = {}

    def fastest(self, nbytes: int) -> str:
        """The all-reduce of the least cost for that many bytes: by the cost model, in which each rank has a port;
        of ranks that share ports by trying each on these links, while nothing else is under way."""
        if not self._shares_ports:
            return costs.fastest(self.size, nbytes, self.alpha, self.beta, self.gamma)
        found = self._tried.get(nbytes)
        if found is None:
            found = self._tried[nbytes] = min(costs.ALL_REDUCE, key=lambda name: self._try(name, nbytes))
        return found

    def _try(self, name: str, nbytes: int) -> float:
        """Seconds that an all-reduce takes on idle links. To find them takes 10 ms for 64 ranks, 0.2 s for
        1000."""
        if name == "direct" and self.size > MOST_DIRECT:  # each rank of a node sends to all others, one by one
            together = self.venue.cluster.ranks_per_node * nbytes
            return costs.direct(self.size, together, self.alpha, self.beta, self.gamma)
        return by_waves(self, np.zeros(len(self.venue.network.free)), Movement(name, 0, nbytes, 1), 0.0)

    # -- what a movement consists of ---------------------------------------------------------------------

    def rounds(self, movement: Movement) -> list[Round]:
        """Step by step, the messages of a schedule in the order in which they are posted."""
        found = self._rounds.get(movement)
        if found is None:
            if len(self._rounds) > 64:
                self._rounds.clear()
            found = self._rounds[movement] = _rounds(self, movement)
        return found

    def traffic(self, movement: Movement) -> Traffics:
        found = self._traffic.get(movement)
        if found is None:
            found = self._traffic[movement] = traffic(movement, self.size)
        return found

    def route(self, pattern: Pattern) -> list[Stage]:
        found = self._routes.get(pattern)
        if found is None:
            ranks = np.array(self.ranks)
            found = self.venue.network.route(ranks[pattern.src], ranks[pattern.dst])
            self._routes[pattern] = found
        return found


# --- message by message -----------------------------------------------------------------------------------


class Round(NamedTuple):
    """A step: its messages, and the most bytes that a rank adds at its end."""

    messages: list[tuple[Path, int]]
    added: int


def _rounds(group: Group, movement: Movement) -> list[Round]:
    name, root, length, itemsize = movement
    schedule = schedules.get(name, group.size, root)
    bounds = chunk_bounds(length, schedule.chunks)
    path = group.venue.network.path
    rounds: list[Round] = []
    added: list[dict[int, int]] = [{} for _ in range(schedule.steps)]
    messages: list[list[tuple[Path, int]]] = [[] for _ in range(schedule.steps)]
    for m in sorted(schedule.messages, key=lambda m: port_order(m, group.size)):
        nbytes = (bounds[m.stop - 1][1] - bounds[m.start][0]) * itemsize
        messages[m.step].append((path(group.ranks[m.src], group.ranks[m.dst]), nbytes))
        if m.op == "reduce":
            added[m.step][m.dst] = added[m.step].get(m.dst, 0) + nbytes
    for step, sums in zip(messages, added):
        rounds.append(Round(step, max(sums.values(), default=0)))
    return rounds


def port_order(m: Message, world_size: int) -> tuple[int, int, int]:
    """The order in which messages are posted: to the next rank first, so that no two senders meet at a port."""
    return m.step, (m.dst - m.src) % world_size, m.src


# --- as vectors -------------------------------------------------------------------------------------------


def by_waves(group: Group, free: Floats, movement: Movement, start: float) -> float:
    """When the movement ends that begins at ``start``; ``free``, when each link becomes free, is changed in place.

    Equal to the messages one by one, to the bit, if no others are under way, and, where ranks share links before
    the last one, if no rank sends several messages in one step. About equal where messages hop along a `Ring`:
    here they take their place in all links when they leave, one by one when they get there.
    """
    name, root, length, itemsize = movement
    p = group.size
    edges = np.array([0, *(hi for _, hi in chunk_bounds(length, chunks(name, p)))]) * itemsize
    travel = group.venue.network.travel
    for step in waves(name, p, root):
        end, added = start, np.zeros(p, np.int64)
        for pattern, first, stop, reduce in step:
            nbytes = edges[stop] - edges[first]
            end = max(end, float(travel(free, group.route(pattern), nbytes, start).max()))
            if reduce:
                np.add.at(added, pattern.dst, nbytes)
        start = end + int(added.max()) * group.gamma
    return start


def traffic(movement: Movement, world_size: int) -> Traffics:
    """What each member sends and receives."""
    name, root, length, itemsize = movement
    sent, received, messages = (np.zeros(world_size, np.int64) for _ in range(3))
    edges = np.array([0, *(hi for _, hi in chunk_bounds(length, chunks(name, world_size)))]) * itemsize
    for step in waves(name, world_size, root):
        for pattern, first, stop, _ in step:
            nbytes = edges[stop] - edges[first]
            np.add.at(sent, pattern.src, nbytes)
            np.add.at(received, pattern.dst, nbytes)
            np.add.at(messages, pattern.src, 1)
    return Traffics(sent.tolist(), received.tolist(), messages.tolist())
