"""DataParallel over messages: the same bits as in shared memory; buckets leave in order, and early."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.comm import Communicator, comm_self
from minidp.nn import functional as F
from minidp.parallel.bucketed import BucketedDataParallel
from tests.test_data_parallel import dataset, poisoned, same_bits, small_model, train

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "adam": lambda p: optim.Adam(p, lr=0.01, eps=1e-3),  # the usual 1e-8 is 0 in float16
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"bucket_cap_mb": 0},
    {"clip_norm": 0.3, "bucket_cap_mb": 0.0003},
    {"accumulation_steps": 2, "bucket_cap_mb": 0},
]


class Odd(nn.Module):
    """A tied weight, a frozen one, one that only rank 0 uses, one that nobody uses, two groups of parameters."""

    def __init__(self, rank: int) -> None:
        self.first, self.second, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen.weight.requires_grad = False
        self.sometimes, self.never = nn.Linear(6, 6), nn.Linear(6, 6)
        self.rank = rank
        self.register_buffer("counter", np.full(3, float(rank + 1)))

    def forward(self, x: Any) -> Any:
        x = self.frozen(self.second(F.tanh(self.first(x))))
        return self.sometimes(x) if self.rank == 0 else x


def odd_model(seed: int, dtype: str) -> nn.Module:
    return Odd(seed).initialize(seed).astype(dtype)


def two_groups(model: nn.Module, optimizer: str) -> optim.Optimizer:
    first, *rest = model.parameters()
    return OPTIMIZERS[optimizer]([{"params": rest}, {"params": [first], "lr": 0.02}])  # type: ignore[no-any-return]


def history(comm: Any, kind: Any, make: Any, optimizer: str, dtype: str, options: Any) -> list[dict[str, Any]]:
    """w after each of five steps, of unequal shards: two have one without samples, one has no samples at all."""
    model = make(comm.rank, dtype)
    s = kind(model, two_groups(model, optimizer), comm, **options)
    x, y = dataset(dtype).arrays
    backwards = options.get("accumulation_steps", 1)
    states = []
    for step in range(5):
        # 16 in the first step: 1/16 is exact, and the division is left to the update. Later totals are odd.
        sizes = [16 // comm.world_size if step == 0 else (3 + 2 * r + step) for r in range(comm.world_size)]
        if step in (1, 4) and comm.world_size > 1:
            sizes[-1] = 0
        if step == 3:
            sizes = [0] * comm.world_size
        lo = sum(sizes[: comm.rank])
        rows = np.arange(lo, lo + sizes[comm.rank])
        if step != 4 or comm.rank == 0:  # in the last step nobody else calls backward
            for part in np.array_split(rows, backwards):
                s.forward_backward(x[part], y[part], F.cross_entropy)
        s.step()
        states.append(s.state_dict())
    s.release()
    return states


def differences(comm: Any) -> tuple[int, list[str]]:
    """(how many cases, which of them are not the same bits in shared memory and over messages)"""
    bad, count = [], 0
    for make in (small_model, odd_model):
        for dtype in ("float32", "float64", "float16"):
            for optimizer in OPTIMIZERS:
                for options in OPTIONS:
                    case = (make, optimizer, dtype, options)
                    slabs = history(comm, parallel.DataParallel, *case)
                    messages = history(comm, BucketedDataParallel, *case)
                    same = all(same_bits(a, b) for a, b in zip(slabs, messages, strict=True))
                    moves = not same_bits(messages[0], messages[1])
                    still = same_bits(messages[2], messages[3])  # no samples, no step
                    if not (same and moves and still):
                        bad.append(f"{make.__name__} {optimizer} {dtype} {options}")
                    count += 1
    return count, bad


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_same_bits_as_in_shared_memory(world_size: int) -> None:
    assert minidp.spawn(differences, world_size) == [(72, [])] * world_size


def test_the_same_bits_in_the_virtual_world() -> None:
    options = {"clip_norm": 0.3, "bucket_cap_mb": 0, "dtype": "float32"}
    want = minidp.spawn(train, 3, "DataParallel", "adam", dict(options))[0][0]
    for state, _ in minidp.spawn(train, 3, "DataParallel", "adam", dict(options), world="virtual"):
        assert same_bits(want, state)


# -- order ---------------------------------------------------------------------------------------------------


class Turned(nn.Module):
    """Layers are defined in the order opposite to that of their use: gradients come from the first to the last."""

    def __init__(self) -> None:
        self.last, self.first = nn.Linear(6, 3), nn.Linear(6, 6)

    def forward(self, x: Any) -> Any:
        return self.last(F.tanh(self.first(x)))


def alone(model: nn.Module, comm: Any = None, **options: Any) -> BucketedDataParallel:
    return BucketedDataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm or comm_self(), **options)


def diary(s: BucketedDataParallel) -> list[str]:
    """What happens from now on: "0.weight" when that gradient is complete, "#2" when bucket 2 leaves."""
    log: list[str] = []
    starts = {s._views[b.index][1].ctypes.data: b.index for b in s.buckets}
    for segment in s.layout.segments:
        segment.parameter.register_post_accumulate_grad_hook(lambda p, name=segment.name: log.append(name))
    all_reduce = s._moving.all_reduce

    def spy(x: np.ndarray, *args: Any, **kwargs: Any) -> Any:
        if kwargs:  # begun; when it runs is the world's affair
            log.append(f"#{starts[x.ctypes.data]}")
        return all_reduce(x, *args, **kwargs)

    s._moving.all_reduce = spy  # type: ignore[method-assign]
    return log


def forward_backward(s: parallel.DataParallel, rows: slice = slice(0, 8)) -> None:
    x, y = dataset(str(s.layout.dtype)).arrays
    s.forward_backward(x[rows], y[rows], F.cross_entropy)


def test_buckets_leave_while_backward_runs() -> None:
    s = alone(small_model(), bucket_cap_mb=0)
    log = diary(s)
    forward_backward(s)
    assert [entry for entry in log if entry[0] == "#"] == [f"#{k}" for k in range(6)]
    assert log.index("#1") < log.index("2.weight") < log.index("#3") < log.index("0.weight")
    first = list(log)
    s.step()
    forward_backward(s)
    assert log == first * 2, "in every step"


def test_buckets_leave_in_index_order_whatever_order_gradients_come_in() -> None:
    s = alone(Turned().initialize(0).astype("float64"), bucket_cap_mb=0)
    log = diary(s)
    forward_backward(s)
    assert log.index("last.weight") < log.index("first.weight")
    assert [entry for entry in log if entry[0] == "#"] == ["#0", "#1", "#2", "#3"]
    assert log[-2:] == ["#2", "#3"], "complete long before, but not their turn"


def test_only_the_last_backward_of_a_step_sends() -> None:
    s = alone(small_model(), bucket_cap_mb=0, accumulation_steps=2)
    log = diary(s)
    forward_backward(s)
    assert not any(entry[0] == "#" for entry in log)
    s.step()
    assert log[-6:] == [f"#{k}" for k in range(6)], "there was no second: all leave in step"
    forward_backward(s)
    forward_backward(s)
    assert log[-18:].index("#0") > 6, "in the second"
    assert log.count("#5") == 2


def test_unused_parameters_leave_when_backward_has_returned() -> None:
    s = alone(odd_model(0, "float64"), bucket_cap_mb=0)
    log = diary(s)
    forward_backward(s)
    names = [segment.name for segment in reversed(s.layout.segments)]
    assert names[:2] == ["never.bias", "never.weight"]
    assert [entry for entry in log if entry[0] == "#"] == log[-len(names) :], (
        "bucket 0 is never's: all wait for it"
    )
    assert log.count("first.weight") == 1, "tied: once, after both uses"
    assert not s._own[s.buckets[1].lo :].any()
    s.step()


# -- hooks ---------------------------------------------------------------------------------------------------


def test_no_hook_stays() -> None:
    model = small_model()
    s = alone(model)
    seen: list[Any] = []
    weight = next(iter(model.parameters()))
    remove = weight.register_post_accumulate_grad_hook(seen.append)
    for _ in range(3):
        forward_backward(s)
        s.step()
    assert seen == [weight] * 3
    assert weight._hooks == [seen.append]
    remove()
    with pytest.raises(ZeroDivisionError):
        s.forward_backward(*dataset().arrays, lambda output, y: F.cross_entropy(output, y) * (1 / 0))
    s.discard()
    assert all(p._hooks is None for p in model.parameters())
    s.release()
    again = alone(model)
    forward_backward(again)
    dead = weakref.ref(again)
    del again
    gc.collect()
    assert dead() is None
    assert all(p._hooks is None for p in model.parameters())


def test_the_users_own_hooks_may_change_gradients() -> None:
    """They run before the bucket leaves, also those that were registered after the strategy was built."""
    states = []
    for kind in (parallel.DataParallel, BucketedDataParallel):
        model = small_model()
        s = kind(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), bucket_cap_mb=0)
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", p.grad.numpy() * 0.5))
        forward_backward(s)
        s.step()
        states.append(s.state_dict())
    assert same_bits(*states)
    assert not same_bits(states[0], small_model().state_dict())


def test_a_backward_inside_of_backward_is_no_silent_error() -> None:
    model = small_model()
    s = alone(model, bucket_cap_mb=0)
    last = list(model.parameters())[-1]
    middle = list(model.parameters())[2]
    middle.register_post_accumulate_grad_hook(lambda p: (last * last).sum().backward())
    with pytest.raises(RuntimeError, match="came after its bucket had left"):
        forward_backward(s)


# -- errors --------------------------------------------------------------------------------------------------


def spoilt(s: Any, what: str, rank: int) -> None:
    """A step whose gradients are not finite, each time in another way."""
    big = float(np.finfo(s.layout.dtype).max)
    first, *_, last = s.layout.segments
    changes: dict[str, list[tuple[int, Any, float]]] = {
        "nan everywhere": [(1, None, np.nan)],
        "inf in the first": [(0, first, np.inf)],
        "nan in the same": [(1, first, np.nan)],
        "two ranks": [(0, last, -np.inf), (1, first, np.nan), (0, first, -np.inf)],
        "only the sum": [(0, last, big), (1, last, big)],
        "infinities that cancel": [(0, last, np.inf), (1, last, -np.inf)],
        "large": [(0, first, big**0.6)],  # its square overflows, itself does not
    }

    def spoil(p: Any) -> None:
        for who, segment, value in changes[what]:
            if who == rank and (segment is None or segment.parameter is p):
                grad = p.grad.numpy().copy()
                grad.reshape(-1)[-1 if segment is None else 1] = value
                p.grad = grad

    removers = [g.parameter.register_post_accumulate_grad_hook(spoil) for g in s.layout.segments]
    forward_backward(s)
    for remove in removers:
        remove()


SPOILT = (
    "inf in the first",
    "nan in the same",
    "nan everywhere",
    "two ranks",
    "only the sum",
    "infinities that cancel",
    "large",
)


def told(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def not_finite(comm: Any) -> list[str]:
    said = []
    for dtype in ("float32", "float16", "float64"):
        for kind in (parallel.DataParallel, BucketedDataParallel):
            for cap in (25, 0):
                model = small_model(dtype=dtype)
                s = kind(model, OPTIMIZERS["momentum"](model.parameters()), comm, bucket_cap_mb=cap)
                for what in SPOILT:
                    before = s.state_dict()
                    spoilt(s, what, comm.rank)
                    says = told(s.step)
                    assert same_bits(before, model.state_dict()) == (says != "nothing")
                    said.append(f"{dtype} {what}: {says}")
                    s.discard()
                forward_backward(s)
                s.step()
    return said


def test_non_finite_gradients_give_the_same_text() -> None:
    for said in minidp.spawn(not_finite, 2):
        n = len(SPOILT)
        for lo in range(0, len(said), 4 * n):
            slabs, messages = said[lo : lo + 2 * n], said[lo + 2 * n : lo + 4 * n]
            assert slabs == messages
            assert slabs[:n] == slabs[n:], "and whatever the buckets are"
        expected = {
            "nan everywhere": "'0.weight' is nan on rank 1",
            "inf in the first": "'0.weight' is inf on rank 0",
            "nan in the same": "'0.weight' is nan on rank 1",
            "two ranks": "'0.weight' is -inf on rank 0",
            "infinities that cancel": "'4.bias' is inf on rank 0",
        }
        for line in said:
            for what, text in expected.items():
                assert what not in line or f"NonFiniteGradient: the gradient of {text} " in line, line


def discards(comm: Any, kind: Any) -> tuple[list[str], dict[str, np.ndarray]]:
    """Everything that may happen to a step that is not made, in turn; w at the end."""
    model = small_model()
    s = kind(model, OPTIMIZERS["adam"](model.parameters()), comm, bucket_cap_mb=0)
    x, y = dataset().arrays
    one, said = comm.rank == 1, []

    def good(lo: int = 0) -> None:
        forward_backward(s, slice(lo + comm.rank, lo + 9))

    good()
    s.step()
    good(3)
    s.discard()  # on all ranks
    good(6)
    if one:
        s.discard()  # on one, after all has left; the other is in step already
        good(9)
        s.discard()
        good(12)
    s.step()
    # Rank 1 fails before anything has left; then with 0 samples, and with the batch after.
    for again in (False, True):
        said.append(told(lambda: s.forward_backward(x[:8], y[:8] + 5 * one, F.cross_entropy)).split(":")[0])
        if one:
            said.append(told(s.step).split(":")[0])
            s.discard()
            if again:
                good(15)
        s.step()
    # Rank 1 fails when some buckets have left; all ranks start again, and may talk before they do.
    remove = next(iter(model.parameters())).register_post_accumulate_grad_hook(_fails if one else id)
    said.append(told(lambda: good(18)).split(":")[0])
    remove()
    if one and kind is BucketedDataParallel:
        assert 0 < len(s._left) < len(s.buckets)
    s.discard()
    comm.barrier()
    s.load_state_dict(s.state_dict())
    good(21)
    s.step()
    # Rank 1 takes back what it had, and has no other.
    good(24)
    if one:
        s.discard()
    s.step()
    return said, s.state_dict()


def _fails(parameter: Any) -> None:
    raise ZeroDivisionError("in a hook")


def test_discard_is_the_same_as_in_shared_memory() -> None:
    for world_size in (2, 3):
        want = minidp.spawn(discards, world_size, parallel.DataParallel)
        got = minidp.spawn(discards, world_size, BucketedDataParallel)
        for rank, ((said, state), (says, other)) in enumerate(zip(want, got, strict=True)):
            failed = ["ValueError", "RuntimeError"] * 2 + ["ZeroDivisionError"]
            assert said == says == (failed if rank == 1 else [*said[:2], "nothing"])
            assert same_bits(state, other)


@pytest.mark.parametrize("world", ["process", "virtual"])
def test_a_failed_step_is_not_committed(world: Any) -> None:
    """The law of test_data_parallel, over messages."""
    for rank, said in enumerate(minidp.spawn(poisoned_over_messages, 2, world=world)):
        assert said[-1] == "0.weight 1 1 nan"
        assert len(said) == (3 if rank == 1 else 1)


def poisoned_over_messages(comm: Any) -> list[str]:
    comm.shares_memory = False
    return poisoned(comm, "DataParallel")


# -- state, metrics, construction ----------------------------------------------------------------------------


def loads(comm: Any, dtype: str) -> tuple[bool, dict[str, float], int]:
    model = odd_model(comm.rank, dtype)
    s = BucketedDataParallel(model, OPTIMIZERS["momentum"](model.parameters()), comm)
    before = s.metrics["bytes_sent"]
    for _ in range(3):
        forward_backward(s)
        s.step()
    metrics = s.metrics
    wanted = {k: v + comm.rank for k, v in odd_model(5, dtype).state_dict().items()}
    forward_backward(s)
    s.load_state_dict(wanted)  # in the middle of a step
    same = same_bits(s.state_dict(), odd_model(5, dtype).state_dict())  # rank 0's
    with pytest.raises(ValueError, match="read-only"):
        model.first.weight.data[0, 0] = 1.0
    forward_backward(s)
    s.step()
    same = same and not same_bits(s.state_dict(), odd_model(5, dtype).state_dict()) and before == 0
    return same, metrics, sum(travels.nbytes for _, travels in s._views)


def test_state_and_metrics() -> None:
    for world_size, dtype in ((1, "float32"), (3, "float16")):
        for same, metrics, nbytes in minidp.spawn(loads, world_size, dtype):
            assert same
            assert metrics["steps"] == 3
            assert metrics["bytes_sent"] == metrics["bytes_received"] == 3 * (world_size - 1) * nbytes


def without_shared_memory() -> Communicator:
    comm = comm_self()
    comm.shares_memory = False
    return comm


def test_data_parallel_yields_it_where_memory_is_not_shared() -> None:
    model = small_model()
    opt = optim.SGD(model.parameters(), lr=0.1)
    s = parallel.DataParallel(model=model, optimizer=opt, comm=without_shared_memory())
    assert type(s) is BucketedDataParallel
    assert repr(s.comm) == "ProcessCommunicator(rank=0, world_size=1, 'DataParallel')"
    forward_backward(s)
    s.step()

    class Own(parallel.DataParallel):
        pass

    s.release()
    with pytest.raises(TypeError, match="Own needs shared memory: derive it from BucketedDataParallel"):
        Own(model, optim.SGD(model.parameters(), lr=0.1), without_shared_memory())
    assert type(Own(model, optim.SGD(model.parameters(), lr=0.1), comm_self())) is Own


def test_ranks_that_agree_exchange_no_descriptions() -> None:
    comm = without_shared_memory()
    with patch.object(type(comm), "all_gather_object", side_effect=AssertionError) as gather:
        gather.side_effect = lambda obj, what="": [obj]
        model = small_model()
        parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)
    assert {call.args[1] for call in gather.call_args_list} <= {
        "DataParallel",
        "DataParallel buckets",
        "DataParallel samples",
    }


def test_a_model_without_trainable_parameters_of_its_own() -> None:
    """Nothing to send, nothing to update: a step is a meeting."""
    model = small_model()
    frozen = list(model.parameters())
    opt = optim.SGD(frozen, lr=0.1)
    for p in frozen:
        p.requires_grad = False
    s = BucketedDataParallel(model, opt, comm_self())
    s.step()
    s.discard()
    assert s.metrics["bytes_sent"] == 0
    assert s.updates == 1
