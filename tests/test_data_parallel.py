"""N workers equal one: the article's table (3.2.2 to 3.3.1, 4.1 to 4.3) for DataParallel, fast and naive."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minidp
from minidp import data, nn, optim, parallel
from minidp.comm import comm_self
from minidp.nn import functional as F

STRATEGIES = ("DataParallel", "NaiveDataParallel")
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01, weight_decay=0.1),
}
SAMPLES = 90  # global batches of 17: the last one is short, and 17 is divided by nothing


def dataset(dtype: str = "float64") -> data.ArrayDataset:
    rng = np.random.default_rng(7)
    return data.ArrayDataset(rng.standard_normal((SAMPLES, 6)).astype(dtype), rng.integers(0, 3, SAMPLES))


def small_model(seed: int = 0, dtype: str = "float64") -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 3), seed=seed
    ).astype(dtype)


def train(comm: Any, strategy: str, optimizer: str, options: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    steps, partition = options.pop("steps", 20), options.pop("partition", "batch")
    size, dtype = options.pop("global_batch_size", 17), options.pop("dtype", "float64")
    model = small_model(seed=comm.rank, dtype=dtype)  # built differently: rank 0's counts
    s = getattr(parallel, strategy)(model, OPTIMIZERS[optimizer](model.parameters()), comm, **options)
    loader = data.DataLoader(
        dataset(dtype), global_batch_size=size, shard=s.shard, shuffle=True, seed=3, partition=partition
    )
    epoch = 0
    while s.updates < steps:
        for x, y in loader.epoch(epoch):
            if s.updates < steps:
                s.forward_backward(x, y, F.cross_entropy)
                s.step()
        epoch += 1
    return s.state_dict(), s.metrics


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """max|Δw| / max|w|."""
    return max(np.abs(a[k] - b[k]).max() for k in a) / max(np.abs(a[k]).max() for k in a)


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(a[k].tobytes() == b[k].tobytes() for k in a)


def plain_training(optimizer: str, steps: int = 20) -> dict[str, np.ndarray]:
    """The reference: one process, no strategy, the whole batch at once."""
    model = small_model(seed=0)
    opt = OPTIMIZERS[optimizer](model.parameters())
    loader = data.DataLoader(dataset(), global_batch_size=17, shuffle=True, seed=3)
    done = epoch = 0
    while done < steps:
        for x, y in loader.epoch(epoch):
            if done < steps:
                opt.zero_grad()
                F.cross_entropy(model(x), y).backward()
                opt.step()
                done += 1
        epoch += 1
    return model.state_dict()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_n_workers_equal_one(strategy: str, optimizer: str) -> None:
    """3.2.5, 4.3: after 20 steps of shuffled, uneven global batches, from models built with different seeds."""
    bar = 1e-9 if "adam" in optimizer else 1e-12
    want = plain_training(optimizer)
    for world_size in (1, 2, 3, 4):
        results = minidp.spawn(train, world_size, strategy, optimizer, {})
        assert all(same_bits(results[0][0], state) for state, _ in results), "3.2.6: all ranks hold the same w"
        assert distance(want, results[0][0]) <= bar


@pytest.mark.parametrize(
    "options", [{}, {"clip_norm": 0.3}, {"partition": "dataset"}, {"dtype": "float32"}], ids=str
)
@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_fast_equals_naive_to_the_bit(optimizer: str, options: dict[str, Any]) -> None:
    for world_size in (1, 2, 3):
        fast, _ = minidp.spawn(train, world_size, "DataParallel", optimizer, dict(options))[0]
        naive, _ = minidp.spawn(train, world_size, "NaiveDataParallel", optimizer, dict(options))[0]
        assert same_bits(fast, naive)


def test_clipping_gives_the_same_on_any_number_of_ranks() -> None:
    states = [minidp.spawn(train, n, "DataParallel", "sgd", {"clip_norm": 0.3})[0][0] for n in (1, 2, 3, 4)]
    assert distance(states[0], minidp.spawn(train, 1, "DataParallel", "sgd", {})[0][0]) > 1e-3, "it must clip"
    assert all(distance(states[0], state) <= 1e-12 for state in states)


def test_bucket_size_does_not_change_a_bit() -> None:
    states = [
        minidp.spawn(train, 3, "DataParallel", "momentum", {"bucket_cap_mb": mb})[0][0] for mb in (0, 0.0005, 25)
    ]
    assert same_bits(states[0], states[1])
    assert same_bits(states[0], states[2])


def test_two_runs_are_equal_to_the_bit() -> None:
    runs = [minidp.spawn(train, 4, "DataParallel", "adam", {"dtype": "float32"})[0][0] for _ in range(2)]
    assert same_bits(*runs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bytes_of_a_step(strategy: str) -> None:
    """Two ranks: n bytes a step each, as by ring; one rank sends nothing."""
    layout = nn.Layout(small_model())
    _, alone = minidp.spawn(train, 1, strategy, "sgd", {"steps": 5})[0]
    assert alone["bytes_sent"] == alone["bytes_received"] == 0
    results = minidp.spawn(train, 2, strategy, "sgd", {"steps": 5})
    exact = sum(segment.size for segment in layout.segments) * 8
    for _, metrics in results:
        assert metrics["steps"] == 5
        assert exact <= metrics["bytes_sent"] / 5 <= layout.nbytes
    assert sum(m["bytes_sent"] for _, m in results) == sum(m["bytes_received"] for _, m in results)


# -- the weighted mean: mean of means is wrong ---------------------------------------------------------------


X4, Y4 = np.array([[1.0], [2.0], [5.0], [11.0]]), np.array([[1.0], [0.0], [2.0], [1.0]])


def shards_of_one_and_three(comm: Any) -> np.ndarray:
    """The gradient that a step with η = 1 applied."""
    mine = slice(0, 1) if comm.rank == 0 else slice(1, 4)
    model = nn.Sequential(nn.Linear(1, 1), seed=0).astype("float64")
    before = model.state_dict()["0.weight"]
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=1.0), comm)
    loss = F.mse_loss(model(X4[mine]), Y4[mine])
    s.backward(loss, samples=len(X4[mine]))
    s.step()
    return before - s.state_dict()["0.weight"]


def test_mean_of_means_would_be_wrong() -> None:
    got = minidp.spawn(shards_of_one_and_three, 2)[0]

    def gradient(rows: slice) -> np.ndarray:
        model = nn.Sequential(nn.Linear(1, 1), seed=0).astype("float64")
        F.mse_loss(model(X4[rows]), Y4[rows]).backward()
        return next(model.parameters()).grad.numpy()  # type: ignore[union-attr]

    full = gradient(slice(0, 4))
    mean_of_means = (gradient(slice(0, 1)) + gradient(slice(1, 4))) / 2
    assert np.allclose(got, full, rtol=1e-12)
    assert not np.allclose(mean_of_means, full, rtol=0.1)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    values=st.lists(st.fractions(min_value=-3, max_value=3, max_denominator=9), min_size=1, max_size=9),
    cuts=st.lists(st.integers(0, 9), max_size=4),
)
def test_weighted_mean_is_exact_in_fractions(values: list[Fraction], cuts: list[int]) -> None:
    """∇L = Σ n_i ∇L_i / Σ n_i == the full batch's, for every split, empty shards too. By our own engine."""
    xs = np.array([[v, v * v - 1] for v in values], dtype=object)
    ys = np.array([[2 * v + 1] for v in values], dtype=object)
    edges = [0, *sorted(min(c, len(values)) for c in cuts), len(values)]

    def gradient(lo: int, hi: int, seed: int) -> np.ndarray:
        layer = nn.Linear(2, 1, bias=False)
        layer.weight.data = np.array([[Fraction(1, 3), Fraction(-2, 7)]], dtype=object)
        F.mse_loss(layer(xs[lo:hi]), ys[lo:hi]).backward(gradient=seed)
        return layer.weight.grad.numpy()  # type: ignore[union-attr]

    full = gradient(0, len(values), 1)
    parts = [gradient(lo, hi, hi - lo) for lo, hi in pairwise(edges)]
    assert (sum(parts) / len(values) == full).all()


# -- what a step is ------------------------------------------------------------------------------------------


def empty_shards(comm: Any) -> tuple[dict[str, np.ndarray], int]:
    """Rank 1 never has samples; rank 2 never calls backward; one step has no samples at all."""
    model = small_model()
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
    x, y = dataset().arrays
    for step in range(5):
        lo, hi = (0, 8) if comm.rank == 0 and step != 2 else (0, 0)
        if comm.rank != 2:
            loss = s.forward_backward(x[lo:hi], y[lo:hi], F.cross_entropy)
            assert comm.rank == 0 or float(loss) == 0.0
        s.step()
    return s.state_dict(), s.updates


def test_ranks_without_samples_take_part() -> None:
    alone, together = minidp.spawn(empty_shards, 1), minidp.spawn(empty_shards, 3)
    assert [updates for _, updates in together] == [5, 5, 5]
    assert all(distance(alone[0][0], state) <= 1e-12 for state, _ in together)


def accumulate(comm: Any, strategy: str, parts: int) -> dict[str, np.ndarray]:
    model = small_model()
    s = getattr(parallel, strategy)(model, optim.Adam(model.parameters(), lr=0.01), comm, accumulation_steps=parts)
    x, y = dataset().arrays
    x, y = x[comm.rank :: comm.world_size], y[comm.rank :: comm.world_size]
    for _ in range(3):
        for rows in np.array_split(np.arange(len(x)), parts):
            s.forward_backward(x[rows], y[rows], F.cross_entropy)
        s.step()
    return s.state_dict()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulation_equals_one_batch(strategy: str) -> None:
    want = minidp.spawn(accumulate, 1, strategy, 1)[0]
    for world_size, parts in ((1, 4), (2, 4), (3, 7)):
        assert distance(want, minidp.spawn(accumulate, world_size, strategy, parts)[0]) <= 1e-9


def tied_frozen_unused(comm: Any, strategy: str) -> dict[str, np.ndarray]:
    """A tied weight, a frozen one, and one that only rank 0 uses."""

    class Model(nn.Module):
        def __init__(self) -> None:
            self.first = nn.Linear(6, 6)
            self.second = nn.Linear(6, 6)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(6, 6)
            self.frozen.weight.requires_grad = False
            self.sometimes = nn.Linear(6, 6)
            self.register_buffer("counter", np.full(3, float(comm.rank + 1)))

        def forward(self, x: Any) -> Any:
            x = self.frozen(self.second(self.first(x)))
            return self.sometimes(x) if comm.rank == 0 else x

    model = Model().initialize(comm.rank).astype("float64")
    s = getattr(parallel, strategy)(model, optim.SGD(model.parameters(), lr=0.1), comm)
    x, y = dataset().arrays
    for _ in range(4):
        s.forward_backward(x[:10], y[:10], F.cross_entropy)
        s.step()
    assert model.first.weight is model.second.weight
    return s.state_dict()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tied_frozen_and_sometimes_used_parameters(strategy: str) -> None:
    states = minidp.spawn(tied_frozen_unused, 3, strategy)
    first = states[0]
    assert all(same_bits(first, state) for state in states)
    assert same_bits({"w": first["first.weight"]}, {"w": first["second.weight"]})
    assert (first["counter"] == 1).all(), "rank 0's buffers"
    start = minidp.spawn(tied_frozen_unused, 1, strategy)[0]
    assert same_bits({"w": first["frozen.weight"]}, {"w": start["frozen.weight"]})


def dropped(comm: Any, how: str) -> list[bytes]:
    """Which units survived in each forward of two updates with two backwards each."""
    seen: list[bytes] = []

    class Spy(nn.Module):
        def forward(self, x: Any) -> Any:
            seen.append((x.numpy() != 0).tobytes())
            return x

    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), Spy(), nn.Linear(64, 3), seed=3 + comm.rank)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm, accumulation_steps=2)
    x, y = dataset("float32").arrays
    for _ in range(2):
        for _ in range(2):
            if how == "forward_backward":
                s.forward_backward(x[:4], y[:4], F.cross_entropy)
            else:
                s.backward(F.cross_entropy(model(x[:4]), y[:4]), samples=4)
        s.step()
    return seen


def test_dropout_masks_are_a_function_of_update_call_and_rank() -> None:
    runs = [minidp.spawn(dropped, 2, how) for how in ("forward_backward", "forward_backward", "by hand")]
    assert runs[0] == runs[1] == runs[2]
    masks = [mask for rank in runs[0] for mask in rank]
    assert len(set(masks)) == 8, "each forward of each rank drops others"


def test_one_rank_alone_without_spawn() -> None:
    state, metrics = train(comm_self(), "DataParallel", "adam", {})
    assert distance(plain_training("adam"), state) <= 1e-9
    assert metrics["bytes_sent"] == 0


def scores(comm: Any) -> int:
    """3.3: evaluation never pads. Evaluate a shard, then all-reduce (correct, count)."""
    train_set, test_set = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 10), seed=0)
    s = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.5), comm)
    loader = data.DataLoader(train_set, global_batch_size=64, shard=s.shard, shuffle=True, seed=0)
    for x, y in loader.epoch(0):
        s.forward_backward(x, y, F.cross_entropy)
        s.step()
    tally = np.zeros(2, np.int64)
    for x, y in data.DataLoader(test_set, global_batch_size=7 * comm.world_size, shard=s.shard).epoch(0):
        with minidp.no_grad():
            tally += [(model(x).numpy().argmax(axis=1) == y).sum() if len(x) else 0, len(x)]
    comm.all_reduce(tally)
    assert tally[1] == len(test_set) == 360
    return int(tally[0])


def test_evaluation_counts_each_sample_once() -> None:
    correct = [minidp.spawn(scores, n)[0] for n in (1, 2, 3)]
    assert correct[0] == correct[1] == correct[2] > 300


# -- errors --------------------------------------------------------------------------------------------------


def raises(comm: Any, what: str) -> str:
    model = small_model(dtype="float32")
    opt = optim.SGD(model.parameters(), lr=0.1)
    x, y = dataset("float32").arrays
    if what == "two strategies":
        parallel.DataParallel(model, opt, comm)
        build = lambda: parallel.DataParallel(model, opt, comm)  # noqa: E731
    elif what == "optimizer lacks":
        half = optim.SGD(list(model.parameters())[:2], lr=0.1)
        build = lambda: parallel.DataParallel(model, half, comm)  # noqa: E731
    elif what == "foreign optimizer":
        other = optim.SGD([*model.parameters(), *small_model().parameters()], lr=0.1)
        build = lambda: parallel.DataParallel(model, other, comm)  # noqa: E731
    elif what == "models differ":
        wide = nn.Sequential(nn.Linear(6, 9 + comm.rank), seed=0)
        build = lambda: parallel.DataParallel(wide, optim.SGD(wide.parameters(), lr=0.1), comm)  # noqa: E731
    elif what == "optimizers differ":
        slow = optim.SGD(model.parameters(), lr=0.1 / (1 + comm.rank))
        build = lambda: parallel.DataParallel(model, slow, comm)  # noqa: E731
    else:
        s = parallel.DataParallel(model, opt, comm)
        s.forward_backward(x, y, F.cross_entropy)
        build = {
            "one backward more": lambda: s.forward_backward(x, y, F.cross_entropy),
            "write": lambda: next(iter(model.parameters())).data.__setitem__(0, 1.0),
            "optimizer.step": opt.step,
            "state": lambda: s.load_state_dict({"0.weight": np.zeros((2, 2))}),
        }[what]
    try:
        build()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("two strategies", "ValueError: the model belongs to another strategy"),
        ("optimizer lacks", "ValueError: the optimizer lacks the parameters 2.weight, 2.bias, 4.weight, 4.bias"),
        ("foreign optimizer", "ValueError: the optimizer holds a parameter that is not the model's"),
        (
            "models differ",
            "CollectiveMismatch: rank 1 has built another DataParallel than rank 0: 0.weight (10, 6)",
        ),
        ("optimizers differ", "CollectiveMismatch: rank 1 has built another DataParallel than rank 0"),
        ("one backward more", "RuntimeError: backward was called 2 times before step(): give the strategy"),
        ("write", "ValueError: assignment destination is read-only"),
        ("optimizer.step", "RuntimeError: SGD.step()"),
        ("state", "ValueError: this state does not fit the model: missing 0.bias"),
    ],
)
def test_errors_say_what_to_do(what: str, says: str) -> None:
    for message in minidp.spawn(raises, 2, what):
        assert message.startswith(says), message


def poisoned(comm: Any, strategy: str) -> list[str]:
    model = small_model()
    s = getattr(parallel, strategy)(model, optim.Adam(model.parameters(), lr=0.1), comm)
    x, y = dataset().arrays
    said = []
    s.forward_backward(x[:8], y[:8], F.cross_entropy)
    s.step()
    good = s.state_dict()
    # A label out of range fails on rank 1 only: its step must not go through as if nothing had happened.
    try:
        s.forward_backward(x[:8], y[:8] + 5 * comm.rank, F.cross_entropy)
    except ValueError as error:
        said.append(str(error))
        try:
            s.step()
        except RuntimeError as again:
            said.append(str(again))
    s.discard()
    # NaN on rank 1 only: an error on all ranks that names it, and nothing is committed.
    bad = x[:8].copy()
    bad[3, 2] = np.nan if comm.rank == 1 else 0.0
    s.forward_backward(bad, y[:8], F.cross_entropy)
    try:
        s.step()
    except parallel.NonFiniteGradient as error:
        said.append(f"{error.parameter} {error.rank} {error.step} {error.value}")
    assert same_bits(good, model.state_dict()), "a failed step changes nothing"
    s.discard()
    s.forward_backward(x[:8], y[:8], F.cross_entropy)
    s.step()
    assert not same_bits(good, s.state_dict())
    return said


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_failed_step_is_not_committed(strategy: str) -> None:
    for rank, said in enumerate(minidp.spawn(poisoned, 2, strategy)):
        assert said[-1] == "0.weight 1 1 nan"
        assert len(said) == (3 if rank == 1 else 1)
        if rank == 1:
            assert "strategy.discard()" in said[1]


def load(comm: Any, strategy: str) -> bool:
    model = small_model()
    s = getattr(parallel, strategy)(model, optim.SGD(model.parameters(), lr=0.1), comm)
    x, y = dataset().arrays
    s.forward_backward(x, y, F.cross_entropy)
    s.step()
    wanted = {k: v + comm.rank for k, v in small_model(seed=5).state_dict().items()}
    s.load_state_dict(wanted)
    same = same_bits(s.state_dict(), small_model(seed=5).state_dict())  # rank 0's
    s.forward_backward(x, y, F.cross_entropy)
    s.step()
    return same and not same_bits(s.state_dict(), small_model(seed=5).state_dict())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_load_state_dict(strategy: str) -> None:
    assert minidp.spawn(load, 2, strategy) == [True, True]
