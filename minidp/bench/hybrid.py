"""``hybrid``: one batch on two workers, shared out in each way there is, against one worker with all of it."""

from __future__ import annotations

from collections.abc import Sequence

from minidp.bench import step
from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import LARGE, TEXT, Training, Transformer
from minidp.bench.measure import ratio
from minidp.bench.report import Line, Report
from minidp.bench.roster import ALONE, BY_DATA, BY_DP, BY_PP, BY_TP, SHARDED_1, SHARDED_2
from minidp.bench.screen import Screen

ENTRANTS = (ALONE, BY_DATA, BY_DP, BY_TP, BY_PP, SHARDED_1, SHARDED_2)
WIDE = Transformer(65, 64, 256, 8, 4, 16)
JOBS = (LARGE, TEXT, WIDE)
NOTES = (
    "Strong scaling: the same batch for all, so 2 would be perfect. With pp=2 and 8 micro-batches 1/9 of the time",
    "is idle, which leaves 1.78. dp=2 is DataParallel inside a mesh. Sharded: 2 workers that share no memory.",
)


def run(rounds: Rounds, screen: Screen, models: Sequence[Training] = JOBS) -> Report:
    report = Report("hybrid", "one batch on 2 workers, one thread each", rounds, step.COLUMNS, notes=NOTES)
    with contest(ENTRANTS, screen) as teams:
        report.missing = teams.missing
        for job in models:
            samples = teams.run(job, rounds)
            alone = samples[ALONE.key]
            for entrant in ENTRANTS:
                seconds = samples[entrant.key]
                line = Line(job.name, entrant.name, step.figures(job, seconds, 1), seconds)
                report.lines.append(line if entrant is ALONE else line.compared("×2 / ×1", ratio(alone, seconds)))
        report.others = teams.others
    return report
