"""The place where the ranks of a virtual world are: its clock, its network, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from greenlet import GreenletExit, getcurrent

from minidp.comm.errors import CollectiveMismatch, CommError, RankFailed, in_words
from minidp.comm.wording import left_waiting, name_of_all, name_places, name_ranks, stuck
from minidp.sim.cluster import Cluster
from minidp.sim.computer import Computer
from minidp.sim.loop import Loop, Task
from minidp.sim.network import Network

_PATIENCE = 100  # how often a rank may come back to a world that has failed before it is ended
_STANDSTILL = 100_000  # calls of communicators with no clock moving, after which a later failure is told at once
_undying: list[Task] = []  # tasks that catch even that, kept: who collects them would wake them


class Venue:
    """One run of a virtual world. All in one thread; nothing is left of it when it ends.

    Args:
        cluster: what the ranks live on. ValueError if they do not fit.
        world_size: number of ranks, servers included.
        servers_from: the rank of the first server, if there are any.
    """

    def __init__(self, cluster: Cluster, world_size: int, servers_from: int | None = None) -> None:
        self.loop, self.cluster, self.world_size = Loop(), cluster, world_size
        self.servers_from = world_size if servers_from is None else servers_from
        self.network = Network(cluster, world_size)
        self.ranks: list[Computer] = []
        self.streams: list[Task] = []
        self.returned: dict[int, Any] = {}
        self.raised: list[tuple[int, BaseException]] = []
        """In the order in which it happened."""
        self._news: CommError | None = None
        self._untold: dict[int, tuple[float, BaseException]] = {}
        """Failures of ranks whose clocks are ahead, by rank: when, and what."""
        self._seen: dict[int, float] = {}
        """While a failure is untold: of each rank that has called its communicator, the clock then."""
        self._standstill = 0
        """How many calls have found no clock moved."""
        self._refused: dict[int, int] = {}
        self._over = False

    def run(self, functions: Sequence[Callable[[], Any]]) -> None:
        """Run a function on every rank. Afterwards each rank is in ``returned`` or in ``raised``."""
        self.ranks = [
            Computer(self.loop, self.cluster, rank, lambda rank=rank, f=f: self._life(rank, f))  # type: ignore[misc]
            for rank, f in enumerate(functions)
        ]
        for task in self.ranks:
            self.loop.at(0.0, task.switch)
        try:
            while not all(task.dead for task in self.ranks):
                self.loop.run()
                self._nobody_can_go_on()
        except _Hopeless:
            pass
        finally:
            self._over = True
            self._news = self._news or CommError("the run has ended")
            for task in (*self.ranks, *self.streams):
                with suppress(_Hopeless):
                    task.stop()
                if not task.dead:
                    _undying.append(task)

    def _life(self, rank: int, function: Callable[[], Any]) -> None:
        try:
            value = function()
        except KeyboardInterrupt:
            raise  # of the person who started all ranks, whichever runs just then
        except BaseException as error:  # also SystemExit and GreenletExit: a rank that ends so has failed
            if self._over and isinstance(error, GreenletExit):
                raise
            # The others learn of it when their clocks are there: of two failures the earlier one is the first.
            self.ranks[rank].catch_up()
            time_s = max(self.loop.now, self.ranks[rank].clock)
            self._untold[rank] = time_s, error
            self.loop.at(time_s, partial(self._failed, rank))
        else:
            self.ranks[rank].catch_up()
            self.returned[rank] = value

    def _failed(self, rank: int) -> None:
        if rank not in self._untold:
            return  # it was told before its time
        _, error = self._untold.pop(rank)
        self.raised.append((rank, error))
        text = f"{self.name_of_all(rank)} raised {in_words(error)}"
        self._tell(RankFailed(text, rank))

    # -- for communicators -------------------------------------------------------------------------------

    def here(self, rank: int) -> Task:
        """The task that runs, which must belong to ``rank``; its clock is brought up to date.

        Raises what has become of the world, if it has failed.
        """
        task: Task = getcurrent()
        if task is not self.ranks[rank]:
            if not isinstance(task, Task) or task.rank != rank or task.loop is not self.loop:
                raise CommError(
                    f"the communicator of rank {rank} was used outside its rank's function (in a thread, or after "
                    "the run): in the virtual world all ranks share one thread, and each speaks for itself alone"
                )
        else:
            task.catch_up()
        if self._news is not None or self._untold:
            self._refuse(rank)
        return task

    def check(self, rank: int) -> None:
        """Raise what has become of the world, if it has failed."""
        if self._news is not None or self._untold:
            self._refuse(rank)

    def _refuse(self, rank: int) -> None:
        if self._news is None:
            # Where messages take no time, the others might never come to the time of a failure.
            clock = self.ranks[rank].clock
            self._standstill = self._standstill + 1 if self._seen.get(rank) == clock else 0
            self._seen[rank] = clock
            if self._standstill < _STANDSTILL:
                return
            self._failed(min(self._untold, key=lambda rank: (self._untold[rank][0], rank)))
        assert self._news is not None
        self._refused[rank] = self._refused.get(rank, 0) + 1
        if self._refused[rank] > _PATIENCE:
            text = f"{self.name(rank)} goes on for ever in a world that has failed: {self._news}"
            self.raised.append((rank, CommError(text)))
            self.loop.hub.throw(_Hopeless(text))
        raise self._copy_of_news()

    def _copy_of_news(self) -> CommError:
        """One for each rank: a traceback and notes are its own."""
        news = self._news
        assert news is not None
        return RankFailed(str(news), news.rank) if isinstance(news, RankFailed) else type(news)(str(news))

    # -- when something goes wrong -----------------------------------------------------------------------

    def _tell(self, news: CommError) -> None:
        """Let everybody who waits, or comes to wait, know."""
        if self._news is None:
            self._news = news
        for task in (*self.ranks, *self.streams):
            if task.waits_for is not None and not task.dead:
                task.fail(self._copy_of_news())

    def _nobody_can_go_on(self) -> None:
        """There is no event any more: whoever is left waits for what will never come."""
        left = [task for task in self.ranks if not task.dead]
        if not left:
            return
        if all(task.waits_for is None for task in left):
            if self.raised:  # a signal's exception struck a rank that was just handing over to one of these
                raise _Hopeless(str(self._news))
            raise CommError(f"rank {left[0].rank} has gone elsewhere: a greenlet of its own has left its function")
        where = self.where_all_are()
        verdict = left_waiting(where) if self.returned else stuck(where)
        self._tell(CollectiveMismatch(verdict))

    def where_all_are(self, here: str | None = None) -> str:
        """``rank 2 returned; ranks 0, 1, 3 wait in all_reduce #412 (float32 (4,), sum)``.

        ``here``: in words, where the one is that runs.
        """
        running = getcurrent()
        places: dict[str, list[int]] = {}
        for task in self.ranks:
            if task.rank in self.returned:
                place = "returned"
            elif task.waits_for is not None:
                place = f"wait in {task.waits_for()}"
            elif here is not None and task is running:
                place = f": {here}"
            else:
                place = "compute"
            places.setdefault(place, []).append(task.rank)
        return name_places(places, self.servers_from)

    def name(self, rank: int) -> str:
        """``rank 2``, or ``server 0``."""
        return name_ranks([rank], servers_from=self.servers_from)

    def name_of_all(self, rank: int) -> str:
        """``rank 2 of 4``, or ``server 0 of 2``."""
        return name_of_all(rank, self.world_size, self.servers_from)


class _Hopeless(CommError):
    """A rank that does not end although it was told that the world has failed."""
