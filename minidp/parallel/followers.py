"""Backup workers on several servers: the first server decides who is in time, the others go by what it said.

If each decided by itself, one worker could be late here and another there, and each wait for the other's round. So
a worker asks the first server first. Its answer tells of which workers the round is made; those push to the others
too, which close that round when they have all of them. Who is late gets w from them when that round is over.
"""

from __future__ import annotations

from minidp.parallel.session import Answer, Opening, Session
from minidp.parallel.wire import Reply, Request, Status

MOST_WORKERS = 62  # whose numbers fit, as bits, into a header


class FollowingSession(Session):
    """A session on a server that is not the first, with backup workers."""

    def __init__(self, opening: Opening, answer: Answer) -> None:
        super().__init__(opening, answer)
        self._coming: dict[int, dict[int, Request]] = {}  # rounds that are not over, by number: who has pushed
        self._late: dict[int, int] = {}  # who waits for w, and for which version

    def push(self, worker: int, request: Request) -> None:
        """Of a member of round ``request.round``; or, without members, of one that is late and waits for it."""
        if request.members:
            if not request.samples:
                self.inbox(worker)[...] = 0
            self._coming.setdefault(request.round, {})[worker] = request
        else:
            self._late[worker] = request.round
        self._close_round()

    def _close_round(self) -> None:
        while True:
            came = self._coming.get(self.slice.version, {})
            if came and self._complete(came):
                del self._coming[self.slice.version]
                self._update(came)
            elif not came and self._nobody_comes():
                self.slice.skip()
            else:
                break
        for worker, version in list(self._late.items()):
            if version <= self.slice.version:
                del self._late[worker]
                self._tell(worker, Reply(Status.LATE, size=1))

    def _complete(self, came: dict[int, Request]) -> bool:
        """Whether all members are there, but those who have died after the round was made."""
        members = members_of(next(iter(came.values())).members)
        return members - came.keys() <= self._died

    def _nobody_comes(self) -> bool:
        """Whether all members of the next round have died: whoever lives waits for a later one."""
        waiting = set(self._late).union(*self._coming.values())
        return any(version > self.slice.version for version in [*self._late.values(), *self._coming]) and (
            set(self.clocks.present) <= waiting | self._gathered.keys()
        )

    def leave(self, worker: int, died: bool) -> None:
        self._late.pop(worker, None)
        super().leave(worker, died)


def members_of(bits: int) -> set[int]:
    return {worker for worker in range(MOST_WORKERS) if bits >> worker & 1}
