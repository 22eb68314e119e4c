"""Rounds, medians, ratios and bars of the bench: pure functions, and a contender with a clock of its own."""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from minidp.bench import allreduce, cli, contest, jobs, machine, measure, pace, predict, ps, scaling, virtual
from minidp.bench.contest import Rounds
from minidp.bench.measure import Bar, Figure, compare, ratio
from minidp.bench.report import Line, Report
from minidp.bench.team import PeerFailed, Team
from minidp.sim import Cluster, loop


class Runner:
    """Takes ``cost_s`` a repetition, on paper."""

    def __init__(self, name: str, cost_s: float, record: list[tuple[str, int, int]]) -> None:
        self.name, self.cost_s, self.record = name, cost_s, record

    def burst(self, repeats: int, warm_up: int = 0) -> float:
        self.record.append((self.name, repeats, warm_up))
        return repeats * self.cost_s


def test_a_figure_is_the_median_with_its_quartiles() -> None:
    assert Figure.of([9.0, 1.0, 5.0, 3.0, 7.0]) == Figure(5.0, 3.0, 7.0)
    assert Figure.of([2.5]) == Figure(2.5, 2.5, 2.5)


def test_a_ratio_divides_within_rounds() -> None:
    # The machine halves its speed after the second round: the ratio does not see it, one of medians would.
    ours, theirs = [1.0, 1.0, 2.0, 2.0, 2.0], [3.0, 3.0, 6.0, 6.0, 3.0]
    assert ratio(theirs, ours).median == 3.0
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 2.0])


@pytest.mark.parametrize(
    ("bar", "below", "at", "above", "text"),
    [
        (Bar(1.4), False, True, True, "≥ 1.4"),
        (Bar(1.4, at_least=False), True, True, False, "≤ 1.4"),
        (Bar(1.4, most=1.45), False, True, False, "1.4–1.45"),
        (Bar(1.2, most=1.4), True, True, False, "1.2–1.4"),
    ],
)
def test_a_bar(bar: Bar, below: bool, at: bool, above: bool, text: str) -> None:
    assert [bar.met(value) for value in (1.3, 1.4, 1.5)] == [below, at, above]
    assert str(bar) == text
    assert Figure(1.4, 1, 2, bar).met is True
    assert Figure(1.4, 1, 2).met is None


def test_contenders_alternate_and_bursts_take_equal_time() -> None:
    record: list[tuple[str, int, int]] = []
    ticks: list[None] = []
    samples = compare(
        {"ours": Runner("ours", 0.001, record), "peer": Runner("peer", 0.01, record)},
        pairs=3,
        burst_s=0.1,
        tick=lambda: ticks.append(None),
    )
    assert samples == {"ours": pytest.approx([0.001] * 3), "peer": pytest.approx([0.01] * 3)}
    measured = [(name, repeats) for name, repeats, warm_up in record if warm_up]
    assert measured == [("ours", 100), ("peer", 10)] * 3
    assert all(warm_up == max(2, repeats // 10) for _, repeats, warm_up in record if warm_up)
    assert len(ticks) == 6


def test_a_job_longer_than_a_burst_runs_once() -> None:
    assert compare({"slow": Runner("slow", 2.0, [])}, pairs=2, burst_s=0.1) == {"slow": [2.0, 2.0]}


def test_the_bars_are_those_of_the_project() -> None:
    limits = [bar.limit for nbytes in allreduce.SIZES if (bar := allreduce.bar(nbytes))]
    assert limits == [1.0, 1.0, 1.0, 0.95, 0.95, 0.95, 1.4, 3.0]
    assert {payload: bar.limit for payload, bar in virtual.MESSAGES_BARS.items()} == {
        "no payload": 300,
        "38 kB a message": 150,
    }
    assert str(predict.BAND) == "0.85–1.15"
    assert {nbytes: str(bar) for nbytes, bar in ps.BARS_US.items()} == {38440: "≤ 150", 2**22: "≤ 4000"}
    assert ps.BARS_US.keys() <= set(ps.SIZES)
    assert str(pace.ASYNCHRONOUS) == "≥ 3"
    assert measure.PROPER_PAIRS == 9
    assert Rounds(9, 0.1).proper
    assert not Rounds(8, 0.1).proper


def test_speedup_counts_the_samples_of_both_workers() -> None:
    assert scaling._speedup([1.0, 1.0], [1.0, 1.0], None).median == 2.0  # two steps' samples in a step's time
    assert scaling._speedup([1.0, 1.0], [2.0, 2.0], None).median == 1.0


def test_virtual_ranks_of_one_process_share_a_clock() -> None:
    assert virtual._last_end([(10.0, 12.0), (9.0, 11.0), (9.5, 12.5)]) == 3.5


def test_sigterm_between_two_ranks_is_no_other_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may strike a rank that has taken the next one's event, and not yet handed over to it."""
    switch, struck = loop.Task.switch, []

    def struck_once(task: loop.Task) -> Any:
        if loop.rank_here() is not None and not struck:
            struck.append(task)
            raise SystemExit(143)
        return switch(task)

    monkeypatch.setattr(loop.Task, "switch", struck_once)
    ranks = virtual.Ranks(virtual.send_and_recv, 0)
    with pytest.raises(SystemExit) as ended:
        ranks.burst(1)
    assert ended.value.code == 143
    assert struck


def test_predicted_time_is_of_the_job_on_the_cluster() -> None:
    """Ten times slower to compute; and a second worker adds one exchange of all 9610 weights."""
    slow = Cluster(nodes=2, flops=1e9, latency_s=1e-3)
    one_s, two_s = (predict.predicted_s(jobs.TINY, slow, workers) for workers in (1, 2))
    assert one_s == pytest.approx(10 * predict.predicted_s(jobs.TINY, replace(slow, flops=1e10), 1))
    assert two_s == pytest.approx(one_s + 1e-3 + 9610 * 4 / slow.bandwidth_bytes_per_s, rel=0.01)


def test_jobs_are_the_same_for_everybody() -> None:
    state = jobs.TINY.state()
    assert [(name, array.shape) for name, array in state.items()] == [
        ("0.weight", (128, 64)),
        ("0.bias", (128,)),
        ("2.weight", (10, 128)),
        ("2.bias", (10,)),
    ]
    for (name, a), b in zip(state.items(), jobs.TINY.state().values()):
        assert a.dtype == np.float32, name
        np.testing.assert_array_equal(a, b)
    (x, y), (other, _) = jobs.TINY.batch_of(0), jobs.TINY.batch_of(1)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((32, 64), np.float32, (32,), np.int64)
    assert not np.array_equal(x, other)
    assert [jobs.human_bytes(n) for n in (4, 4096, 38440, 2**19, 2**27)] == [
        *("4 B", "4 KB", "37.54 KB", "512 KB", "128 MB")
    ]


@pytest.mark.parametrize("figures", [{"a": 1.0, "b": 1.1}, {"a": 1.0, "b": math.nan}])
def test_contestants_that_do_other_work_are_refused(figures: dict[str, float]) -> None:
    teams = {key: Team(key.upper(), [], 2, Path(key)) for key in figures}
    with pytest.raises(PeerFailed, match=r"do not do the same work.*A 1, B"):
        contest._check_agreement(teams, figures)
    contest._check_agreement(teams, {"a": 1.0, "b": 1.0001})
    contest._check_agreement({**teams, "b": Team("B", [], 1, Path("b"))}, {"a": 1.0, "b": 9.0})  # other sizes


@pytest.mark.parametrize(("text", "nbytes"), [("4096", 4096), ("64k", 65536), ("16M", 2**24), ("128MB", 2**27)])
def test_sizes(text: str, nbytes: int) -> None:
    assert cli.parser().parse_args(["allreduce", "--sizes", text]).sizes == [nbytes]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["allreduce", "--sizes", "5"], "'5' is not a size: give a multiple of 4 bytes"),
        (["allreduce", "--sizes", "0"], "'0' is not a size"),
        (["step", "--pairs", "0"], "'0' is not a number of rounds: give 1 or more"),
        (["step", "--burst", "-1"], "'-1' is not a length of a burst"),
        (["race"], "'?allreduce'?, '?step'?, '?scaling'?, '?startup'?, '?micro-shards'?"),
        ([], "required"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_neighbours_are_what_the_machine_did_besides_us(monkeypatch: pytest.MonkeyPatch) -> None:
    tick = 1 / os.sysconf("SC_CLK_TCK")
    # user nice system idle iowait irq softirq steal: 100 + 20 + 30 busy ticks, of which our process took 25
    files = {
        "/proc/stat": "cpu  100 0 20 9000 500 0 0 30 0 0\ncpu0 1 2 3\n",
        "/proc/7/stat": "7 (py (thon) 3) S 1 7 7 0 -1 0 0 0 0 0 20 5 0 0",
    }
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(Path, "read_text", lambda self: files[str(self)])
    monkeypatch.setattr(machine.time, "monotonic", lambda: next(clock))
    neighbours = machine.Neighbours({7})
    files["/proc/stat"] = "cpu  300 0 20 9000 500 0 0 60 0 0\n"  # 230 more
    files["/proc/7/stat"] = "7 (py (thon) 3) S 1 7 7 0 -1 0 0 0 0 0 160 15 0 0"  # 150 of them ours
    assert neighbours.cores() == pytest.approx((230 - 150) * tick / 2)


def test_a_machine_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_proc(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", no_proc)
    assert machine.Neighbours({7}).cores() is None


@pytest.mark.parametrize(("others", "warned"), [(None, False), (0.05, False), (0.8, True)])
def test_noise_is_called_noise(others: float | None, warned: bool) -> None:
    console = Console(width=120, file=io.StringIO(), record=True)
    Report("step", "steps", Rounds(9, 0.4), {}, others=others).print(console)
    assert ("other processes took 0.80 of its" in console.export_text()) == warned


@pytest.mark.parametrize("width", [200, 80])
def test_a_table_fits_its_terminal(width: int) -> None:
    report = Report(
        "step", "steps", Rounds(9, 0.4), {"us": ("µs", ",.1f"), "n": ("n", "d")}, missing=["[x] is missing"]
    )
    figure = Figure(0.5, 0.4, 0.6, Bar(0.4, at_least=False))
    report.lines.append(
        Line("MLP 784-512-512-10, batch 128", "minidp ×1", {"us": 1234.5, "n": 3}, [1.0], "ours / eager", figure)
    )
    report.lines.append(Line("MLP 784-512-512-10, batch 128", "PyTorch eager", {"us": 2469.0, "n": 3}, [2.0]))
    console = Console(width=width, file=io.StringIO(), record=True)
    report.print(console)
    text = console.export_text()
    assert "medians of 9 alternating rounds" in text
    assert "≤ 0.4 missed" in text
    assert "1,234.5" in text
    assert "[x] is missing" in text
    assert "0 of 1 bars met. Missed: MLP 784-512-512-10, batch 128: ours / eager." in " ".join(text.split())
    assert ("0.40–0.60" in text) == (width == 200)
    assert "…" not in text
