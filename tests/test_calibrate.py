"""Calibration: the fit on made-up probes, the command that measures real ones, what happens when it fails."""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minidp.bench import leftovers
from minidp.launch import cores
from minidp.sim.calibration import Probe, calibrate, fit, predict, prediction_errors
from minidp.sim.cluster import Cluster

MODULE = sys.modules["minidp.sim.calibration"]
HOME = Path(__file__).resolve().parents[1]
KNOWN = Cluster(
    nodes=2,
    op_overhead_s=7e-6,
    flops=9e10,
    memory_bytes_per_s=3.7e10,
    latency_s=5e-6,
    bandwidth_bytes_per_s=2e10,
)


def made_up(
    cluster: Cluster, count: int = 8, noise: float = 0.0, paired: bool = True, seed: int = 3
) -> list[Probe]:
    """Probes of all sizes whose times are what ``cluster`` says, times exp(noise · z)."""
    rng = np.random.default_rng(seed)
    probes = []
    for _ in range(count):
        probe = Probe(
            operations=int(rng.integers(9, 25)),
            flops=10 ** rng.uniform(4, 9),
            nbytes=10 ** rng.uniform(4, 8),
            gradient_bytes=10 ** rng.uniform(3, 7),
            one_s=1,
        )
        one_s, two_s = predict(cluster, probe) * np.exp(noise * rng.standard_normal(2))
        probes.append(probe._replace(one_s=one_s, two_s=two_s if paired else None))
    return probes


# ── the fit ─────────────────────────────────────────────────────────────────────────────────────────────


def test_known_constants_are_recovered() -> None:
    found = fit(made_up(KNOWN), nodes=5)
    assert found.nodes == 5
    for name in ("op_overhead_s", "flops", "memory_bytes_per_s", "latency_s", "bandwidth_bytes_per_s"):
        assert getattr(found, name) == pytest.approx(getattr(KNOWN, name), rel=1e-6), name
    assert max(map(abs, prediction_errors(found, made_up(KNOWN)))) < 1e-9


def test_three_probes_are_enough() -> None:
    found = fit(made_up(KNOWN, count=3))
    assert found.flops == pytest.approx(KNOWN.flops, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_three_percent_leaves_good_predictions(seed: int) -> None:
    """Two workers' time less one's is noisier than either, so a tenth is what can be asked for."""
    found = fit(made_up(KNOWN, count=10, noise=0.03, seed=seed))
    assert max(map(abs, prediction_errors(found, made_up(KNOWN, count=10, seed=seed)))) < 0.1


def test_without_pairs_the_network_is_the_default_one() -> None:
    found = fit(made_up(KNOWN, paired=False))
    assert found.op_overhead_s == pytest.approx(KNOWN.op_overhead_s)
    assert (found.latency_s, found.bandwidth_bytes_per_s) == (5e-6, 1.25e9)
    assert len(prediction_errors(found, made_up(KNOWN, paired=False))) == 8


def test_what_costs_nothing_is_infinitely_fast() -> None:
    free = Cluster(2, flops=math.inf, op_overhead_s=1e-6, latency_s=0, bandwidth_bytes_per_s=math.inf)
    found = fit(made_up(free))
    assert found.op_overhead_s == pytest.approx(1e-6)
    assert found.flops > 1e20  # rounding may leave a trace
    assert found.memory_bytes_per_s is None or found.memory_bytes_per_s > 1e20
    assert found.latency_s < 1e-15
    assert found.bandwidth_bytes_per_s > 1e20


def test_two_workers_that_are_faster_than_one_need_no_network() -> None:
    """It happens: they share the update, and what that saves may be more than what the exchange costs."""
    probes = [probe._replace(two_s=0.9 * probe.one_s) for probe in made_up(KNOWN)]
    found = fit(probes)
    assert (found.latency_s, found.bandwidth_bytes_per_s) == (0, math.inf)
    one_s, two_s = predict(found, probes[0])
    assert one_s == two_s


def test_the_fit_is_the_best_that_is_not_negative() -> None:
    """Karush-Kuhn-Tucker: no slope where a cost is positive, an upward one where it is 0."""
    rng = np.random.default_rng(0)
    zeros = 0
    for _ in range(200):
        amounts, seconds = rng.random((6, 3)), rng.standard_normal(6) + 0.5
        scale = rng.uniform(0.5, 2, 6)
        costs = np.array(MODULE._solve(amounts, seconds, scale, "…"))
        slope = (amounts / scale[:, None]).T @ ((amounts @ costs - seconds) / scale)
        assert (costs >= 0).all()
        assert np.allclose(slope[costs > 0], 0, atol=1e-9)
        assert (slope > -1e-9).all()
        zeros += int((costs == 0).any())
    assert 20 < zeros < 200


@pytest.mark.parametrize(
    ("probes", "match"),
    [
        ([], "0 probes can't tell apart operations, FLOPs and bytes: measure at least 3"),
        (made_up(KNOWN, count=2), "2 probes can't tell apart operations"),
        (made_up(KNOWN, count=1) * 5, "too much alike to tell apart operations, FLOPs and bytes: measure models"),
        ([p._replace(gradient_bytes=8) for p in made_up(KNOWN)], "too much alike to tell apart latency and"),
        (
            [*made_up(KNOWN)[:1], *made_up(KNOWN, paired=False)[1:]],
            "1 probes can't tell apart latency and bandwidth: measure at least 2",
        ),
        ([*made_up(KNOWN), made_up(KNOWN)[0]._replace(one_s=math.nan)], "probe 8 has a number that is not finite"),
        ([made_up(KNOWN)[0]._replace(two_s=math.inf), *made_up(KNOWN)], "probe 0 .*: measure it again"),
        ([made_up(KNOWN)[0]._replace(flops=-1), *made_up(KNOWN)], "probe 0 .* or is negative"),
        ([made_up(KNOWN)[0]._replace(one_s=0), *made_up(KNOWN)], "probe 0 took no time"),
    ],
)
def test_probes_that_tell_nothing_are_refused(probes: list[Probe], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        fit(probes)


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "minidp.calibrate", *arguments],
        env={**os.environ, **variables},
        cwd=HOME,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_prints_json_and_nothing_else_and_leaves_nothing() -> None:
    token = secrets.token_hex()
    done = command("--seconds", "0.3", "--workers", "1", **{leftovers.VARIABLE: token})
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert (report["cores"], report["workers"], report["seconds"]) == (cores(), 1, 0.3)
    assert leftovers.gone_within(token, 5) is not None
    probes = report["probes"]
    for probe in probes:
        assert probe["two_s"] is None
        # SGD with momentum and Adam: forward, backward and update of every parameter are in the count.
        *_, inputs, outputs = probe["widths"]
        assert probe["operations"] >= 4 * (len(probe["widths"]) - 1) + 1
        assert probe["flops"] > 6 * probe["batch"] * inputs * outputs
        assert probe["gradient_bytes"] == 4 * sum(
            (a + 1) * b for a, b in zip(probe["widths"], probe["widths"][1:])
        )
        assert probe["nbytes"] > 5 * probe["gradient_bytes"]
        assert 0 < probe["one_s"] < 60
    fit([Probe(**{name: probe[name] for name in Probe._fields}) for probe in probes])


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "long"])
def test_the_command_refuses_a_time_that_is_none(seconds: str) -> None:
    done = command(f"--seconds={seconds}")
    assert done.returncode == 2
    assert f"{seconds!r} is no time to measure for" in done.stderr


def test_calibrate_works_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("numpy.py", "minidp.py", "json.py"):  # must not be taken for the real ones
        (tmp_path / name).write_text("raise ImportError('the wrong one')")
    monkeypatch.chdir(tmp_path)
    token = secrets.token_hex()
    monkeypatch.setenv(leftovers.VARIABLE, token)
    cluster = calibrate(seconds=0.3)
    assert cluster.nodes == cores()
    assert 1e-7 < cluster.op_overhead_s < 1e-2
    assert cluster.flops > 1e7
    assert capfd.readouterr() == ("", "")
    assert leftovers.gone_within(token, 5) is not None


# ── what calibrate makes of it ──────────────────────────────────────────────────────────────────────────


def report(**changes: Any) -> dict[str, Any]:
    probes = [probe._asdict() for probe in made_up(KNOWN, paired=changes.get("workers") != 1)]
    return {"cores": 2, "workers": 2, "others_cores": 0.0, "probes": probes, **changes}


def test_the_measurement_is_fitted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(MODULE, "_measure", lambda seconds, timeout_s: report(cores=6))
    with caplog.at_level(logging.INFO, "minidp.sim"):
        cluster = calibrate()
    assert cluster.nodes == 6
    assert cluster.flops == pytest.approx(KNOWN.flops)
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "predicted within 0 %" in record.getMessage()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cores": 1, "workers": 1}, "one core, so no messages were measured"),
        ({"others_cores": 0.97}, "other programs took 1.0 of 2 cores meanwhile"),
    ],
)
def test_what_makes_the_figures_doubtful_is_said(
    changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(MODULE, "_measure", lambda seconds, timeout_s: report(**changes))
    cluster = calibrate()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert said in record.getMessage()
    if changes.get("workers") == 1:
        assert (cluster.nodes, cluster.bandwidth_bytes_per_s) == (1, 1.25e9)


@pytest.mark.parametrize(
    ("program", "match"),
    [
        ("import sys; sys.exit('no room')", r"failed with exit status 1:\n    no room$"),
        ("print('Hello')", r"printed something else than JSON: 'Hello\\n'"),
        ("import os; os.kill(os.getpid(), 9)", r"failed with exit status -9"),
        ("import time; time.sleep(60)", r"did not end within 1 s: .* larger timeout_s"),
    ],
)
def test_a_measurement_that_fails_is_told(program: str, match: str, monkeypatch: pytest.MonkeyPatch) -> None:
    token = secrets.token_hex()
    monkeypatch.setenv(leftovers.VARIABLE, token)
    monkeypatch.setattr(MODULE, "_COMMAND", ("-c", program))
    with pytest.raises(RuntimeError, match=f"(?s)the calibration .*{match}"):
        calibrate(timeout_s=1)
    assert leftovers.gone_within(token, 5) is not None


def test_workers_end_when_the_limit_ends_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    token = secrets.token_hex()
    monkeypatch.setenv(leftovers.VARIABLE, token)
    with pytest.raises(RuntimeError, match=r"did not end within 1\.5 s"):
        calibrate(seconds=600, timeout_s=1.5)
    assert leftovers.gone_within(token, 5) is not None


def test_no_interpreter_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(RuntimeError, match="could not be started"):
        calibrate()
