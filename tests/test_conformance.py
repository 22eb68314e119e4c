"""One suite for all worlds: every collective × world size × dtype × length × op, against closed-form answers.

Another world joins by a line in WORLDS. Inputs are functions of the rank alone and whole numbers, so answers are
exact in every dtype and for every order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.comm import ANY, AVG, MAX, MIN, SUM, Communicator
from minidp.comm.schedules import ALL_REDUCE
from tests.told import told

WORLDS: dict[str, Callable[..., list[Any]]] = {
    "process": lambda fn, n, *args: minidp.spawn(fn, n, *args, world="process", timeout_s=20),
    "virtual": lambda fn, n, *args: minidp.spawn(fn, n, *args, world="virtual"),
}
DTYPES = ("float32", "float64", "float16", "int64", "uint8", "bool", "complex128")
OPS = {SUM: sum, MAX: max, MIN: min}


def lengths(p: int) -> list[int]:
    """Empty, one, around the number of ranks, and longer than two payload slots and a queue of 8 slots."""
    return sorted({0, 1, p - 1, p, p + 1, 300_001})


def value(rank: int, n: int, dtype: str) -> np.ndarray:
    """Rank-valued input: small whole numbers, different in every element and on every rank."""
    return ((np.arange(n) * 7 + rank * 3) % 11).astype(dtype)


def reduced(p: int, n: int, dtype: str, op: Any) -> np.ndarray:
    everybody = np.stack([value(rank, n, dtype) for rank in range(p)])
    if op is AVG:
        return (everybody.sum(axis=0) / p).astype(dtype)
    fold = {SUM: np.add, MAX: np.maximum, MIN: np.minimum}[op]
    return fold.reduce(everybody, axis=0, dtype=dtype)


def cases(p: int, *, large: bool = True) -> Iterator[tuple[int, str, Any]]:
    for n in lengths(p):
        for dtype in DTYPES:
            if n > 1000 and (dtype != "float32" or not large):
                continue
            for op in (SUM, MAX, MIN):
                if dtype == "complex128" and op is not SUM:
                    continue
                yield n, dtype, op


def check(got: np.ndarray, want: np.ndarray, what: object) -> None:
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, not {want.dtype}"
    assert np.array_equal(got, want), f"{what}: {got[:5]} instead of {want[:5]}"


def all_reduce(comm: Communicator) -> None:
    p = comm.world_size
    for n, dtype, op in cases(p):
        x = value(comm.rank, n, dtype)
        comm.all_reduce(x, op)
        check(x, reduced(p, n, dtype, op), ("all_reduce", n, dtype, op))
    for n in (0, 5, 1000):
        x = value(comm.rank, n, "float64")
        comm.all_reduce(x, AVG)
        check(x, reduced(p, n, "float64", AVG), ("avg", n))


def all_reduce_by_every_schedule(comm: Communicator) -> None:
    p = comm.world_size
    for name in ALL_REDUCE:
        for n, dtype, op in cases(p, large=name == "ring"):
            x = value(comm.rank, n, dtype)
            comm.all_reduce(x, op, algorithm=name)
            check(x, reduced(p, n, dtype, op), (name, n, dtype, op))


def reduce_scatter(comm: Communicator) -> None:
    p = comm.world_size
    for n, dtype, op in cases(p):
        x = value(comm.rank, n * p, dtype)
        out = np.empty(n, dtype)
        comm.reduce_scatter(out, x, op)
        check(out, reduced(p, n * p, dtype, op)[n * comm.rank : n * (comm.rank + 1)], ("reduce_scatter", n, dtype))
        check(x, value(comm.rank, n * p, dtype), "reduce_scatter leaves x as it is")


def all_gather(comm: Communicator) -> None:
    p = comm.world_size
    for n, dtype, op in cases(p):
        if op is SUM:
            out = np.empty((p, n), dtype)
            comm.all_gather(out, value(comm.rank, n, dtype))
            check(out, np.stack([value(r, n, dtype) for r in range(p)]), ("all_gather", n, dtype))


def broadcast_reduce(comm: Communicator) -> None:
    p = comm.world_size
    for root in range(p):
        for n, dtype, op in cases(p, large=root == p - 1):
            x = value(comm.rank, n, dtype)
            comm.broadcast(x, root)
            check(x, value(root, n, dtype), ("broadcast", root, n, dtype))
            x = value(comm.rank, n, dtype)
            comm.reduce(x, root, op)
            want = reduced(p, n, dtype, op) if comm.rank == root else value(comm.rank, n, dtype)
            check(x, want, ("reduce", root, n, dtype, op))


def gather_scatter_all_to_all(comm: Communicator) -> None:
    p, r = comm.world_size, comm.rank
    for n in lengths(p):
        everybody = np.stack([value(rank, n, "float32") for rank in range(p)])
        for root in range(p):
            got = comm.gather(value(r, n, "float32"), root)
            assert (got is None) == (r != root)
            if got is not None:
                check(got, everybody, ("gather", root, n))
            check(comm.scatter(everybody if r == root else None, root), everybody[r], ("scatter", root, n))
        mine = np.stack([value(10 * r + j, n, "int64") for j in range(p)])
        out = np.empty_like(mine)
        comm.all_to_all(out, mine)
        check(out, np.stack([value(10 * j + r, n, "int64") for j in range(p)]), ("all_to_all", n))


def shapes_and_strides(comm: Communicator) -> None:
    p = comm.world_size
    total = p * (p + 1) / 2
    scalar = np.array(comm.rank + 1.0)
    comm.all_reduce(scalar)
    assert scalar.shape == ()
    assert scalar == total
    for view in (lambda a: a.T, lambda a: a[::2, 1:], lambda a: a[:, ::-1]):
        base = np.zeros((6, 5))
        x = view(base)
        x[...] = comm.rank + 1
        comm.all_reduce(x)
        assert (x == total).all()
        assert (base == 0).sum() == base.size - x.size, "only the view may be written"
        y = view(np.zeros((6, 5)))
        comm.broadcast(x, 0)
        comm.recv(y, comm.send(np.ascontiguousarray(x), comm.rank) or comm.rank)
        assert (y == total).all()


def point_to_point(comm: Communicator) -> None:
    p, r = comm.world_size, comm.rank
    right, left = (r + 1) % p, (r - 1) % p
    for n in lengths(p):  # everybody sends first: a queue is shorter than the longest message
        got = np.empty(n, np.float64)
        sending = comm.send(value(r, n, "float64"), right, async_op=True)
        assert comm.recv(got, left) == left
        sending.wait()
        check(got, value(left, n, "float64"), ("ring of messages", n))
    # Tags may be asked for in another order than they were sent.
    for tag in (1, 2, 3):
        comm.send(np.full(4, tag), right, tag)
    for tag in (3, 1, 2):
        got = np.zeros(4, np.int64)
        comm.recv(got, left, tag)
        assert (got == tag).all()
    # From anybody: rank 0 gets one message from each, in whatever order they come.
    if r == 0:
        seen = set()
        for _ in range(p - 1):
            got = np.zeros(1, np.int64)
            src = comm.recv(got, ANY, tag=9)
            assert got[0] == src
            seen.add(src)
        assert seen == set(range(1, p))
    else:
        comm.send(np.array([r]), 0, tag=9)


def objects_and_barrier(comm: Communicator) -> None:
    p, r = comm.world_size, comm.rank
    comm.barrier()
    for root in range(p):
        assert comm.broadcast_object({"rank": r, "list": [1] * 200_000}, root)["rank"] == root
    assert comm.all_gather_object("x" * (r * 1000)) == ["x" * (i * 1000) for i in range(p)]
    comm.barrier()


def groups(comm: Communicator) -> None:
    p, r = comm.world_size, comm.rank
    parity = comm.split(r % 2, key=-r)
    assert parity is not None
    members = sorted((i for i in range(p) if i % 2 == r % 2), reverse=True)
    assert (parity.rank, parity.world_size) == (members.index(r), len(members))
    x = np.array([r])
    parity.all_reduce(x)
    assert x[0] == sum(members)
    alone = comm.split(None if r else 0)
    assert (alone is None) == (r != 0)
    if alone is not None:
        alone.barrier()
    duplicate = comm.split(0, r)
    assert duplicate is not None
    later = duplicate.all_reduce(x, async_op=True)  # two groups do not disturb each other
    comm.barrier()
    later.wait()
    assert x[0] == sum(sum(i for i in range(p) if i % 2 == j % 2) for j in range(p))


def deferred(comm: Communicator) -> None:
    """async_op keeps the order of the program, whatever is waited for first."""
    p = comm.world_size
    a, b = np.ones(3), np.ones(3)
    first = comm.all_reduce(a, async_op=True)
    second = comm.all_reduce(b, MAX, async_op=True)
    second.wait()
    assert (a == p).all()
    assert (b == 1).all()
    first.wait()
    assert (a == p).all()
    comm.all_reduce(a, async_op=True)
    comm.barrier()
    assert (a == p * p).all()
    first = comm.all_reduce(a, async_op=True)
    if comm.rank == 0:
        first.wait()  # the others begin the second before they come to the first
    second = comm.all_reduce(np.ones(4), async_op=True)
    first.wait()
    second.wait()
    assert (a == p**3).all()


def counted(comm: Communicator) -> None:
    """Bytes where they move: exactly 2(N−1)/N·n by ring, (N−1)n directly, nothing for one rank."""
    p, n = comm.world_size, 120  # 120 is divided by 1, 2, 3 and 4
    for algorithm, sent in (
        ("ring", 2 * (p - 1) * n * 8 // p),
        ("direct", (p - 1) * n * 8),
        (None, (p - 1) * n * 8),
    ):
        before = comm.traffic.bytes_sent
        comm.all_reduce(np.ones(n), algorithm=algorithm)
        assert comm.traffic.bytes_sent - before == sent, (algorithm, p)


def rank_order(comm: Communicator) -> None:
    """By default sums go in order of rank: the same bits as a left fold, on all ranks, also in float32."""
    p = comm.world_size
    values = [
        np.random.default_rng(r).standard_normal(1000).astype(np.float32) * 10.0 ** (r % 3) for r in range(p)
    ]
    want = values[0].copy()
    for v in values[1:]:
        want += v
    for algorithm in (None, "direct"):
        x = values[comm.rank].copy()
        comm.all_reduce(x, algorithm=algorithm)
        assert x.tobytes() == want.tobytes()
    out = np.empty(1000 // p, np.float32)
    comm.reduce_scatter(out, np.concatenate([v[: len(out)] for v in [values[comm.rank]]] * p))
    assert out.tobytes() == want[: len(out)].tobytes()
    half = np.full(64, 1.0 if comm.rank else 2048.0, np.float16)  # 2048 + 1 is 2048 in float16
    comm.all_reduce(half)
    assert (half == np.float16(2048 + p - 1)).all()


def shared_memory(comm: Communicator) -> None:
    p, r = comm.world_size, comm.rank
    views = comm.allocate(1000 * (r + 1))
    assert [v.size for v in views] == [1000 * (i + 1) for i in range(p)]
    assert all(v.dtype == np.uint8 and not v.any() and v.ctypes.data % 64 == 0 for v in views)
    comm.barrier()
    views[r][:] = r + 1
    comm.barrier()
    assert all((v == i + 1).all() for i, v in enumerate(views))


def who_only_reads(comm: Communicator) -> None:
    """A read-only array is enough for it, of any strides, and stays as it is."""
    p, r = comm.world_size, comm.rank
    mine = value(r, 12, "float64").reshape(3, 4).T
    mine.flags.writeable = False
    root = p - 1
    x = mine if r == root else np.zeros((4, 3))
    comm.broadcast(x, root)
    check(x, value(root, 12, "float64").reshape(3, 4).T, "broadcast")
    x = mine if r != root else np.array(mine)
    comm.reduce(x, root)
    check(x, reduced(p, 12, "float64", SUM).reshape(3, 4).T if r == root else mine, "reduce")
    comm.send(mine, r)
    got = np.empty((4, 3))
    comm.recv(got, r)
    check(got, mine, "send")


def in_place(comm: Communicator) -> None:
    """The result may be where the input was."""
    p, r = comm.world_size, comm.rank
    x = np.arange(p, dtype=float) + 10 * r
    comm.all_to_all(x, x)
    check(x, r + 10.0 * np.arange(p), "all_to_all")
    x = np.arange(p + 1, dtype=float) + 10 * r
    comm.all_to_all(x[1:], x[:-1])
    check(x[1:], r + 10.0 * np.arange(p), "all_to_all, shifted")
    x = np.arange(2 * p, dtype=float) + 100 * r
    comm.all_gather(x, x[2 * r : 2 * r + 2].copy())
    check(x, np.array([2 * i + k + 100.0 * i for i in range(p) for k in (0, 1)]), "all_gather")


def counted_when_it_comes(comm: Communicator) -> None:
    """A receive counts what has come from others, when it has."""
    x = np.zeros(4)
    work = comm.recv(x, ANY, async_op=True)
    comm.send(np.ones(4), comm.rank)
    work.wait()
    assert (comm.traffic.bytes_sent, comm.traffic.bytes_received) == (0, 0), "from oneself"
    if comm.world_size > 1:
        work = comm.recv(x, (comm.rank - 1) % comm.world_size, async_op=True)
        assert comm.traffic.bytes_received == 0
        comm.send(np.ones(4), (comm.rank + 1) % comm.world_size)
        work.wait()
        assert (comm.traffic.bytes_sent, comm.traffic.bytes_received) == (32, 32)


def refused(comm: Communicator) -> None:
    """On every rank, before anything is sent: the next collective works."""
    p = comm.world_size
    whole, part, fixed = np.ones(2 * p, np.int32), np.ones(2, np.int32), np.ones(p)
    fixed.flags.writeable = False
    calls: dict[str, Callable[[], object]] = {
        "TypeError: AVG of int32": lambda: comm.all_reduce(whole, AVG),
        "TypeError: AVG of int32: an": lambda: comm.all_reduce(whole, AVG, "ring"),
        "TypeError: AVG of int32: an average": lambda: comm.reduce(whole, 0, AVG),
        "TypeError: AVG of int32: an average of": lambda: comm.reduce_scatter(part, whole, AVG),
        "TypeError: AVG of int32: an average of int": lambda: comm.all_reduce(whole, AVG, async_op=True),
        "TypeError: op='sum'": lambda: comm.reduce(whole, 0, "sum"),  # type: ignore[arg-type]
        "ValueError: the result can't": lambda: comm.all_reduce(fixed),
        "ValueError: the result can't be": lambda: comm.all_reduce(fixed, algorithm="ring", async_op=True),
        "ValueError: the result can't be written": lambda: comm.reduce_scatter(fixed, np.ones(p * p)),
        "TypeError: split: color=[1]": lambda: comm.split([1]),  # type: ignore[arg-type]
        "TypeError: split: color=0.5": lambda: comm.split(0.5),  # type: ignore[arg-type]
        "TypeError: split: key=None": lambda: comm.split(0, None),  # type: ignore[arg-type]
    }
    for says, call in calls.items():
        said = told(call)
        assert said.startswith(says), (said, says)
    comm.all_reduce(whole)
    assert (whole == p).all()


CONFORMANCE = (
    all_reduce,
    all_reduce_by_every_schedule,
    reduce_scatter,
    all_gather,
    broadcast_reduce,
    gather_scatter_all_to_all,
    shapes_and_strides,
    point_to_point,
    objects_and_barrier,
    groups,
    deferred,
    who_only_reads,
    in_place,
    counted_when_it_comes,
    refused,
    counted,
    rank_order,
    shared_memory,
)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("case", CONFORMANCE, ids=lambda case: case.__name__)
@pytest.mark.parametrize("world", WORLDS)
def test_collective(world: str, case: Callable[[Communicator], None], world_size: int) -> None:
    WORLDS[world](case, world_size)
