"""Parameter servers when something dies, stops, returns or is wrong: what is lost, who goes on, what is said."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import optim, parallel
from minidp.comm.queue import ArrayQueue
from minidp.comm.vigil import is_stopped
from minidp.nn import functional as F
from tests.servers import counter, served
from tests.test_data_parallel import OPTIMIZERS, dataset, same_bits, small_model
from tests.test_faults import _nothing_is_left  # noqa: F401  an autouse fixture
from tests.told import told

pytestmark = pytest.mark.timeout(60)

SIZE = 30_000  # float64: 2 servers have two chunks of a message each (64 KB), not equally full
PUTS = 3  # chunks of a push to one server: the header, and its content
STEPS = 6


def build(comm: Any, size: int, staleness: int | None, **options: Any) -> tuple[Any, parallel.ParameterServer]:
    model = counter(size)
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, staleness=staleness, **options)
    comm.barrier()
    return model, s


def die_at_put(number: int, when: str) -> None:
    """From now on this process is killed in its put of this number, counted from 0."""
    put, count = ArrayQueue.put, iter(range(number + 1))

    def deadly(queue: ArrayQueue, chunk: Any, payload: Any) -> None:
        if next(count) == number:
            if when == "within":  # all is written, and the receiver has not been told
                type(queue.tail).publish = lambda word, value: None  # type: ignore[method-assign]
                put(queue, chunk, payload)
            os.kill(os.getpid(), signal.SIGKILL)
        put(queue, chunk, payload)

    ArrayQueue.put = deadly  # type: ignore[method-assign]


def until(true: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether it has become true within that time."""
    deadline = time.monotonic() + seconds
    while not true() and time.monotonic() < deadline:
        time.sleep(0.005)
    return true()


def dies_in_a_push(comm: Any, staleness: int | None, number: int, when: str, expected: list[int]) -> Any:
    """Rank 1 dies; rank 0 makes its steps, and looks at what the servers then have."""
    model, s = build(comm, SIZE, staleness)
    if comm.rank == 1:
        die_at_put(number, when)
    for _ in range(STEPS):
        model.step(s)
    assert comm.rank == 0
    reached = until(lambda: sorted(i.version for i in s.servers()) == expected)
    w, servers = s.state_dict()["w"], s.servers()
    return reached, [set((-w[i.lo : i.hi]).tolist()) for i in servers], [i.version for i in servers]


@pytest.mark.parametrize("number", range(2 * PUTS + 1))
@pytest.mark.parametrize("staleness", [1, None])
def test_a_push_is_applied_once_or_not_at_all(staleness: int | None, number: int, caplog: Any) -> None:
    """Killed before, or in the middle of, each chunk of the second push: a server has all of it, or nothing."""
    when = "within" if number % 2 else "before"
    sent = number + 2 * PUTS  # chunks that have left; rank 1 begins with server 1
    expected = [STEPS + sent // (2 * PUTS), STEPS + (sent + PUTS) // (2 * PUTS)]
    with caplog.at_level(logging.WARNING, "minidp.launch"):
        results = served(dies_in_a_push, 2, 2, staleness, sent, when, expected, world="process", timeout_s=20)
    (reached, counts, versions), lost = results
    assert lost is None
    assert (reached, sorted(versions)) == (True, expected)
    assert counts == [{float(version)} for version in versions], "every element of a slice, and as often"
    said = [record.getMessage() for record in caplog.records if "go on without" in record.getMessage()]
    assert said == ["rank 1 of 2 was killed by SIGKILL (out of memory?); the others go on without it"]


def killed(comm: Any, staleness: int | None, who: tuple[int, ...], path: str, options: dict[str, Any]) -> Any:
    """Workers ``who`` are killed after their second step; −1: server 1 is, by rank 0."""
    model, s = build(comm, 2000, staleness, **options)
    for step in range(STEPS):
        if step == 2 and comm.rank in who:
            Path(path).write_text(str(time.monotonic()))
            os.kill(os.getpid(), signal.SIGKILL)
        if step == 2 and comm.rank == 0 and -1 in who:
            Path(path).write_text(str(time.monotonic()))
            os.kill(s.servers()[1].pid, signal.SIGKILL)
        model.step(s)
    return [i.version for i in s.servers()], s.metrics["steps"]


def run_killed(workers: int, staleness: int | None, who: tuple[int, ...], path: Path, **options: Any) -> Any:
    return served(killed, workers, 2, staleness, who, str(path / "t"), options, world="process", timeout_s=20)


def test_a_synchronous_run_ends_with_a_worker(tmp_path: Path) -> None:
    with pytest.raises(minidp.RankFailed, match=r"^rank 1 of 2 was killed by SIGKILL") as caught:
        run_killed(2, 0, (1,), tmp_path)
    assert caught.value.rank == 1
    assert time.monotonic() - float((tmp_path / "t").read_text()) < 2


def test_with_backup_workers_it_goes_on(tmp_path: Path) -> None:
    results = run_killed(3, 0, (2,), tmp_path, backup_workers=1)
    assert results[2] is None
    assert all(steps == STEPS for _, steps in results[:2])
    with pytest.raises(minidp.RankFailed):  # more deaths than backups
        run_killed(3, 0, (1, 2), tmp_path, backup_workers=1)


@pytest.mark.parametrize("staleness", [0, 1, None])
def test_a_servers_death_ends_the_run(staleness: int | None, tmp_path: Path) -> None:
    with pytest.raises(minidp.RankFailed) as caught:
        run_killed(2, staleness, (-1,), tmp_path)
    said = str(caught.value)
    assert said.startswith("server 1 of 2 was killed by SIGKILL")
    assert "elements 1000 to 2000 of the parameters: w, and the optimizer's state of them" in said
    assert time.monotonic() - float((tmp_path / "t").read_text()) < 2


@pytest.mark.parametrize("staleness", [1, None])
def test_nobody_is_left_to_go_on(staleness: int | None, tmp_path: Path) -> None:
    with pytest.raises(minidp.RankFailed, match="of 2 was killed by SIGKILL"):
        run_killed(2, staleness, (0, 1), tmp_path)


def ends_early(comm: Any, staleness: int | None, how: str) -> Any:
    model, s = build(comm, 100, staleness)
    for step in range(STEPS):
        if step == 2 and comm.rank == 1:
            if how == "raises":
                raise ValueError("no such thing")
            break
        model.step(s)
    return -float(s.state_dict()["w"][0]) if comm.rank == 0 and staleness != 0 else s.updates


@pytest.mark.parametrize("world", ["process", "virtual"])
@pytest.mark.parametrize("staleness", [0, 1, None])
def test_a_worker_that_raises_ends_the_run(staleness: int | None, world: str) -> None:
    with pytest.raises(minidp.RankFailed, match=r"^rank 1 of 2 raised ValueError: no such thing"):
        served(ends_early, 2, 2, staleness, "raises", world=world, timeout_s=20)


@pytest.mark.parametrize("world", ["process", "virtual"])
def test_a_worker_that_returns(world: str) -> None:
    for staleness in (1, None):
        assert served(ends_early, 2, 2, staleness, "returns", world=world, timeout_s=20) == [STEPS + 2, 2]
    with pytest.raises(
        minidp.CollectiveMismatch, match=r"rank 1 has returned, or released its strategy; rank 0 waits in step #3"
    ):
        served(ends_early, 2, 2, 0, "returns", world=world, timeout_s=20)


def stopped(comm: Any) -> Any:
    """Rank 1 stops; rank 0 makes all its steps, and wakes it."""
    model, s = build(comm, SIZE, None)
    pid = comm.all_gather_int(os.getpid())[1]
    if comm.rank == 1:
        model.step(s)
        os.kill(pid, signal.SIGSTOP)
        model.step(s)
        return s.updates
    try:
        assert until(lambda: is_stopped(pid))
        for _ in range(50):
            model.step(s)
        return s.updates, is_stopped(pid)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_stopped_worker_holds_nobody_up_in_asynchronous_training() -> None:
    assert served(stopped, 2, 2, world="process", timeout_s=20) == [(50, True), 2]


def hears(comm: Any) -> Any:
    """Rank 1 sends to rank 0 after rank 2 has died. Rank 0 is so slow that it sees both in the same nap."""
    comm.expendable(True)
    comm.barrier()
    if comm.rank == 2:
        time.sleep(0.2)  # rank 0 is in its nap then
        os.kill(os.getpid(), signal.SIGKILL)
    box, watch = comm._mailbox, comm._mailbox.rendezvous.watch
    if comm.rank == 1:
        assert until(lambda: watch.board.losses() > 0)
        comm.send(np.full(3, 7.0), 0)
        return comm.recv(np.empty(3), 0)
    x, heard, pump = np.zeros(3), [], watch.pump

    def late() -> None:
        watch.pump = pump
        assert until(lambda: watch.board.losses() and box._something())
        pump()

    watch.pump = late
    while 1 not in heard:
        try:
            heard.append(comm.recv(x, minidp.comm.ANY))
        except minidp.comm.RankLost as lost:
            heard.append(lost.rank)
    comm.send(x, 1)
    return heard


def test_a_message_that_comes_with_the_news_of_a_death_is_not_lost() -> None:
    heard, *_ = minidp.spawn(hears, 3, timeout_s=10, progress=False, blas_threads=1)
    assert sorted(heard) == [1, 2] or heard == [1]


# -- not a number --------------------------------------------------------------------------------------------


def poisoned(comm: Any, strategy: str, optimizer: str, options: dict[str, Any]) -> Any:
    """Rank 1's second step holds a NaN; whoever is told forgets the step and goes on."""
    model = small_model()
    s = getattr(parallel, strategy)(model, OPTIMIZERS[optimizer](model.parameters()), comm, **options)
    x, y = dataset().arrays
    said = []
    for step in range(4):
        batch = x[comm.rank :: 3].copy()
        if (comm.rank, step) == (1, 1):
            batch[3, 2] = np.nan
        s.forward_backward(batch, y[comm.rank :: 3], F.cross_entropy)
        before = model.state_dict()
        versions = [i.version for i in s.servers()] if options else []
        try:
            s.step()
        except parallel.NonFiniteGradient as error:
            said.append(f"{error.parameter} {error.rank} {error.step} {error.value}")
            assert same_bits(model.state_dict(), before)
            if options and options["staleness"] == 0:
                assert [i.version for i in s.servers()] == versions == [1, 1], "servers know nothing of it"
            with pytest.raises(RuntimeError, match="discard"):
                s.step()
            s.discard()
    return said, s.updates, s.state_dict()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("world", ["process", "virtual"])
def test_a_nan_is_refused_by_all_in_synchronous_training(world: str, optimizer: str) -> None:
    plain = minidp.spawn(poisoned, 3, "DataParallel", optimizer, {}, world=world, blas_threads=1)
    ours = served(poisoned, 3, 2, "ParameterServer", optimizer, {"staleness": 0}, world=world)
    for rank, (said, updates, state) in enumerate(ours):
        assert said == plain[rank][0] == ["0.weight 1 1 nan"]
        assert updates == plain[rank][1] == 3
        assert same_bits(state, plain[0][2]), "nothing of it stays in the optimizer's state"


@pytest.mark.parametrize("staleness", [2, None])
def test_a_nan_is_its_ranks_own_affair_otherwise(staleness: int | None) -> None:
    results = served(poisoned, 3, 2, "ParameterServer", "adam", {"staleness": staleness})
    assert [(said, updates) for said, updates, _ in results] == [([], 4), (["0.weight 1 1 nan"], 3), ([], 4)]
    assert all(np.isfinite(value).all() for _, _, state in results for value in state.values())


# -- what can't work -----------------------------------------------------------------------------------------


def refused(comm: Any, staleness: Any, options: dict[str, Any], differ: bool) -> str:
    model = counter(20)
    if differ and comm.rank == 1:
        staleness = 3
    rule = optim.SGD(model.parameters(), lr=1)
    return told(partial(parallel.ParameterServer, model, rule, comm, staleness=staleness, **options))


@pytest.mark.parametrize(
    ("staleness", "options", "says"),
    [
        (-1, {}, "ValueError: staleness=-1: give 0"),
        (True, {}, "TypeError: staleness=True: give 0"),
        (1.0, {}, "TypeError: staleness=1.0: give 0"),
        ("1", {}, "TypeError: staleness='1': give 0"),
        (None, {"backup_workers": 1}, "ValueError: backup_workers are for staleness=0"),
        (0, {"backup_workers": 2}, "ValueError: backup_workers=2: give a number from 0 to 1, of 2 workers"),
        (0, {"backup_workers": -1}, "ValueError: backup_workers=-1"),
        (0, {"backup_workers": True}, "ValueError: backup_workers=True"),
        (0, {"staleness_aware": True}, "ValueError: staleness_aware and delay_compensation treat late gradients"),
        (0, {"delay_compensation": 0.1}, "ValueError: staleness_aware and delay_compensation treat late"),
        (None, {"delay_compensation": -1}, "ValueError: delay_compensation=-1: give λ"),
        (None, {"delay_compensation": True}, "ValueError: delay_compensation=True: give λ"),
        (None, {"delay_compensation": "x"}, "ValueError: delay_compensation='x': give λ"),
        (0, {"nominal_batch": 4}, "ValueError: nominal_batch=4 is for staleness other than 0"),
        (None, {"nominal_batch": 0}, "ValueError: nominal_batch=0: give a positive number"),
        (1, {"accumulation_steps": 0}, "ValueError: accumulation_steps=0"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(staleness: Any, options: dict[str, Any], says: str) -> None:
    for message in served(refused, 2, 1, staleness, options, False):
        assert message.startswith(says), message


def test_ranks_that_disagree_and_runs_without_servers() -> None:
    for message in served(refused, 2, 1, None, {}, True):
        assert message.startswith("CollectiveMismatch: rank 1 has built another ParameterServer than rank 0")
    for world in ("process", "virtual"):
        for message in served(refused, 2, 0, 0, {}, False, world=world):
            assert message.startswith("ValueError: ParameterServer needs servers, and this run has none")
    assert "ParameterServer needs servers" in refused(minidp.comm.comm_self(), 0, {}, False)
    for servers, error in [(-1, ValueError), (1.0, TypeError), (True, TypeError)]:
        with pytest.raises(error, match="servers"):
            served(refused, 1, servers, 0, {}, False)
