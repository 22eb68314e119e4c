"""Ranks that lose each other in less obvious ways: each must end in an error or in the right numbers."""

from __future__ import annotations

import pickle
import time
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel
from minidp.comm import AVG
from minidp.nn import functional as F
from tests.told import told


def goes_on_after_a_timeout(comm: Any) -> list[str]:
    if comm.rank == 1:
        time.sleep(1.0)
        x = np.zeros(3)
        return [told(lambda: comm.all_reduce(x)), str(x[0])]
    said = [told(lambda v=v: comm.all_reduce(np.full(3, v))) for v in (1.0, 20.0, 300.0)]
    time.sleep(0.8)
    return said


def test_a_rank_that_goes_on_after_a_timeout_is_out_of_step() -> None:
    zero, one = minidp.spawn(goes_on_after_a_timeout, 2, timeout_s=0.4)
    assert zero[0].startswith("CollectiveTimeout: rank 1 did not come to all_reduce #1")
    assert all(said.startswith("CommError: this communicator is out of step") for said in zero[1:])
    assert one[1] in ("0.0", "1.0"), "never a sum of different collectives"


def gives_up(comm: Any) -> list[str]:
    x = np.ones(300_000)  # five chunks
    x.flags.writeable = comm.rank == 1
    return [told(lambda: comm.all_reduce(x)), told(lambda: comm.all_reduce(np.ones(300_000)))]


def test_a_read_only_array_is_refused_before_the_others_are_met() -> None:
    zero, one = minidp.spawn(gives_up, 2)
    assert zero[0].startswith("ValueError: the result can't be written to a read-only array")
    assert zero[1] == one[0] == "nothing", "the first that both came to"
    assert one[1].startswith("CollectiveMismatch: rank 0 returned; rank 1 waits in all_reduce #2")


def other_object_collectives(comm: Any) -> str:
    return told(lambda: comm.split(0) if comm.rank == 0 else comm.all_gather_object("hello"))


def test_split_is_not_taken_for_a_gather() -> None:
    for said in minidp.spawn(other_object_collectives, 2):
        assert said.startswith("CollectiveMismatch")
        assert "rank 0 called split; rank 1 called all_gather_object" in said


def builds_alone(comm: Any) -> str:
    model = nn.Sequential(nn.Linear(2, 2))
    build = lambda: parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.1), comm)  # noqa: E731
    return told(build if comm.rank == 0 else comm.barrier)


def test_a_strategy_that_only_one_rank_builds() -> None:
    for said in minidp.spawn(builds_alone, 2):
        assert "rank 0 called DataParallel; rank 1 called barrier" in said


def refused(comm: Any) -> list[str]:
    read_only = np.ones(3)
    read_only.flags.writeable = False
    return [
        told(lambda: comm.all_reduce(np.float64(1.0))),
        told(lambda: comm.broadcast(3.0)),
        told(lambda: comm.all_reduce(np.ones(3), "max")),
        told(lambda: comm.all_reduce(read_only)),
        told(lambda: comm.all_reduce(np.ones(3), algorithm="rings")),
        told(lambda: comm.all_reduce(np.array([1, "a"], dtype=object))),
        told(lambda: comm.send(np.ones(1), 5)),
        told(lambda: comm.send(np.ones(1), 0, tag=-1)),
        told(lambda: comm.all_reduce(np.ones(3, np.int32), AVG)),
    ]


def test_what_is_no_array_or_operation_is_refused_on_every_rank() -> None:
    for said in minidp.spawn(refused, 2):
        assert said[0].startswith("TypeError: an array is needed, not float64")
        assert said[1].startswith("TypeError: an array is needed, not float")
        assert "ReduceOp.SUM, ReduceOp.AVG" in said[2]
        assert said[3].startswith("ValueError: the result can't be written to a read-only array")
        assert "valid: ring, binomial_tree" in said[4]
        assert said[5].startswith("TypeError")
        assert "ranks 0 to 1" in said[6]
        assert "tags are 0 or more" in said[7]
        assert "average of integers" in said[8]


def average_of_halves(comm: Any) -> float:
    x = np.full(3, 40_000, np.float16)  # the sum is larger than float16 can hold
    comm.all_reduce(x, AVG)
    return float(x[0])


def test_half_precision_is_averaged_before_it_is_rounded() -> None:
    assert minidp.spawn(average_of_halves, 2) == [40_000.0, 40_000.0]


# -- messages in flight --------------------------------------------------------------------------------------


def last_words(comm: Any) -> float:
    x = np.zeros(1)
    if comm.rank == 0:
        comm.recv(x)  # from anybody
        return float(x[0])
    time.sleep(float(np.random.default_rng().uniform(0, 0.002)))
    comm.send(np.full(1, 7.0), 0)
    return 7.0


def test_a_message_counts_though_its_sender_has_returned() -> None:
    for _ in range(25):
        assert minidp.spawn(last_words, 2) == [7.0, 7.0]


def waits_while_messages_move(comm: Any) -> float:
    """Whoever waits, for whatever and in whatever group, moves all messages on."""
    other, n = comm.split(0), 600_000  # 4.8 MB: nine queues full
    x = np.zeros(n)
    if comm.rank == 0:
        work = comm.recv(x, 1, async_op=True)
        comm.barrier()
        work.wait()
        sending = comm.send(x, 1, async_op=True)
        other.barrier()
        sending.wait()
    else:
        comm.send(np.ones(n), 0)
        comm.barrier()
        comm.recv(x, 0)
        other.barrier()
    return float(x.sum())


def test_messages_move_while_their_owner_waits_elsewhere() -> None:
    assert minidp.spawn(waits_while_messages_move, 2, timeout_s=10) == [600_000.0] * 2


def all_listen(comm: Any) -> None:
    x = np.zeros(1)
    comm.recv(x) if comm.rank < 2 else comm.all_reduce(x)


@pytest.mark.parametrize("world_size", [2, 3])
def test_everybody_waits_for_anybody(world_size: int) -> None:
    start = time.monotonic()
    with pytest.raises(minidp.CollectiveMismatch, match="wait for each other and none can go on"):
        minidp.spawn(all_listen, world_size, timeout_s=20)
    assert time.monotonic() - start < 10


def late_one_after_the_other(comm: Any) -> None:
    time.sleep([0.0, 0.6, 1.2, 30.0][comm.rank])
    comm.barrier()


def test_patience_is_counted_once() -> None:
    start = time.monotonic()
    with pytest.raises(minidp.CollectiveTimeout, match=r"ranks? (2, )?3 did not come"):
        minidp.spawn(late_one_after_the_other, 4, timeout_s=1.0)
    assert time.monotonic() - start < 2.0


def test_what_spawn_raises_can_be_pickled() -> None:
    with pytest.raises(minidp.CollectiveMismatch) as caught:
        minidp.spawn(all_listen, 2)
    there_and_back = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(there_and_back, minidp.CollectiveMismatch)
    assert isinstance(there_and_back, minidp.RankFailed)
    assert there_and_back.rank == caught.value.rank


# -- strategies ----------------------------------------------------------------------------------------------


def model_and_batch(dtype: str = "float64") -> tuple[nn.Module, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), seed=1).astype(dtype)
    return model, rng.standard_normal((7, 5)).astype(dtype), rng.integers(0, 3, 7)


def disagree_about(comm: Any, what: str) -> str:
    model, _, _ = model_and_batch()
    first, second, *rest = model.parameters()
    r = comm.rank
    if what == "rates of a group":
        opt = optim.SGD([{"params": [first], "lr": 0.1 + r}, {"params": [second, *rest]}], lr=0.1)
    elif what == "rates of a schedule":
        opt = optim.SGD(model.parameters(), lr=lambda t, r=r: 0.1 + r)
    else:
        opt = optim.SGD(model.parameters(), lr=0.1)
    if what == "layers":
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU() if r else nn.Tanh(), nn.Linear(7, 3))
        opt = optim.SGD(model.parameters(), lr=0.1)
    options = {"buckets": {"bucket_cap_mb": r}, "clipping": {"clip_norm": 1.0 + r}}.get(what, {})
    return told(lambda: parallel.DataParallel(model, opt, comm, **options))


@pytest.mark.parametrize("what", ["rates of a group", "rates of a schedule", "layers", "buckets", "clipping"])
def test_ranks_that_would_update_differently(what: str) -> None:
    for said in minidp.spawn(disagree_about, 2, what):
        assert said.startswith("CollectiveMismatch: rank 1 has built another DataParallel than rank 0")


def load_between(comm: Any, strategy: str, bad: bool) -> np.ndarray:
    model, x, y = model_and_batch()
    s = getattr(parallel, strategy)(model, optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
    for step in range(6):
        if step == 3:
            good = s.state_dict()
            if bad:
                s.forward_backward(x * np.nan, y, F.cross_entropy)
                with pytest.raises(parallel.NonFiniteGradient):
                    s.step()
            s.load_state_dict(good)
        s.forward_backward(x, y, F.cross_entropy)
        s.step()
    return s.state_dict()["0.weight"]


def test_loading_parameters_leaves_the_optimizer_where_it_was() -> None:
    want = minidp.spawn(load_between, 2, "NaiveDataParallel", False)[0]
    for strategy in ("DataParallel", "NaiveDataParallel"):
        for bad in (False, True):
            assert (minidp.spawn(load_between, 2, strategy, bad)[0] == want).all()


def halves_and_fortran(comm: Any, strategy: str) -> tuple[np.ndarray, np.ndarray]:
    model, x, y = model_and_batch("float16")
    s = getattr(parallel, strategy)(model, optim.SGD(model.parameters(), lr=0.1), comm, clip_norm=0.5)
    for _ in range(5):
        s.forward_backward(x[comm.rank :: 2], y[comm.rank :: 2], F.cross_entropy)
        s.step()
    turned = nn.Sequential(nn.Linear(4, 3), seed=0)
    turned[0].weight = nn.Parameter(np.asfortranarray(turned.state_dict()["0.weight"]))
    t = getattr(parallel, strategy)(turned, optim.SGD(turned.parameters(), lr=0.1), comm)
    t.forward_backward(np.ones((2, 4), np.float32), np.array([0, 1]), F.cross_entropy)
    t.step()
    return s.state_dict()["0.weight"], t.state_dict()["0.weight"]


def test_fast_equals_naive_in_half_precision_and_for_transposed_parameters() -> None:
    fast = minidp.spawn(halves_and_fortran, 2, "DataParallel")[0]
    naive = minidp.spawn(halves_and_fortran, 2, "NaiveDataParallel")[0]
    assert fast[0].tobytes() == naive[0].tobytes()
    assert fast[1].tobytes() == naive[1].tobytes()


def habits(comm: Any, what: str) -> str:
    model, x, y = model_and_batch()
    opt = optim.SGD(model.parameters(), lr=0.1)
    if what == "loss.backward":
        s = parallel.DataParallel(model, opt, comm)
        F.cross_entropy(model(x), y).backward()
        return told(s.step)
    if what == "released":
        s = parallel.DataParallel(model, opt, comm)
        s.release()
        parallel.DataParallel(model, opt, comm)  # free again
        return told(s.step)
    keep = parallel.NaiveDataParallel(model, opt, comm)
    return told(lambda: parallel.DataParallel(model, opt, keep.comm))


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("loss.backward", "call strategy.backward(loss, samples=n)"),
        ("released", "the strategy has been released"),
        ("naive first", "the model belongs to another strategy already"),
    ],
)
def test_habits_that_would_do_nothing_in_silence(what: str, says: str) -> None:
    assert all(says in said for said in minidp.spawn(habits, 2, what))


def forget_splits(comm: Any) -> int:
    import os

    before = len(os.listdir("/proc/self/fd"))
    for _ in range(50):
        comm.split(0)
        comm.allocate(100)
    return len(os.listdir("/proc/self/fd")) - before


def test_groups_and_allocations_cost_no_descriptor() -> None:
    assert minidp.spawn(forget_splits, 2) == [0, 0]
