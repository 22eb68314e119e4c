"""Checkpoints between devices and the host, ranks that share memory of a device without a lock, recorded runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import data, parallel
from minidp.backend import Device
from minidp.nn import functional as F
from minidp.parallel import event_log
from minidp.replay.rerun import rerun
from tests.device_double import DoubleDevice
from tests.leftovers import nothing_is_left
from tests.test_hogwild import ROWS, WIDTH, rows_of, serial_rows, train_rows
from tests.test_replay import train as train_recorded
from tests.test_strategies_device import DOUBLES, PLACES, WORLDS, Case, dataset, spawned

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with nothing_is_left():
        yield
        gc.collect()  # a virtual rank's device has descriptors, for as long as it lives


# -- checkpoints -----------------------------------------------------------------------------------------------

CASES = {
    "slabs": Case("DataParallel", "normed", "adamw"),
    "tied": Case("DataParallel", "tied"),
    "half": Case("DataParallel", "float16"),
    "residuals": Case("DataParallel", "normed", compress="topk:0.2+ef"),
    "naive": Case("NaiveDataParallel", "normed"),
    "outer": Case("LocalSGD", "gpt", "adamw", sync_every=3, outer=True),
    "servers": Case("ParameterServer", "normed", compress="int8+ef"),
}


def leg(comm: Any, case: str, folder: str, load: bool) -> dict[str, np.ndarray]:
    """Three updates, or the next three of a checkpoint, which ends each."""
    s = CASES[case].build(comm)
    if load:
        assert s.load(folder).updates == s.updates == 3
    loader = data.DataLoader(dataset(CASES[case].model), global_batch_size=16, shard=s.shard, shuffle=True, seed=3)
    for _ in range(3):
        epoch, step = loader.position(s.updates)
        x, y = next(iter(loader.epoch(epoch, start_step=step)))
        s.forward_backward(x, y, F.cross_entropy)
        s.step()
    s.save(folder)
    state: dict[str, np.ndarray] = s.state_dict()
    return state


@pytest.mark.parametrize("double", DOUBLES)
@pytest.mark.parametrize("case", CASES)
def test_checkpoints_go_between_the_device_and_the_host(case: str, double: str, tmp_path: Path) -> None:
    servers = 2 * (case == "servers")

    def legs(*places: tuple[str, str | Device]) -> dict[str, np.ndarray]:
        folder = str(tmp_path / "-".join(f"{world} {device}" for world, device in places))
        for number, (world, device) in enumerate(places):
            states = spawned(leg, 2, world, device, case, folder, number > 0, servers=servers)
        return states[1]

    there = DOUBLES[double]()
    want = legs(("virtual", "cpu"), ("virtual", "cpu"))
    for places in (
        (("virtual", there), ("virtual", "cpu")),
        (("process", "cpu"), ("process", there)),
        (("process", there), ("virtual", there)),
    ):
        got = legs(*places)
        assert [k for k in want if want[k].tobytes() != got[k].tobytes()] == []


# -- without a lock ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_hogwild_on_memory_of_a_device(rule: str, world: str) -> None:
    """Supports that are disjoint: all updates are there, whoever came when."""
    for ranks in (1, 2):
        expected = serial_rows(rule, ranks)
        for state, metrics in spawned(train_rows, ranks, world, DoubleDevice(), parallel.Hogwild, rule):
            assert state["0.weight"].shape == (ROWS, WIDTH)
            assert state["0.weight"].tobytes() == expected.tobytes(), (ranks, rule)
            assert metrics["lost_updates"] == 0
            counts = [rows_of(r, ranks, step, rule == "adam").size for r in range(ranks) for step in range(30 + r)]
            assert metrics["updates_written"] == WIDTH * sum(counts)


@pytest.mark.parametrize(("world", "double"), PLACES)
def test_one_hogwild_alone_has_the_bits_of_the_cpu(world: str, double: str) -> None:
    case = Case("Hogwild", "normed", "adamw", count_lost=double == "its own")
    want, got = (spawned(case.run, 1, world, device) for device in ("cpu", DOUBLES[double]()))
    for (name, here), there in zip(want[0].items(), got[0].values(), strict=True):
        assert here.tobytes() == there.tobytes(), name


def overlapping(comm: Any) -> tuple[bool, dict[str, float]]:
    s = Case("Hogwild", "mlp").build(comm)
    x, y = dataset("mlp")[np.arange(32)]
    losses = []
    for _ in range(30):
        losses.append(s.forward_backward(x, y, F.cross_entropy).item())
        s.step()
    state = s.state_dict()
    s.load_state_dict(state)
    again = s.state_dict()
    comm.barrier()
    assert all(np.array_equal(state[name], again[name]) for name in state)
    return losses[-1] < losses[0], s.metrics


def test_ranks_overwrite_each_other_on_a_device() -> None:
    for world in WORLDS:
        for learned, metrics in spawned(overlapping, 2, world, DoubleDevice()):
            assert learned
            assert 0 <= metrics["lost_updates"] < metrics["updates_written"]


def test_hogwild_says_that_it_needs_memory_which_all_see() -> None:
    with pytest.raises(
        minidp.RankFailed,
        match=r"ValueError: .*no memory of each other on double.*need one w that all ranks share",
    ):
        spawned(train_rows, 2, "process", DoubleDevice(shareable=False), parallel.Hogwild, "sgd")


# -- recorded runs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("options", [{"staleness": None}, {"staleness": 0, "backup_workers": 1}])
def test_a_recorded_run_on_a_device_is_run_again(options: dict[str, Any], world: str, tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    minidp.spawn(
        train_recorded, 2, options, servers=2, world=world, device=DoubleDevice(), record=path, progress=False
    )
    log = event_log.read(path)
    assert log.facts["device"] == "double"
    assert log.ends
    assert rerun(log, device=DoubleDevice()).ends == log.ends
