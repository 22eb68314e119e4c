"""``scaling``: 2 workers against 1, same batch a worker; and 2 of ours against PyTorch's DDP and PyTorch + MPI."""

from __future__ import annotations

from collections.abc import Sequence

from minidp.bench import step
from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import IMAGES, LARGE, MODELS, SMALL, TEXT, TINY, Training
from minidp.bench.measure import Bar, Figure, ratio
from minidp.bench.report import Line, Report
from minidp.bench.roster import DDP, EAGER, OURS_1, OURS_2, TORCH_MPICH, Entrant
from minidp.bench.screen import Screen

ENTRANTS = (OURS_1, EAGER, OURS_2, DDP, TORCH_MPICH)
SPEEDUP: dict[Training, Bar] = {
    LARGE: Bar(1.8),
    SMALL: Bar(1.65),
    TINY: Bar(1.55),
    IMAGES: Bar(1.75),
    TEXT: Bar(1.75),
}
OVER_OURS: dict[Entrant, dict[Training, Bar]] = {
    DDP: {LARGE: Bar(2), SMALL: Bar(3.8), TINY: Bar(28)},
    TORCH_MPICH: {LARGE: Bar(1.15), SMALL: Bar(1.3), TINY: Bar(3)},
}
NOTES = (
    "×2 / ×1: weak scaling, samples/s of 2 workers over those of 1, the same batch a worker; 2 would be perfect.",
    "×1 runs alone and has to meet the bar of `step`, so the base is not a slow one. DDP goes over gloo.",
    "PyTorch+MPICH: mpi4py, one Allreduce of all gradients a step.",
)


def run(rounds: Rounds, screen: Screen, models: Sequence[Training] = MODELS) -> Report:
    report = Report("scaling", "2 workers, one thread each", rounds, step.COLUMNS, notes=NOTES)
    with contest(ENTRANTS, screen) as teams:
        report.missing = teams.missing
        for job in models:
            samples = teams.run(job, rounds)
            for entrant in ENTRANTS:
                if entrant.key in samples:
                    seconds = samples[entrant.key]
                    line = Line(job.name, entrant.name, step.figures(job, seconds, entrant.world_size), seconds)
                    report.lines.append(_compare(line, entrant, job, samples))
        report.others = teams.others
    return report


def _compare(line: Line, entrant: Entrant, job: Training, samples: dict[str, list[float]]) -> Line:
    """Each contestant's own question: who is it to be compared with?"""
    seconds = samples[entrant.key]
    if entrant is OURS_1 and EAGER.key in samples:
        return line.compared("ours / eager", ratio(seconds, samples[EAGER.key], step.BARS.get(job)))
    if entrant is OURS_2:
        return line.compared("×2 / ×1", _speedup(samples[OURS_1.key], seconds, SPEEDUP.get(job)))
    if entrant in OVER_OURS:
        bar = OVER_OURS[entrant].get(job)
        return line.compared(f"{entrant.short} / ours", ratio(seconds, samples[OURS_2.key], bar))
    return line


def _speedup(one_s: Sequence[float], two_s: Sequence[float], bar: Bar | None) -> Figure:
    """Samples/s of 2 workers over samples/s of 1: twice the samples in the time of a step."""
    return ratio([2 * seconds for seconds in one_s], two_s, bar)
