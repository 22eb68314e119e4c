"""The bench of compression: its bytes and sums are those of real ranks, its verdicts follow from them."""

from __future__ import annotations

import io
import signal
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import minidp
from minidp.bench import compress, compress_report, compress_training, leftovers
from minidp.bench.compress_peers import Peers, ring_bytes, sent_bytes
from minidp.bench.compress_report import CompressReport, verdict
from minidp.bench.contest import Rounds
from minidp.bench.report import Line
from minidp.bench.screen import Screen
from minidp.comm import Communicator
from minidp.compress import get
from minidp.parallel.reducer import CommReducer
from minidp.sim import Cluster
from tests.test_bench_cli import check_schema, run_bench

SIDE = 128


def test_compress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = run_bench(tmp_path / "out.json", "compress", "--quick", "--burst", "0.005")
    check_schema(report, "compress", 1)
    lines, nbytes = report["lines"], 4 * SIDE**2
    routes = {spec: get(spec).route for spec in compress.TOGETHER}
    nodes = list(compress_training.CLUSTERS)
    assert [(line["job"], line["who"]) for line in lines] == [
        *((spec, way) for spec in compress.ALONE for way in ("encode", "decode")),
        *routes.items(),
        *((spec, where) for where in nodes for spec in ("none", *routes)),
    ]
    alone, rest = lines[: 2 * len(compress.ALONE)], lines[2 * len(compress.ALONE) :]
    for line in alone:
        assert line["smaller"] == pytest.approx(nbytes / line["payload_bytes"])
        assert line["comparison"]["median"] == line["GB_per_s"] == nbytes / line["samples_s"][0] / 1e9
    for line in rest[: len(routes)]:
        computing_s, sent = line["samples_s"][0], line["sent_bytes_8"]
        assert line["computing_ms"] == pytest.approx(1e3 * computing_s)
        assert ("error" in line) is (line["job"] != "sign")
        for gbits in compress_report.GBITS:
            per_s = gbits / 8 * 1e9
            ours, ring = sent / per_s + computing_s, 2 * 7 / 8 * nbytes / per_s
            assert line[f"times_{gbits}_Gb_per_s"] == pytest.approx(ring / ours)
        even = compress.times(ring_bytes(nbytes, 8), sent, computing_s, line["break_even_Gb_per_s"])
        assert even == pytest.approx(1)
    base, *others = rest[len(routes) : 2 * len(routes) + 1]
    for line in others:
        assert line["comparison"]["median"] == pytest.approx(line["steps_per_s"] / base["steps_per_s"])
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert "sent MB" in printed, "all columns fit"
    assert "quartiles" in printed
    assert max(map(len, printed.splitlines())) <= 120
    words = " ".join(printed.split())
    assert "SMOKE RUN of 1 round, not a measurement (9 rounds are)" in words
    assert "No bar could be checked." in words, "they are for the full size"


def _exchanged(comm: Communicator, spec: str) -> tuple[np.ndarray, int]:
    """The sum of a first exchange, and the bytes that this rank sends in the second one."""
    x = compress.gradient(SIDE)
    if comm.rank:
        x = np.roll(x.reshape(-1), comm.rank * x.size // comm.world_size + 1).reshape(x.shape)
    compressor = get(spec, rank=comm.rank)
    reducer = CommReducer(comm, compressor.steady)
    total = compressor.exchange(x, "w", reducer)
    again, before = get(spec, rank=comm.rank), comm.traffic.bytes_sent
    again.exchange(x, "w", reducer)  # sizes have been told, where they are told once
    return total, comm.traffic.bytes_sent - before


@pytest.mark.parametrize("ranks", [2, 8])
@pytest.mark.parametrize("spec", compress.TOGETHER)
def test_bytes_and_sums_are_those_of_real_ranks(spec: str, ranks: int) -> None:
    """On a network without latency, where nothing is gained by sending more bytes in fewer messages."""
    cluster = Cluster(nodes=ranks, latency_s=0)
    results = minidp.spawn(_exchanged, ranks, spec, world="virtual", cluster=cluster)
    (total, first), sent = results[0], [bytes_sent for _, bytes_sent in results]
    x, route = compress.gradient(SIDE), get(spec).route
    found = get(spec).exchange(x, "w", Peers(spec, ranks, x))
    if route == "sum":  # chunks of a ring may differ by a number
        assert sent_bytes(spec, x, ranks) == sum(sent) / ranks
    else:
        assert sent_bytes(spec, x, ranks) == first
        alike = x.size if route == "gather" else x.size // ranks  # of other parts the sums are made up
        np.testing.assert_array_equal(found.reshape(-1)[:alike], total.reshape(-1)[:alike])


@pytest.mark.parametrize("ranks", [2, 8])
def test_float32_sends_what_it_is_compared_with(ranks: int) -> None:
    x = compress.gradient(SIDE)
    assert ring_bytes(x.nbytes, ranks) == sent_bytes("none", x, ranks) == 2 * (ranks - 1) * x.nbytes / ranks


def test_errors_of_one_call() -> None:
    x = compress.gradient(SIDE)
    assert compress.error_of("none", x) == 0
    assert compress.error_of("sign", x) is None, "it says nothing of length"
    kept = np.sort(np.abs(x.reshape(-1)))[-get("topk:0.01").compress(x, "w").arrays[0].size :]
    expected = (1 - float(kept @ kept) / float(np.linalg.norm(x)) ** 2) ** 0.5
    assert compress.error_of("topk:0.01+ef", x) == pytest.approx(expected, rel=1e-4)


def test_the_gradient_has_a_heavy_tail() -> None:
    x = np.abs(compress.gradient(512))
    assert 10 < x.max() / np.median(x) < 1000


def test_verdicts() -> None:
    words = {1.1: "pays", 23.5: "pays", 1.09: "even", 1.0: "even", 0.92: "even", 0.9: "loses", 0.01: "loses"}
    assert {times: verdict(times).split()[-1].removesuffix("[/]") for times in words} == words
    assert verdict(12.871) == "[green]12.87× pays[/]"
    raw, sent = ring_bytes(16e6, 8), ring_bytes(4e6, 8)
    assert compress.times(raw, sent, 0, 10) == 4, "if computing were free"
    assert compress.times(raw, raw, 0.01, 1) < 1, "nothing saved"


def test_where_no_bytes_are_saved_no_network_is_slow_enough() -> None:
    exchange = compress.Exchange("gather", 0.5, {2: 1e9, 8: 1e9}, [0.001], None)
    line = compress.line_together("topk:0.5", compress.FULL, exchange)
    assert line.figures["break_even_Gb_per_s"] == 0
    assert all(line.figures[f"times_{gbits}_Gb_per_s"] < 1 for gbits in compress_report.GBITS)


def test_the_bars() -> None:
    calls = compress.Calls(4 * 2**20, [0.001], [0.002], None)  # 16.8 and 8.4 GB/s
    found = {}
    for spec in compress.ALONE:
        for line in compress.lines_alone(spec, compress.FULL, calls):
            assert line.result is not None
            if line.result.bar is not None:
                found[f"{spec} {line.who}"] = (str(line.result.bar), line.result.met)
    assert found == {
        "bf16 encode": ("≥ 11", True),
        "int8 encode": ("≥ 5", True),
        "int8 decode": ("≥ 8", True),
        "qsgd:4 encode": ("≥ 1.5", True),
        "sign encode": ("≥ 6", True),
        "sign decode": ("≥ 12", False),
        "topk:0.01 encode": ("≥ 2.5", True),
    }


def test_training_on_a_slow_network_meets_its_bars() -> None:
    """In virtual time: no noise."""
    with Screen() as screen:
        lines = compress_training.run(screen, ("none", "int8", "topk:0.01+ef"))
    judged = [(line.job, line.who, line.result) for line in lines if line.result is not None]
    assert [(job, who, str(result.bar), result.met) for job, who, result in judged] == [
        ("int8", compress_training.DEFAULT, "≥ 3", True),
        ("topk:0.01+ef", compress_training.DEFAULT, "≥ 15", True),
        ("int8", compress_training.CORE, "None", None),
        ("topk:0.01+ef", compress_training.CORE, "None", None),
    ]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_narrow_terminals_get_fewer_columns(width: int) -> None:
    size = compress.Size()
    calls = compress.Calls(4 * 2**20, [0.0001] * 9, [0.0001] * 9, 0.0)
    exchange = compress.Exchange("owners", 1.6396, {2: 8.0 * 2**20, 8: 14.0 * 2**20}, [0.0134] * 9, 0.0)
    report = CompressReport("compress", "", Rounds(9, 0.4), {}, side=size.side, model=size.job.name)
    for spec in compress.ALONE:
        report.lines += compress.lines_alone(spec, size, calls)
    report.lines += [compress.line_together(spec, size, exchange) for spec in compress.TOGETHER]
    for nodes in compress_training.CLUSTERS:
        report.lines.append(Line("none", nodes, {"ms": 37.59}, [0.03759]))
    console = Console(width=width, file=io.StringIO())
    report.print(console)
    assert isinstance(console.file, io.StringIO)
    printed = console.file.getvalue()
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    assert "pays" in printed
    assert ("added" in printed.split("2. N ranks")[1].split("fp16")[0]) is (width > 80)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_workers_end_with_the_bench(number: signal.Signals) -> None:
    code = """
import sys
from minidp.bench import cli
from minidp.bench.screen import Screen
Screen.tick = lambda self: print("burst", flush=True)
sys.exit(cli.main(["compress", "--pairs", "1", "--burst", "0.01"]))
"""
    segments = leftovers.segments()
    script = leftovers.Script(code)
    try:
        script.wait_for_line("burst")
        script.process.send_signal(number)
        status, _, errors = script.finish()
        assert leftovers.gone_within(script.token, 5) is not None
    finally:
        script.clean()
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "Traceback" not in errors
    assert leftovers.segments() == segments
