"""How long messages along a mesh's axes take: those of all groups that share nodes set out together, and are timed
as the virtual world times them, message by message.

Rank (d·pp + s)·tp + t is part t of stage s of replica d. Along tp neighbours have neighbouring ranks: with tp
ranks or more on a node they talk inside it, through lanes of their own. Along dp they are tp · pp ranks apart: the
groups of all ranks of a node want its one port at the same time, and get it one after another.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np

from minidp.comm.meeting import Meeting, Transport, passes_one_by_one
from minidp.comm.movement import Group, Movement, Round, by_waves
from minidp.comm.venue import Venue
from minidp.sim import Cluster, Switch

Groups = tuple[tuple[int, ...], ...]


class Mesh(NamedTuple):
    """Sizes of the axes: replicas, parts of each layer, stages."""

    dp: int
    tp: int
    pp: int

    def __str__(self) -> str:
        return f"{self.dp}×{self.tp}×{self.pp}"


class Clock:
    """Times of collectives and messages on a cluster, each found once."""

    def __init__(self, cluster: Cluster, world_size: int) -> None:
        cluster.check_ranks(world_size)
        self.cluster, self.world_size = cluster, world_size
        self._known: dict[tuple[Groups, str, int, int], float] = {}

    def tensor(self, tp: int, schedule: str, length: int, itemsize: int) -> float:
        """Seconds of a collective along tp: ``schedule`` as in `Collective`, of ``length`` elements."""
        groups = [tuple(range(first, first + tp)) for first in range(0, self.world_size, tp)]
        return self._together(groups, schedule, length, itemsize)

    def data(self, dp: int, length: int, itemsize: int) -> float:
        """Seconds of an all-reduce along dp, in all groups at once, by the algorithm that is fastest for one."""
        apart = self.world_size // dp
        groups = [tuple(range(first, self.world_size, apart)) for first in range(apart)]
        return self._together(groups, "all_reduce", length, itemsize)

    def count(self, dp: int) -> float:
        """Seconds in which the replicas tell each other a number: one latency."""
        return 0.0 if dp == 1 else self._group(tuple(range(0, self.world_size, self.world_size // dp))).alpha

    def messages(self, tp: int, pp: int, nbytes: int, backwards: bool = False) -> list[float]:
        """Seconds of a message from each stage to the next, or of one to it from the next: shape (pp − 1,).

        Every rank of a stage sends to its counterpart in the other, in all replicas at once.
        """
        times = []
        for stage in range(pp - 1):
            group = self._group(tuple(range(self.world_size)))
            path, messages = group.venue.network.path, []
            for first in range(stage * tp, self.world_size, pp * tp):
                for rank in range(first, first + tp):
                    ends = (rank + tp, rank) if backwards else (rank, rank + tp)
                    messages.append((path(*ends), nbytes))
            meeting = Meeting(group, 0)
            Transport(meeting, [Round(messages, 0)]).go_on()
            group.venue.loop.run()
            times.append(meeting.end)
        return times

    def _group(self, ranks: tuple[int, ...]) -> Group:
        return Group(Venue(self.cluster, self.world_size), ranks, "planned")

    def _together(self, groups: list[tuple[int, ...]], schedule: str, length: int, itemsize: int) -> float:
        """Until all have ended; of groups that share no links with the first, their likes are enough."""
        if len(groups[0]) == 1:
            return 0.0
        near = self._in_the_way(groups)
        key = near, schedule, length, itemsize
        if key not in self._known:
            self._known[key] = self._timed(*key)
        return self._known[key]

    def _in_the_way(self, groups: list[tuple[int, ...]]) -> Groups:
        """The first group, and those that it meets on its nodes, and those that they meet, and so on."""
        if not isinstance(self.cluster.topology, Switch):
            return tuple(groups)  # they may meet between nodes
        node_of = self.cluster.node_of
        visitors: dict[int, list[int]] = {}
        for i, group in enumerate(groups):
            nodes = {node_of(rank) for rank in group}
            if len(nodes) > 1 or i == 0:  # inside a node each rank has lanes of its own
                for node in nodes:
                    visitors.setdefault(node, []).append(i)
        found, new = {0}, [0]
        while new:
            for node in {node_of(rank) for rank in groups[new.pop()]}:
                for i in visitors.pop(node, ()):
                    if i not in found:
                        found.add(i)
                        new.append(i)
        return tuple(groups[i] for i in sorted(found))

    def _lie(self, ranks: tuple[int, ...]) -> tuple[int, ...]:
        """Who shares a node with whom, by numbers; in a topology where it matters, which nodes they are."""
        nodes = [self.cluster.node_of(rank) for rank in ranks]
        if not isinstance(self.cluster.topology, Switch):
            return tuple(nodes)
        numbers: dict[int, int] = {}
        return tuple(numbers.setdefault(node, len(numbers)) for node in nodes)

    def _timed(self, groups: Groups, schedule: str, length: int, itemsize: int) -> float:
        venue = Venue(self.cluster, self.world_size)
        network, ends, meetings = venue.network, [0.0, 0.0], []
        chosen: dict[tuple[int, ...], str] = {}
        for ranks in groups:
            group = Group(venue, ranks, "planned")
            name = schedule
            if schedule == "all_reduce":  # groups that lie on nodes alike choose alike
                key = self._lie(ranks)
                if key not in chosen:
                    chosen[key] = group.fastest(length * itemsize)
                name = chosen[key]
            movement = Movement(name, 0, length, itemsize)
            if passes_one_by_one(group, movement):
                meetings.append(Meeting(group, 0))
                venue.loop.at(0.0, partial(_begin, meetings[-1], movement))
            else:
                free = np.array(network.free)
                ends.append(by_waves(group, free, movement, 0.0))
                network.free[:] = free.tolist()
        venue.loop.run()
        return max(*ends, *(meeting.end for meeting in meetings))


def _begin(meeting: Meeting, movement: Movement) -> None:
    Transport(meeting, meeting.group.rounds(movement)).go_on()
