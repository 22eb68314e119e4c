"""Tests of the tests: each classic bug is planted in the workers, and a law must notice it.

Every law is also run on the code as it is, where it must hold: a law that always fails notices nothing.
"""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import minidp
from minidp import data, nn, optim, parallel
from minidp.autograd import Tensor, engine, gradcheck
from minidp.comm import schedules
from minidp.comm.schedules import Schedule
from minidp.nn import functional as F

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: optim.SGD(p, lr=0.2),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.02),
}
BAR = {"sgd": 1e-12, "momentum": 1e-12, "adam": 1e-9}
STEPS = 12


# -- the law: N workers equal one ----------------------------------------------------------------------------


class Model(nn.Module):
    """``middle`` is used twice, and so is what goes into it: diamonds of leaves and of inner nodes."""

    def __init__(self) -> None:
        self.first, self.middle, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Any) -> Any:
        h = F.tanh(self.first(x))
        h = h + F.tanh(self.middle(h))
        return self.last(F.tanh(self.middle(h)))


def batches(shard: tuple[int, int]) -> Iterator[tuple[np.ndarray, ...]]:
    """Global batches of 9, 9, 9, 9 and 4: shards differ, and so do their shares from step to step."""
    rng = np.random.default_rng(1)
    dataset = data.ArrayDataset(rng.standard_normal((40, 5)), rng.integers(0, 3, 40))
    loader = data.DataLoader(dataset, global_batch_size=9, shard=shard, shuffle=True, seed=2)
    for epoch in range(STEPS):
        yield from loader.epoch(epoch)


def one_worker(optimizer: str) -> dict[str, np.ndarray]:
    """The reference, in this process: the plain loop, the whole batch at once."""
    model = Model().initialize(0).astype("float64")
    opt = OPTIMIZERS[optimizer](model.parameters())
    for _, (x, y) in zip(range(STEPS), batches((0, 1))):
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    return model.state_dict()


def train(
    comm: Any, strategy: type[parallel.Strategy], optimizer: str, mutation: Callable[[], Any]
) -> tuple[dict[str, np.ndarray], list[float]]:
    with mutation():
        model = Model().initialize(comm.rank).astype("float64")
        s = strategy(model, OPTIMIZERS[optimizer](model.parameters()), comm)
        losses = []
        for _, (x, y) in zip(range(STEPS), batches(s.shard)):
            losses.append(float(s.forward_backward(x, y, F.cross_entropy)))
            s.step()
        return s.state_dict(), losses


def holds(strategy: type[parallel.Strategy], optimizer: str, mutation: Callable[[], Any] = nullcontext) -> bool:
    """3.2.5: the weights of two workers are those of one, to rounding, and (3.2.6) the same on both."""
    want = one_worker(optimizer)
    scale = max(np.abs(w).max() for w in want.values())
    (state, _), (other, _) = minidp.spawn(train, 2, strategy, optimizer, mutation)
    same = all(state[k].tobytes() == other[k].tobytes() for k in want)
    return bool(same and max(np.abs(state[k] - want[k]).max() for k in want) / scale <= BAR[optimizer])


@contextmanager
def mean_of_means() -> Iterator[None]:
    """1/N Σ ∇L_i instead of Σ n_i ∇L_i / Σ n_i: every rank says that it has one sample."""
    backward = parallel.Strategy.backward

    def mutated(self: Any, loss: Any, samples: int, gradient: Any = None) -> None:
        backward(self, loss, min(samples, 1), gradient)

    with patch.object(parallel.Strategy, "backward", mutated):
        yield


@contextmanager
def sum_instead_of_mean() -> Iterator[None]:
    """The learning rate is N times what was asked for: nobody divides by the other rank's samples."""
    reduce, mean = parallel.DataParallel._reduce, parallel.NaiveDataParallel._mean_gradient
    with (
        patch.object(parallel.DataParallel, "_reduce", lambda s, block, n: reduce(s, block, n // 2)),
        patch.object(parallel.NaiveDataParallel, "_mean_gradient", lambda s, i, n: mean(s, i, n // 2)),
    ):
        yield


@contextmanager
def old_gradients_stay() -> Iterator[None]:
    """Nobody clears what the last step has left, so a first gradient is added instead of stored."""
    fast, naive = parallel.DataParallel, parallel.NaiveDataParallel
    with (
        patch.object(fast, "_start_gradients", lambda s: None),
        patch.object(naive, "_start_gradients", lambda s: None),
    ):
        yield


@contextmanager
def no_broadcast_at_the_start() -> Iterator[None]:
    """Ranks start from models of their own (3.2.2): here each rank was built with another seed."""
    broadcast = minidp.comm.ProcessCommunicator.broadcast

    def keep(self: Any, x: np.ndarray, src: int = 0, **options: Any) -> None:
        mine = x.copy()
        broadcast(self, x, src, **options)
        if x.dtype.kind == "f":
            x[...] = mine

    with patch.object(minidp.comm.ProcessCommunicator, "broadcast", keep):
        yield


STRATEGIES = (parallel.DataParallel, parallel.NaiveDataParallel)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_law_holds_without_a_mutation(strategy: type[parallel.Strategy], optimizer: str) -> None:
    assert holds(strategy, optimizer)


@pytest.mark.parametrize(
    ("mutation", "strategies", "optimizers"),
    [
        (mean_of_means, STRATEGIES, ("sgd", "adam")),
        (sum_instead_of_mean, STRATEGIES, ("sgd", "momentum")),  # Adam does not see a constant factor
        (old_gradients_stay, STRATEGIES, ("sgd",)),
        (no_broadcast_at_the_start, STRATEGIES[1:], ("sgd",)),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_a_mutation_is_noticed(
    mutation: Callable[[], Any], strategies: tuple[Any, ...], optimizers: tuple[str, ...]
) -> None:
    for strategy in strategies:
        for optimizer in optimizers:
            assert not holds(strategy, optimizer, mutation), f"{strategy.__name__} with {optimizer}"


class AveragesParameters(parallel.NaiveDataParallel):
    """Each rank updates by its own gradient, and then the ranks average their parameters."""

    def _reduce_and_update(self, samples: int) -> None:
        count = np.array([samples])
        self.comm.all_reduce(count)
        for i, segment in enumerate(self.layout.segments):
            grad = segment.parameter.grad
            self._update(
                i, grad.numpy().reshape(-1) / max(samples, 1) if grad is not None else np.zeros(segment.size)
            )
            w = segment.parameter.data
            w *= samples
            self.comm.all_reduce(w)
            w /= count[0]


def test_averaged_parameters_pass_a_weak_test_and_fail_the_law() -> None:
    """The loss goes down, and plain SGD can't tell the two apart: that is why laws use momentum and Adam."""
    for _, losses in minidp.spawn(train, 2, AveragesParameters, "adam", nullcontext):
        assert np.mean(losses[-4:]) < np.mean(losses[:4]), "the loss goes down"
    assert holds(AveragesParameters, "sgd")
    assert not holds(AveragesParameters, "momentum")
    assert not holds(AveragesParameters, "adam")


# -- the engine ----------------------------------------------------------------------------------------------


def rewritten(function: Any, *changes: tuple[str, str]) -> Any:
    """The same function with pieces of its source replaced; each piece must be there exactly once."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, (
            f"{old!r} is not once in {function.__qualname__}: the mutation is out of date"
        )
        source = source.replace(old, new)
    namespace = dict(function.__globals__)
    flags = __future__.annotations.compiler_flag
    exec(compile(source, f"<mutated {function.__qualname__}>", "exec", flags, dont_inherit=True), namespace)
    return namespace[function.__name__]


@contextmanager
def overwrites_at_inner_nodes() -> Iterator[None]:
    """``grad =`` instead of ``grad +=`` where a node's output is used twice."""
    mutated = rewritten(engine._walk, ("grads[parent] = grads[parent] + g", "grads[parent] = g"))
    with patch.object(engine, "_walk", mutated):
        yield


@contextmanager
def overwrites_at_leaves() -> Iterator[None]:
    with patch.object(
        Tensor, "_accumulate", rewritten(Tensor._accumulate, ("self._grad += grad", "self._grad = grad"))
    ):
        yield


@contextmanager
def overwrites_in_slots() -> Iterator[None]:
    """The same where gradients go straight into a strategy's slab."""
    changes = ("slot += grad", "slot[...] = grad"), ("super()._accumulate(", "Tensor._accumulate(self, ")
    with patch.object(nn.Parameter, "_accumulate", rewritten(nn.Parameter._accumulate, *changes)):
        yield


def inner_diamond(x: Tensor) -> Tensor:
    y = x.exp()
    return y * y + y


def leaf_diamond(x: Tensor) -> Tensor:
    return x * x + x


def derivatives(comm: Any, mutation: Callable[[], Any]) -> list[bool]:
    """Which of the two diamonds pass the gradient check."""
    passed = []
    with mutation():
        for function in (inner_diamond, leaf_diamond):
            try:
                gradcheck(function, np.random.default_rng(3).standard_normal((2, 3)))
                passed.append(True)
            except AssertionError:
                passed.append(False)
    return passed


@pytest.mark.parametrize(
    ("mutation", "passes"),
    [
        (nullcontext, [True, True]),
        (overwrites_at_inner_nodes, [False, True]),
        (overwrites_at_leaves, [True, False]),
    ],
    ids=["none", "inner", "leaf"],
)
def test_overwritten_gradients_are_noticed(mutation: Callable[[], Any], passes: list[bool]) -> None:
    assert minidp.spawn(derivatives, 1, mutation) == [passes]


def test_overwritten_gradients_in_slabs_are_noticed() -> None:
    assert not holds(parallel.DataParallel, "sgd", overwrites_in_slots)
    assert holds(parallel.NaiveDataParallel, "sgd", overwrites_in_slots), "it has no slabs"


# -- schedules -----------------------------------------------------------------------------------------------


def corruptions(schedule: Schedule) -> Iterator[Schedule]:
    """The schedule without one entry, with another chunk in it, and with a copy for a reduce or the reverse.

    All ranks run the same one, so it does not hang; it is wrong.
    """
    for i, t in enumerate(schedule.transfers):
        before, after = schedule.transfers[:i], schedule.transfers[i + 1 :]
        others = [t._replace(chunk=c) for c in range(schedule.chunks) if c != t.chunk]
        others.append(t._replace(op="copy" if t.op == "reduce" else "reduce"))
        for transfers in ((*before, *after), *((*before, other, *after) for other in others)):
            try:
                yield Schedule(schedule.name, schedule.world_size, schedule.chunks, transfers)
            except ValueError:
                continue  # refused before anything runs


def sums(comm: Any, name: str, mutate: bool) -> tuple[int, int]:
    """(all-reduces that gave the sum on every rank, all-reduces tried)."""
    good = schedules.all_reduce(name, comm.world_size)
    right = tried = 0
    for schedule in corruptions(good) if mutate else [good]:
        with patch.dict(schedules.ALL_REDUCE, {name: lambda p, schedule=schedule: schedule}):
            x = np.random.default_rng(comm.rank).integers(1, 10**6, 7)
            comm.all_reduce(x, algorithm=name)
        want = sum(np.random.default_rng(rank).integers(1, 10**6, 7) for rank in range(comm.world_size))
        everywhere = np.array([np.array_equal(x, want)], np.int64)
        comm.all_reduce(everywhere, minidp.ReduceOp.MIN)
        right, tried = right + int(everywhere[0]), tried + 1
    return right, tried


@pytest.mark.parametrize("name", schedules.ALL_REDUCE)
def test_a_corrupted_schedule_entry_is_noticed(name: str) -> None:
    assert minidp.spawn(sums, 3, name, False) == [(1, 1)] * 3
    for right, tried in minidp.spawn(sums, 3, name, True, timeout_s=20):
        assert right == 0
        assert tried >= 4
