"""``python -m minidp.demo --strategy hybrid``: one model on a mesh, beside the same on one worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minidp.demo import hybrid
from minidp.demo.__main__ import main
from minidp.demo.options import parse

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
    assert result["relative_difference"] < 1e-3
    assert result["loss"] == pytest.approx(result["loss_one_worker"], rel=1e-4)
    assert result["parameters_one_worker"] == sum(LAYERS)
    assert result["memory_one_worker"]["parameters"] == pytest.approx(4 * sum(LAYERS), rel=1e-3)
    return result


def test_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = figures(tmp_path, "--dp", "2", "--tp", "2", "--pp", "1")
    out = capsys.readouterr().out
    assert (result["dp"], result["tp"], result["pp"], result["world"]) == (2, 2, 1, "process")
    # Rows of each second layer, columns of each first; the biases of each second one are whole.
    assert result["parameters"] == sum(LAYERS) // 2 + (512 + 10) // 2
    assert result["bytes_per_step"]["dp"] == pytest.approx(4 * result["parameters"], rel=0.02)
    assert result["bytes_per_step"]["tp"] > 0
    assert (result["bytes_per_step"]["pp"], result["idle_share"]) == (0, None)
    for words in ("rank 0  rank 1", "replica 1", "along dp", "along tp", "float64"):
        assert words in out
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
    assert 0.02 < result["idle_share"] < 0.3
    assert 1.5 < result["steps_per_s"] / result["steps_per_s_one_worker"] < 2
    for words in ("stage 0", "stage 1", "2 of 8", "The last step", "(p − 1)/(m + p − 1)"):
        assert words in out
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert {"F0", "B7"} <= {event["name"] for event in json.loads(events.read_text())["traceEvents"]}


def test_all_three_axes_with_gpipe(tmp_path: Path) -> None:
    mesh = ("--dp", "2", "--tp", "2", "--pp", "2", "--micro-batches", "4", "--schedule", "gpipe")
    result = figures(tmp_path, *mesh, "--world", "virtual", "--optimizer", "sgd")
    assert (result["schedule"], result["micro_batches"], result["most_activations"]) == ("gpipe", 4, 4)
    assert all(sent > 0 for sent in result["bytes_per_step"].values())


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
        (("--strategy", "hybrid", "--plot", "x.png"), "--world virtual"),
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
    ],
)
def test_a_model_that_can_not_be_shared_out_so(
    options: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*HYBRID, "--world", "virtual", *options]) == 2
    said = " ".join(capsys.readouterr().out.split())
    assert text in said
    assert "Traceback" not in said


def test_another_w_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(hybrid, "relative_difference", lambda a, b: 0.1)
    assert main([*HYBRID, "--world", "virtual", "--epochs", "1"]) == 0
    assert "this should not happen" in capsys.readouterr().out
