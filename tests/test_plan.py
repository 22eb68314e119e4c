"""``python -m minidp.plan``: how far a model scales, in a table, in words, in figures and in a picture."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minidp.plan import options, report
from minidp.plan.__main__ import main
from minidp.plan.study import Job, Point, pays_up_to, study
from minidp.sim import Cluster, FatTree, Ring

MODEL = ("--params", "7e9", "--flops-per-sample", "4.2e13")
SMALL = Job(params=1_000_000, flops_per_sample=6e9, layers=4, bucket_mb=1)
ROOM = Cluster(nodes=2, flops=1e13, latency_s=5e-6, bandwidth_bytes_per_s=1e10)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, width: int = 80) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width))
        assert main([*MODEL, *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def rows(out: str) -> dict[str, list[str]]:
    """The table's lines by their number of ranks: the words of each."""
    return {words[0]: words for words in map(str.split, out.splitlines()) if words and words[0][0].isdigit()}


def efficiencies(points: Sequence[Point]) -> list[float]:
    return [point.efficiency for point in points]


# --- the command ------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path) -> None:
    """As a person runs it: table, verdict, figures, picture."""
    figures, picture = tmp_path / "figures.json", tmp_path / "picture.png"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "minidp.plan", *MODEL, "--ranks", "8..1024", "--global-batch", "4096"),
            *("--json", str(figures), "--plot", str(picture)),
        ],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    out = done.stdout
    assert "7 billion parameters, 32 layers, 42 TFLOPs a sample" in out
    assert "4,096 samples a step, shared equally: strong scaling" in out
    table = rows(out)
    assert list(table) == ["8", "16", "32", "64", "128", "256", "512", "1,024"]
    data = json.loads(figures.read_text())
    assert data["job"] == {
        "params": 7_000_000_000,
        "flops_per_sample": 4.2e13,
        "layers": 32,
        "batch": 1,
        "global_batch": 4096,
        "gradient_bytes": 4,
        "bucket_mb": 25,
    }
    assert data["worth"] == 0.5
    assert [point["ranks"] for point in data["points"]] == [2**i for i in range(3, 11)]
    for point in data["points"]:
        assert set(point) == {"ranks", "step_s", "compute_s", "samples_per_s", "efficiency", "gain"}
        assert point["samples_per_s"] == pytest.approx(4096 / point["step_s"])
        assert point["compute_s"] == pytest.approx(4096 / point["ranks"] * 0.42 + 0.28e-3)
        assert f"{point['efficiency']:.1%}" in table[f"{point['ranks']:,}"]
    limit = data["pays_up_to"]
    assert limit in (256, 512)
    assert f"Adding ranks pays up to {limit}. Beyond, 2 times the ranks give 1." in out
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(picture.read_bytes()[at : at + 4]) for at in (16, 20))
    assert (width, height) > (1000, 500)
    assert f"Picture: {picture}\nFigures: {figures}\n" in out


def test_the_table_literally(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--ranks",
        "1,8,64",
        "--batch",
        "4",
        "--bandwidth",
        "1e11",
        "--memory",
        "2e12",
        "--bucket-mb",
        "2000",
    )
    out = plan(capsys, *arguments, width=100)
    assert [line.rstrip() for line in out.splitlines()] == [
        "minidp: a step of synchronous data parallelism, on a virtual clock",
        "",
        "  model    7 billion parameters, 32 layers, 42 TFLOPs a sample",
        "  work     4 samples a rank and step: weak scaling",
        "  sends    gradients of 4 bytes an element, in buckets of at most 2000 MB",
        "  ranks    100 TFLOP/s each, memory 2 TB/s",
        "  network  α = 5.00 µs, 1/β = 100 GB/s a node, a flat switch",
        "",
        "ranks    step  waiting  samples/s  speed-up  efficiency           gain",
        "    1  1.75 s        0      2.285     1.000  ████████████ 100.0%",
        "    8  1.78 s  30.7 ms      17.97     7.862  ███████████▊  98.3%  0.98",
        "   64  1.78 s  34.5 ms      143.4     62.76  ███████████▊  98.1%  1.00",
        "",
        "Adding ranks pays up to 64, the most asked for, and maybe beyond.",
        "",
        "  waiting     what computing does not hide, of a step",
        "  efficiency  speed-up over one rank, divided by the ranks",
        "  gain        what each added rank gives, as a part of what one before it gave",
        "",
    ]


WIDE = (
    *("--topology", "fat_tree", "--leaf", "32", "--oversubscription", "4", "--ranks-per-node", "8"),
    *("--jitter", "0.1", "--memory", "2e12", "--global-batch", "4096"),
)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--ranks", "8..4096"),
        ("--ranks", "1,100000", "--flops", "1e30"),
        ("--ranks", "1,1000", "--flops", "1e-30", "--bandwidth", "1e-30", "--latency", "1e30", "--batch", "1e30"),
        (
            "--ranks",
            "1,1000",
            "--params",
            "1e15",
            "--bandwidth",
            "1e30",
            "--latency",
            "0",
            "--gradient-bytes",
            "8",
        ),
        ("--ranks", "12345,54321", "--latency", "0", "--params", "32", "--flops-per-sample", "1"),
        ("--ranks", "8..256", *WIDE),
    ],
)
def test_fits_80_columns(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, *arguments)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out, "nothing is cut off"
    assert not re.search(r"nan|inf\b|(?<!e)-0", out.replace("minidp", ""))
    head = [line for line in out.splitlines() if "efficiency" in line and "gain" in line]
    assert len(head) == 1, "no line of the table is broken"
    assert len({len(line) for line in out.splitlines() if "█" in line or line in head}) == 1


def test_says_what_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    out = " ".join(plan(capsys, "--ranks", "8..64", *WIDE).split())
    assert "100 TFLOP/s each, memory 2 TB/s, 8 to a node; times spread by 0.1, 20 steps averaged" in out
    assert "25 GB/s a node, fat tree of 32 nodes a group, oversubscribed 4 times" in out
    assert "in buckets of a layer, 834 MB" in out
    assert "neighbours in a ring" in plan(capsys, "--ranks", "8", "--topology", "ring")
    one = plan(capsys, "--ranks", "1", "--batch", "1", "--layers", "1", "--gradient-bytes", "1")
    assert "1 sample a rank and step" in one
    assert "32 layers" not in one
    assert "1 layer," in one
    assert "1 byte an element" in one


def test_a_single_number_of_ranks_has_no_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    out = plan(capsys, "--ranks", "8")
    assert list(rows(out)) == ["8"]
    assert "pay" not in out
    assert "what each added rank gives" not in out


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "PNG"])
def test_pictures(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / f"[bold]picture.{kind}"
    ranks = {"png": "1", "svg": "1..64", "pdf": ",".join(map(str, range(1, 101))), "PNG": "8,9"}[kind]
    out = plan(capsys, "--ranks", ranks, "--plot", str(path), "--layers", "2", width=30)
    assert f"Picture: {path}\n" in out, "as it is, in one line"
    start = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF-"}[kind.lower()]
    assert path.read_bytes().startswith(start)


def test_help_explains_each_option(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    asked = set(re.findall(r"--[a-z-]+", out.partition("options:")[0]))
    assert len(asked) == 30
    for option in asked:
        assert re.search(rf"^  {option}\b.*?[a-z]{{2}}", out, re.MULTILINE | re.DOTALL), option
    for words in (
        "default: 2.5e10",
        "as 4.2e13",
        "weak scaling",
        "strong scaling",
        "default: 0.5",
        "2: half precision",
    ):
        assert words in " ".join(out.split())


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--ranks 0", "'0': give a range as 8..16384, or a list as 8,12,100, of 1 to 100,000 ranks"),
        ("--ranks 8..", "'8..': give a range"),
        ("--ranks ..8", "'..8': give a range"),
        ("--ranks 8..4", "'8..4': give a range"),
        ("--ranks 0..8", "'0..8': give a range"),
        ("--ranks 1..2..3", "'1..2..3': give a range"),
        ("--ranks 8,-1", "'8,-1': give a range"),
        ("--ranks 8,x", "'8,x': give a range"),
        ("--ranks 8,,9", "'8,,9': give a range"),
        ("--ranks 1e3", "'1e3': give a range"),
        ("--ranks 100001", "'100001': give a range"),
        ("--ranks 1..100001", "'1..100001': give a range"),
        ("--ranks=-8..8", "'-8..8': give a range"),
        ("--ranks 1..99999999999999999999999999", "give a range"),
        ("--ranks 8 --params 0", "argument --params: '0': give a whole number, 1 to 1e+15"),
        ("--ranks 8 --params 1.5", "'1.5': give a whole number"),
        ("--ranks 8 --params 1e16", "'1e16': give a whole number, 1 to 1e+15"),
        ("--ranks 8 --params seven", "'seven': give a whole number"),
        ("--ranks 8 --params nan", "'nan': give a whole number"),
        ("--ranks 8 --params inf", "'inf': give a whole number"),
        (
            "--ranks 8 --flops-per-sample 0",
            "argument --flops-per-sample: '0': give a positive number, 1e-30 to 1e30",
        ),
        ("--ranks 8 --flops-per-sample -1", "'-1': give a positive number"),
        ("--ranks 8 --flops nan", "'nan': give a positive number"),
        ("--ranks 8 --flops 1e31", "'1e31': give a positive number, 1e-30 to 1e30"),
        ("--ranks 8 --bandwidth 0", "argument --bandwidth: '0': give a positive number"),
        ("--ranks 8 --bandwidth inf", "'inf': give a positive number"),
        ("--ranks 8 --memory 0", "argument --memory: '0': give a positive number"),
        ("--ranks 8 --bucket-mb 0", "argument --bucket-mb: '0': give a positive number"),
        ("--ranks 8 --latency=-1e-6", "argument --latency: '-1e-6': give a positive number"),
        ("--ranks 8 --latency soon", "argument --latency: 'soon': give a positive number"),
        ("--ranks 8 --jitter=-0.1", "argument --jitter: '-0.1': give a positive number"),
        ("--ranks 8 --jitter nan", "argument --jitter: 'nan': give a positive number"),
        ("--ranks 8 --worth 0", "argument --worth: '0': give a positive number"),
        ("--ranks 8 --layers 0", "argument --layers: '0': give a whole number, 1 to 10000"),
        ("--ranks 8 --layers 1e5", "argument --layers: '1e5': give a whole number, 1 to 10000"),
        ("--ranks 8 --params 31", "--layers 32: give at most one layer a parameter, 31 here"),
        ("--ranks 8 --gradient-bytes 3", "argument --gradient-bytes: invalid choice: 3 (choose from 1, 2, 4, 8)"),
        ("--ranks 8 --gradient-bytes half", "argument --gradient-bytes: invalid int value: 'half'"),
        ("--ranks 8 --batch 0.5", "argument --batch: '0.5': give a whole number"),
        ("--ranks 8 --global-batch 0", "argument --global-batch: '0': give a whole number"),
        ("--ranks 8 --batch 1 --global-batch 8", "argument --global-batch: not allowed with argument --batch"),
        ("--ranks 8 --ranks-per-node 0", "argument --ranks-per-node: '0': give a whole number"),
        ("--ranks 8 --ranks-per-node 1.5", "argument --ranks-per-node: '1.5': give a whole number"),
        ("--ranks 8 --topology torus", "argument --topology: invalid choice: 'torus' (choose from"),
        ("--ranks 4096 --topology ring", "--topology ring: give at most 2,048 ranks, or another topology"),
        ("--ranks 8 --topology fat_tree --leaf 0", "argument --leaf: '0': give a whole number, 1 to 100000"),
        ("--ranks 8 --topology fat_tree --leaf 1e9", "argument --leaf: '1e9': give a whole number, 1 to 100000"),
        ("--ranks 8 --topology fat_tree --oversubscription 0.5", "'0.5': give a number of at least 1"),
        ("--ranks 8 --topology fat_tree --oversubscription nan", "'nan': give a number of at least 1"),
        ("--ranks 8 --topology fat_tree --oversubscription inf", "'inf': give a positive number, 1e-30 to 1e30"),
        ("--ranks 8 --leaf 4", "describe a fat tree: give --topology fat_tree too"),
        ("--ranks 8 --topology ring --oversubscription 2", "describe a fat tree: give --topology fat_tree too"),
        ("--ranks 8 --json /", "--json /: give a file in a folder that is there and may be written to"),
        ("--ranks 8 --json /none/x.json", "--json /none/x.json: give a file in a folder that is there"),
        ("--ranks 8 --plot /none/x.png", "--plot /none/x.png: give a file in a folder that is there"),
        ("--ranks 8 --plot x.gif", "--plot x.gif: give a name that ends in .png, .svg, .pdf"),
        ("--ranks 8 --plot x", "--plot x: give a name that ends in .png, .svg, .pdf"),
        ("--rnaks 8", "the following arguments are required: --ranks"),
        ("--ranks 8 --wrong", "unrecognized arguments: --wrong"),
    ],
)
def test_bad_arguments(arguments: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*MODEL, *arguments.split()])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    said = err.splitlines()[-1]
    assert says in said or says.replace("choose from 1, 2", "choose from '1', '2'") in said
    assert "usage: python -m minidp.plan" in err


@pytest.mark.parametrize("missing", ["--params", "--flops-per-sample"])
def test_what_is_required(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*MODEL, "--ranks", "8"]
    at = arguments.index(missing)
    with pytest.raises(SystemExit) as caught:
        main(arguments[:at] + arguments[at + 2 :])
    assert caught.value.code == 2
    assert f"required: {missing}" in capsys.readouterr().err


def test_a_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as caught:
        main([*MODEL, "--ranks", "8", "--plot", "x.png"])
    assert caught.value.code == 2
    assert "--plot draws with matplotlib, which is missing: pip install matplotlib" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as caught:
        main([*MODEL, "--ranks", "8", "--json", str(tmp_path / "x")])
    assert caught.value.code == 2
    assert "may be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8..64", [8, 16, 32, 64]),
        ("8..65", [8, 16, 32, 64, 65]),
        ("3..20", [3, 6, 12, 20]),
        ("1..1", [1]),
        ("7..8", [7, 8]),
        ("5", [5]),
        ("100,8,12,8", [8, 12, 100]),
        (" 8, 9", [8, 9]),
        ("65536..100000", [65536, 100_000]),
        ("8..16384", [2**i for i in range(3, 15)]),
    ],
)
def test_ranks(text: str, found: list[int]) -> None:
    assert options.ranks(text) == found


# --- the figures --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [ROOM, replace(ROOM, jitter=0.2), replace(ROOM, ranks_per_node=4)])
@pytest.mark.parametrize("job", [SMALL, replace(SMALL, global_batch=64)])
def test_one_rank_is_perfect(job: Job, room: Cluster) -> None:
    """To the bit: with jitter, too, where it is measured by itself."""
    (one,) = study(job, room, [1], steps=5)
    assert (one.efficiency, one.gain) == (1.0, None)
    if not room.jitter:
        assert one.waiting_s == 0
    later = study(job, room, [1, 2, 30], steps=5)
    assert later[0] == one
    assert 0 < later[2].efficiency < later[1].efficiency <= 1 + 1e-12, "two on one node need no network"


def test_figures_by_hand() -> None:
    """One layer: no overlap. A step on 4 ranks is 0.6 ms, and an all-reduce of 4 MB: 4α + 3/2 n β, halving."""
    job = Job(params=1_000_000, flops_per_sample=6e9, layers=1)
    one, four, eight = study(job, ROOM, [1, 4, 8])
    travels = 4 * 5e-6 + 1.5 * 4e6 / 1e10
    header = 5e-6  # Σ n_i, meanwhile
    update = 4e6 / 1e13
    assert header < travels
    assert (one.step_s, one.compute_s) == (pytest.approx(6e-4 + update), pytest.approx(6e-4 + update))
    assert four.step_s == pytest.approx(6e-4 + travels + update, rel=1e-12)
    assert four.compute_s == one.compute_s
    assert four.waiting_s == pytest.approx(travels)
    assert four.samples_per_s == 4 / four.step_s
    assert four.efficiency == pytest.approx(one.step_s / four.step_s)
    assert four.gain == pytest.approx((four.samples_per_s - one.samples_per_s) / 3 / one.samples_per_s)
    assert eight.gain == pytest.approx((eight.samples_per_s - four.samples_per_s) / four.samples_per_s)


def test_a_free_network_gives_all() -> None:
    free = replace(ROOM, latency_s=0.0, bandwidth_bytes_per_s=float("inf"))
    points = study(SMALL, free, [1, 2, 7, 64, 100, 1000])
    assert efficiencies(points) == pytest.approx([1.0] * 6, rel=1e-12)
    assert [point.gain for point in points[1:]] == pytest.approx([1.0] * 5, rel=1e-9)
    assert pays_up_to(points, 0.99) is None


def test_strong_scaling_ends_at_the_global_batch() -> None:
    """A sample is not divided: the fullest rank counts."""
    job = replace(SMALL, global_batch=16)
    assert [job.samples(p) for p in (1, 3, 15, 16, 17, 1000)] == [16, 6, 2, 1, 1, 1]
    free = replace(ROOM, latency_s=0.0, bandwidth_bytes_per_s=float("inf"))
    points = study(job, free, [1, 8, 15, 16, 17, 64])
    rates = [point.samples_per_s for point in points]
    assert rates[1] == rates[2], "two samples on the fullest"
    assert rates[3] == rates[4] == rates[5], "more ranks have nothing to do"
    assert points[3].efficiency < 1, "each rank updates all of w"
    assert pays_up_to(points, 0.5) == 16
    assert [point.step_s for point in study(job, ROOM, [16, 32])][1] > study(job, ROOM, [16])[0].step_s


def test_weak_scaling_has_the_batch_of_every_rank() -> None:
    job = replace(SMALL, batch=3)
    for point in study(job, ROOM, [1, 5]):
        assert point.samples_per_s == 3 * point.ranks / point.step_s


def test_larger_batches_and_half_precision_wait_less() -> None:
    (now,) = study(SMALL, ROOM, [16])
    assert study(replace(SMALL, batch=4), ROOM, [16])[0].efficiency > now.efficiency
    assert study(replace(SMALL, gradient_bytes=2), ROOM, [16])[0].waiting_s < 0.6 * now.waiting_s
    assert study(replace(SMALL, bucket_mb=100), ROOM, [16])[0].waiting_s > now.waiting_s, "no overlap"


def test_an_oversubscribed_fat_tree_is_slower() -> None:
    """On 32 ranks, of which 4 make a group; not inside of one group."""
    job = replace(SMALL, gradient_bytes=8)

    def steps(oversubscription: float) -> list[float]:
        room = replace(ROOM, nodes=4, topology=FatTree(4, oversubscription))
        return [point.step_s for point in study(job, room, [4, 32])]

    flat = [point.step_s for point in study(job, ROOM, [4, 32])]
    assert steps(1) == pytest.approx(flat)
    assert steps(8)[0] == pytest.approx(flat[0])
    assert steps(4)[1] <= steps(8)[1] < steps(16)[1]
    assert steps(16)[1] > 1.5 * flat[1]


def test_ranks_of_a_node_share_its_port() -> None:
    """Eight inside one node need no network; by a ring, one rank of a node sends to the next node."""
    shared = replace(ROOM, ranks_per_node=8)
    inside, outside = study(SMALL, shared, [8, 16])
    assert inside.waiting_s == pytest.approx(0, abs=1e-12)
    assert outside.waiting_s > 0
    assert outside.step_s != study(SMALL, ROOM, [16])[0].step_s


def test_a_ring_is_no_better_than_a_switch() -> None:
    ring = replace(ROOM, topology=Ring())
    for there, here in zip(study(SMALL, ring, [1, 2, 4, 64]), study(SMALL, ROOM, [1, 2, 4, 64])):
        assert there.step_s >= here.step_s * (1 - 1e-12)


def test_jitter_lowers_efficiency() -> None:
    """All wait for the slowest, and of more ranks the slowest is slower."""
    free = replace(ROOM, latency_s=0.0, bandwidth_bytes_per_s=float("inf"), jitter=0.1)
    found = efficiencies(study(SMALL, free, [1, 4, 32, 256], steps=20))
    assert found == sorted(found, reverse=True)
    assert found[0] == 1
    assert 0.7 < found[3] < found[1] < 0.95


def test_a_straggler_slows_all_but_those_it_is_compared_with() -> None:
    free = replace(ROOM, nodes=10, latency_s=0.0, bandwidth_bytes_per_s=float("inf"))
    for node in (0, 1, 9):  # 9: beyond the nodes that are needed
        slow = replace(free, stragglers={node: 2.0})
        assert efficiencies(study(SMALL, slow, [2, 4])) == pytest.approx([1.0 if node == 9 else 0.5] * 2)
    tree = replace(free, nodes=12, topology=FatTree(4), stragglers={9: 2.0})
    assert efficiencies(study(SMALL, tree, [1, 2])) == pytest.approx([1, 1]), "whole groups, the straggler's too"


def points(*rates: tuple[int, float]) -> list[Point]:
    return [Point(ranks, 1.0, 1.0, rate, rate / ranks, None) for ranks, rate in rates]


@pytest.mark.parametrize(
    ("rates", "worth", "limit"),
    [
        ([(1, 1), (2, 2), (4, 4)], 0.99, None),
        ([(1, 1), (2, 1.5), (4, 2.2)], 0.5, 2),  # gains 0.5, 0.47
        ([(1, 1), (2, 1.5), (4, 2.25)], 0.5, None),  # exactly
        ([(1, 1), (2, 1.4)], 0.5, 1),
        ([(1, 1), (2, 0.5), (4, 0.4)], 0.5, 1),
        ([(8, 100)], 0.5, None),
        ([(60, 1), (64, 1), (100, 2)], 0.5, None),  # 64 is passed over
        ([(60, 1), (64, 1), (100, 1.1)], 0.5, 60),
        ([(60, 1), (64, 1), (100, 2), (110, 2)], 0.5, 100),
    ],
)
def test_pays_up_to(rates: Any, worth: float, limit: int | None) -> None:
    assert pays_up_to(points(*rates), worth) == limit


def test_verdicts() -> None:
    more = report.verdict(points((8, 8), (2000, 2000)), 0.5)
    assert more == "[bold]Adding ranks pays up to 2,000[/], the most asked for, and maybe beyond."
    end = report.verdict(points((8, 8), (1000, 1000), (1500, 1100)), 0.5)
    times = "1.5 times the ranks give 1.1 times the samples a second."
    assert end == f"[bold]Adding ranks pays up to 1,000.[/] Beyond, {times}"
    none = report.verdict(points((1, 8), (2, 6)), 0.5)
    assert (
        none == "[bold]Adding to 1 rank does not pay:[/] 2 times the ranks give 0.75 times the samples a second."
    )
    assert "Adding to 8 ranks does not pay" in report.verdict(points((8, 8), (16, 8)), 0.5)


def test_gains_that_do_not_pay_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    """Yellow, on a terminal; a loss is 0.00, not less."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "80"}.items():
            patch.setenv(name, value)
        patch.delenv("NO_COLOR", raising=False)
        main([*MODEL, "--ranks", "1,8,32,33", "--global-batch", "32"])
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    yellow = {re.sub(r"\x1b\[\d+m", "", line).split()[0]: "\x1b[33m" in line for line in lines}
    assert yellow == {"1": False, "8": False, "32": True, "33": True}
    assert re.search(r"m0\.00\b", lines[-1])


# --- numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "found"),
    [
        (0, ""),
        (1, "█" * 12),
        (0.5, "█" * 6),
        (0.005, ""),
        (0.006, "▏"),
        (1 / 96, "▏"),
        (7 / 96, "▉"),
        (0.9999, "█" * 12),
        (0.99, "█" * 11 + "▉"),
        (1.5, "█" * 12),
        (-0.1, ""),
    ],
)
def test_bar(share: float, found: str) -> None:
    assert report.bar(share) == found.ljust(12)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (0, "0"),
        (1e-12, "0.00100 ns"),
        (1e-9, "1.00 ns"),
        (2.5e-7, "250 ns"),
        (9.9949e-7, "999 ns"),
        (9.996e-7, "1.00 µs"),
        (5e-6, "5.00 µs"),
        (9.996e-4, "1.00 ms"),
        (0.01234, "12.3 ms"),
        (0.99949, "999 ms"),
        (0.9996, "1.00 s"),
        (9.996, "10.0 s"),
        (99.96, "100 s"),
        (999.9, "1,000 s"),
        (12345.6, "12,346 s"),
        (1.234e12, "1.23e+12 s"),
    ],
)
def test_seconds(value: float, found: str) -> None:
    assert report.seconds(value) == found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (0, "0"),
        (1, "1.000"),
        (0.00012345, "0.0001234"),
        (9.9999, "10.00"),
        (1711.9, "1,712"),
        (17119, "17,119"),
        (999_999_999, "1.000e+09"),
        (123_456_789, "123,456,789"),
        (1e-5, "1.000e-05"),
    ],
)
def test_rounded(value: float, found: str) -> None:
    assert report.rounded(value, 4) == found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (1, "1"),
        (1234, "1,234"),
        (999_940, "999,940"),
        (1e6, "1 million"),
        (1.25e8, "125 million"),
        (999_999_999, "1 billion"),
        (7e9, "7 billion"),
        (1.76e12, "1.76 trillion"),
        (1e15, "1000 trillion"),
    ],
)
def test_number(value: float, found: str) -> None:
    assert report.number(value) == found


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (0.5, "0.5 "),
        (999.9, "999.9 "),
        (999.99, "1 k"),
        (1000, "1 k"),
        (2.5e10, "25 G"),
        (999_999, "1 M"),
        (8.4e13, "84 T"),
        (1e18, "1 E"),
        (1e30, "1e+12 E"),
        (1e-7, "1e-07 "),
    ],
)
def test_quantity(value: float, found: str) -> None:
    assert report.quantity(value) == found
