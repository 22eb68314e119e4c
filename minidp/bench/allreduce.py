"""``allreduce``: sums of 2 ranks, 4 KB to 128 MB: ours over private buffers, MPICH's, gloo's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from minidp.bench.contest import Rounds, contest
from minidp.bench.jobs import AllReduce
from minidp.bench.measure import Bar, ratio
from minidp.bench.report import Line, Report
from minidp.bench.roster import GLOO, MPICH, OURS_2, SLAB
from minidp.bench.screen import Screen

KB, MB = 2**10, 2**20
SIZES = (4 * KB, 16 * KB, 64 * KB, 256 * KB, MB, 4 * MB, 16 * MB, 128 * MB)
QUICK_SIZES = SIZES[:6]
ENTRANTS = (OURS_2, MPICH, GLOO, SLAB)

COLUMNS = {
    "us": ("µs", ",.1f"),
    "algbw_GB_per_s": ("algbw GB/s", ".2f"),
    "busbw_GB_per_s": ("busbw GB/s", ".2f"),
}
NOTES = (
    "algbw = bytes / time; busbw = algbw · 2(N−1)/N, what a ring would move over each link (equal for 2 ranks).",
    "MPICH by mpi4py's Allreduce, gloo by torch.distributed's all_reduce; all in place.",
    "slab: the exchange inside DataParallel, on gradients that lie in shared memory from the start: no copies.",
)


def bar(nbytes: int) -> Bar | None:
    """MPICH's time over ours must be at least this."""
    for largest, limit in ((64 * KB, 1.0), (4 * MB, 0.95), (16 * MB, 1.4)):
        if nbytes <= largest:
            return Bar(limit)
    return Bar(3.0)


def run(rounds: Rounds, screen: Screen, sizes: Sequence[int] = SIZES) -> Report:
    report = Report("allreduce", "all_reduce of float32, 2 ranks, private buffers", rounds, COLUMNS, notes=NOTES)
    with contest(ENTRANTS, screen) as teams:
        report.missing = teams.missing
        for nbytes in sizes:
            job = AllReduce(nbytes)
            samples = teams.run(job, rounds)
            for entrant in ENTRANTS:
                if entrant.key in samples:
                    seconds = samples[entrant.key]
                    line = Line(job.name, entrant.name, _figures(nbytes, median(seconds)), seconds)
                    if entrant is not OURS_2:
                        limit = bar(nbytes) if entrant is MPICH else None
                        line = line.compared(f"{entrant.short} / ours", ratio(seconds, samples[OURS_2.key], limit))
                    report.lines.append(line)
        report.others = teams.others
    return report


def _figures(nbytes: int, seconds: float, world_size: int = 2) -> dict[str, float]:
    algbw = nbytes / seconds / 1e9
    return {
        "us": seconds * 1e6,
        "algbw_GB_per_s": algbw,
        "busbw_GB_per_s": algbw * 2 * (world_size - 1) / world_size,
    }
