"""``ps``: the parameter server. An exchange with it, beside a Ray actor's; and who waits for whom, in `pace`."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from minidp.bench import pace
from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import TINY, Exchange
from minidp.bench.measure import Bar, Figure, ratio
from minidp.bench.report import Line, Report
from minidp.bench.roster import PS_ASYNC, PS_SYNC, RAY
from minidp.bench.screen import Screen

KB, MB = 2**10, 2**20
TINY_BYTES = sum(array.nbytes for array in TINY.state().values())
SIZES = (TINY_BYTES, 256 * KB, MB, 4 * MB)
QUICK_SIZES = (TINY_BYTES, 4 * MB)
BARS_US = {TINY_BYTES: Bar(150, at_least=False), 4 * MB: Bar(4000, at_least=False)}
ENTRANTS = (PS_SYNC, PS_ASYNC, RAY)

COLUMNS = {
    "us": ("µs", ",.1f"),
    **pace.COLUMNS,
}
NOTES = (
    "push + pull: 1 worker, 1 server process. A gradient of so many bytes goes there, SGD moves w, w comes back; "
    f"{TINY_BYTES:,} bytes are the {TINY.name.partition(',')[0]}'s. All end with the same w.",
    "Ray: ray.get(actor.push_pull.remote(gradient)), the actor holds w as a NumPy array; as local as Ray can be.",
    *pace.NOTES,
)


def run(rounds: Rounds, screen: Screen, sizes: Sequence[int] = SIZES, work: pace.Work = pace.FULL) -> Report:
    report = Report("ps", "parameter server", rounds, COLUMNS, notes=NOTES)
    with contest(ENTRANTS, screen) as teams:
        report.missing = teams.missing
        for nbytes in sizes:
            job = Exchange(nbytes)
            report.lines += _lines(job, teams.run(job, rounds))
        report.others = teams.others
    report.lines += pace.run(screen, work)
    return report


def _lines(job: Exchange, samples: dict[str, list[float]]) -> list[Line]:
    lines = []
    for entrant in ENTRANTS:
        if entrant.key in samples:
            seconds = samples[entrant.key]
            figures = {"us": median(seconds) * 1e6, "GB_per_s": job.nbytes / median(seconds) / 1e9}
            line = Line(job.name, entrant.name, figures, seconds)
            if entrant is RAY:
                line = line.compared("Ray / ours", ratio(seconds, samples[PS_ASYNC.key]))
            else:
                line = line.compared("µs", Figure.of([1e6 * s for s in seconds], BARS_US.get(job.nbytes)))
            lines.append(line)
    return lines
