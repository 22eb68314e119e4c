"""The ranks that are left: what checkpoints and states need of a group, also where some of it has died."""

from __future__ import annotations

from typing import Any, Protocol

from minidp.comm import RankLost
from minidp.parallel.links import Links
from minidp.parallel.slabs import Flat


class Group(Protocol):
    """The collectives on objects of a ``Communicator``, as far as `checkpoint` needs them."""

    rank: int
    world_size: int

    def all_gather_int(self, value: int, what: str = ...) -> list[int]: ...
    def all_gather_object(self, obj: Any, what: str = ...) -> list[Any]: ...
    def broadcast_object(self, obj: Any, src: int = ..., what: str = ...) -> Any: ...


class Present:
    """The workers of a session that live and have not returned, by way of a server, which knows who they are.

    ``rank`` and ``world_size`` are this one's among them, as of the last gathering, which each operation is.
    RankLost if somebody has died between two that belong together: call again.
    """

    def __init__(self, links: Links, worker: int, workers: int) -> None:
        self._links, self._worker = links, worker
        self.rank, self.world_size = worker, workers

    def all_gather_object(self, obj: Any, what: str = "", w: Flat | None = None) -> list[Any]:
        """As that of a communicator; the servers' parameters come into ``w``, if it is given: the same on all."""
        everybody = self._links.gather(obj, w)
        self.rank = [worker for worker, _ in everybody].index(self._worker)
        self.world_size = len(everybody)
        return [value for _, value in everybody]

    def all_gather_int(self, value: int, what: str = "") -> list[int]:
        return self.all_gather_object(int(value), what)

    def broadcast_object(self, obj: Any, src: int = 0, what: str = "") -> Any:
        """As that of a communicator; ``src`` counts those who came to the last gathering."""
        before = len(self.all_gather_object(None))  # some may have left long ago
        everybody = self.all_gather_object(obj if self.rank == src else None, what)
        if len(everybody) != before:
            raise RankLost(f"a worker has left in the middle of {what or 'broadcast_object'}: call it again")
        return everybody[src]
