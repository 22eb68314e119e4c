"""``python -m minidp.demo --compress``: what is saved, what is lost, and who is on the Pareto front."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from minidp import compress
from minidp.demo import compare_compressors, compressors
from minidp.demo.__main__ import main
from minidp.trace.pareto import Choice, front, plot_pareto

PARAMETERS = 64 * 128 + 128 + 128 * 10 + 10  # of the virtual world's MLP
SMALL = ("--world", "virtual", "--workers", "2", "--epochs", "2")


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def figures(tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "figures"
    assert main([*options, "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result


# --- one compressor ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "less"), [("int8+ef", 4), ("sign", 15), ("topk:0.01+ef", 70), ("powersgd:4", 6.6)]
)
def test_one_compressor(spec: str, less: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = figures(tmp_path, *SMALL, "--compress", spec)
    out = capsys.readouterr().out
    said = " ".join(out.split())
    assert result["compress"] == spec
    assert result["bytes_per_step_float32"] == 4 * PARAMETERS, "2(N−1)/N of them all"
    assert result["bytes_per_step_float32"] / result["bytes_per_step"] == pytest.approx(less, rel=0.15)
    assert result["lr_workers"] == pytest.approx(0.0005 if spec == "sign" else 0.05)
    assert ("the workers' η is smaller: 0.01 × 0.05 = 0.0005" in said) is (spec == "sign")
    assert result["relative_difference"] > 0
    assert result["loss"] < 2.3, "it has learnt something"
    assert result["sha256"] == {}, "of exact bits nothing is claimed"
    assert "sha256" not in out
    points = 100 * (result["test_accuracy"] - result["test_accuracy_one_worker"])
    for words in (
        f"2 workers, gradients as {spec}: what is saved, and what is lost?",
        "∇L ≈ Σ compress(n_i ∇L_i / Σ n_i)",
        f"sent {spec}: {compressors.about(spec)}",
        "without compression, float32 │ 0 B │ 37.5 KB",
        "end at different ones, as they must",
        f"test accuracy is {points:+.1f} points from one worker's",
    ):
        assert words in said, words
    for words in ("report it", "same w,", "so every N and every cut gives the same"):
        assert words not in said, words


def test_none_is_float32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = figures(tmp_path, *SMALL, "--compress", "none")
    assert result["relative_difference"] < 1e-5
    assert "2 workers and one end at the same w, but for float32's rounding" in " ".join(
        capsys.readouterr().out.split()
    )


def test_in_processes_and_balanced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    options = ("--workers", "2", "--compress", "int8+ef", "--save", str(folder), "--balance", "--epochs", "1")
    result = figures(tmp_path, *options, "--optimizer", "sgd")
    assert result["bytes_per_step_float32"] / result["bytes_per_step"] == pytest.approx(4, rel=0.02)
    assert result["predicted_step_s"] is None
    assert len(result["shares"]) == 2
    assert [path.name for path in folder.iterdir()] == ["update-00000006.safetensors"]
    assert "Workers of one machine read each other's memory" in " ".join(capsys.readouterr().out.split())


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """With the residuals of error feedback."""
    options = (
        "--world",
        "virtual",
        "--workers",
        "2",
        "--compress",
        "topk:0.05+ef",
        "--save",
        str(tmp_path / "half"),
    )
    whole = figures(tmp_path, *options[:-2], "--epochs", "2")
    figures(tmp_path, *options, "--epochs", "1")
    resumed = figures(tmp_path, *options, "--epochs", "2", "--resume")
    assert resumed["resumed_at"] == 6
    for what in ("loss", "test_accuracy", "relative_difference"):
        assert resumed[what] == whole[what]


def test_until_an_accuracy(tmp_path: Path) -> None:
    result = figures(tmp_path, *SMALL[:-1], "10", "--compress", "terngrad", "--until", "60")
    assert (result["compress"], result["reached"]) == ("terngrad", True)


def test_a_cnn_and_one_worker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--model", "cnn", "--world", "virtual", "--workers", "1", "--epochs", "1", "--compress", "sign")
    result = figures(tmp_path, *options)
    assert (result["bytes_per_step"], result["lr_workers"]) == (0, 0.002), "Adam takes no notice of lengths"
    assert "Who is alone sends nothing" in capsys.readouterr().out


# --- all of them ------------------------------------------------------------------------------------------------


def test_all_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_compressors, "SEEDS", 2)
    picture = tmp_path / "picture.png"
    result = figures(tmp_path, "--compress", "all", "--epochs", "1", "--plot", str(picture))
    out = capsys.readouterr().out
    said = " ".join(out.split())
    names = ["float32", *compress.EXAMPLES]
    runs = {each["compressor"]: each for each in result["compressors"]}
    assert list(runs) == names
    assert (result["workers"], result["steps"], result["seeds"]) == (4, 45, 2)
    assert result["bandwidth_bytes_per_s"] == 1.25e8
    base = runs["float32"]
    assert base["bytes_per_step"] == pytest.approx(1.5 * 4 * PARAMETERS, rel=1e-3)
    for name, run in runs.items():
        assert run["times_less"] == base["bytes_per_step"] / run["bytes_per_step"]
        assert run["times_faster"] == base["seconds"] / run["seconds"]
        assert len(run["test_accuracies"]) == 2
        assert run["test_accuracy"] == pytest.approx(sum(run["test_accuracies"]) / 2)
        assert run["points"] == pytest.approx(100 * (run["test_accuracy"] - base["test_accuracy"]))
        assert run["seconds"] > result["computing_s"]
        assert run["loss"] < 2.2, "it has learnt something"
        row = next(line for line in out.splitlines() if line.startswith(f"│ {name} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[2] == f"{run['times_less']:.3g}"
        assert cells[4] == f"{run['times_faster']:.2f}"
        assert cells[5].startswith(f"{run['test_accuracy']:.1%} ")
        on = (name in result["front_bytes"]) + (name in result["front_seconds"])
        assert cells[7] == ("", "◇", "◆")[on]
    assert runs["none"]["test_accuracy"] == base["test_accuracy"], "the same numbers travel"
    assert runs["int8"]["times_less"] == pytest.approx(4, rel=0.02)
    assert runs["sign"]["lr"] == pytest.approx(0.01 * base["lr"])
    assert result["front_bytes"][0] == "randomk:0.01+ef", "nobody sends less"
    for what in ("bytes_per_step", "seconds"):
        on_front = result[{"bytes_per_step": "front_bytes", "seconds": "front_seconds"}[what]]
        for name, run in runs.items():
            points = (run[what], run["test_accuracy"])
            beaten = any(
                each[what] <= points[0]
                and each["test_accuracy"] >= points[1]
                and (each[what], each["test_accuracy"]) != points
                for each in runs.values()
            )
            assert (name in on_front) is not beaten
    for words in (
        "4 workers, how small may gradients be?",
        "messages take 5 µs + n / (0.125 GB/s)",
        "45 steps on the virtual clock, means of 2 seeds",
        "On the Pareto front is who is beaten by nobody",
        "topk:0.01+ef: every rank keeps other numbers, so all send all to all, 3 times",
        "has its turn 0.45 times: late",
        "here η is 0.01 × 0.2 = 0.002",
        f"Picture: {picture}",
    ):
        assert words in said, words
    assert max(map(len, out.splitlines())) <= 80
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")


def test_two_runs_print_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_compressors, "SEEDS", 1)
    specs = {"float32": None, "qsgd:4": "qsgd:4", "randomk:0.01+ef": "randomk:0.01+ef"}
    monkeypatch.setattr(compare_compressors, "SPECS", specs)
    options = (
        "--compress",
        "all",
        "--epochs",
        "1",
        "--workers",
        "3",
        "--bandwidth",
        "1e7",
        "--optimizer",
        "momentum",
    )
    seen = [(figures(tmp_path, *options), capsys.readouterr().out) for _ in range(2)]
    assert seen[0] == seen[1]
    assert (seen[0][0]["workers"], seen[0][0]["bandwidth_bytes_per_s"], seen[0][0]["lr"]) == (3, 1e7, 0.05)


# --- the picture ------------------------------------------------------------------------------------------------


def test_the_front() -> None:
    points = [(4.0, 0.9), (1.0, 0.5), (2.0, 0.8), (2.0, 0.7), (3.0, 0.8), (4.0, 0.9), (9.0, 0.1)]
    assert front(points) == [1, 2, 0, 5], "equal ones are on it together; as good for more is not"
    assert front([(1.0, 1.0)]) == [0]
    assert front([]) == []
    assert front([(1.0, 1.0), (1.0, 1.0)]) == [0, 1]


def test_the_picture(tmp_path: Path) -> None:
    """Names as in the demo, some of them at the same point: none lies on another, all are inside."""
    places = [(57696, 0.168, 0.951), (58488, 0.187, 0.951), (14408, 0.099, 0.951), (14408, 0.112, 0.951)]
    places += [(3650, 0.071, 0.960), (1594, 0.044, 0.957), (12376, 0.075, 0.951)]
    names = ("float32", "none", "int8", "int8+ef", "terngrad", "topk:0.01+ef", "powersgd:4+ef")
    choices = [
        Choice(name, (sent, seconds), accuracy, compressors.kind(name), name.endswith("+ef"))
        for name, (sent, seconds, accuracy) in zip(names, places)
    ]
    file = tmp_path / "picture.svg"
    figure = plot_pareto(choices, file, "A title", solid=("with error feedback", "without"))
    assert file.read_text().lstrip().startswith("<?xml")
    left, right = figure.axes
    assert [axes.get_xscale() for axes in (left, right)] == ["log", "log"]
    assert left.get_ylim() == right.get_ylim()
    assert right.get_xlabel() == "time of the training [ms]"
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        *("float32", "fewer levels", "fewer numbers", "low rank"),
        *("with error feedback", "without", "Pareto front"),
    ]
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == list(names)
        boxes = [text.get_window_extent() for text in axes.texts]
        assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
        room = axes.get_window_extent().padded(1)
        for box in boxes:
            assert room.x0 <= box.x0 < box.x1 <= room.x1
            assert room.y0 <= box.y0 < box.y1 <= room.y1
        line = axes.get_lines()[0].get_xydata()
        assert len(line) == 3, "from topk across, then up to terngrad"
        assert [text.get_text() for text in axes.texts if text.get_weight() == "bold"] == [
            "terngrad",
            "topk:0.01+ef",
        ]
    with pytest.raises(ValueError, match="at least one choice"):
        plot_pareto([])


# --- options ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["int9"], "--compress 'int9' is unknown. There are: none, fp16,"),
        (["int8+eff"], "--compress 'int8+eff' is unknown."),
        (["topk"], "--compress 'topk': '' is no density: give it a density; or all, to compare them"),
        (["topk:2"], "give the part that is kept, above 0, at most 1"),
        (["int8", "--micro-shards", "4"], "--micro-shards is for exact bits, which no compressor keeps"),
        (["int8", "--naive"], "the literal version (--naive) sends gradients as they are"),
        (["int8", "--strategy", "ps"], "--compress is of synchronous training: leave it out, or --strategy ps"),
        (["int8", "--strategy", "all"], "--compress is of synchronous training"),
        (["int8", "--world", "virtual", "--plot", "x.foo"], "give a name that ends in .png, .svg, .pdf"),
        (["all", "--strategy", "sync"], "--compress all trains again and again, to compare: leave --strategy out"),
        (["all", "--save", "x"], "leave --save out, or give one compressor"),
        (["all", "--until", "90"], "leave --until out"),
        (["all", "--micro-shards", "4"], "leave --micro-shards out"),
        (["all", "--world", "process"], "is timed on a virtual cluster, whose network is known"),
        (["all", "--workers", "1"], "give --workers 2 or more"),
        (["all", "--plot", "x.foo"], "give a name that ends in .png, .svg, .pdf"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_does_not_go_together(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--compress", *options])
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


def test_every_example_is_described() -> None:
    for spec in compress.EXAMPLES:
        assert len(compressors.about(spec)) > 10
        assert "{" not in compressors.about(spec)
    kinds = {compressors.kind(spec) for spec in compress.EXAMPLES}
    assert kinds == {"float32", "fewer bits", "fewer levels", "one bit", "fewer numbers", "low rank"}
    assert compressors.kind("float32") == "float32"
