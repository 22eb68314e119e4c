"""A step on a device is committed before it is known to be good: what is not, is taken back a step later."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend, nn, optim, parallel
from minidp.nn import functional as F
from tests import host_cuda
from tests.device_double import DoubleDevice
from tests.leftovers import nothing_is_left
from tests.test_faults import NOTICE_S, failed, killed_at_a_random_moment, killed_in_forward, training
from tests.test_strategies_device import DOUBLES, PLACES, spawned
from tests.told import told

pytestmark = pytest.mark.timeout(60)

# What rank 0 and rank 1 have, in which of the first and the last parameter.
SPOILT: dict[str, list[tuple[int, int, float]]] = {
    "inf in the first": [(0, 0, np.inf)],
    "nan in the same": [(1, 0, np.nan)],
    "two ranks": [(0, -1, -np.inf), (1, 0, np.nan), (0, 0, -np.inf)],
    "only the sum": [(0, -1, 1.0), (1, -1, 1.0)],  # times the largest number
    "infinities that cancel": [(0, -1, np.inf), (1, -1, -np.inf)],
}
SAID = {
    "inf in the first": "'0.weight' is inf on rank 0",
    "nan in the same": "'0.weight' is nan on rank 1",
    "two ranks": "'0.weight' is -inf on rank 0",
    "infinities that cancel": "'3.bias' is inf on rank 0",
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"clip_norm": 0.1, "bucket_cap_mb": 0.0},
    {"micro_shards": 4},
    {"accumulation_steps": 2},
]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with nothing_is_left():
        yield


def build(comm: Any, dtype: str = "float32", **options: Any) -> Any:
    layers = nn.Linear(6, 9), nn.Dropout(0.2), nn.Tanh(), nn.Linear(9, 3)
    model = nn.Sequential(*layers, seed=0).astype(dtype)
    rule = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return parallel.DataParallel(model, rule, comm, **options)


def give(s: Any, batch: int) -> None:
    rng = np.random.default_rng([batch, s.comm.rank])
    x = rng.standard_normal((8, 6)).astype(s.layout.dtype)
    for _ in range(s.accumulation_steps):
        s.forward_backward(x, rng.integers(0, 3, 8), F.cross_entropy)


def give_spoilt(s: Any, batch: int, what: str) -> None:
    largest = float(np.finfo(s.layout.dtype).max)

    def spoil(p: Any) -> None:
        for who, which, value in SPOILT[what]:
            if who == s.comm.rank and s.layout.segments[which].parameter is p:
                grad = p.grad.data.copy()
                grad.reshape(-1)[1] = value * largest
                p.grad = grad

    removers = [g.parameter.register_post_accumulate_grad_hook(spoil) for g in s.layout.segments]
    with np.errstate(all="ignore"):  # micro-shards of the host are added in backward
        give(s, batch)
    for remove in removers:
        remove()


def held(s: Any) -> dict[str, np.ndarray]:
    """All that a step changes, without a word to others."""
    state = s.model.state_dict()
    for slot, of_slot in s.optimizer_state().items():
        state |= {f"{slot}.{name}": backend.to_numpy(array).copy() for name, array in of_slot.items()}
    return state | {"updates": np.array(s.updates)}


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return all(one[name].tobytes() == other[name].tobytes() for name in one | other)


def spoilt_in(dtype: str) -> list[str]:
    """Sums of halves are made in float32, where two largest numbers have room."""
    return [what for what in SPOILT if dtype != "float16" or what != "only the sum"]


def bad_steps(comm: Any, dtype: str, options: dict[str, Any], learns_by: str) -> tuple[list[str], Any]:
    """What is said of each bad step, and what comes of it all. The CPU gets no batch where a device loses one."""
    s, said = build(comm, dtype, **options), []
    for number, what in enumerate(spoilt_in(dtype)):
        give(s, 10 * number)
        s.step()
        before = held(s)
        give_spoilt(s, 10 * number + 1, what)
        if comm.device.on_host:
            said.append(told(s.step))
        else:
            s.step()  # nothing is known yet
            assert s.updates == before["updates"] + 1
            if learns_by == "step":
                give(s, 10 * number + 2)
                said.append(told(s.step))
                assert s.in_step
                assert "call strategy.discard()" in told(s.step)
            elif learns_by == "state_dict":
                said.append(told(s.state_dict))
                assert not s.in_step
            elif learns_by == "state_dict in a step":
                give(s, 10 * number + 2)
                said.append(told(s.state_dict))
                assert "call strategy.discard()" in told(s.step), "those gradients were of a w that is no more"
            elif learns_by == "save":
                said.append(told(lambda: s.save(Path("/nowhere"))))
                assert not s.in_step
        assert same(before, held(s))
        if s.in_step:
            s.discard()
        assert same(before, before | s.state_dict())
    give(s, 100)
    s.step()
    s.state_dict()
    return said, held(s)


@pytest.mark.parametrize(("world", "double"), PLACES)
@pytest.mark.parametrize("learns_by", ["step", "state_dict", "state_dict in a step", "save"])
def test_a_bad_step_is_taken_back(learns_by: str, world: str, double: str) -> None:
    plans = [("float32", options) for options in OPTIONS] if learns_by == "step" else [("float32", {})]
    plans += [("float16", {}), ("float64", {})] if learns_by == "step" else []
    for dtype, options in plans:
        want = spawned(bad_steps, 2, world, "cpu", dtype, options, "")
        got = spawned(bad_steps, 2, world, DOUBLES[double](), dtype, options, learns_by)
        for (says, state), (also, there) in zip(want, got, strict=True):
            assert says == also
            assert same(state, there), (dtype, options)
            for what, line in zip(spoilt_in(dtype), says, strict=True):
                if options.get("accumulation_steps", 1) == 1 and "micro_shards" not in options:
                    assert SAID.get(what, "'3.bias' is ") in line
                assert line.startswith("NonFiniteGradient: ")


def test_alone() -> None:
    want = spawned(bad_steps_alone, 1, "process", "cpu")
    for world, double in PLACES:
        assert spawned(bad_steps_alone, 1, world, DOUBLES[double]()) == want


def bad_steps_alone(comm: Any) -> tuple[str, bytes]:
    s = build(comm)
    give(s, 0)
    s.step()
    give_spoilt(s, 1, "inf in the first")
    says = told(lambda: (s.step(), s.state_dict()))
    s.discard()
    give(s, 2)
    s.step()
    return says, s.state_dict()["0.weight"].tobytes()


def nobody_looks(comm: Any, check_finite: bool) -> bool:
    s = build(comm, check_finite=check_finite)
    give_spoilt(s, 0, "inf in the first")
    s.step()
    if check_finite:
        s.load_state_dict(build(comm).model.state_dict())  # takes the step back: w is replaced, m is not
    return all(np.isfinite(array).all() for array in held(s).values())


def test_loading_forgets_a_bad_step_and_no_check_means_none() -> None:
    for world in ("process", "virtual"):
        assert spawned(nobody_looks, 2, world, DoubleDevice(), True) == [True] * 2
        assert spawned(nobody_looks, 2, world, DoubleDevice(), False) == [False] * 2


def loads_after_a_bad_step(comm: Any, folder: str) -> bool:
    s = build(comm)
    give(s, 0)
    s.step()
    good = held(s)
    s.save(folder)
    give_spoilt(s, 1, "nan in the same")
    s.step()
    s.load(folder)
    return same(good, held(s)) and same(good, good | s.state_dict())


def test_a_checkpoint_replaces_a_bad_step(tmp_path: Path) -> None:
    for world, double in PLACES:
        folder = str(tmp_path / world / double)
        assert all(spawned(loads_after_a_bad_step, 2, world, DOUBLES[double](), folder))


# -- a killed rank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", DOUBLES)
def test_a_killed_rank_is_noticed(double: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "minidp.launch")
    for ranks, how, more in ((3, killed_in_forward, ()), (2, killed_at_a_random_moment, (0.02,))):
        place = str(tmp_path / how.__name__)
        error, noticed = failed(training, ranks, how, place, *more, device=DOUBLES[double](), progress=False)
        assert isinstance(error, minidp.RankFailed)
        assert error.rank == 1
        assert "was killed by SIGKILL" in str(error)
        assert noticed - float(Path(place).read_text()) < NOTICE_S + 0.3


# -- by kernels, and checksums -----------------------------------------------------------------------------------


@pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"micro_shards": 4}])
def test_kernels_find_the_same(options: dict[str, Any]) -> None:
    """They add up in other orders than NumPy, so that w is equal to rounding; what is not finite is the same."""
    want = spawned(bad_steps, 2, "process", "cpu", "float32", options, "")
    for shareable in (True, False):
        device = DoubleDevice(shareable=shareable, kernels=True)
        got = spawned(bad_steps, 2, "process", device, "float32", options, "step")
        for (says, state), (also, there) in zip(want, got, strict=True):
            assert says == also
            for name, array in state.items():
                np.testing.assert_allclose(there[name], array, rtol=1e-4, atol=1e-6, err_msg=name)


def corrupted(comm: Any) -> tuple[list[str], dict[str, np.ndarray]]:
    s, said = build(comm, checksum=True), []
    for batch in range(4):
        give(s, batch)
        if batch == 2 and comm.rank == 1:
            s._own[3] = 7.0
        said.append(told(s.step))
        if said[-1] != "nothing":
            s.discard()
    return said, s.state_dict()


def test_a_changed_gradient_is_found_on_a_device() -> None:
    want, got = (spawned(corrupted, 2, "process", device) for device in ("cpu", DoubleDevice()))
    for (says, state), (also, there) in zip(want, got, strict=True):
        assert says == also
        assert "CorruptGradient" in says[2]
        assert says.count("nothing") == 3
        assert same(state, there)
