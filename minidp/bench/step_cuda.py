"""``step --device cuda``: one training step on one GPU, ours and PyTorch's in eager mode, timed by events."""

from __future__ import annotations

from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import CNN, LARGE, MLP, SMALL, TINY, Training, Transformer
from minidp.bench.measure import Bar, ratio
from minidp.bench.report import Line, Report
from minidp.bench.roster import EAGER_CUDA, OURS_CUDA
from minidp.bench.screen import Screen
from minidp.bench.step import COLUMNS, figures

WIDE = MLP((784, 4096, 4096, 10), 4096)
IMAGES = CNN((32, 64), 28, 512)
TEXT = Transformer(65, 256, 512, 8, 4, 32)
BARS: dict[Training, Bar] = {
    WIDE: Bar(1.0, at_least=False),
    LARGE: Bar(1.0, at_least=False),
    SMALL: Bar(1.0, at_least=False),
    TINY: Bar(1.0, at_least=False),
    TEXT: Bar(1.2, at_least=False),
    IMAGES: Bar(1.5, at_least=False),
}
NOTES = (
    "A step is forward, cross-entropy, backward and SGD's update, float32 throughout (no TF32), on a fixed batch "
    "that lies on the GPU. Below 1 we win.",
    "Times are the GPU's, between two events around each burst; both run in processes of their own, in turn.",
)


def run(rounds: Rounds, screen: Screen, models: tuple[Training, ...] = tuple(BARS)) -> Report:
    report = Report("step --device cuda", "one training step, one GPU", rounds, COLUMNS, notes=NOTES)
    with contest((OURS_CUDA, EAGER_CUDA), screen) as teams:
        report.missing = teams.missing
        for job in models:
            samples = teams.run(job, rounds)
            for entrant in (OURS_CUDA, EAGER_CUDA):
                if entrant.key not in samples:
                    continue
                seconds = samples[entrant.key]
                line = Line(job.name, entrant.name, figures(job, seconds, 1), seconds)
                if entrant is OURS_CUDA and EAGER_CUDA.key in samples:
                    line = line.compared("ours / eager", ratio(seconds, samples[EAGER_CUDA.key], BARS.get(job)))
                report.lines.append(line)
        report.others = teams.others
    return report
