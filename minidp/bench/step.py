"""``step``: one training step in one thread, ours at world size 1 and PyTorch's in eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import LARGE, MODELS, SMALL, TINY, Training
from minidp.bench.measure import Bar, ratio
from minidp.bench.report import Line, Report
from minidp.bench.roster import EAGER, OURS_1
from minidp.bench.screen import Screen

BARS = {LARGE: Bar(0.95, at_least=False), SMALL: Bar(0.95, at_least=False), TINY: Bar(0.40, at_least=False)}

COLUMNS = {"us": ("µs a step", ",.1f"), "steps_per_s": ("steps/s", ",.0f")}
NOTES = (
    "A step is forward, cross-entropy, backward and SGD's update, float32, on a fixed batch. Below 1 we win.",
)


def run(rounds: Rounds, screen: Screen, models: tuple[Training, ...] = MODELS) -> Report:
    report = Report("step", "one training step, one process, one thread", rounds, COLUMNS, notes=NOTES)
    with contest((OURS_1, EAGER), screen) as teams:
        report.missing = teams.missing
        for job in models:
            samples = teams.run(job, rounds)
            ours, theirs = samples[OURS_1.key], samples.get(EAGER.key)
            line = Line(job.name, OURS_1.name, figures(job, ours, 1), ours)
            if theirs is not None:
                line = line.compared("ours / eager", ratio(ours, theirs, BARS.get(job)))
            report.lines.append(line)
            if theirs is not None:
                report.lines.append(Line(job.name, EAGER.name, figures(job, theirs, 1), theirs))
        report.others = teams.others
    return report


def figures(job: Training, seconds: Sequence[float], world_size: int) -> dict[str, float]:
    """A step of N workers works through N batches: steps/s counts updates, samples/s what they consume."""
    step_s = median(seconds)
    return {"us": step_s * 1e6, "steps_per_s": 1 / step_s, "samples_per_s": world_size * job.batch / step_s}
