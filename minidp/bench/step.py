"""``step``: one training step in one thread, ours with one worker and PyTorch's in eager mode."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import CNN, IMAGES, LARGE, MODELS, SMALL, TEXT, TINY, Training
from minidp.bench.measure import Bar, ratio
from minidp.bench.report import Line, Report
from minidp.bench.roster import CHANNELS_LAST, EAGER, OURS_1
from minidp.bench.screen import Screen

BARS: dict[Training, Bar] = {
    LARGE: Bar(0.95, at_least=False),
    SMALL: Bar(0.95, at_least=False),
    TINY: Bar(0.40, at_least=False),
    IMAGES: Bar(1.0, at_least=False),
    TEXT: Bar(1.05, at_least=False),
}
CHANNELS_LAST_BARS: dict[Training, Bar] = {IMAGES: Bar(1.5, at_least=False)}

COLUMNS = {"us": ("µs a step", ",.1f"), "steps_per_s": ("steps/s", ",.0f")}
NOTES = (
    "A step is forward, cross-entropy, backward and SGD's update, float32, on a fixed batch. Below 1 we win.",
    "Ours runs in a worker of minidp.spawn, which keeps freed memory (malloc); PyTorch with its own defaults.",
)


def run(rounds: Rounds, screen: Screen, models: tuple[Training, ...] = MODELS) -> Report:
    report = Report("step", "one training step, one process, one thread", rounds, COLUMNS, notes=NOTES)
    with contest((OURS_1, EAGER, CHANNELS_LAST), screen) as teams:
        report.missing = teams.missing
        for job in models:
            samples = teams.run(job, rounds, without=() if isinstance(job, CNN) else (CHANNELS_LAST,))
            ours = samples[OURS_1.key]
            for entrant in (OURS_1, EAGER, CHANNELS_LAST):
                if entrant.key not in samples:
                    continue
                seconds = samples[entrant.key]
                line = Line(job.name, entrant.name, figures(job, seconds, 1), seconds)
                if entrant is OURS_1 and EAGER.key in samples:
                    line = line.compared("ours / eager", ratio(ours, samples[EAGER.key], BARS.get(job)))
                if entrant is CHANNELS_LAST:
                    line = line.compared("ours / channels_last", ratio(ours, seconds, CHANNELS_LAST_BARS.get(job)))
                report.lines.append(line)
        report.others = teams.others
    return report


def figures(job: Training, seconds: Sequence[float], world_size: int) -> dict[str, float]:
    """A step of N workers works through N batches: steps/s counts updates, samples/s what they consume."""
    step_s = median(seconds)
    return {"us": step_s * 1e6, "steps_per_s": 1 / step_s, "samples_per_s": world_size * job.batch / step_s}
