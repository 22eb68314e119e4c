"""Timing-only runs: the clocks of the virtual world without its ranks; rehearsals, and described steps by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import autograd, nn, optim, parallel
from minidp.comm import Communicator
from minidp.comm.rehearsal import Collective, Compute, Rehearsal, Script, Tape, Wait
from minidp.nn import functional as F
from minidp.parallel.strategy import Strategy
from minidp.parallel.timing import Layer, Timing, described_step, rehearse, replay
from minidp.sim import Cluster, FatTree, Ring

Options = dict[str, Any]
X = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
Y = np.array([0, 1, 2, 0])
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=0.01),
}
CASES: list[tuple[str, str, Options]] = [
    ("DataParallel", "sgd", {}),
    ("DataParallel", "momentum", {"bucket_cap_mb": 0.002}),
    ("DataParallel", "adam", {"bucket_cap_mb": 0, "clip_norm": 0.1, "accumulation_steps": 2}),
    ("NaiveDataParallel", "adam", {"clip_norm": 0.1}),
    ("DataParallel", "sgd", {"norm": "local"}),
    ("DataParallel", "sgd", {"norm": "synchronised"}),
]
# Computing and communication take about as long: neither hides the other.
MACHINE: Options = {
    "flops": 3e9,
    "op_overhead_s": 1e-6,
    "memory_bytes_per_s": 5e9,
    "reduce_bytes_per_s": 3e9,
    "latency_s": 7e-6,
    "bandwidth_bytes_per_s": 1.1e8,
}


def clusters(p: int) -> dict[str, Cluster]:
    """Machine rooms for p ranks; where several ranks share a node there is a node that is not full."""
    threes = {"nodes": -(-p // 3), "ranks_per_node": 3, "local_latency_s": 1e-6}
    return {
        "flat": Cluster(nodes=p, **MACHINE),
        "stragglers": Cluster(nodes=p, stragglers={p - 1: 3.3, 0: 0.7}, **MACHINE),
        "jitter": Cluster(nodes=p, jitter=0.3, seed=4, **MACHINE),
        "threes": Cluster(**threes, **MACHINE),
        "slow nodes": Cluster(**threes, local_bandwidth_bytes_per_s=2e7, jitter=0.1, **MACHINE),
        "fat tree": Cluster(nodes=-(-p // 4) * 4, topology=FatTree(4, 4), **MACHINE),
        "small leaves": Cluster(nodes=-(-p // 4) * 2, ranks_per_node=2, topology=FatTree(2, 1.5), **MACHINE),
        "ring": Cluster(nodes=max(2, p), topology=Ring(), stragglers={0: 2.0}, **MACHINE),
        "ring of pairs": Cluster(nodes=max(2, -(-p // 2)), ranks_per_node=2, topology=Ring(), **MACHINE),
        "nothing waits": Cluster(nodes=p, flops=1e9, latency_s=0, bandwidth_bytes_per_s=float("inf")),
        "nothing computes": Cluster(nodes=p, flops=float("inf"), latency_s=1e-5, bandwidth_bytes_per_s=1e7),
    }


CLUSTERS = list(clusters(1))


def model(norm: str | None = None) -> nn.Module:
    middle = [nn.BatchNorm1d(40)] if norm else []
    return nn.Sequential(
        nn.Linear(6, 40), *middle, nn.Tanh(), nn.Linear(40, 30), nn.GELU(), nn.Linear(30, 3), seed=0
    )


def build(comm: Communicator, strategy: str, optimizer: str, options: Options) -> Strategy:
    options = dict(options)
    m = model(norm := options.pop("norm", None))
    if norm == "synchronised":
        parallel.SyncBatchNorm.convert(m, comm)
    made: Strategy = getattr(parallel, strategy)(m, OPTIMIZERS[optimizer](m.parameters()), comm, **options)
    return made


def one_step(s: Strategy) -> None:
    for _ in range(s.accumulation_steps):
        s.forward_backward(X, Y, F.cross_entropy)
    s.step()


def train(comm: Communicator, steps: int, *case: Any) -> list[float]:
    """The clock at the start, and after each step."""
    s = build(comm, *case)
    clocks = [comm.now()]
    for _ in range(steps):
        one_step(s)
        clocks.append(comm.now())
    s.release()
    return clocks


def virtual(p: int, cluster: Cluster, steps: int, *case: Any) -> np.ndarray:
    """Shape (steps + 1, p)."""
    return np.array(minidp.spawn(train, p, steps, *case, world="virtual", cluster=cluster)).T


def rehearsed_run(steps: int, *case: Any) -> Script:
    """All of `train`, its construction included, as one script: replayed it has absolute times, no differences."""
    tape = Tape()
    with tape.metered():
        train(Rehearsal(tape), steps, *case)
        return tape.cut()


# --- the law: timing-only equals the event loop ----------------------------------------------------------


@pytest.mark.parametrize("room", CLUSTERS)
@pytest.mark.parametrize("p", [1, 2, 3, 5, 8])
def test_the_clocks_of_every_rank_and_step_to_the_bit(p: int, room: str) -> None:
    cluster = clusters(p)[room]
    for case in CASES:
        want = virtual(p, cluster, 3, *case)
        assert (np.diff(want, axis=0) > 0).all() or (p, room) == (1, "nothing computes"), "time has passed"
        for steps in (0, 1, 3):
            found = replay(rehearsed_run(steps, *case), cluster, p).clocks
            assert found.tolist() == [want[steps].tolist()], (case, steps)


@pytest.mark.parametrize("room", ["jitter", "slow nodes", "fat tree", "ring"])
def test_64_ranks_to_the_bit(room: str) -> None:
    cluster = clusters(64)[room]
    for case in (CASES[1], CASES[3]):
        want = virtual(64, cluster, 2, *case)
        assert replay(rehearsed_run(2, *case), cluster, 64).clocks.tolist() == [want[2].tolist()], case


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}")
@pytest.mark.parametrize("p", [1, 2, 3, 5, 8, 64])
def test_rehearse_and_replay_to_the_bit(p: int, case: Any) -> None:
    """The way it is used: one step is written down, and replayed several times from 0.

    In the virtual world construction comes before. All numbers here are sums of powers of two, so that the times
    of steps are exact, whatever came before.
    """
    room = Cluster(
        nodes=p,
        flops=2.0**30,
        op_overhead_s=2.0**-20,
        memory_bytes_per_s=2.0**32,
        reduce_bytes_per_s=2.0**31,
        latency_s=2.0**-17,
        bandwidth_bytes_per_s=2.0**27,
        stragglers={0: 1.5, p - 1: 4.0},
    )
    want = virtual(p, room, 4, *case)
    script = rehearse(lambda comm: build(comm, *case), X, Y, F.cross_entropy)
    timing = replay(script, room, p, steps=4)
    assert timing.clocks.tolist() == (want[1:] - want[0]).tolist()
    assert timing.step_s == (want[4] - want[0]).max() / 4


@pytest.mark.parametrize("room", CLUSTERS)
def test_rehearse_and_replay_with_any_numbers(room: str) -> None:
    """Where times are rounded the two differ by rounding, and by nothing else."""
    cluster = clusters(5)[room]
    for case in CASES:
        want = virtual(5, cluster, 3, *case)
        script = rehearse(lambda comm, case=case: build(comm, *case), X, Y, F.cross_entropy)  # type: ignore[misc]
        found = replay(script, cluster, 5, steps=3).clocks
        np.testing.assert_allclose(found, want[1:] - want[0], rtol=1e-11, atol=0)


@pytest.mark.parametrize("room", ["flat", "jitter", "slow nodes", "fat tree", "ring"])
def test_beyond_64_ranks_to_rounding(room: str) -> None:
    cluster = clusters(100)[room]
    for case in (CASES[1], CASES[3]):
        want = virtual(100, cluster, 2, *case)
        found = replay(rehearsed_run(2, *case), cluster, 100).clocks
        np.testing.assert_allclose(found, want[2:], rtol=1e-9, atol=0)


def test_ten_thousand_ranks() -> None:
    """Their steps take no longer than those of 100 where latency is free and the network is no bottleneck."""
    script = described_step([Layer(1000, 1e9, 2e9)] * 4)
    room = Cluster(nodes=10_000, flops=1e12, jitter=0.1, stragglers={9_999: 2.0})
    timing = replay(script, room, 10_000, steps=2)
    assert timing.clocks.shape == (2, 10_000)
    assert (timing.clocks[0] > 0.024).all(), "all wait for the straggler, give or take its jitter"
    assert timing.step_s < 0.05


# --- any program that a rehearsal can see ------------------------------------------------------------------


def all_collectives(comm: Communicator) -> list[float]:
    """Each once, some begun and waited for later or not at all, with work between them."""
    x, many = np.ones(37, np.float32), np.ones((comm.world_size, 5))

    def compute() -> None:
        autograd.tensor(np.ones((20, 20))) @ autograd.tensor(np.ones((20, 20)))

    compute()
    comm.broadcast_object({"some": "thing", "longer": list(range(50))}, 1 % comm.world_size)
    comm.all_gather_object("abc")
    comm.all_reduce(x, algorithm="ring")
    compute()
    early = comm.all_reduce(x, async_op=True)
    comm.broadcast(x)  # after what was begun before
    compute()
    comm.all_gather_int(3, async_op=True)  # nobody waits for it
    assert early is not None
    early.wait()
    other = comm.split(0, comm.rank)
    assert other is not None
    late = other.broadcast(x, async_op=True)
    compute()
    assert late is not None
    comm.barrier()
    late.wait()
    comm.all_gather(np.ones(5 * comm.world_size), np.ones(5))
    compute()
    comm.reduce(x, 1 % comm.world_size)
    comm.gather(x, 0)
    comm.scatter(many if comm.rank == 0 else None, 0)
    comm.all_to_all(np.empty_like(many), many)
    comm.allocate(100)
    compute()
    return [comm.now()]


@pytest.mark.parametrize("room", CLUSTERS)
@pytest.mark.parametrize("p", [1, 2, 5, 7])
def test_all_collectives_to_the_bit(p: int, room: str) -> None:
    cluster = clusters(p)[room]
    tape = Tape()
    with tape.metered():
        all_collectives(Rehearsal(tape))
        script = tape.cut()
    want = minidp.spawn(all_collectives, p, world="virtual", cluster=cluster)
    assert replay(script, cluster, p).clocks.T.tolist() == want


def reduce_scatter(comm: Communicator) -> list[float]:
    x = np.ones(2 * 3 * 4 * 5, np.float32)  # a length that stays, and is divided by every p
    comm.reduce_scatter(np.empty(len(x) // comm.world_size, np.float32), x)
    return [comm.now()]


@pytest.mark.parametrize("p", [1, 2, 4, 5])
def test_reduce_scatter_to_the_bit(p: int) -> None:
    cluster = clusters(p)["flat"]
    tape = Tape()
    reduce_scatter(Rehearsal(tape))
    want = minidp.spawn(reduce_scatter, p, world="virtual", cluster=cluster)
    assert replay(tape.cut(), cluster, p).clocks.T.tolist() == want


def delayed(comm: Communicator, begin_step: Callable[[], Any] = lambda: None) -> list[float]:
    """A step that ends while its messages still travel; the next one waits for them (as staleness 1 would)."""
    x, clocks, work = np.ones(3000, np.float32), [], None
    for _ in range(4):
        begin_step()
        autograd.tensor(np.ones((30, 30))) @ autograd.tensor(np.ones((30, 30)))
        if work is not None:
            work.wait()
        work = comm.all_reduce(x, async_op=True)
        autograd.tensor(np.ones((50, 50))) @ autograd.tensor(np.ones((50, 50)))
        clocks.append(comm.now())
    return clocks


@pytest.mark.parametrize("room", ["flat", "jitter"])
def test_waits_for_what_an_earlier_step_has_begun(room: str) -> None:
    tape, scripts = Tape(), []
    with tape.metered():
        delayed(Rehearsal(tape), lambda: scripts.append(tape.cut()))
        scripts.append(tape.cut())
    assert scripts[2] == scripts[3] == scripts[4]
    assert [entry for entry in scripts[2] if isinstance(entry, Wait)] == [Wait(0, 0)]
    cluster = clusters(3)[room]
    want = np.array(minidp.spawn(delayed, 3, world="virtual", cluster=cluster)).T
    assert replay(scripts[2], cluster, 3, steps=4).clocks.tolist() == want.tolist(), "the first waits for nothing"
    in_haste = [entry for entry in scripts[2] if entry != Wait(0, 0)]
    assert (replay(in_haste, cluster, 3, steps=4).clocks != want)[1:].any(), "later ones do wait"


# --- the rehearsal itself -----------------------------------------------------------------------------------


def test_the_script_of_a_step_literally() -> None:
    """Linear(2, 3), float32: 2·3 weights and 3 biases, each padded to 16 elements; a batch of 4."""

    def small(comm: Communicator, **options: Any) -> Strategy:
        m = nn.Sequential(nn.Linear(2, 3), seed=0)
        return parallel.DataParallel(m, optim.SGD(m.parameters(), lr=0.1), comm, **options)

    def works(script: Script) -> Script:
        return [entry for entry in script if not isinstance(entry, Compute)]

    x = np.ones((4, 2), np.float32)
    script = rehearse(small, x, Y, F.cross_entropy)
    compute, bucket, count, first, last, update = script
    assert isinstance(compute, Compute)
    assert compute.operations > 0
    assert compute.flops >= 3 * 2 * 4 * 2 * 3 - 2 * 4 * 2 * 3, "x has no gradient: two matrix products of 2·4·2·3"
    assert bucket == Collective("all_reduce", 32, 4, stream=2)  # 0 is the user's communicator, 1 the strategy's
    assert count == Collective("", stream=3)
    assert (first, last) == (Wait(2, 1), Wait(3, 1))
    assert update == Compute(1, 2 * 32, 3 * 32 * 4)

    two = rehearse(lambda comm: small(comm, bucket_cap_mb=0), x, Y, F.cross_entropy)
    assert works(two) == [
        Collective("all_reduce", 16, 4, stream=2),
        Collective("all_reduce", 16, 4, stream=2),
        Collective("", stream=3),
        Wait(2, 1),
        Wait(2, 2),
        Wait(3, 1),
    ]
    naive = rehearse(
        lambda comm: parallel.NaiveDataParallel(
            m := nn.Sequential(nn.Linear(2, 3), seed=0), optim.SGD(m.parameters(), lr=0.1), comm
        ),
        *(x, Y, F.cross_entropy),
    )
    assert works(naive) == [Collective("direct", 1, 8), Collective("direct", 6, 4), Collective("direct", 3, 4)]
    assert naive[-2:] == [Compute(1, 12, 72), Compute(1, 6, 36)] or naive[-1] == Compute(2, 18, 108)


def test_work_of_all_backwards_of_a_step_is_in_the_script() -> None:
    """With accumulation the gradients leave in the last backward: the work before is that of the others, too."""

    def script(backwards: int) -> Script:
        case = ("DataParallel", "sgd", {"accumulation_steps": backwards, "bucket_cap_mb": 0})
        return rehearse(lambda comm: build(comm, *case), X, Y, F.cross_entropy)

    def work(script: Script) -> float:
        return sum(entry.flops for entry in script if isinstance(entry, Compute))

    def before_the_first_bucket(script: Script) -> float:
        return work(script[: next(i for i, entry in enumerate(script) if isinstance(entry, Collective))])

    one, three = script(1), script(3)
    update = one[-1]
    assert isinstance(update, Compute)
    assert work(three) - update.flops > 2.9 * (work(one) - update.flops)
    assert before_the_first_bucket(three) > 2 * work(one[:-1])
    assert [type(entry) for entry in one] == [type(entry) for entry in three]


def test_nothing_depends_on_values() -> None:
    def script(scale: float, seed: int, case: Any) -> Script:
        x = scale * np.random.default_rng(seed).standard_normal(X.shape).astype(np.float32)
        return rehearse(lambda comm: build(comm, *case), x, np.roll(Y, seed), F.cross_entropy)

    for case in CASES:
        assert script(1, 0, case) == script(100, 1, case) == script(0, 2, case)


def test_rehearse_leaves_the_model_free() -> None:
    m = model()

    def build_on(comm: Communicator) -> Strategy:
        return parallel.DataParallel(m, optim.SGD(m.parameters(), lr=0.1), comm)

    first = rehearse(build_on, X, Y, F.cross_entropy)
    assert rehearse(build_on, X, Y, F.cross_entropy) == first, "or the model would belong to another strategy"

    def fails(*_: Any) -> Any:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rehearse(build_on, X, Y, fails)
    with pytest.raises(parallel.NonFiniteGradient, match=r"rank 0"):
        rehearse(build_on, X * np.float32(np.nan), Y, F.cross_entropy)
    m[0].weight.data[...] = 1.0  # what NaN has not spoiled: no step was committed
    assert rehearse(build_on, X, Y, F.cross_entropy) == first


def test_what_is_computed_outside_is_not_in_the_script() -> None:
    tape = Tape()
    one = autograd.tensor(np.ones((2, 2)))
    one @ one
    with tape.metered():
        assert tape.cut() == []
        one @ one
        (work,) = tape.cut()
        assert isinstance(work, Compute)
        assert (work.operations, work.flops) == (1, 16)
    one @ one
    assert tape.cut() == []


@pytest.mark.parametrize(
    "talk",
    [
        lambda comm: comm.send(np.ones(2), 1),
        lambda comm: comm.recv(np.ones(2), 1),
        lambda comm: comm.recv(np.ones(2)),
        lambda comm: comm.send(np.ones(2), 1, async_op=True),
    ],
)
def test_messages_from_rank_to_rank_cannot_be_rehearsed(talk: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"rank to rank can't be rehearsed: run the strategy itself"):
        talk(Rehearsal(Tape()))
    with pytest.raises(ValueError, match=r"src=2: this communicator has ranks 0 to 1"):
        Rehearsal(Tape()).broadcast_object(1, src=2)


def test_objects_come_back_as_copies() -> None:
    comm, thing = Rehearsal(Tape(), world_size=3), {"a": [1]}
    assert comm.broadcast_object(thing) == thing
    assert comm.broadcast_object(thing) is not thing
    everybody = comm.all_gather_object(thing)
    assert everybody == [thing] * 3
    assert everybody[0] is not everybody[1]
    assert comm.all_gather_int(7) == [7, 7, 7]
    assert comm.split(None) is None
    assert [len(view) for view in comm.allocate(5)] == [5, 5, 5]


# --- described steps, by hand -------------------------------------------------------------------------------

# A message of one byte takes a second; so an all-reduce of n bytes on two ranks, by the ring or the like.
SLOW = {"flops": 1.0, "latency_s": 0.0, "bandwidth_bytes_per_s": 1.0}


def comm_s(n: int) -> float:
    """Two ranks exchange n bytes (direct: nβ, and no other is faster; adding is free)."""
    return float(n)


@pytest.mark.parametrize("backward", [(1, 1, 1, 1), (5, 1, 9, 2), (100, 1, 1, 1), (0, 0, 0, 50)])
def test_buckets_end_one_after_the_other(backward: tuple[int, ...]) -> None:
    """finish_k = max(finish_{k−1}, ready_k) + comm_k; layers are given from input to output."""
    sizes = (8, 2, 12, 6)
    layers = [Layer(n, 3, b) for n, b in zip(sizes, backward)]
    ready, finish = 3.0 * len(layers), 0.0
    for layer in reversed(layers):
        ready += layer.backward_flops
        finish = max(finish, ready) + comm_s(layer.parameters)
    update = Compute(1, 7.0)
    timing = replay(described_step(layers, 0, itemsize=1, update=update), Cluster(nodes=2, **SLOW), 2)
    assert timing.clocks.tolist() == [[max(finish, ready) + 7] * 2]
    assert timing.compute_s == ready + 7
    assert timing.efficiency == (ready + 7) / (max(finish, ready) + 7)


def test_numbers_by_hand() -> None:
    """Three layers of 4, 10, 2 bytes; forward 3 s; backward 1, 2, 3 s. With everything written out:

    ready   6 (layer 2), 8 (layer 1), 9 (layer 0);  finish  6+2 = 8, 8+10 = 18, 18+4 = 22
    """
    layers = [Layer(4, 1, 1), Layer(10, 1, 2), Layer(2, 1, 3)]
    two = Cluster(nodes=2, **SLOW)
    assert replay(described_step(layers, 0, 1), two, 2).step_s == 22
    # Both ranks wait, then the second step begins: 22 later, all again.
    assert replay(described_step(layers, 0, 1), two, 2, steps=3).clocks.tolist() == [
        [22.0] * 2,
        [44.0] * 2,
        [66.0] * 2,
    ]
    # Layers 2 and 1 in one bucket of 12 bytes: it leaves at 8 and is back at 20; the next at 24.
    assert replay(described_step(layers, 12 / 2**20, 1), two, 2).step_s == 24
    # A straggler of factor 2: ready 12, 16, 18; finish 14, 26, 30.
    slow = Cluster(nodes=2, stragglers={1: 2.0}, **SLOW)
    assert replay(described_step(layers, 0, 1), slow, 2).clocks.tolist() == [[30.0, 30.0]]
    # Alone nobody waits.
    assert replay(described_step(layers, 0, 1), two, 1).step_s == 9
    assert replay(described_step(layers, 0, 1), two, 1).efficiency == 1


@pytest.mark.parametrize("p", [2, 5, 8, 100])
def test_without_overlap_a_step_is_the_slowest_rank_plus_communication(p: int) -> None:
    """Article 3.3.1: one bucket, which is ready at the end of backward."""
    layers = [Layer(1000, 2e6, 4e6)] * 5
    room = Cluster(nodes=p, flops=1e9, stragglers={p - 1: 3.0, 0: 2.0}, latency_s=1e-4)
    slowest = 3 * 5 * 6e6 / 1e9
    alone = replay([Collective("all_reduce", 5000, 4)], room, p).step_s
    assert replay(described_step(layers), room, p).step_s == pytest.approx(slowest + alone, rel=1e-13)
    assert alone > 0.5e-4


def buckets(layers: list[int], cap_bytes: float, itemsize: int = 1) -> list[tuple[int, int]]:
    """(elements, layers whose backward came before it) of each bucket."""
    script = described_step([Layer(n, 1, 1) for n in layers], cap_bytes / 2**20, itemsize)
    found, computed = [], -1  # the first entry is the forward
    for entry in script:
        computed += isinstance(entry, Compute)
        if isinstance(entry, Collective) and entry.schedule:
            assert (entry.stream, entry.itemsize) == (0, itemsize)
            found.append((entry.length, computed))
    return found


def test_buckets_of_a_described_step() -> None:
    assert buckets([1, 2, 3], 0) == [(3, 1), (2, 2), (1, 3)]
    assert buckets([1, 2, 3], 5) == [(5, 2), (1, 3)]
    assert buckets([1, 2, 3], 6) == [(6, 3)]
    assert buckets([1, 2, 3], 6, itemsize=2) == [(3, 1), (3, 3)]
    assert buckets([9, 1, 1], 2) == [(2, 2), (9, 3)], "a layer that is larger than a bucket"
    assert buckets([1, 9, 1], 2) == [(1, 1), (9, 2), (1, 3)]
    assert buckets([0, 0, 4, 0, 0, 3, 0], 4) == [(3, 2), (4, 5)], "it leaves when its last gradient is there"
    assert buckets([0, 0], 4) == []
    assert buckets([], 4) == []


def test_described_buckets_are_those_of_the_strategy() -> None:
    """Layers of one parameter of whole cache lines each, so that nothing is padded."""
    sizes = [16 * n for n in (3, 1, 40, 2, 2, 9)]

    class Model(nn.Module):
        def __init__(self) -> None:
            self.parts = nn.Sequential(*(nn.Linear(16, n // 16, bias=False) for n in sizes), seed=0)

        def forward(self, x: Any) -> Any:
            return sum(F.tanh(part(x)).sum() for part in self.parts)

    for cap in (0, 100, 200, 1000, 10_000):
        script = rehearse(
            lambda comm, cap=cap: parallel.DataParallel(  # type: ignore[misc]
                m := Model(), optim.SGD(m.parameters(), lr=0.1), comm, bucket_cap_mb=cap / 2**20
            ),
            *(np.ones((2, 16), np.float32), np.ones(2), lambda out, y: out * 0.1),
        )
        real = [entry.length for entry in script if isinstance(entry, Collective) and entry.schedule]
        described = buckets(sizes, cap, itemsize=4)
        assert [length for length, _ in described] == real, cap


def test_a_described_step_without_parameters_or_layers() -> None:
    two = Cluster(nodes=2, **SLOW)
    assert replay(described_step([Layer(0, 1, 2)] * 2), two, 2).step_s == 6
    assert replay(described_step([]), two, 2).step_s == 0
    assert replay(described_step([]), two, 2).efficiency == 1


# --- refusals ---------------------------------------------------------------------------------------------


def test_errors() -> None:
    two = Cluster(nodes=2, **SLOW)
    script = described_step([Layer(4, 1, 1)])
    with pytest.raises(ValueError, match=r"steps=0: at least one step makes a timing"):
        replay(script, two, 2, steps=0)
    for world_size in (0, -1):
        with pytest.raises(ValueError, match=rf"world_size={world_size}: give at least 1"):
            replay(script, two, world_size)
    with pytest.raises(ValueError, match=r"3 ranks do not fit into a cluster of 2 nodes × 1 ranks"):
        replay(script, two, 3)
    with pytest.raises(ValueError, match=r"bucket_cap_mb=-1: give 0 \(a bucket a layer\) or more"):
        described_step([Layer(4, 1, 1)], -1)
    with pytest.raises(ValueError, match=r"negative number of parameters: give 0 or more"):
        described_step([Layer(4, 1, 1), Layer(-4, 1, 1)])


def test_a_script_that_nobody_can_follow() -> None:
    two = Cluster(nodes=2, **SLOW)
    with pytest.raises(ValueError, match=r"Wait\(stream=0, nth=2\) waits for what the script has not begun: .* 1"):
        replay([Collective("ring", 4, stream=0), Wait(0, 2)], two, 2)
    with pytest.raises(ValueError, match=r"Wait\(stream=5, nth=1\) waits for what the script has not begun: .* 0"):
        replay([Wait(5, 1)], two, 2)
    with pytest.raises(ValueError, match=r"Wait\(stream=0, nth=1\) waits"):
        replay([Wait(0, 1), Collective("ring", 4, stream=0)], two, 2, steps=2)
    for p in (2, 3, 100):
        with pytest.raises(ValueError, match=r"schedule='rign', .*: there is no such schedule; minidp\.comm\."):
            replay([Collective("rign", 4)], Cluster(nodes=100), p)


@pytest.mark.parametrize("p", [2, 100])
def test_collectives_that_meet_on_the_network_are_refused(p: int) -> None:
    """Where each has the network for itself, two streams and blocking ones are fine."""
    cluster = Cluster(nodes=p, **SLOW)
    both = [Collective("ring", 400, stream=0), Collective("ring", 400, stream=1)]
    with pytest.raises(ValueError, match=r"stream=1\) begins while another collective is under way: a replay"):
        replay(both, cluster, p)
    with pytest.raises(ValueError, match=r"stream=None\) begins while another collective is under way"):
        replay([both[0], Collective("ring", 400)], cluster, p)
    apart = replay([both[0], Wait(0, 1), both[1], Wait(1, 1)], cluster, p)
    one = replay([both[0], Wait(0, 1)], cluster, p)
    assert apart.step_s == pytest.approx(2 * one.step_s)
    assert replay(both, cluster, 1).step_s == 0, "nothing travels"


def test_timing_is_a_value() -> None:
    timing = Timing(np.array([[1.0, 2.0], [3.0, 5.0]]), compute_s=2.0)
    assert (timing.step_s, timing.efficiency) == (2.5, 0.8)
