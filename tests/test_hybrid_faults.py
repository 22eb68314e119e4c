"""One verdict for a whole mesh: a bad gradient anywhere is raised everywhere; a rank that fails ends the run."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import backend, nn, optim, parallel
from minidp.nn import functional as F
from tests.device_double import DoubleDevice
from tests.leftovers import nothing_is_left
from tests.meshes import State, build, forward, same
from tests.told import told

pytestmark = pytest.mark.timeout(60)
NOTICE_S = 0.2  # a dead rank
DEVICES: dict[str, Any] = {
    "cpu": lambda: "cpu",
    "double": DoubleDevice,
    "double of its own": lambda: DoubleDevice(shareable=False),
}


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    with nothing_is_left():
        yield


def spawned(fn: Any, ranks: int, world: str, device: Any, *args: Any) -> list[Any]:
    return minidp.spawn(fn, ranks, *args, world=world, device=device, progress=False, blas_threads=1, timeout_s=20)


def held(s: Any) -> State:
    """All that a step changes on this rank, without a word to others."""
    state = s.model.state_dict()
    for slot, of_slot in s._inner.optimizer_state().items():
        state |= {f"{slot}.{name}": backend.to_numpy(array).copy() for name, array in of_slot.items()}
    return state | {"updates": np.array(s.updates)}


# -- not finite --------------------------------------------------------------------------------------------------


def spoil(s: Any, rank: int, which: int, value: float, step: int) -> None:
    """A backward whose gradient of one of a rank's parameters holds something bad."""

    def change(p: Any) -> None:
        grad = p.grad.data.copy()
        grad.reshape(-1)[0] = value
        p.grad = grad

    removers = []
    if s.comm.rank == rank:
        removers = [s.layout.segments[which].parameter.register_post_accumulate_grad_hook(change)]
    forward(s, step, 16)
    for remove in removers:
        remove()


def bad_steps(comm: Any, mesh: Any, options: dict[str, Any], culprits: list[int]) -> tuple[list[str], State]:
    """What is said of each bad step; what comes of all. A step on a device is known to be bad one later."""
    s, said = build(comm, mesh, dropout=0.1, **options), []
    late = not comm.device.on_host and "compress" not in options
    forward(s, 0, 16)
    s.step()
    for number, rank in enumerate(culprits):
        before = held(s)
        spoil(s, rank, number % 2, (np.nan, np.inf, -np.inf)[number % 3], 100 + number)
        if late:
            s.step()
            if number % 2:
                forward(s, 200, 16)  # is lost with it
        said.append(told(s.state_dict if late and not number % 2 else s.step))
        assert same(before, held(s)), "nothing was committed"
        if s.in_step:
            assert "call strategy.discard()" in told(s.step)
            s.discard()
        assert s.updates == before["updates"]
        forward(s, 1 + number, 16)
        s.step()
    return said, s.state_dict()


def good_steps(comm: Any, mesh: Any, options: dict[str, Any], count: int) -> State:
    s = build(comm, mesh, dropout=0.1, **options)
    for step in range(count):
        forward(s, step, 16)
        s.step()
    return s.state_dict()


def check(
    mesh: tuple[int, int, int], world: str, device: Any, options: dict[str, Any], culprits: list[int]
) -> None:
    ranks = int(np.prod(mesh))
    want = spawned(good_steps, ranks, world, "cpu", mesh, options, 1 + len(culprits))[0]
    results = spawned(bad_steps, ranks, world, device, mesh, options, culprits)
    for said, state in results:
        assert said == results[0][0], "all ranks raise the same"
        assert same(want, state), "as if those batches had not been"
    for number, (text, rank) in enumerate(zip(results[0][0], culprits, strict=True)):
        assert text.startswith("NonFiniteGradient: the gradient of '"), text
        assert f"is {('nan', 'inf', '-inf')[number % 3]} on rank {rank} at step {1 + number}" in text


OPTIONS = [{}, {"clip_norm": 0.5}, {"bucket_cap_mb": 0.0}, {"compress": "topk:0.3+ef"}]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_bad_gradient_of_any_of_eight_ranks(options: dict[str, Any], device: str) -> None:
    """Each rank in turn: the first and the last of dp, of tp, of pp."""
    check((2, 2, 2), "virtual", DEVICES[device](), options, list(range(8)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mesh", [(2, 2, 1), (2, 1, 2), (1, 2, 2)], ids=str)
def test_in_processes_and_with_one_buffer(mesh: tuple[int, int, int], device: str) -> None:
    """Along dp = 2 ranks share two buffers, with dp = 1 there is one, on a device always two."""
    check(mesh, "process", DEVICES[device](), {"clip_norm": 0.5}, [1, 2, 3])


@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 1), (1, 1, 2), (2, 1, 1)], ids=str)
def test_small_meshes(mesh: tuple[int, int, int]) -> None:
    for options in OPTIONS:
        check(mesh, "virtual", "cpu", options, [int(np.prod(mesh)) - 1, 0])


def several(comm: Any) -> str:
    """All ranks have trouble: it is the first stage's, and of it the first element's."""
    s = build(comm, (1, 2, 2))
    for p in s.model.parameters():
        if p.size:
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.data * np.nan))
    forward(s, 0, 16)
    return told(s.step)


def test_of_several_the_first_is_told() -> None:
    for said in spawned(several, 4, "virtual", "cpu"):
        assert "'token_embedding.weight' is nan on rank 0 at step 0" in said


def bad_statistics(comm: Any, mesh: tuple[int, int, int]) -> tuple[str, bool]:
    """Of a batch norm on one stage: its statistics are looked at before anything is committed."""
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), seed=0)
    dp, tp, pp = mesh
    place = parallel.Mesh(comm, dp=dp, tp=tp, pp=pp)
    s = parallel.HybridParallel(model, optim.SGD(model.parameters(), lr=0.1), place, micro_batches=2)
    x, y = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32), np.arange(8) % 3
    s.forward_backward(x, y, F.cross_entropy)
    s.step()
    before = s.state_dict()
    with np.errstate(all="ignore"):
        s.forward_backward(x * (np.float32(3e38) if s.shard[0] == dp - 1 else 1), y, F.cross_entropy)
    said = told(s.step)
    s.discard()
    return said, same(before, s.state_dict())


@pytest.mark.parametrize("mesh", [(2, 1, 2), (1, 2, 2), (2, 2, 1)], ids=str)
def test_statistics_that_are_not_finite(mesh: tuple[int, int, int]) -> None:
    results = spawned(bad_statistics, 4, "virtual", "cpu", mesh)
    assert len({said for said, _ in results}) == 1
    assert results[0][0].startswith("NonFiniteGradient: the batch's statistics of '2' is")
    assert all(whole for _, whole in results)


# -- a rank that fails -------------------------------------------------------------------------------------------


class Spy(nn.Module):
    def __init__(self, body: Any) -> None:
        self.body, self.calls = body, 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        self.body(self.calls)
        return x

    def extra_repr(self) -> str:
        return ""


def training(comm: Any, mesh: tuple[int, int, int], culprit: int, how: str, place: str) -> None:
    def body(call: int) -> None:
        if comm.rank == culprit and call == 9:
            Path(place).write_text(str(time.monotonic()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the culprit")

    layers = (layer for _ in range(2) for layer in (nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), Spy(body)))
    model = nn.Sequential(*layers, nn.Linear(6, 3), seed=0)
    dp, tp, pp = mesh
    s = parallel.HybridParallel(
        model,
        optim.Adam(model.parameters()),
        parallel.Mesh(comm, dp=dp, tp=tp, pp=pp),
        micro_batches=2,
    )
    x, y = np.ones((8, 6), np.float32), np.zeros(8, int)
    for _ in range(100_000):
        s.forward_backward(x, y, F.cross_entropy)
        s.step()


@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize(("mesh", "culprit"), [((1, 2, 1), 1), ((1, 1, 2), 0), ((1, 1, 2), 1), ((2, 1, 2), 3)])
def test_a_rank_that_fails_ends_the_run(mesh: Any, culprit: int, how: str, tmp_path: Path) -> None:
    place = tmp_path / "t"
    with pytest.raises(minidp.RankFailed) as caught:
        spawned(training, int(np.prod(mesh)), "process", "cpu", mesh, culprit, how, str(place))
    noticed = time.monotonic() - float(place.read_text())
    assert caught.value.rank == culprit
    said = "was killed by SIGKILL" if how == "kill" else "raised ValueError: the culprit"
    assert f"rank {culprit} of {int(np.prod(mesh))} {said}" in str(caught.value)
    assert noticed < NOTICE_S + (0.1 if how == "kill" else 0.5)


def one_returns(comm: Any) -> None:
    s = build(comm, (1, 1, 2))
    forward(s, 0, 16)
    if comm.rank == 0:
        return
    s.step()


@pytest.mark.parametrize("world", ["virtual", "process"])
def test_a_stage_that_returned_is_told_of(world: str) -> None:
    with pytest.raises(minidp.CommError, match="rank 0"):
        spawned(one_returns, 2, world, "cpu")
