"""What goes wrong in the virtual world: it ends at once, and says who waits for what.

``timeout_s`` is far above pytest's own limit in most tests: whatever ended by a timeout would fail.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from greenlet import GreenletExit

import minidp
from minidp import backend
from minidp import comm as room
from minidp.comm import ANY, MAX
from minidp.comm.errors import RankMismatch
from minidp.sim import Cluster
from tests.told import told

pytestmark = pytest.mark.timeout(30)


def run(fn: Any, world_size: int, *args: Any, timeout_s: float = 1000.0, **options: Any) -> list[Any]:
    return minidp.spawn(fn, world_size, *args, world="virtual", timeout_s=timeout_s, **options)


def failure(fn: Any, world_size: int, *args: Any, **options: Any) -> minidp.RankFailed:
    with pytest.raises(minidp.RankFailed) as caught:
        run(fn, world_size, *args, **options)
    assert run(lambda comm: comm.rank, 2) == [0, 1], "the next run knows nothing of it"
    return caught.value


# --- nobody can go on ---------------------------------------------------------------------------------------


def recv_without_send(comm: Any) -> None:
    if comm.rank == 1:
        comm.recv(np.zeros(3, np.float32), 0, tag=7)
    elif comm.rank == 2:
        comm.recv(np.zeros(1), ANY)
    else:
        comm.barrier()


def other_order(comm: Any) -> None:
    a, b = comm.duplicate("left"), comm.duplicate("right")
    for group in (a, b) if comm.rank else (b, a):
        group.all_reduce(np.zeros(2))


def returns_early(comm: Any) -> None:
    comm.barrier()
    if comm.rank != 2:
        comm.all_reduce(np.zeros((2, 3), np.float32), MAX)


def waits_for_a_work(comm: Any) -> None:
    if comm.rank == 0:
        comm.all_reduce(np.zeros(2), async_op=True).wait()
    elif comm.rank == 1:
        comm.recv(np.zeros(1), 0, async_op=True).wait()


DEADLOCKS = [
    (
        recv_without_send,
        3,
        "ranks wait for each other and none can go on: rank 0 waits in barrier #1; rank 1 waits in recv from rank "
        "0, tag 7 (float32[3]); rank 2 waits in recv from any rank, tag 0 (float64[1])",
    ),
    (
        other_order,
        2,
        "rank 0 waits in all_reduce #1 of right (float64 (2,), sum); rank 1 waits in all_reduce #1 of left (",
    ),
    (returns_early, 4, "rank 2 returned; ranks 0, 1, 3 wait in all_reduce #2 (float32 (2, 3), max)"),
    (
        waits_for_a_work,
        3,
        "rank 2 returned; rank 0 waits in all_reduce #1 (float64 (2,), sum); rank 1 waits in recv from rank 0",
    ),
]


@pytest.mark.parametrize(("fn", "p", "says"), DEADLOCKS, ids=[fn.__name__ for fn, _, _ in DEADLOCKS])
def test_a_deadlock_is_told_at_once_with_what_each_waits_for(fn: Any, p: int, says: str) -> None:
    error = failure(fn, p)
    assert isinstance(error, RankMismatch)
    assert isinstance(error, minidp.CollectiveMismatch)
    assert says in str(error)
    assert str(error).startswith(f"rank {error.rank} of {p} raised CollectiveMismatch: ")


def different_collectives(comm: Any) -> list[str]:
    x = np.ones(2)
    calls = [lambda: comm.all_reduce(x), lambda: comm.broadcast(x, 1), lambda: comm.all_reduce(x)]
    first = told(calls[comm.rank])
    comm.all_reduce(x)  # they have met: they can go on
    return [first, str(x[0])]


def test_different_collectives_are_told_to_all_and_all_can_go_on() -> None:
    for said, total in run(different_collectives, 3):
        assert said.startswith(
            "CollectiveMismatch: the ranks disagree at collective #1: ranks 0, 2 called all_reduce"
        )
        assert "rank 1 called broadcast float64 (2,), src=1" in said
        assert total == "3.0"


@pytest.mark.parametrize("what", ["dtype", "shape", "op", "algorithm", "root"])
def test_every_part_of_the_header_counts(what: str) -> None:
    def disagree(comm: Any) -> str:
        odd = comm.rank == 1
        x = np.ones(
            (2, 3) if what == "shape" and odd else 6, np.float32 if what == "dtype" and odd else np.float64
        )
        if what == "root":
            return told(lambda: comm.reduce(x, int(odd)))
        algorithm = "ring" if what == "algorithm" and odd else None
        return told(lambda: comm.all_reduce(x, MAX if what == "op" and odd else minidp.ReduceOp.SUM, algorithm))

    assert all("rank 0 called" in said and "rank 1 called" in said for said in run(disagree, 2))


def works_that_disagree(comm: Any, waits: bool) -> list[str]:
    x = np.ones(2 + comm.rank)
    work = comm.all_reduce(x, async_op=True)
    said = [told(work.wait)] if waits else []
    return [*said, told(comm.barrier), told(comm.barrier)]


def test_what_a_work_met_is_raised_by_wait_or_by_the_next_collective() -> None:
    for said in run(works_that_disagree, 2, True):
        assert [text.partition(":")[0] for text in said] == ["CollectiveMismatch", "nothing", "nothing"]
    for said in run(works_that_disagree, 2, False):
        assert [text.partition(":")[0] for text in said] == ["CollectiveMismatch", "nothing"]


# --- a rank raises ------------------------------------------------------------------------------------------

heard: dict[int, list[str]] = {}
finished: list[int] = []


def raises(comm: Any, how: str) -> None:
    if comm.rank == 2:
        raise ValueError("no such batch")
    calls = {
        "collective": lambda: comm.all_reduce(np.zeros(3)),
        "recv": lambda: comm.recv(np.zeros(3), 2),
        "any": lambda: comm.recv(np.zeros(3)),
        "async": lambda: comm.all_reduce(np.zeros(3), async_op=True).wait(),
        "async recv": lambda: comm.recv(np.zeros(3), 2, async_op=True).wait(),
        "split": lambda: comm.split(0),
    }
    said = [told(calls[how]), told(comm.barrier), told(comm.now), told(lambda: comm.send(np.zeros(1), 0))]
    room.heard[comm.rank] = said  # the test's own globals travel by value


@pytest.mark.parametrize("how", ["collective", "recv", "any", "async", "async recv", "split"])
def test_the_others_are_told_that_a_rank_has_failed_and_may_catch_it(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "heard", heard, raising=False)
    heard.clear()
    error = failure(raises, 4, how)
    assert str(error) == "rank 2 of 4 raised ValueError: no such batch"
    assert (error.rank, type(error)) == (2, minidp.RankFailed)
    assert isinstance(error.__cause__, ValueError)
    assert any("Traceback of rank 2" in note and "raise ValueError" in note for note in error.__notes__)
    assert heard == dict.fromkeys((0, 1, 3), [f"RankFailed: {error}"] * 4)


def two_failures(comm: Any) -> None:
    backend.count([0.0, 5.0, 1.0][comm.rank])
    if comm.rank:
        raise KeyError(comm.rank)
    comm.barrier()


def test_the_first_failure_is_that_of_the_earlier_clock() -> None:
    assert failure(two_failures, 3, cluster=Cluster(3, flops=1.0)).rank == 2


def fails_later(comm: Any) -> float:
    """What goes on before the failing rank's clock has come there goes on."""
    if comm.rank == 2:
        backend.count(3.0)
        raise OSError("late")
    x = np.zeros(1)
    comm.send(x, 1 - comm.rank)
    comm.recv(x, 1 - comm.rank)
    before = comm.now()
    with pytest.raises(minidp.RankFailed):
        comm.barrier()
    room.finished.append(before)
    return before


def test_a_failure_reaches_the_others_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "finished", finished, raising=False)
    finished.clear()
    assert failure(fails_later, 3, cluster=Cluster(3, flops=1.0)).rank == 2
    assert len(finished) == 2
    assert max(finished) < 1


def fails_where_time_stands_still(comm: Any) -> None:
    pair = comm.split(comm.rank // 2)
    if comm.rank >= 2:
        backend.count(5.0 - comm.rank)
        raise ValueError(f"of rank {comm.rank}")
    while True:
        pair.barrier()


def test_a_failure_is_told_where_the_others_never_come_to_its_time() -> None:
    """Local links are free, so the barriers of ranks 0 and 1 take no time, for ever."""
    error = failure(fails_where_time_stands_still, 4, cluster=Cluster(1, ranks_per_node=4, flops=1.0))
    assert str(error) == "rank 3 of 4 raised ValueError: of rank 3", "the earlier one of two"


def computes_while_a_failure_is_ahead(comm: Any) -> None:
    if comm.rank == 0:
        backend.count(10.0)
        raise ValueError("late")
    for _ in range(150_000):  # more calls than make a standstill, but this clock moves
        backend.count(1e-6)
        comm.now()
    raise KeyError("early")


def test_who_computes_may_still_fail_first() -> None:
    assert failure(computes_while_a_failure_is_ahead, 2, cluster=Cluster(2, flops=1.0)).rank == 1


def asks_and_sends(comm: Any) -> int:
    """Empty messages take no time here, and are no events."""
    for _ in range(300):
        for _ in range(4000 * (1 - comm.rank)):
            comm.now()
        (comm.recv if comm.rank else comm.send)(np.zeros(0), 1 - comm.rank)
    return 1


def test_who_sends_does_more_than_ask() -> None:
    assert run(asks_and_sends, 2) == [1, 1]


def waits_for_time(comm: Any) -> None:
    if comm.rank:
        comm.barrier()
    while comm.now() < 1e9:
        pass


def asks_again_and_again(comm: Any) -> int:
    for _ in range(1100):
        for _ in range(1000):
            comm.now()
        comm.barrier()
    return 1


def test_who_only_asks_for_the_time_is_told_that_it_does_not_pass() -> None:
    error = failure(waits_for_time, 2)
    assert error.rank == 0
    assert "rank 0 has asked for the time 1000000 times, and it is always 0 s" in str(error)
    assert run(asks_again_and_again, 2) == [1, 1]


@pytest.mark.parametrize(
    "error",
    [SystemExit(3), GreenletExit(), BaseException("any"), AssertionError("x"), minidp.CollectiveTimeout("t")],
)
def test_however_a_rank_ends_it_is_named(error: BaseException) -> None:
    def ends(comm: Any) -> None:
        if comm.rank == 1:
            raise error
        comm.barrier()

    caught = failure(ends, 2)
    assert str(caught).startswith(f"rank 1 of 2 raised {type(error).__name__}")
    assert isinstance(caught, minidp.CollectiveTimeout) == isinstance(error, minidp.CollectiveTimeout)


def goes_on_for_ever(comm: Any, bare: bool) -> None:
    if comm.rank == 2:
        raise ValueError("boo")
    while True:
        try:
            comm.barrier()
        except BaseException as error:
            if not bare and not isinstance(error, minidp.CommError):
                raise


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_who_catches_everything_for_ever_is_ended(world_size: int, bare: bool) -> None:
    def alone(comm: Any) -> None:  # nobody raises: they wait for a rank that has returned
        if comm.rank:
            goes_on_for_ever(comm, bare)

    error = failure(goes_on_for_ever if world_size == 3 else alone, world_size, *[bare] * (world_size == 3))
    assert ("raised ValueError: boo" if world_size == 3 else "goes on for ever") in str(error)


def cleans_up(comm: Any, kind: str) -> None:
    try:
        comm.barrier()
        if comm.rank == 1:
            raise KeyboardInterrupt if kind == "interrupt" else ValueError
        comm.barrier()
    finally:
        room.finished.append(comm.rank)
        if comm.rank != 1:
            assert told(comm.barrier) != "nothing"


@pytest.mark.parametrize("kind", ["interrupt", "error"])
def test_finally_blocks_run_and_an_interrupt_goes_through(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "finished", finished, raising=False)
    finished.clear()
    with pytest.raises(KeyboardInterrupt if kind == "interrupt" else minidp.RankFailed):
        run(cleans_up, 3, kind)
    assert sorted(finished) == [0, 1, 2]
    assert run(lambda comm: comm.all_gather_int(comm.rank), 3) == [[0, 1, 2]] * 3


class Stubborn(Exception):
    def __init__(self, who: str, why: str) -> None:  # such an exception can't be copied
        super().__init__(f"{who}: {why}")


class Number:
    def __add__(self, other: Any) -> Any:
        raise Stubborn("no", "sum")


def adds_what_cannot_be_added(comm: Any) -> list[str]:
    nothing, words = np.array([None]), np.array(["a", "b"])
    assert told(lambda: comm.all_reduce(np.array([Number()]))) == "Stubborn: no: sum"
    said = [told(lambda: comm.all_reduce(nothing)), told(lambda: comm.all_reduce(words, MAX))]
    comm.barrier()
    return said


def test_a_sum_that_cannot_be_made_is_an_error_on_every_rank() -> None:
    for said in run(adds_what_cannot_be_added, 3):
        assert said[0] == "TypeError: unsupported operand type(s) for +: 'NoneType' and 'NoneType'"
        assert "ufunc 'maximum'" in said[1]
