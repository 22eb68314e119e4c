"""This machine as a ``Cluster``: what operations, FLOPs, memory and messages cost here, measured and fitted.

    python -m minidp.calibrate      times training steps of probe models and counts what they compute
    fit                             makes a Cluster's numbers of that

The model is that of ``Cluster.compute_s``, for two workers with one exchange of all n gradient bytes added:

    t₁ = operations · op_overhead_s + FLOPs / flops + bytes / memory_bytes_per_s          t₂ = t₁ + α + n β
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from minidp.sim.cluster import Cluster

_log = logging.getLogger("minidp.sim")
_HOME = str(Path(__file__).resolve().parents[2])
_COMMAND = (
    "-P",
    "-m",
    "minidp.calibrate",
)  # -P: nothing in the folder where we happen to be is taken for a module
_BLAS = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_BUSY = 0.2  # of a core; less is the system itself

Matrix = npt.NDArray[np.float64]


class Probe(NamedTuple):
    """One training step: what it counts on a rank (``backend.meter``), and the seconds that it took.

    ``two_s`` is a step of two workers together, each with the work of the one in ``one_s``; None: not measured.
    """

    operations: float
    flops: float
    nbytes: float
    gradient_bytes: float
    one_s: float
    two_s: float | None = None


def calibrate(seconds: float = 4.0, timeout_s: float = 60.0) -> Cluster:
    """Measure this machine: a cluster with a node for each core, as fast as a core is in training steps.

    A fresh process, and two workers of it, with one BLAS thread each, train small models for ``seconds`` and 1.5 s
    besides. Each model counts with the median of its bursts of steps, so this is the machine as it was for most of
    that time: if other programs or guests of its host disturb, for longer then or more later, predictions are off
    by what they take. Of a core that is taken all the time a warning of the logger ``minidp.sim`` says so. The
    network is the shared memory between two workers: α is what meeting twice costs, β what exchanging gradients
    costs over updating all of them alone. How more than two cores slow each other down is not measured. With one
    core, only computing is measured: a warning says so.

    Raises RuntimeError if the measurement fails or takes longer than ``timeout_s``, with its last words.
    """
    report = _measure(seconds, timeout_s)
    probes = [Probe(**{name: each[name] for name in Probe._fields}) for each in report["probes"]]
    cluster = fit(probes, nodes=report["cores"])
    if report["workers"] == 1:
        _log.warning("calibrate: one core, so no messages were measured: latency and bandwidth are the defaults")
    if report["others_cores"] is not None and report["others_cores"] > _BUSY:
        _log.warning(
            "calibrate: other programs took %.1f of %d cores meanwhile: calibrate again when the machine is quiet",
            report["others_cores"],
            report["cores"],
        )
    errors = prediction_errors(cluster, probes)
    _log.info(
        "calibrate: %s; the probes' steps are predicted within %.0f %%", cluster, 100 * max(map(abs, errors))
    )
    return cluster


def fit(probes: Sequence[Probe], nodes: int = 2) -> Cluster:
    """The cluster that predicts the probes' times best: nonnegative least squares of relative errors.

    Where the best coefficient is 0, that part costs nothing here: ``flops`` and ``bandwidth_bytes_per_s`` are then
    infinite, ``memory_bytes_per_s`` None. Without ``two_s`` in any probe, the network is the default one.

    Raises ValueError for times that are none, and for probes that are too few, or too much alike, to tell apart
    operations, FLOPs and bytes (three at least), or latency and bandwidth (two at least, with ``two_s``).
    """
    for i, probe in enumerate(probes):
        if not all(math.isfinite(value) and value >= 0 for value in probe if value is not None):
            raise ValueError(
                f"probe {i} has a number that is not finite or is negative, {probe}: measure it again"
            )
        if probe.one_s == 0 or probe.two_s == 0:
            raise ValueError(f"probe {i} took no time, {probe}: time more steps of it")
    one_s = np.array([p.one_s for p in probes])
    work = np.array([p[:3] for p in probes], float).reshape(-1, 3)
    per_operation, per_flop, per_byte = _solve(work, one_s, one_s, "operations, FLOPs and bytes")
    network: dict[str, Any] = {}
    pairs = [(p.gradient_bytes, p.one_s, p.two_s) for p in probes if p.two_s is not None]
    if pairs:
        nbytes, one, two = np.array(pairs).T
        exchange = np.stack([np.ones_like(nbytes), nbytes], axis=1)
        latency_s, beta = _solve(exchange, two - one, two, "latency and bandwidth")
        network = {"latency_s": latency_s, "bandwidth_bytes_per_s": _speed(beta)}
    return Cluster(
        nodes=nodes,
        flops=_speed(per_flop),
        op_overhead_s=per_operation,
        memory_bytes_per_s=1 / per_byte if per_byte else None,
        **network,
    )


def predict(cluster: Cluster, probe: Probe) -> tuple[float, float]:
    """Seconds of the probe's step on ``cluster``: one worker, two workers."""
    one_s = float(cluster.compute_s(probe.operations, probe.flops, probe.nbytes))
    return one_s, one_s + cluster.latency_s + probe.gradient_bytes * cluster.seconds_per_byte


def prediction_errors(cluster: Cluster, probes: Sequence[Probe]) -> list[float]:
    """Predicted over measured seconds, less 1, of every time that the probes have."""
    errors = []
    for probe in probes:
        one_s, two_s = predict(cluster, probe)
        errors.append(one_s / probe.one_s - 1)
        if probe.two_s is not None:
            errors.append(two_s / probe.two_s - 1)
    return errors


def _speed(seconds_per_unit: float) -> float:
    return 1 / seconds_per_unit if seconds_per_unit else math.inf


def _solve(amounts: Matrix, seconds: Matrix, scale: Matrix, unknowns: str) -> list[float]:
    """Costs c ≥ 0 that minimise Σ ((amounts · c − seconds) / scale)², one a column of ``amounts``."""
    rows, columns = amounts.shape
    if rows < columns:
        raise ValueError(
            f"{rows} probes can't tell apart {unknowns}: measure at least {columns}, of different kinds"
        )
    matrix = amounts / scale[:, None]
    lengths = np.linalg.norm(matrix, axis=0)
    matrix = matrix / np.where(lengths > 0, lengths, 1)  # columns differ by a factor of 10⁶ in size
    if np.linalg.matrix_rank(matrix) < columns:
        raise ValueError(
            f"the probes are too much alike to tell apart {unknowns}: measure models of different kinds"
        )
    target = seconds / scale
    best, least = np.zeros(columns), float(target @ target)
    # The optimum is the unconstrained one of those columns that it uses: with three columns, try all seven sets.
    for count in range(1, columns + 1):
        for used in itertools.combinations(range(columns), count):
            costs = np.linalg.lstsq(matrix[:, used], target, rcond=None)[0]
            residual = matrix[:, used] @ costs - target
            if (costs >= 0).all() and float(residual @ residual) < least:
                best, least = np.zeros(columns), float(residual @ residual)
                best[list(used)] = costs
    return [float(cost) for cost in best / lengths]


def _measure(seconds: float, timeout_s: float) -> dict[str, Any]:
    """What ``python -m minidp.calibrate`` says, run as this process would run it, whatever the current folder."""
    path = [entry or os.getcwd() for entry in sys.path]
    environment = {
        **os.environ,
        **dict.fromkeys(_BLAS, "1"),
        "PYTHONPATH": os.pathsep.join([*path, *([] if _HOME in path else [_HOME])]),
    }
    command = [sys.executable, *_COMMAND, "--seconds", str(seconds)]
    told = f"the calibration ({' '.join(command)})"
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
        )  # killed at the limit; its workers end when it does
    except subprocess.TimeoutExpired:
        raise RuntimeError(
            f"{told} did not end within {timeout_s:g} s: the machine may be overloaded; try again, or "
            "with a larger timeout_s"
        ) from None
    except OSError as error:
        raise RuntimeError(f"{told} could not be started: {error}") from error
    if done.returncode:
        last = "".join(f"\n    {line}" for line in done.stderr.strip().splitlines()[-6:])
        raise RuntimeError(f"{told} failed with exit status {done.returncode}:{last}")
    try:
        report: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        raise RuntimeError(f"{told} printed something else than JSON: {done.stdout[:200]!r}") from None
    return report
