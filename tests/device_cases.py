"""Collectives on arrays of a device, whatever brings them from rank to rank: closed forms, and the host's bits.

For ``test_conformance_device.py`` and ``test_nccl.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minidp.comm import ANY, AVG, MAX, MIN, SUM, Communicator
from tests.told import told

DTYPES = ("float32", "float64", "float16", "int64", "uint8", "bool", "complex128")
NUMPY = {SUM: np.add, AVG: np.add, MAX: np.maximum, MIN: np.minimum}


def lengths(p: int) -> list[int]:
    """Empty, one, around the number of ranks, and several slots of 64 bytes, not full."""
    return sorted({0, 1, p - 1, p, p + 1, 75})


def value(rank: int, n: int, dtype: str) -> np.ndarray:
    """Small whole numbers, different in every element and on every rank."""
    return ((np.arange(n) * 7 + rank * 3) % 11).astype(dtype)


def noise(rank: int, n: int, dtype: str) -> np.ndarray:
    """Numbers whose sum depends on the order in which they are added."""
    x = np.random.default_rng(rank).standard_normal(n) * 10.0 ** (rank % 3)
    return x.astype(dtype) if np.dtype(dtype).kind in "fc" else value(rank, n, dtype)


def reduced(p: int, n: int, dtype: str, op: Any, of: Any = value) -> np.ndarray:
    everybody = [of(rank, n, dtype) for rank in range(p)]
    total = NUMPY[op].reduce(everybody, axis=0, dtype=dtype)
    return (total / p).astype(dtype) if op is AVG else total


class Here:
    """A rank's moves between host and device, and the look at what came of a collective."""

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.device, self.xp = comm, comm.device, comm.device.xp

    def put(self, x: np.ndarray) -> Any:
        return self.device.asarray(x)

    def check(self, got: Any, want: np.ndarray, *what: object) -> None:
        assert self.device.is_here(got), f"{what}: a {type(got).__name__}"
        host = self.xp.asnumpy(got)
        assert host.dtype == want.dtype, f"{what}: {host.dtype}, not {want.dtype}"
        assert host.tobytes() == want.tobytes(), f"{what}: {host[:5]} instead of {want[:5]}"


def each(p: int) -> list[tuple[int, str, Any]]:
    ops = {dtype: (SUM, MAX, MIN, AVG) if dtype.startswith("float") else (SUM, MAX, MIN) for dtype in DTYPES}
    ops["complex128"] = (SUM,)
    return [(n, dtype, op) for n in lengths(p) for dtype in DTYPES for op in ops[dtype]]


def all_reduce(comm: Communicator, exact: bool = True) -> None:
    """``exact``: sums in order of rank, with the host's bits, also where they depend on the order."""
    here, p, r = Here(comm), comm.world_size, comm.rank
    for n, dtype, op in each(p):
        x = here.put(value(r, n, dtype))
        comm.all_reduce(x, op)
        if op is not AVG:
            here.check(x, reduced(p, n, dtype, op), "all_reduce", n, dtype, op)
        x, host = here.put(noise(r, n, dtype)), noise(r, n, dtype)
        work = comm.all_reduce(x, op, async_op=n % 2 == 0)
        comm.all_reduce(host, op)
        if work is not None:
            work.wait()
        if exact:
            here.check(x, host, "as on the host", n, dtype, op)


def by_every_schedule(comm: Communicator) -> None:
    here, p = Here(comm), comm.world_size
    for algorithm in ("direct", "ring", "binomial_tree", "recursive_doubling", "halving_doubling"):
        for dtype in DTYPES:
            for async_op in (False, True):
                x = here.put(value(comm.rank, 9, dtype))
                work = comm.all_reduce(x, SUM, algorithm, async_op=async_op)
                if work is not None:
                    work.wait()
                here.check(x, reduced(p, 9, dtype, SUM), algorithm, dtype)


def scattered_and_gathered(comm: Communicator) -> None:
    here, p, r = Here(comm), comm.world_size, comm.rank
    for n, dtype, op in each(p):
        if op is AVG:
            continue
        x, out = here.put(value(r, n * p, dtype)), here.put(np.zeros(n, dtype))
        comm.reduce_scatter(out, x, op)
        here.check(out, reduced(p, n * p, dtype, op)[n * r : n * (r + 1)], "reduce_scatter", n, dtype, op)
        here.check(x, value(r, n * p, dtype), "reduce_scatter leaves x as it is")
        if op is SUM:
            rows = here.put(np.zeros((p, n), dtype))
            comm.all_gather(rows, here.put(value(r, n, dtype)))
            here.check(rows, np.stack([value(i, n, dtype) for i in range(p)]), "all_gather", n, dtype)
            mine = np.stack([value(10 * r + j, n, dtype) for j in range(p)])
            comm.all_to_all(rows, here.put(mine))
            here.check(rows, np.stack([value(10 * j + r, n, dtype) for j in range(p)]), "all_to_all", n, dtype)


def from_and_to_a_root(comm: Communicator) -> None:
    here, p, r = Here(comm), comm.world_size, comm.rank
    for root in {0, p - 1}:
        for n, dtype, op in each(p):
            if n == 1 or (n == 75 and root):
                continue
            if op is SUM:
                x = here.put(value(r, n, dtype))
                comm.broadcast(x, root)
                here.check(x, value(root, n, dtype), "broadcast", root, n, dtype)
                all_rows = comm.gather(x, root)
                assert (all_rows is None) == (r != root)
                if all_rows is not None:
                    here.check(all_rows, np.stack([value(root, n, dtype)] * p), "gather", n, dtype)
                row = comm.scatter(here.put(np.stack([value(i, n, dtype) for i in range(p)])), root)
                here.check(row, value(r, n, dtype), "scatter", root, n, dtype)
                row = comm.scatter(all_rows, root)  # the others give nothing
                here.check(row, value(root, n, dtype), "scatter of None", root, n, dtype)
            x = here.put(value(r, n, dtype))
            comm.reduce(x, root, op)
            if op is not AVG:
                want = reduced(p, n, dtype, op) if r == root else value(r, n, dtype)
                here.check(x, want, "reduce", root, n, dtype, op)


def strides(comm: Communicator) -> None:
    """Arrays with gaps: only what they show is read and written."""
    here, p, r = Here(comm), comm.world_size, comm.rank
    whole = np.arange(30.0).reshape(6, 5)
    for view in (lambda a: a.T, lambda a: a[::2, 1:], lambda a: a[:, ::-1], lambda a: a[2, 3:4].reshape(())):
        for collective in (
            lambda x, c: c.all_reduce(x),
            lambda x, c: c.broadcast(x, p - 1),
            lambda x, c: c.reduce(x, p - 1),
            lambda x, c: c.all_reduce(x, algorithm="ring"),
            lambda x, c: c.all_reduce(x, MAX, async_op=True).wait(),
            lambda x, c: c.recv(x, c.send(x, c.rank) or c.rank),
        ):
            host, device = whole * (r + 1), here.put(whole * (r + 1))
            collective(view(host), comm)
            collective(view(device), comm)
            here.check(device, host, "strides")
    whole = np.arange(12.0 * p).reshape(6, 2 * p) + r
    host, out = whole[:, ::2], np.zeros((2 * p, 12))[::2, ::2]
    device, into = here.put(whole)[:, ::2], here.put(np.zeros((2 * p, 12)))[::2, ::2]
    for gather in ("all_gather", "all_to_all"):
        arguments = [(o, h.T if gather == "all_to_all" else h.T[0]) for o, h in ((out, host), (into, device))]
        for o, x in arguments:
            getattr(comm, gather)(o, x)
        here.check(into, out, gather, "with strides")
    part, whole_of_it = np.zeros((6, 2))[:, 0], np.stack([noise(r, 6, "float64")] * p, axis=1).T
    into = here.put(np.zeros((6, 2)))[:, 0]
    comm.reduce_scatter(part, whole_of_it)
    comm.reduce_scatter(into, here.put(np.ascontiguousarray(whole_of_it.T)).T)
    assert np.allclose(here.xp.asnumpy(into), part, rtol=1e-13)


def in_any_order(comm: Communicator) -> None:
    """Works are done in the order of the program, whenever each rank waits for which, or looks at what is not its
    turn; and a collective that does not wait comes after those that were begun before it."""
    here, p, r = Here(comm), comm.world_size, comm.rank
    a, b, c = here.put(np.ones(3)), here.put(np.ones(20, np.float32)), here.put(np.ones((p, 2), bool))
    works = [comm.all_reduce(a, async_op=True)]
    if r % 2:
        works[0].wait()
    works += [
        comm.all_reduce(b, MAX, async_op=True),
        comm.all_gather(c, here.put(np.full(2, r % 2 == 0)), async_op=True),
        comm.all_gather_int(r, async_op=True),
    ]
    for i in (2, 0, 1, 3) if r % 2 else (1, 3, 2, 0):
        value = works[i].wait()
        assert value == (list(range(p)) if i == 3 else None)
        assert works[i].wait() == value, "twice"
    here.check(a, np.full(3, float(p)), "first")
    here.check(b, np.ones(20, np.float32), "second")
    here.check(c, np.array([[i % 2 == 0] * 2 for i in range(p)]), "third")
    work = comm.all_reduce(a, async_op=r == 0)  # one rank may wait later
    if work is not None:
        work.wait()
    comm.broadcast(b, p - 1, async_op=True).wait()
    comm.reduce_scatter(a[:1], here.put(np.full(p, 2.0)), async_op=True).wait()
    here.check(a[:1], np.full(1, 2.0 * p), "reduce_scatter")
    here.check(a[1:], np.full(2, float(p * p)), "one waits later")
    for collective, times in (
        (lambda x: comm.all_reduce(x), p),
        (lambda x: comm.all_reduce(x, algorithm="ring"), p),
        (lambda x: comm.broadcast(x, p - 1), 1),
        (lambda x: comm.gather(x, 0), 1),
        (lambda x: comm.all_gather(here.put(np.zeros((p, 9))), x), 1),
        (lambda x: comm.all_to_all(here.put(np.zeros((p, 9 // p))), x[: 9 // p * p].reshape(p, -1)), 1),
    ):
        x = here.put(np.full(9, r + 1.0))
        work = comm.all_reduce(x, async_op=True)
        if r == 0:
            work.wait()  # the others leave it to the next collective
        collective(x)
        work.wait()
        here.check(x, np.full(9, times * p * (p + 1) / 2), "after what was begun before")


def messages(comm: Communicator) -> None:
    here, p, r = Here(comm), comm.world_size, comm.rank
    right, left = (r + 1) % p, (r - 1) % p
    for n in lengths(p):
        got = here.put(np.zeros(n))
        sending = comm.send(here.put(value(r, n, "float64")), right, async_op=True)
        receiving = comm.recv(got, left, async_op=True)
        assert receiving.wait() == left
        sending.wait()
        here.check(got, value(left, n, "float64"), "ring of messages", n)
    for tag in (1, 2, 3):
        comm.send(here.put(np.full(4, tag)), right, tag)
    for tag in (3, 1, 2):
        got = here.put(np.zeros(4, np.int64))
        comm.recv(got, left, tag)
        here.check(got, np.full(4, tag), "tags")
    comm.send(np.arange(3.0), right)  # from the host
    got = here.put(np.zeros(3))
    assert comm.recv(got, ANY) == left  # to the device
    here.check(got, np.arange(3.0), "from host to device")
    if r == 0:
        senders = set()
        for _ in range(p - 1):
            got = here.put(np.zeros(1, np.int64))
            senders.add(src := comm.recv(got, ANY, 9))
            here.check(got, np.array([src]), "from anybody")
        assert senders == set(range(1, p))
    else:
        comm.send(here.put(np.array([r])), 0, 9)


def groups(comm: Communicator) -> None:
    here, p, r = Here(comm), comm.world_size, comm.rank
    odd = comm.split(0 if r < p - 1 else None, key=-r, name="all but the last")  # of p - 1 ranks, reversed
    assert (odd is None) == (r == p - 1)
    if odd is not None:
        assert (odd.rank, odd.world_size) == (p - 2 - r, p - 1)
        for group in (odd, odd.duplicate("again")):
            x = here.put(np.full(9, r + 1))
            group.all_reduce(x)
            here.check(x, np.full(9, p * (p - 1) // 2), "odd group")
            group.broadcast(x, 0, async_op=True).wait()
            rows = here.put(np.zeros((p - 1, 2)))
            group.all_gather(rows, here.put(np.full(2, float(r))))
            here.check(rows, np.array([[i, i] for i in reversed(range(p - 1))], float), "in order of the group")
    alone = comm.split(r)
    assert alone is not None
    alone.all_reduce(x := here.put(np.full(3, float(r))))
    here.check(x, np.full(3, float(r)), "alone")
    again = comm.duplicate("again")
    works = [c.all_reduce(here.put(np.ones(2)), async_op=True) for c in (again, comm)]
    for work in works:
        work.wait()


def refused(comm: Communicator) -> None:
    """On every rank, before anything is sent: the next collective works."""
    here, p = Here(comm), comm.world_size
    d, h = here.put(np.ones(p)), np.ones(p)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("TypeError: out is a ndarray and x a ", lambda: comm.all_gather(h, d[:1])),
        ("TypeError: out is a DeviceArray and x a ndarray: both must lie on the device, or both on the host",
         lambda: comm.reduce_scatter(d[:1], h)),
        ("TypeError: out is a ndarray", lambda: comm.all_to_all(h, d)),
        ("TypeError: AVG of int64", lambda: comm.all_reduce(here.put(np.ones(2, np.int64)), AVG, async_op=True)),
        ("TypeError: op='sum'", lambda: comm.reduce(d, 0, "sum")),
        ("ValueError: src=9", lambda: comm.broadcast(d, 9)),
        ("ValueError: dst=9", lambda: comm.reduce(d, 9)),
        ("ValueError: all_gather(out, x): the whole", lambda: comm.all_gather(d, here.put(np.ones(2 * p)))),
        ("ValueError: reduce_scatter(out, x): the whole", lambda: comm.reduce_scatter(d, d.astype(np.float32))),
        ("ValueError: allocate: nbytes=-1", lambda: comm.allocate(-1)),
    ]  # fmt: skip
    for says, call in calls:
        said = told(call)
        assert said.startswith(says), (said, says)
    comm.all_reduce(d)
    here.check(d, np.full(p, float(p)), "afterwards")


CASES = (
    all_reduce,
    by_every_schedule,
    scattered_and_gathered,
    from_and_to_a_root,
    strides,
    in_any_order,
    messages,
)
CASES += (groups, refused)
