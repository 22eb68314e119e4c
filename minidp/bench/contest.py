"""A contest: all teams that can start, side by side; the same job for each; rounds."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from minidp.bench import measure
from minidp.bench.jobs import Job
from minidp.bench.machine import Neighbours
from minidp.bench.roster import Entrant
from minidp.bench.screen import Screen
from minidp.bench.team import PeerFailed, Team

AGREEMENT = 1e-3  # relative: the losses after four updates differ by rounding alone, the libraries' sums in order


@dataclass(frozen=True)
class Rounds:
    """How much is measured: ``pairs`` rounds of bursts of ``burst_s`` seconds."""

    pairs: int
    burst_s: float

    @property
    def proper(self) -> bool:
        return self.pairs >= measure.PROPER_PAIRS


class Contest:
    """The teams that have started, by key, and a sentence for each that is missing."""

    def __init__(self, screen: Screen) -> None:
        self.teams: dict[str, Team] = {}
        self.missing: list[str] = []
        self._screen = screen
        self._neighbours = Neighbours(set())

    def watch(self) -> None:
        """From now on count what processes other than the teams' take."""
        self._neighbours = Neighbours({os.getpid(), *(pid for team in self.teams.values() for pid in team.pids)})

    @property
    def others(self) -> float | None:
        """How many cores' worth other processes of this machine, or other guests of its host, took meanwhile."""
        return self._neighbours.cores()

    def run(self, job: Job, rounds: Rounds, without: Sequence[Entrant] = ()) -> dict[str, list[float]]:
        """Seconds per repetition of ``job`` in every round, by team; some may sit out."""
        resting = {entrant.key for entrant in without}
        teams = {key: team for key, team in self.teams.items() if key not in resting}
        self._screen.phase(f"{job.name}: preparing")
        _check_agreement(teams, {key: team.prepare(job) for key, team in teams.items()})
        self._screen.phase(job.name, rounds.pairs * len(teams))
        return measure.compare(teams, rounds.pairs, rounds.burst_s, self._screen.tick)


@contextmanager
def contest(entrants: Sequence[Entrant], screen: Screen) -> Iterator[Contest]:
    """Start all teams whose packages are here; end them at the end, after an error or Ctrl-C too.

    A peer that does not start is missing, with its last words; that we do not start is an error.
    """
    result = Contest(screen)
    with ExitStack() as stack:
        folder = tempfile.TemporaryDirectory(prefix="minidp-bench-")
        stack.callback(folder.cleanup)
        launched: dict[Entrant, Team] = {}
        for entrant in entrants:
            sentence = entrant.missing()
            if sentence is not None:
                result.missing.append(sentence)
                continue
            screen.phase(f"starting {entrant.name}")
            team = Team(entrant.name, entrant.commands(), entrant.world_size, Path(folder.name, entrant.key))
            launched[entrant] = stack.enter_context(team)
        try:
            for entrant, team in launched.items():
                screen.phase(f"waiting for {entrant.name}")
                if _gathered(entrant, team, result):
                    result.teams[entrant.key] = team
            folder.cleanup()  # all are connected: even if this process is killed from now on, no file is left
            result.watch()
            yield result
        finally:
            for team in launched.values():
                team.release()  # all, before the first is waited for


def _gathered(entrant: Entrant, team: Team, result: Contest) -> bool:
    try:
        team.gather()
    except PeerFailed as failure:
        if not entrant.packages:
            raise
        team.close()
        result.missing.append(f"{entrant.name} is missing: {failure}")
        return False
    return True


def _check_agreement(teams: Mapping[str, Team], figures: Mapping[str, float]) -> None:
    """See that teams of one size have done the same work: equal losses, equal sums."""
    for world_size in {team.world_size for team in teams.values()}:
        of_size = {key: figures[key] for key, team in teams.items() if team.world_size == world_size}
        first, *others = of_size.values()
        if any(not math.isclose(first, other, rel_tol=AGREEMENT) for other in others):  # a NaN is close to nothing
            said = ", ".join(f"{teams[key].name} {figure:.6g}" for key, figure in of_size.items())
            raise PeerFailed(f"the contestants do not do the same work, so times mean nothing: {said}")
