"""``python -m minidp.demo --strategy hybrid``: one model on a mesh, beside the same on one worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minidp import data
from minidp.demo import hybrid
from minidp.demo.__main__ import main
from minidp.demo.options import parse
from minidp.demo.train import Job

LAYERS = (64 * 512 + 512, 512 * 512 + 512, 512 * 512 + 512, 512 * 10 + 10)
HYBRID = ("--strategy", "hybrid", "--epochs", "2")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def figures(tmp_path: Path, *options: str) -> dict[str, Any]:
    file = tmp_path / "figures"
    assert main([*HYBRID, *options, "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    assert result["relative_difference_float64"] < 1e-12
    assert result["relative_difference_float32"] < 1e-5
    assert result["relative_difference"] < 1e-3
    assert result["loss"] == pytest.approx(result["loss_one_worker"], rel=1e-4)
    assert result["parameters_one_worker"] == sum(LAYERS)
    assert result["memory_one_worker"]["parameters"] == pytest.approx(4 * sum(LAYERS), rel=1e-3)
    return result


def test_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "step.svg"
    result = figures(tmp_path, "--dp", "2", "--tp", "2", "--pp", "1", "--plot", str(picture))
    out = capsys.readouterr().out
    assert (result["dp"], result["tp"], result["pp"], result["world"]) == (2, 2, 1, "process")
    # Rows of each second layer, columns of each first; the biases of each second one are whole.
    assert result["parameters"] == sum(LAYERS) // 2 + (512 + 10) // 2
    assert result["bytes_per_step"]["dp"] == pytest.approx(4 * result["parameters"], rel=1e-3)
    assert result["bytes_per_step"]["tp"] > 0
    assert (result["bytes_per_step"]["pp"], result["idle_share"]) == (0, None)
    seats = [(seat["dp"], seat["pp"], seat["tp"], seat["node"]) for seat in result["ranks"]]
    assert seats == [(0, 0, 0, None), (0, 0, 1, None), (1, 0, 0, None), (1, 0, 1, None)]
    assert all(
        seat["memory"]["gradients"] == pytest.approx(4 * seat["parameters"], 1e-3) for seat in result["ranks"]
    )
    for words in ("ranks 0, 1 ", "ranks 2, 3 ", "replica 1", "along dp", "along tp", "after 10 steps in float64"):
        assert words in out
    assert picture.read_text().startswith("<?xml")
    assert "along pp" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_on_the_virtual_clock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, events = tmp_path / "step.png", tmp_path / "trace.json"
    options = ("--dp", "1", "--pp", "2", "--world", "virtual", "--plot", str(picture), "--trace", str(events))
    result = figures(tmp_path, *options)
    out = capsys.readouterr().out
    assert (result["micro_batches"], result["schedule"], result["most_activations"]) == (8, "1f1b", 2)
    assert result["parameters"] == LAYERS[0] + LAYERS[1]
    assert result["idle_share_formula"] == pytest.approx(1 / 9)
    assert 1 / 9 <= result["idle_share"] < 0.2, "stages are not quite alike, and messages take time"
    assert all(seat["pipeline_wait_s"] > 0 for seat in result["ranks"])
    assert [seat["node"] for seat in result["ranks"]] == [0, 1]
    assert [seat["layers"] for seat in result["ranks"]] == [["0", "1", "2"], ["3", "4", "5", "6"]]
    assert 1.5 < result["steps_per_s"] / result["steps_per_s_one_worker"] < 2
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 80
    for words in ("0 to 2", "3 to 6", "nodes 0, 1", "2 of 8", "One step", "(p − 1)/(m + p − 1)"):
        assert words in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {"F0", "B7"} <= {event["name"] for event in json.loads(events.read_text())["traceEvents"]}


def test_all_three_axes_with_gpipe(tmp_path: Path) -> None:
    mesh = ("--dp", "2", "--tp", "2", "--pp", "2", "--micro-batches", "4", "--schedule", "gpipe")
    result = figures(tmp_path, *mesh, "--world", "virtual", "--optimizer", "sgd")
    assert (result["schedule"], result["micro_batches"], result["most_activations"]) == ("gpipe", 4, 4)
    assert all(sent > 0 for sent in result["bytes_per_step"].values())
    assert [seat["node"] for seat in result["ranks"]] == [0, 0, 1, 1, 2, 2, 3, 3]  # parts of a layer share one


def test_a_mesh_that_is_wider_than_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures(tmp_path, "--dp", "4", "--tp", "4", "--world", "virtual", "--epochs", "1")
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    for words in ("ranks 0 … 3", "node 0", "more", "…"):
        assert words in out


def test_a_transformer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_set, test_set = data.load_text()
    few = (
        data.ArrayDataset(*(a[:64] for a in train_set.arrays)),
        data.ArrayDataset(*(a[:8] for a in test_set.arrays)),
    )
    monkeypatch.setattr(Job, "load", lambda self: few)
    file = tmp_path / "figures"
    mesh = ("--model", "transformer", "--dp", "1", "--tp", "2", "--pp", "2", "--world", "virtual")
    assert main([*HYBRID, *mesh, "--epochs", "1", "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    assert (result["model"], result["dataset"], result["steps"]) == ("transformer", "text", 2)
    assert result["relative_difference_float64"] < 1e-10
    assert result["parameters"] < 0.3 * result["parameters_one_worker"]
    assert "embedding to blocks.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "mesh"),
    [
        ((), (2, 2, 1)),
        (("--workers", "4"), (2, 2, 1)),
        (("--workers", "6", "--tp", "3"), (2, 3, 1)),
        (("--pp", "2"), (1, 1, 2)),
        (("--workers", "3"), (3, 1, 1)),
    ],
)
def test_what_is_not_said_is_chosen(options: tuple[str, ...], mesh: tuple[int, int, int]) -> None:
    args = parse(["--strategy", "hybrid", *options])
    assert (args.dp, args.tp, args.pp) == mesh
    assert args.workers == mesh[0] * mesh[1] * mesh[2]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--dp", "2"), "--dp is of --strategy hybrid"),
        (("--schedule", "gpipe"), "--schedule is of --strategy hybrid"),
        (("--strategy", "hybrid", "--tp", "0"), "--tp must be at least 1"),
        (("--strategy", "hybrid", "--workers", "6", "--tp", "4"), "tp · pp may be 1, 2, 3, 6"),
        (("--strategy", "hybrid", "--workers", "6", "--tp", "2", "--dp", "2"), "--workers 6, but dp=2 × tp=2"),
        (("--strategy", "hybrid", "--micro-shards", "8"), "--micro-shards is of synchronous training"),
        (("--strategy", "hybrid", "--compress", "int8"), "--compress"),
        (("--strategy", "hybrid", "--latency", "0"), "--world virtual"),
        (("--strategy", "hybrid", "--plot", "x.txt"), "give a name that ends in .png"),
    ],
)
def test_what_does_not_go_together(
    options: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(options))
    assert ended.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--tp", "3"), "out_features=512 does not divide into 3 equal parts"),
        (("--pp", "9"), "take pp of 1 to 7"),
        (("--model", "cnn", "--tp", "2"), "this model has no layers that can be cut"),
        (("--micro-batches", "5"), "a batch of 128 samples does not split into micro_batches=5"),
    ],
)
def test_a_model_that_can_not_be_shared_out_so(
    options: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*HYBRID, "--world", "virtual", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("minidp.demo: ")
    assert text in said
    assert len(said.splitlines()) == 1


def test_another_w_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(hybrid, "relative_difference", lambda a, b: 0.1)
    assert main([*HYBRID, "--world", "virtual", "--epochs", "1"]) == 0
    assert "this should not happen" in capsys.readouterr().out
