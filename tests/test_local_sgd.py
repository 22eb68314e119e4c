"""Local SGD: laws of averaging now and then, exactly; and DiLoCo's outer step."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minidp
from minidp import data, nn, optim, parallel
from minidp.comm import comm_self
from minidp.nn import functional as F
from minidp.parallel.buffers import least_weights, mean_buffers
from tests.test_data_parallel import OPTIMIZERS, distance, plain_training, same_bits, train
from tests.told import told
from tests.training import go_on, spawned

pytestmark = pytest.mark.timeout(60)

WORLDS = ("process", "virtual")


def third(value: int) -> Fraction:
    return Fraction(value, 3)


# -- exactly: a small training in Fractions, and the same by a plain loop -----------------------------------------

# Samples of each rank in each step: unequal, none for one rank, none for all.
COUNTS = {
    1: [[3], [1], [0], [5], [2], [6], [4]],
    2: [[1, 2], [0, 3], [4, 1], [0, 0], [5, 0], [3, 3], [2, 1]],
    3: [[3, 0, 2], [0, 7, 0], [1, 4, 2], [0, 0, 0], [5, 1, 0], [1, 1, 1], [2, 0, 4]],
}


def batch(rank: int, step: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng([rank, step])
    x, y = (np.empty((count, c), object) for c in (2, 2))
    for array in (x, y):
        array.ravel()[...] = [third(int(v)) for v in rng.integers(-4, 5, array.size)]
    return x, y


def exact_model() -> nn.Module:
    model = nn.Linear(2, 2).astype(object)
    model.weight.data = np.array([[third(1), third(2)], [third(-2), third(4)]], object)
    model.bias.data = np.array([third(1), third(-1)], object)
    return model


def sgd(params: Any, **hyper: Any) -> optim.Optimizer:
    return optim.SGD(params, **{"lr": Fraction(1, 8), **hyper})


MOMENTUM = {"momentum": Fraction(9, 10), "weight_decay": Fraction(1, 7)}
DILOCO = {"lr": Fraction(7, 10), "momentum": Fraction(9, 10), "nesterov": True}


def exact(comm: Any, kind: str, rule: dict[str, Any], options: dict[str, Any]) -> Any:
    """The model after each step, as all ranks hold it together, and what each holds."""
    model = exact_model()
    options = dict(options)
    if "outer" in options:
        options["outer"] = sgd(model.parameters(), **options["outer"])
    s = getattr(parallel, kind)(model, sgd(model.parameters(), **rule), comm, **options)
    found = []
    for step, counts in enumerate(COUNTS[comm.world_size]):
        s.forward_backward(*batch(comm.rank, step, counts[comm.rank]), F.mse_loss)
        s.step()
        found.append((flat(s.state_dict()), flat(model.state_dict())))
    return found


def flat(state: dict[str, np.ndarray]) -> list[Fraction]:
    values = [v for array in state.values() for v in array.ravel()]
    assert all(isinstance(v, Fraction) for v in values)
    return values


def reference(ranks: int, rule: dict[str, Any], every: int, outer: dict[str, Any] | None) -> Any:
    """The same in one process: a replica and an optimizer a rank, averages as in the papers."""
    replicas = [exact_model() for _ in range(ranks)]
    rules = [sgd(model.parameters(), **rule) for model in replicas]
    theta = exact_model()
    outside = None if outer is None else sgd(theta.parameters(), **outer)
    used, found = [0] * ranks, []

    def mean(name: str) -> Any:
        return sum(n * getattr(m, name).data for n, m in zip(used, replicas)) / sum(used)

    for step, counts in enumerate(COUNTS[ranks]):
        for rank, n in enumerate(counts):
            used[rank] += n
            if n:
                rules[rank].zero_grad()
                F.mse_loss(replicas[rank](batch(rank, step, n)[0]), batch(rank, step, n)[1]).backward()
                rules[rank].step()
                rules[rank].updates = step + 1
        means = {name: mean(name) if any(used) else getattr(theta, name).data for name in ("weight", "bias")}
        if (step + 1) % every == 0:
            if any(used):
                for name in means:
                    p = getattr(theta, name)
                    p.grad = p.data - means[name]
                    if outside is None:
                        p.data = means[name]
                if outside is not None:
                    outside.step()
                for model in replicas:
                    for name in means:
                        getattr(model, name).data = getattr(theta, name).data.copy()
            used = [0] * ranks
            means = {name: getattr(theta, name).data.copy() for name in means}
        found.append((flat(means), [flat(model.state_dict()) for model in replicas]))
    return found


@pytest.mark.parametrize("ranks", COUNTS)
def test_with_h_1_it_is_synchronous_sgd_exactly(ranks: int) -> None:
    """Fractions, unequal shards and empty ones, a step without any sample: ``==``."""
    rule = {"weight_decay": Fraction(1, 7)}
    local = minidp.spawn(exact, ranks, "LocalSGD", rule, {"sync_every": 1}, world="virtual")
    for rank, states in enumerate(local):
        assert [state for state, _ in states] == [state for state, _ in local[0]], rank
        assert all(together == own for together, own in states), "all ranks hold it"
    # One process, all samples of a step in one batch.
    model = exact_model()
    opt = sgd(model.parameters(), **rule)
    for step, counts in enumerate(COUNTS[ranks]):
        x, y = (np.concatenate(a) for a in zip(*(batch(rank, step, n) for rank, n in enumerate(counts))))
        if len(x):
            opt.zero_grad()
            F.mse_loss(model(x), y).backward()
            opt.step()
        assert flat(model.state_dict()) == local[0][step][0]


def of_data_parallel(comm: Any, kind: str, options: dict[str, Any], counts: list[list[int]]) -> Any:
    model = exact_model()
    s = getattr(parallel, kind)(model, sgd(model.parameters()), comm, **options)
    for step, of_ranks in enumerate(counts):
        s.forward_backward(*batch(comm.rank, step, of_ranks[comm.rank]), F.mse_loss)
        s.step()
    return flat(s.state_dict())


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(1, 4).flatmap(
        lambda ranks: st.lists(st.lists(st.integers(0, 4), min_size=ranks, max_size=ranks), min_size=1, max_size=4)
    )
)
def test_it_equals_data_parallel_for_any_shares(counts: list[list[int]]) -> None:
    for of_ranks in counts:
        if sum(of_ranks) in (1, 2, 4, 8, 16):  # DataParallel multiplies by 1/n then, which is a float
            of_ranks[0] += 1 if sum(of_ranks) > 1 else 2
    args = (of_data_parallel, len(counts[0]))
    want = minidp.spawn(*args, "DataParallel", {}, counts, world="virtual")
    assert minidp.spawn(*args, "LocalSGD", {"sync_every": 1}, counts, world="virtual") == want


@pytest.mark.parametrize("outer", [None, DILOCO], ids=["mean", "DiLoCo"])
@pytest.mark.parametrize("every", [1, 2, 3, 9])
@pytest.mark.parametrize("ranks", COUNTS)
def test_replicas_and_their_means_are_as_in_the_papers(ranks: int, every: int, outer: Any) -> None:
    """With momentum, whose buffers are never averaged; the mean of every moment, which changes nothing."""
    options = {"sync_every": every} | ({} if outer is None else {"outer": outer})
    want = reference(ranks, MOMENTUM, every, outer)
    for rank, found in enumerate(minidp.spawn(exact, ranks, "LocalSGD", MOMENTUM, options, world="virtual")):
        for step, (together, own) in enumerate(found):
            assert together == want[step][0], (rank, step)
            assert own == want[step][1][rank], (rank, step)


def test_an_outer_step_of_1_is_the_mean() -> None:
    plain, outer = (
        minidp.spawn(exact, 3, "LocalSGD", MOMENTUM, {"sync_every": 2, **options}, world="virtual")
        for options in ({}, {"outer": {"lr": 1}})
    )
    assert plain == outer


# -- in floats --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("partition", ["batch", "dataset"])
def test_with_h_1_n_workers_equal_one(partition: str) -> None:
    want = plain_training("sgd")
    if partition == "dataset":
        want = minidp.spawn(train, 3, "DataParallel", "sgd", {"partition": partition})[0][0]
    for ranks, world in ((1, "virtual"), (2, "process"), (3, "virtual")):
        if partition == "dataset" and ranks != 3:
            continue
        options = {"sync_every": 1, "partition": partition}
        found = minidp.spawn(train, ranks, "LocalSGD", "sgd", options, world=world)
        assert all(same_bits(found[0][0], state) for state, _ in found)
        assert distance(want, found[0][0]) <= 1e-12


ALONE: tuple[dict[str, Any], ...] = (
    {},
    {"clip_norm": 0.3},
    {"global_batch_size": 16},  # 1/n is exact
    {"dtype": "float32"},
    {"dtype": "float16"},
    {"dtype": "float16", "clip_norm": 0.3},
)


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (optimizer, options)
        for optimizer in OPTIMIZERS
        for options in ALONE
        if "adam" not in optimizer or options.get("dtype") != "float16"  # there Adam's eps is 0
    ],
    ids=str,
)
def test_one_rank_alone_has_the_bits_of_data_parallel(optimizer: str, options: dict[str, Any]) -> None:
    """For any H: the mean of one is that one."""
    ((want, _),) = minidp.spawn(train, 1, "DataParallel", optimizer, dict(options), world="virtual")
    for every in (1, 3):
        local = {"sync_every": every, **options}
        ((found, _),) = minidp.spawn(train, 1, "LocalSGD", optimizer, local, world="virtual")
        assert same_bits(want, found), every


def test_a_gradient_is_clipped_by_each_rank_for_itself() -> None:
    """The gradient of rank 1 is far too long, that of rank 0 short enough."""

    def walk(comm: Any, clip_norm: float | None) -> list[float]:
        model = nn.Linear(2, 1, bias=False).astype("float64")
        model.weight.data = np.zeros((1, 2))
        s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=1.0), comm, 1, clip_norm=clip_norm)
        x = np.array([[0.3, 0.4] if comm.rank == 0 else [30.0, 40.0]])
        s.forward_backward(x, None, lambda output, _: output.mean())
        s.step()
        return model.weight.data.ravel().tolist()

    for found in minidp.spawn(walk, 2, 1.0, world="virtual"):
        assert np.allclose(found, [-(0.3 + 0.6) / 2, -(0.4 + 0.8) / 2], rtol=1e-6)
    for found in minidp.spawn(walk, 2, None, world="virtual"):
        assert np.allclose(found, [-30.3 / 2, -40.4 / 2])


def test_means_of_half_precision_do_not_overflow() -> None:
    def mean(comm: Any, outer: bool) -> Any:
        model = nn.Linear(2, 1, bias=False).astype("float16")
        model.weight.data = np.full((1, 2), 40000, np.float16)
        more = {"outer": optim.SGD(model.parameters(), lr=1)} if outer else {}
        s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.0), comm, 1, **more)
        s.forward_backward(np.full((comm.rank + 1, 2), 1e-3, np.float16), None, lambda output, _: output.mean())
        s.step()
        return model.weight.data.tolist()

    for outer in (False, True):
        assert minidp.spawn(mean, 3, outer, world="virtual") == [[[40000.0, 40000.0]]] * 3


# -- what travels, and what is whose ----------------------------------------------------------------------------


def counted(comm: Any, every: int) -> tuple[float, float, float]:
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3), seed=0)
    s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm, every)
    start = comm.traffic.bytes_sent
    x, y = np.ones((2, 6), np.float32), np.zeros(2, int)
    for _ in range(12):
        s.forward_backward(x, y, F.cross_entropy)
        s.step()
    found = s.metrics["bytes_sent"], s.metrics["averagings"], comm.traffic.bytes_sent - start
    s.state_dict()
    assert s.metrics["bytes_sent"] == found[0], "of the training"
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_bytes_fall_as_1_over_h(world: str) -> None:
    nbytes = nn.Layout(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))).nbytes
    for every in (1, 2, 3, 12, 13):
        for sent, averagings, all_sent in spawned(counted, 2, world, every):
            assert averagings == 12 // every
            assert sent == nbytes * averagings
            assert sent <= all_sent <= sent + 8 * averagings, "parameters, and a number each time"


def drifts(comm: Any, every: int) -> Any:
    """Of each step: parameters and optimizer state of this rank, then of the mean."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2), seed=comm.rank)
    model = model.astype("float64")
    s = parallel.LocalSGD(model, optim.Adam(model.parameters(), lr=0.01), comm, every)
    rng = np.random.default_rng(comm.rank)
    found = []
    for step in range(7):
        x, y = rng.standard_normal((3 + comm.rank, 4)), rng.integers(0, 2, 3 + comm.rank)
        s.forward_backward(x, y, F.cross_entropy)
        if step % 2:
            s.state_dict()  # in the middle of a step: gradients stay
        s.step()
        state = {slot: {k: a.copy() for k, a in arrays.items()} for slot, arrays in s.optimizer_state().items()}
        found.append((model.state_dict(), state, s.state_dict() if step < 5 else None))
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_replicas_drift_and_meet(world: str) -> None:
    zero, one = spawned(drifts, 2, world, 3)
    for step, ((w0, state0, mean0), (w1, state1, mean1)) in enumerate(zip(zero, one)):
        together = (step + 1) % 3 == 0
        for name in w0:
            if name != "1.num_batches_tracked":
                assert (w0[name].tobytes() == w1[name].tobytes()) == together, (step, name)
        assert w0["1.num_batches_tracked"] == w1["1.num_batches_tracked"] == step + 1
        assert not any(
            (state0[slot][name] == state1[slot][name]).all()
            for slot in state0
            for name in ("0.weight", "3.weight")
        ), "never averaged"
        if mean0 is not None:
            assert same_bits(mean0, mean1)
            for name in mean0:  # 3 samples a step, and 4
                assert np.allclose(mean0[name], (3 * w0[name] + 4 * w1[name]) / 7, rtol=1e-14, atol=1e-16), name


def test_the_state_dict_of_a_moment_changes_nothing() -> None:
    def plain(comm: Any, ask: bool) -> Any:
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2), seed=0)
        s = parallel.LocalSGD(model, OPTIMIZERS["nesterov"](model.parameters()), comm, 3)
        rng = np.random.default_rng(comm.rank)
        for _ in range(5):
            s.forward_backward(rng.standard_normal((3, 4)), rng.integers(0, 2, 3), F.cross_entropy)
            if ask:
                s.state_dict()
            s.step()
            if ask:
                s.state_dict()
        return model.state_dict()

    asked, quiet = (minidp.spawn(plain, 2, ask, world="virtual") for ask in (True, False))
    assert all(same_bits(a, b) for a, b in zip(asked, quiet))
    assert not same_bits(*quiet), "in the middle of three steps"


def test_two_runs_are_equal_to_the_bit() -> None:
    options = {"sync_every": 3, "dtype": "float32"}
    runs = [minidp.spawn(train, 3, "LocalSGD", "adam", dict(options))[0][0] for _ in range(2)]
    assert same_bits(*runs)
    assert same_bits(runs[0], minidp.spawn(train, 3, "LocalSGD", "adam", options, world="virtual")[0][0])


def test_accumulated_backwards_are_one_step() -> None:
    def steps(comm: Any, parts: int) -> Any:
        model = nn.Linear(3, 2, bias=False).astype("float64").initialize(0)
        options = {"accumulation_steps": parts}
        s = parallel.LocalSGD(model, OPTIMIZERS["adam"](model.parameters()), comm, 2, **options)
        rng = np.random.default_rng(comm.rank)
        for _ in range(4):
            x, y = rng.standard_normal((4, 3)), rng.standard_normal((4, 2))
            for rows in np.split(np.arange(4), parts):
                s.forward_backward(x[rows], y[rows], F.mse_loss)
            s.step()
        return s.state_dict()

    one, two = (minidp.spawn(steps, 2, parts, world="virtual")[0] for parts in (1, 2))
    assert distance(one, two) <= 1e-12


def test_loaded_parameters_are_everybodys_and_steps_are_counted_from_there() -> None:
    def loads(comm: Any) -> Any:
        model = nn.Linear(2, 1).astype("float64")
        outer = optim.SGD(model.parameters(), lr=0.5)
        s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm, 2, outer=outer)
        x = np.full((1, 2), comm.rank + 1.0)

        def step() -> None:
            s.forward_backward(x, np.zeros((1, 1)), lambda output, _: output.mean())
            s.step()

        step()  # one of two
        s.load_state_dict({"weight": np.full((1, 2), 3.0 + comm.rank), "bias": np.zeros(1)})  # rank 0's counts
        assert model.weight.data.tolist() == [[3.0, 3.0]]
        step()
        first = model.weight.data[0, 0]
        step()
        return first, model.weight.data[0, 0]

    (first, zero), (second, one) = minidp.spawn(loads, 2, world="virtual")
    assert (first, second) == pytest.approx((2.9, 2.8)), "not averaged yet"
    assert zero == one == pytest.approx(3 - 0.5 * (0.2 + 0.4) / 2), "Δ is measured from what was loaded"


def test_a_released_model_is_this_ranks_own() -> None:
    model = nn.Linear(2, 1)
    s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), 2)
    with pytest.raises(ValueError, match="read-only"):
        model.weight.data[...] = 0
    s.release()
    model.weight.data[...] = 0
    for call in (s.discard, s.step, s.state_dict, lambda: s.load_state_dict(model.state_dict())):
        assert "the strategy has been released" in told(call)
    parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), 2)


# -- buffers ----------------------------------------------------------------------------------------------------


class Bag(nn.Module):
    def __init__(self, **buffers: Any) -> None:
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)


def means(comm: Any, weights: list[int], buffers: list[dict[str, Any]]) -> dict[str, Any]:
    model = Bag(**{name: np.array(value) for name, value in buffers[comm.rank].items()})
    arrays = list(model.buffers())
    mean_buffers(comm, model, weights[comm.rank])
    assert all(a is b for a, b in zip(arrays, model.buffers())), "in place"
    return dict(model.named_buffers())


@pytest.mark.parametrize("world", WORLDS)
def test_mean_buffers(world: str) -> None:
    third32 = np.float32(1) / np.float32(3)
    given = [
        {
            "mean": np.array([[1.0, 2.0]]) * (rank + 1),
            "small": np.full(3, rank, np.float16),
            "agreed": np.array([1 / 3, np.inf, 0.1]),
            "agreed32": np.full((), third32),
            "count": np.array(2**60 + rank, np.int64),
            "seen": np.array([rank == 1, False]),
            "none": np.zeros(0),
        }
        for rank in range(3)
    ]
    for weights, mean in (([1, 2, 5], (1 + 4 + 15) / 8), ([0, 0, 0], 2.0), ([0, 7, 0], 2.0), ([10, 0, 20], 7 / 3)):
        found = spawned(means, 3, world, weights, given)
        for of_rank in found:
            assert {name: array.dtype for name, array in of_rank.items()} == {
                name: np.asarray(array).dtype for name, array in given[0].items()
            }
            assert same_bits(of_rank, found[0])
            assert of_rank["mean"].tolist() == [[mean, 2 * mean]]
            assert np.allclose(of_rank["small"], mean - 1, rtol=1e-3)
            assert of_rank["agreed"].tolist() == [1 / 3, np.inf, 0.1]
            assert of_rank["agreed32"] == third32
            assert of_rank["count"] == 2**60 + 2
            assert of_rank["seen"].tolist() == [True, False]


def test_means_of_buffers_are_rounded_once() -> None:
    given = [{"x": np.random.default_rng(rank).standard_normal(50).astype(np.float32)} for rank in range(3)]
    weights = [3, 1, 7]
    mean = sum(n * of_rank["x"].astype(np.float64) for n, of_rank in zip(weights, given)) / 11
    for found in minidp.spawn(means, 3, weights, given, world="virtual"):
        assert found["x"].tolist() == mean.astype(np.float32).tolist()


def test_a_rank_without_samples_has_no_say() -> None:
    given = [{"x": np.array([np.nan, np.inf])}, {"x": np.array([2.0, 3.0])}]
    for found in minidp.spawn(means, 2, [0, 3], given, world="virtual"):
        assert found["x"].tolist() == [2.0, 3.0]


def test_means_of_fractions_are_exact() -> None:
    given = [{"x": np.array([Fraction(rank + 1, 7)], object)} for rank in range(3)]
    for found in minidp.spawn(means, 3, [1, 0, 2], given, world="virtual"):
        assert found["x"][0] == (Fraction(1, 7) + 2 * Fraction(3, 7)) / 3


def test_a_model_without_buffers_costs_nothing() -> None:
    def sent(comm: Any) -> int:
        mean_buffers(comm, nn.Linear(2, 2), 3)
        return comm.traffic.bytes_sent

    assert minidp.spawn(sent, 2, world="virtual") == [0, 0]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=5))
def test_least_weights(counts: list[int]) -> None:
    weights, total = least_weights(counts)
    assert total == sum(weights) > 0
    assert np.gcd.reduce(weights) == 1
    if any(counts):
        assert all(Fraction(w, total) == Fraction(n, sum(counts)) for w, n in zip(weights, counts))


# -- what can go wrong ------------------------------------------------------------------------------------------


def with_nan(comm: Any, bad: str, how: str) -> Any:
    """In step 3 of 6 rank 1 has a batch with NaN, or none at all."""
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1), seed=0).astype("float64")
    s = parallel.LocalSGD(model, OPTIMIZERS["adam"](model.parameters()), comm, 2)
    rng = np.random.default_rng(comm.rank)
    said = ""
    for step in range(6):
        x, y = rng.standard_normal((4, 2)), rng.standard_normal((4, 1))
        if step == 3 and comm.rank == 1:
            x, y = (x[:0], y[:0]) if how == "none" else (x, y)
            if how != "none":
                (x if bad == "x" else y)[...] = np.nan
        s.forward_backward(x, y, F.mse_loss)
        before = model.state_dict() | {"m": s.optimizer_state()["exp_avg"]["0.weight"].copy()}
        try:
            s.step()
        except parallel.NonFiniteGradient as error:
            if how == "raise":
                raise
            assert same_bits(before, model.state_dict() | {"m": s.optimizer_state()["exp_avg"]["0.weight"].copy()})
            assert "call strategy.discard() first" in told(
                lambda s=s, x=x, y=y: s.forward_backward(x, y, F.mse_loss)
            )
            said = f"{error.parameter} {error.rank} {error.step}"
            s.discard()
            s.step()
    return s.state_dict(), said, s.updates


@pytest.mark.parametrize("bad", ["x", "y"])
def test_a_batch_that_is_left_out_is_one_without_samples(bad: str) -> None:
    caught = minidp.spawn(with_nan, 2, bad, "catch", world="virtual")
    want = minidp.spawn(with_nan, 2, bad, "none", world="virtual")
    assert [said for _, said, _ in caught] == ["", "1 1 3" if bad == "x" else "0.weight 1 3"]
    for (state, _, updates), (without, _, _) in zip(caught, want):
        assert updates == 6
        assert same_bits(state, without)


@pytest.mark.parametrize("world", WORLDS)
def test_nan_ends_the_run_if_nobody_catches_it(world: str) -> None:
    with pytest.raises(minidp.RankFailed, match=r"rank 1 of 2 raised NonFiniteGradient: .*0\.weight.* at step 3"):
        spawned(with_nan, 2, world, "y", "raise")


def test_check_finite_can_be_turned_off() -> None:
    model = nn.Linear(2, 1)
    s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), 1, check_finite=False)
    s.forward_backward(np.full((1, 2), np.nan, np.float32), np.zeros((1, 1), np.float32), F.mse_loss)
    s.step()
    assert np.isnan(model.weight.data).all()


def wrong(comm: Any, what: str) -> str:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    params, options, every = list(model.parameters()), {}, 2
    if what == "sync_every":
        every += comm.rank
    elif what == "an outer on one":
        options = {"outer": optim.SGD(params, lr=1.0)} if comm.rank else {}
    elif what == "outer rates":
        options = {"outer": optim.SGD(params, lr=1.0 + comm.rank)}
    elif what == "another model's":
        options = {"outer": optim.SGD(other.parameters(), lr=1.0)}
    elif what == "some of them":
        options = {"outer": optim.SGD([model.weight], lr=1.0)}
    return told(lambda: parallel.LocalSGD(model, optim.SGD(params, lr=0.1), comm, every, **options))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sync_every", "CollectiveMismatch: rank 1 has built another LocalSGD .*sync_every=3.*sync_every=2"),
        ("an outer on one", "CollectiveMismatch: rank 1 has .*outer=.*SGD.* instead of .*outer=None"),
        ("outer rates", "CollectiveMismatch: rank 1 has .*2.0.* instead of .*1.0"),
        ("another model's", "ValueError: outer: the optimizer lacks the parameters weight, bias"),
        ("some of them", "ValueError: outer: the optimizer lacks the parameters bias"),
    ],
)  # fmt: skip
def test_ranks_that_differ_and_rules_of_others(what: str, message: str) -> None:
    for said in minidp.spawn(wrong, 2, what, world="virtual"):
        assert re.match(message, said), said


@pytest.mark.parametrize("every", [0, -1, 1.5, "2", None])
def test_h_is_a_whole_number(every: Any) -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"sync_every=.*whole number ≥ 1"):
        parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), every)
    parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), np.int64(3))


def test_fractions_have_no_square_roots() -> None:
    model = nn.Linear(2, 1).astype(object)
    plain, adam = optim.SGD(model.parameters(), lr=1), optim.AdamW(model.parameters())
    for rule, options, who in (
        (adam, {}, "AdamW"),
        (plain, {"outer": adam}, "AdamW"),
        (plain, {"clip_norm": 1.0}, "clip_norm"),
    ):
        with pytest.raises(TypeError, match=f"{who} takes square roots"):
            parallel.LocalSGD(model, rule, comm_self(), 1, **options)


def out_of_step(comm: Any) -> None:
    model = nn.Linear(2, 1)
    s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm, 2)
    for _ in range(4 - comm.rank):
        s.step()
    s.state_dict()


def test_ranks_with_different_numbers_of_steps_are_told() -> None:
    with pytest.raises(minidp.CollectiveMismatch, match=r"step/average.*state_dict|state_dict.*step/average"):
        minidp.spawn(out_of_step, 2, world="virtual")


def test_a_parameter_that_a_step_does_not_use_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(2, 1), seed=0)
    s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1), comm_self(), 2)
    for step in range(4):
        before = model.state_dict()
        s.backward(model[step % 2](np.ones((1, 2), np.float32)).mean(), samples=1)
        s.step()
        moved = [not np.array_equal(before[f"{i}.weight"], model[i].weight.data) for i in (0, 1)]
        assert moved == [step % 2 == 0, step % 2 == 1]


def test_frozen_parameters_are_rank_0s() -> None:
    def some(comm: Any) -> Any:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2), seed=comm.rank).astype("float64")
        model[1].weight.requires_grad = False
        s = parallel.LocalSGD(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm, 2)
        start = model.state_dict()
        go_on(s, data.ArrayDataset(np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 0, 1])), 4, 4)
        assert (model[1].weight.data == start["1.weight"]).all()
        return s.state_dict()

    zero, one = minidp.spawn(some, 2, world="virtual")
    assert same_bits(zero, one)
