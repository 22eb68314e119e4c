"""``python -m minidp.demo --report``: one page, which tells what the terminal and ``--json`` tell."""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import Tensor
from minidp.comm import Communicator
from minidp.demo.__main__ import main
from minidp.demo.curve import POINTS, Curve, Moment
from minidp.demo.words import in_bytes
from tests.test_trace_page import Tree, stands_alone

pytest.importorskip("matplotlib")

VIRTUAL = ("--world", "virtual", "--workers", "3", "--epochs", "2")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def reported(tmp_path: Path, *options: str) -> tuple[Tree, dict[str, Any]]:
    """The page of a run as a tree, and its figures."""
    page, figures = tmp_path / "report.html", tmp_path / "figures.json"
    assert main([*options, "--report", str(page), "--json", str(figures)]) == 0
    return stands_alone(page.read_text(encoding="utf-8")), json.loads(figures.read_text())


def bars(tree: Tree) -> list[str]:
    return [title for title in tree.of("title") if title.startswith("rank ")]


def row(tree: Tree, name: str) -> list[str]:
    """What follows a cell of that text, up to where another row may begin."""
    cells = tree.of("td")
    return cells[cells.index(name) + 1 :][:6]


def check(tree: Tree, headings: list[str], command: str) -> None:
    assert tree.of("h2") == ["What was run", *headings, "Environment"]
    assert tree.of("pre")[0].startswith(f"python -m minidp.demo {command}")
    assert row(tree, "minidp")[0] == version("minidp")
    assert row(tree, "NumPy")[0] == version("numpy")
    assert row(tree, "Python")[0].startswith(platform.python_version())
    assert row(tree, "date")[0].count(":") >= 2
    assert "core" in row(tree, "processor")[0]
    text = " ".join(text for _, text in tree.texts)
    assert "[bold]" not in text  # rich's marks
    assert "[/]" not in text


# --- each kind of run -------------------------------------------------------------------------------------------


def test_of_workers_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, figures = reported(tmp_path, "--workers", "2", "--epochs", "1", "--global-batch-size", "512")
    check(tree, ["Result", "How the loss falls", "Two steps", "Bytes"], "--workers 2 --epochs 1")
    assert tree.of("h1") == ["minidp: do 2 workers equal one, and how much faster?"]
    loss = f"{figures['loss']:.5f}"
    assert row(tree, "training loss L(w)")[:2] == [f"{figures['loss_one_worker']:.5f}", loss]
    assert row(tree, "steps / s")[:2] == [f"{figures[f'steps_per_s{of}']:.1f}" for of in ("_one_worker", "")]
    assert row(tree, "sent by a worker in a step")[1] == in_bytes(figures["bytes_per_step"])
    sent = row(tree, f"sent by a worker in {figures['steps']} steps")[0]
    assert sent == in_bytes(figures["steps"] * figures["bytes_per_step"])
    for rank in (0, 1):
        assert sum(bar.startswith(f"rank {rank}: forward (compute), ") for bar in bars(tree)) == 2
    assert row(tree, "workers")[0] == "2 workers, a process each"
    assert tree.tags.count("svg") == 3
    assert f"Report: {tmp_path / 'report.html'}" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("more", [(), ("--compress", "int8"), ("--naive",), ("--balance", "--straggler", "1:3")])
def test_of_a_virtual_cluster(more: tuple[str, ...], tmp_path: Path) -> None:
    tree, figures = reported(tmp_path, *VIRTUAL, *more)
    check(tree, ["Result", "How the loss falls", "Two steps", "Bytes"], "--world virtual")
    assert row(tree, "test accuracy")[1] == f"{figures['test_accuracy']:.1%}"
    assert sum("forward (compute)" in bar for bar in bars(tree)) == 2 * 3
    assert row(tree, "workers")[0] == "3 workers on the virtual clock"
    assert ("without compression, as float32" in tree.of("td")) == bool(figures["compress"])


def test_micro_shards_have_many_forwards_in_a_step(tmp_path: Path) -> None:
    tree, _ = reported(tmp_path, "--world", "virtual", "--workers", "2", "--epochs", "1", "--micro-shards", "8")
    assert sum("forward (compute)" in bar for bar in bars(tree)) == 2 * 2 * 4


@pytest.mark.parametrize("strategy", ["all", "ps", "ssp", "async", "local", "hogwild"])
def test_of_strategies(strategy: str, tmp_path: Path) -> None:
    tree, figures = reported(tmp_path, *VIRTUAL, "--strategy", strategy)
    check(tree, ["Result", "How the loss falls", "Two steps", "Bytes"], "--world virtual")
    for each in figures["strategies"]:
        cells = row(tree, each["strategy"])
        assert cells[1] == f"{each['speed_vs_sync']:.2f}"
        all_steps = sum(each["steps"])
        assert f"{all_steps:,}" in tree.of("td")
        assert in_bytes(all_steps * each["bytes_per_step"]) in tree.of("td")
    assert tree.tags.count("svg") == 1 + len(figures["strategies"])
    assert len(bars(tree)) > 10 * len(figures["strategies"])


def test_of_strategies_in_processes(tmp_path: Path) -> None:
    tree, _ = reported(tmp_path, "--workers", "2", "--epochs", "1", "--strategy", "async")
    check(tree, ["Result", "How the loss falls", "Two steps", "Bytes"], "--workers 2")
    assert tree.tags.count("svg") == 3
    assert {bar[:7] for bar in bars(tree)} == {"rank 0:", "rank 1:"}


@pytest.mark.parametrize("world", ["virtual", "process"])
def test_of_a_mesh(world: str, tmp_path: Path) -> None:
    tree, figures = reported(tmp_path, "--strategy", "hybrid", "--pp", "2", "--epochs", "1", "--world", world)
    check(tree, ["Result", "How the loss falls", "One step", "Bytes"], "--strategy hybrid")
    assert row(tree, "between stages (pp)")[0] == in_bytes(figures["bytes_per_step"]["pp"])
    assert any(": F0 (compute), " in bar for bar in bars(tree))
    assert "  activations, along pp" in tree.of("td")  # what is set in stays so
    assert tree.tags.count("svg") == 3


def test_of_compressors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from minidp.demo import compare_compressors

    few = {name: compare_compressors.SPECS[name] for name in ("float32", "int8", "sign+ef")}
    monkeypatch.setattr(compare_compressors, "SPECS", few)
    monkeypatch.setattr(compare_compressors, "SEEDS", 1)
    tree, figures = reported(tmp_path, "--compress", "all", "--workers", "2", "--epochs", "1")
    check(tree, ["Result", "What is saved, and what is lost", "Bytes"], "--compress all")
    for each in figures["compressors"]:
        assert row(tree, each["compressor"])[0] == in_bytes(each["bytes_per_step"])
        assert in_bytes(each["bytes_per_step"] * figures["steps"]) in tree.of("td")
    assert tree.tags.count("svg") == 1


# --- what it must not do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--strategy", "async"), ("--strategy", "hybrid", "--workers", "4")])
def test_to_report_changes_no_figure(more: tuple[str, ...], tmp_path: Path) -> None:
    """Virtual times and all: looking costs the clock nothing."""
    options = (*VIRTUAL[:2], *more, *([] if "hybrid" in more else VIRTUAL[2:4]), "--epochs", "1")
    _, with_report = reported(tmp_path, *options)
    assert main([*options, "--json", str(tmp_path / "plain.json")]) == 0
    assert json.loads((tmp_path / "plain.json").read_text()) == with_report


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the overflow that is meant
def test_a_run_that_diverges_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*VIRTUAL, "--lr", "1e30", "--report", str(tmp_path / "r.html")]) == 1
    assert not (tmp_path / "r.html").exists()
    assert "diverged" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["[/b] & [bold]<script>", "no text \udcff", "long " * 40])
def test_odd_names_of_files(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, figures = tmp_path / f"{name}.html", tmp_path / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("what was there before")
    assert main([*VIRTUAL, "--report", str(path), "--json", str(figures), "--trace", str(figures)]) == 0
    shown = name.replace("\udcff", "\ufffd")
    tree = stands_alone(path.read_text(encoding="utf-8"))
    assert f"{shown}.html" in tree.of("pre")[0].replace("$'", "")
    out = capsys.readouterr().out
    assert f"\nReport: {tmp_path}/{shown}.html\n" in out
    assert f"\nFigures: {tmp_path}/{shown}.json\n" in out
    assert f"\nTrace of all ranks: {tmp_path}/{shown}.json (open" in out


@pytest.mark.parametrize("option", ["--report", "--plot", "--json", "--trace"])
def test_what_cannot_be_written_is_known_before_anything_runs(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor is anything changed or left behind by trying."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minidp, "spawn", None)
    there = Path("there.html")
    there.write_text("before")
    long = "x" * 300 + ".html"
    with pytest.raises(SystemExit):
        main([*VIRTUAL, option, long])
    assert f"{option} {long}: File name too long" in capsys.readouterr().err
    with pytest.raises(TypeError):  # it would run
        main([*VIRTUAL, option, str(there)])
    with pytest.raises(TypeError):
        main([*VIRTUAL, option, "new.html"])
    Path("link.html").symlink_to("nothing.html")
    with pytest.raises(TypeError):
        main([*VIRTUAL, option, "link.html"])
    assert there.read_text() == "before"
    assert sorted(Path().iterdir()) == [Path("link.html"), there]

    def refused(self: Path, *args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)  # the administrator may write everywhere
    with pytest.raises(SystemExit):
        main([*VIRTUAL, option, str(there)])
    assert f"{option} there.html: Permission denied" in capsys.readouterr().err


def test_a_single_step_is_no_plural(tmp_path: Path) -> None:
    tree, _ = reported(tmp_path, *VIRTUAL[:4], "--epochs", "1", "--global-batch-size", "5000")
    assert "sent by a worker in 1 step" in tree.of("td")
    assert "1 step, 1 epoch, on the virtual clock" in tree.of("strong")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--report", "r.htm"], "--report r.htm: give a name that ends in .html"),
        (["--report", "no/such/r.html"], "--report no/such/r.html: there is no folder no/such"),
        (["--report", "r.html", "--until", "90"], "--until only trains: without --report"),
        (["--plot", "p.html"], "--plot draws the timeline of a virtual cluster: add --world virtual"),
    ],
)
def test_bad_arguments(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(options)
    assert exit_.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--report", "--plot"])
def test_without_matplotlib_it_says_so_before_anything_runs(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        main([*VIRTUAL, option, str(tmp_path / "r.html")])
    assert f"{option}: pictures need matplotlib, which is missing: pip install" in capsys.readouterr().err


def test_plots_as_pages(tmp_path: Path) -> None:
    assert main([*VIRTUAL, "--plot", str(tmp_path / "timeline.html")]) == 0
    assert len(bars(stands_alone((tmp_path / "timeline.html").read_text(encoding="utf-8")))) > 12
    assert main([*VIRTUAL, "--strategy", "local", "--plot", str(tmp_path / "curves.html")]) == 0
    assert stands_alone((tmp_path / "curves.html").read_text(encoding="utf-8")).tags.count("svg") == 1


# --- curves -----------------------------------------------------------------------------------------------------


def follow(comm: Communicator, steps: int, wanted: bool) -> list[Moment]:
    """Rank r of the last one R has step + R − r samples, whose loss is 10·step + r: in step 0 R has none."""
    curve = Curve(comm, wanted)
    for step in range(steps):
        samples = step + comm.world_size - 1 - comm.rank or int(comm.world_size == 1)
        curve.add(Tensor(np.float32(10 * step + comm.rank)), samples, step + 1)
    return curve.moments()


def test_a_curve_is_the_weighted_mean_of_all_ranks() -> None:
    found = minidp.spawn(follow, 3, 4, True, world="virtual", cluster=minidp.sim.Cluster(nodes=3))
    assert found[0] == found[1] == found[2]
    assert [at.step for at in found[0]] == [1, 2, 3, 4]
    for step, at in enumerate(found[0]):
        samples = step + np.array([2, 1, 0])
        assert at.loss == pytest.approx(((10 * step + np.arange(3)) * samples).sum() / samples.sum(), rel=1e-12)
        assert at.loss != pytest.approx((10 * step + np.arange(3)).mean())  # the article's 1/N would be another


@pytest.mark.parametrize("steps", [0, 1, POINTS, POINTS + 1, 1000])
def test_a_curve_has_a_few_dozen_points(steps: int) -> None:
    (curve,) = minidp.spawn(follow, 1, steps, True, world="virtual", cluster=minidp.sim.Cluster(nodes=1))
    assert len(curve) == min(steps, POINTS)
    if steps:
        assert curve[-1].step == steps
        assert [at.step for at in curve] == sorted({at.step for at in curve})


def test_nobody_asked_for_a_curve() -> None:
    cluster = minidp.sim.Cluster(nodes=2)
    assert minidp.spawn(follow, 2, 3, False, world="virtual", cluster=cluster) == [[], []]
