"""``virtual``, last part: the step times that the virtual world predicts for this machine, over those measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import MLPS, Training
from minidp.bench.measure import Bar, Figure
from minidp.bench.peers.ours import strategy_of
from minidp.bench.report import Line
from minidp.bench.roster import OURS_1, OURS_2
from minidp.bench.screen import Screen
from minidp.bench.team import PeerFailed
from minidp.nn.functional import cross_entropy
from minidp.parallel.timing import rehearse, replay
from minidp.sim import Cluster, calibrate

BAND = Bar(0.85, most=1.15)


def predicted_s(job: Training, cluster: Cluster, workers: int) -> float:
    """Seconds of a step of so many workers on ``cluster``: the strategy's own script, replayed without arrays."""
    script = rehearse(lambda comm: strategy_of(job, comm), *job.batch_of(0), cross_entropy)
    return replay(script, cluster, workers, steps=5).step_s


def run(
    rounds: Rounds, screen: Screen, calibration_s: float, models: Sequence[Training] = MLPS
) -> tuple[list[Line], float | None]:
    """A line for each model and number of workers, and what other processes took while steps were timed, in cores.

    This machine is calibrated before its steps are timed, and again afterwards; what counts is the mean of both
    predictions, as the machine's speed changes while it is measured.
    """
    clusters = [_calibrated(screen, calibration_s)]
    with contest((OURS_1, OURS_2), screen) as teams:
        samples = {job: teams.run(job, rounds) for job in models}
        others = teams.others
    clusters.append(_calibrated(screen, calibration_s))
    lines = []
    for job in models:
        for entrant in (OURS_1, OURS_2):
            seconds = samples[job][entrant.key]
            before_s, after_s = (predicted_s(job, cluster, entrant.world_size) for cluster in clusters)
            predicted = (before_s + after_s) / 2
            figures = {
                "ms": median(seconds) * 1e3,
                "fastest_ms": min(seconds) * 1e3,
                "predicted_ms": predicted * 1e3,
                "before_ms": before_s * 1e3,
                "after_ms": after_s * 1e3,
            }
            line = Line(job.name, entrant.name, figures, seconds)
            result = Figure.of([predicted / each for each in seconds], BAND)
            lines.append(line.compared("predicted / real", result))
    return lines, others


def _calibrated(screen: Screen, seconds: float) -> Cluster:
    screen.phase("calibrating")
    try:
        cluster: Cluster = calibrate(seconds)
    except RuntimeError as error:
        raise PeerFailed(str(error)) from error
    return cluster
