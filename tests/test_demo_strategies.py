"""``python -m minidp.demo --strategy``: who waits for whom, and what comes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minidp.demo.__main__ import main
from minidp.demo.strategies import WAYS
from minidp.trace.curves import plot_curves

PARAMETERS = 64 * 128 + 128 + 128 * 10 + 10  # of the virtual world's MLP
OTHERS = [name for name in WAYS if name != "sync"]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def compared(tmp_path: Path, *options: str) -> dict[str, Any]:
    """What ``--json`` says, with ``runs``: the figures by strategy."""
    file = tmp_path / "figures"
    assert main([*options, "--json", str(file)]) == 0
    result: dict[str, Any] = json.loads(file.read_text())
    return result | {"runs": {each["strategy"]: each for each in result["strategies"]}}


def check(run: dict[str, Any], limit_s: float) -> None:
    """What is true of every strategy in both worlds; on a busy machine it may have got to a few steps only."""
    times = [point["time_s"] for point in run["curve"]]
    assert times == sorted(times)
    assert times[0] == 0
    assert len(times) > 1
    assert run["curve"][0]["loss"] == pytest.approx(2.3, abs=0.1), "it begins by guessing"
    assert run["loss"] < run["curve"][0]["loss"]
    assert run["test_accuracy"] > 0.1
    assert run["seconds"] >= limit_s
    if WAYS[run["strategy"]].in_step:
        assert len(set(run["steps"])) == 1
        assert run["staleness_max"] == 0
    counts = {int(late): times for late, times in run["staleness_counts"].items()}
    if counts:
        assert max(counts) == run["staleness_max"]
        total = sum(late * times for late, times in counts.items())
        assert run["staleness_mean"] == pytest.approx(total / sum(counts.values()))
        assert sum(counts.values()) == sum(run["steps"]), "each gradient is in it, with one server"


def test_all_beside_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One slow worker of four: who waits for it makes no more samples a second than it lets them."""
    picture = tmp_path / "picture.png"
    result = compared(tmp_path, "--strategy", "all", "--plot", str(picture))
    out, runs = capsys.readouterr().out, result["runs"]
    assert list(runs) == list(WAYS)
    assert (result["world"], result["workers"], result["servers"]) == ("virtual", 4, 1)
    assert (result["stragglers"], result["jitter"]) == ({"3": 5.0}, 0.1)
    for run in runs.values():
        check(run, result["limit_s"])
        assert run["seconds"] <= 1.02 * result["limit_s"], "all have the same time"
        assert run["test_accuracy"] >= 0.94
        row = next(line for line in out.splitlines() if line.startswith(f"│ {run['strategy']} "))
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells[1:3] == [f"{run['samples_per_s']:,.0f}", f"{run['speed_vs_sync']:.2f}"]
        assert cells[3] == f"{run['staleness_mean']:.1f} ({run['staleness_max']})"
        assert cells[5] == f"{run['test_accuracy']:.1%}"
    speed = {name: run["speed_vs_sync"] for name, run in runs.items()}
    assert speed["sync"] == 1
    assert result["most_speed_vs_sync"] == pytest.approx(4)
    assert 3 <= speed["async"] <= 4.2
    assert 3 <= speed["hogwild"] <= 4.2
    for name in ("ps", "ssp", "local"):
        assert 0.9 <= speed[name] <= 1.15, "they wait for the straggler, sooner or later"
    for name in ("async", "hogwild"):
        assert runs[name]["staleness_mean"] == pytest.approx(3, abs=0.2), "N − 1"
        assert runs[name]["loss"] < 0.6 * runs["sync"]["loss"], "more samples in the same time"
        assert runs[name]["target_s"] < 0.5 * runs["sync"]["target_s"]
        assert runs[name]["steps"][0] > 3 * runs[name]["steps"][3]
    # A worker sends 2 (N−1)/N of the parameters where workers average, all of them to servers, an H-th in local.
    sent = {name: run["bytes_per_step"] / (4 * PARAMETERS) for name, run in runs.items()}
    assert [sent["sync"], sent["ps"], sent["ssp"], sent["async"]] == pytest.approx([1.5, 1, 1, 1], rel=1e-2)
    assert sent["local"] == pytest.approx(1.5 / 8, rel=0.05)
    for run in runs.values():
        assert run["lr"] == (0.05 / 4 if WAYS[run["strategy"]].stale else 0.05)
    said = " ".join(out.split())
    for words in (
        "ssp, async and hogwild: η/N = 0.0125",
        "sync, ps and local wait for the slowest worker (node 3 is 5 times slower), local every 8 steps;",
        "so does ssp, as soon as it is 2 steps ahead.",
        f"for nobody: {speed['async']:.1f} and {speed['hogwild']:.1f} times the samples of sync.",
        "it would be 4 times.",
        "up to N − 1 = 3 in the mean",
        f"{runs['hogwild']['lost_updates']:.1%} of what its workers wrote was overwritten unread.",
        f"Picture: {picture}",
    ):
        assert words in said, words
    assert max(map(len, out.splitlines())) <= 80
    width, height = size(picture)
    assert width > 1.5 * height > 600


def test_two_virtual_runs_print_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    for _ in range(2):
        options = ("--strategy", "all", "--epochs", "2", "--workers", "3", "--servers", "2", "--sync-every", "4")
        seen.append((compared(tmp_path, *options), capsys.readouterr().out))
    assert seen[0] == seen[1]
    result, out = seen[0]
    assert (result["servers"], result["sync_every"], result["stragglers"]) == (2, 4, {"2": 5.0})
    assert sum(result["runs"]["async"]["staleness_counts"].values()) == 2 * sum(result["runs"]["async"]["steps"])
    assert "3 workers and 2 servers, who waits for whom?" in out
    assert "5 nodes of 10 GFLOP/s; node 2 5 times slower" in out
    assert "computing times vary: jitter 0.1" in out


@pytest.mark.parametrize("strategy", OTHERS)
def test_each_in_both_worlds(strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for world in ("virtual", "process"):
        result = compared(tmp_path, "--strategy", strategy, "--world", world, "--workers", "2", "--epochs", "4")
        out, runs = capsys.readouterr().out, result["runs"]
        assert list(runs) == ["sync", strategy]
        assert (result["world"], result["epochs"], result["stragglers"]) == (world, 4, {})
        assert runs["sync"]["steps"] == [24, 24]
        for run in runs.values():
            check(run, result["limit_s"])
            if world == "virtual":
                assert run["loss"] < 1.6
                assert run["test_accuracy"] > 0.7
                assert run["seconds"] <= 1.1 * result["limit_s"], "to a step"
        assert f"{strategy} beside synchronous training" in out
        assert ("η/N = 0.025" in out) is WAYS[strategy].stale
        assert ("2 workers and 1 server," in out) is WAYS[strategy].served
        assert ("virtual clock" in out) is (world == "virtual")


def test_bounds_of_staleness(tmp_path: Path) -> None:
    """With a longer lead the straggler is felt later, and gradients are later."""
    options = ("--strategy", "ssp", "--world", "virtual", "--workers", "4", "--straggler", "3:5", "--epochs", "4")
    short = compared(tmp_path, *options, "--staleness", "1")
    long = compared(tmp_path, *options, "--staleness", "20", "--plot", str(tmp_path / "picture.svg"))
    assert (short["staleness_bound"], long["staleness_bound"]) == (1, 20)
    assert short["runs"]["ssp"]["speed_vs_sync"] + 0.3 < long["runs"]["ssp"]["speed_vs_sync"]
    assert short["runs"]["ssp"]["staleness_mean"] < long["runs"]["ssp"]["staleness_mean"]
    for result in (short, long):
        steps = result["runs"]["ssp"]["steps"]
        assert max(steps) - min(steps) <= result["staleness_bound"] + 1, "and those that stop hold nobody back"
    text = (tmp_path / "picture.svg").read_text()
    assert text.lstrip().startswith("<?xml")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_strategy_that_diverges_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--strategy", "async", "--world", "virtual", "--workers", "2", "--epochs", "1"]
    assert main([*options, "--lr", "1e9"]) == 1
    assert "try a smaller --lr than 1e+09" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--strategy", "gossip"], "invalid choice: 'gossip'"),
        (["--servers", "2"], "--servers is of --strategy ps, ssp, async or all: give one of them as well"),
        (["--strategy", "sync", "--servers", "2"], "--servers is of --strategy ps, ssp, async or all"),
        (["--strategy", "hogwild", "--servers", "2"], "--servers is of --strategy ps, ssp, async or all"),
        (["--strategy", "async", "--staleness", "2"], "--staleness is of --strategy ssp or all"),
        (["--strategy", "ssp", "--sync-every", "2"], "--sync-every is of --strategy local or all"),
        (["--strategy", "ssp", "--staleness", "0"], "--staleness 0 is synchronous: that is --strategy ps"),
        (["--strategy", "ssp", "--staleness", "-1"], "--staleness must be at least 1"),
        (["--strategy", "ps", "--servers", "0"], "--servers must be at least 1"),
        (["--strategy", "local", "--sync-every", "0"], "--sync-every must be at least 1"),
        (["--strategy", "ps", "--micro-shards", "4"], "--micro-shards is of synchronous training: leave it out"),
        (["--strategy", "hogwild", "--save", "x"], "--save is of synchronous training: leave it out"),
        (["--strategy", "ps", "--resume", "x"], "--resume is of synchronous training: leave it out"),
        (["--strategy", "local", "--naive"], "--naive is of synchronous training"),
        (["--strategy", "local", "--balance"], "--balance is of synchronous training"),
        (["--strategy", "all", "--until", "90"], "--until is of synchronous training"),
        (["--strategy", "all", "--trace", "t"], "--trace is of synchronous training"),
        (["--strategy", "all", "--workers", "1"], "give --workers 2 or more"),
        (["--strategy", "async", "--straggler", "1:5"], "describes a virtual cluster: add --world virtual"),
        (["--strategy", "async", "--jitter", "0.1"], "describes a virtual cluster: add --world virtual"),
        (["--strategy", "all", "--straggler", "4:5"], "straggler 4 is beyond the cluster: its nodes are 0 to 3"),
        (["--strategy", "all", "--plot", "x.foo"], "give a name that ends in .png, .svg, .pdf"),
        (["--plot", "x.png"], "--plot draws the timeline of a virtual cluster: add --world virtual"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_does_not_go_together(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(options)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert says in err.splitlines()[-1]


def test_help_lists_the_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    for option in ("--strategy", "--servers", "--staleness", "--sync-every"):
        assert re.search(rf"^  {option}\b.*?[a-z]{{3}} [a-z]", out, re.MULTILINE | re.DOTALL), option
    said = " ".join(out.split())
    for name in WAYS:
        assert f"{name}: " in said or f"{name}," in said


def size(picture: Path) -> tuple[int, int]:
    """(width, height) in pixels, of a PNG that is whole."""
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert content.endswith(b"IEND\xaeB`\x82")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_the_picture_of_curves(tmp_path: Path) -> None:
    losses = {"a": [(0.0, 2.3), (0.1, 1.0), (0.2, 0.05)], "b": [(0.0, 2.3), (0.2, 1.5)]}
    figure = plot_curves(losses, {"b": {0: 30, 1: 968, 7: 2}, "a": {}}, tmp_path / "x.png", "A title", "time")
    assert size(tmp_path / "x.png") == (1500, 630)
    left, right = figure.axes
    assert left.get_xlabel() == "time [ms]"
    assert [line.get_xdata()[-1] for line in left.get_lines()] == pytest.approx([200, 200])
    assert left.get_yscale() == "log"
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["b"], "of a there are no gradients"
    assert [bar.get_height() for bar in right.patches] == pytest.approx([0.03, 0.968, 0.002]), "τ = 0, 1 and later"
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["0", "1", ">1"]
    assert right.patches[0].get_facecolor()[:3] == pytest.approx(hex_colour(left.get_lines()[1].get_color()))
    alone = plot_curves({"b": losses["b"]}, {}, names=["a", "b"])
    assert len(alone.axes) == 1
    assert alone.axes[0].get_lines()[0].get_color() == left.get_lines()[1].get_color(), "b looks the same"


def hex_colour(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
