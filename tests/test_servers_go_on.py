"""Runs with servers that go on, or end, as they should: late workers, deaths, returns, several strategies."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import minidp
from minidp import nn, optim, parallel, sim
from minidp.parallel import event_log
from minidp.parallel.event_log import DamagedLog
from minidp.replay.__main__ import main
from minidp.replay.rerun import NothingLate, rerun, revised

WORLDS = ("virtual", "process")
STEPS = 8


class Constant(nn.Module):
    """A gradient of 1 everywhere: −w counts the updates, where the rate is 1."""

    def __init__(self, size: int = 40) -> None:
        super().__init__()
        self.w = nn.Parameter(np.zeros(size))

    def forward(self, x: Any) -> Any:
        return (self.w * x).sum()


def build(comm: Any, **options: Any) -> tuple[Constant, parallel.ParameterServer]:
    model = Constant()
    return model, parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, **options)


def step(model: Constant, strategy: Any, times: int = 1) -> None:
    for _ in range(times):
        strategy.backward(model(np.ones(len(model.w.data))), samples=1)
        strategy.step()


def run(function: Any, workers: int, *args: Any, world: str, servers: int = 2, **more: Any) -> list[Any]:
    return minidp.spawn(
        function, workers, *args, servers=servers, world=world, progress=False, timeout_s=20, **more
    )


# -- backup workers ------------------------------------------------------------------------------------------


def plain_loop(comm: Any, world: str, ends: str) -> Any:
    model, strategy = build(comm, backup_workers=1)
    for _ in range(STEPS):
        if comm.rank == comm.world_size - 1 and world == "process":
            time.sleep(0.01)
        step(model, strategy)
    if ends == "return":
        return strategy.updates
    state = strategy.state_dict()["w"]
    return state.tolist(), [server.version for server in strategy.servers()]


@pytest.mark.parametrize("ends", ["state_dict", "return"])
@pytest.mark.parametrize("world", WORLDS)
def test_the_usual_loop_with_backup_workers(world: str, ends: str) -> None:
    """All make as many steps, one is always late: what is left when the others are done, it makes alone."""
    more = {"cluster": sim.Cluster(nodes=5, flops=1e6, stragglers={2: 5.0})} if world == "virtual" else {}
    results = run(plain_loop, 3, world, ends, world=world, **more)
    if ends == "return":
        assert results == [STEPS] * 3
        return
    assert all(result == results[0] for result in results)
    w, versions = results[0]
    assert min(versions) >= STEPS
    assert sorted({-x for x in w}) == sorted(set(map(float, versions)))


@pytest.mark.parametrize("ends", ["state_dict", "return"])
@pytest.mark.parametrize(("workers", "backups"), [(3, 1), (3, 2), (5, 2)])
def test_servers_agree_about_who_is_late(workers: int, backups: int, ends: str) -> None:
    """However the messages of workers arrive, in whatever order at each server: w is of the same rounds on all."""
    for seed in range(8):
        room = sim.Cluster(nodes=workers + 3, flops=1e6, jitter=1.0, seed=seed, latency_s=1e-5)
        results = run(unsteady, workers, backups, ends, world="virtual", servers=3, cluster=room)
        for w, versions, steps in results:
            assert steps == STEPS
            if ends == "state_dict":
                assert len(set(versions)) == 1
                assert set(w) == {-float(versions[0])}


def unsteady(comm: Any, backups: int, ends: str) -> Any:
    model, strategy = build(comm, backup_workers=backups)
    step(model, strategy, STEPS)
    if ends == "return":
        return [], [], strategy.updates
    w = strategy.state_dict()["w"].tolist()
    return w, [server.version for server in strategy.servers()], strategy.updates


def dies_between(comm: Any, backups: int) -> Any:
    """Rank 0 dies when the first server has counted its gradient in, and the others have not got it."""
    model, strategy = build(comm, backup_workers=backups)
    step(model, strategy, 2)
    if comm.rank == 0:
        exchange = strategy._links._exchange

        def deadly(request: Any, gradient: Any, w: Any, which: slice) -> Any:
            if which.start == 1 and request.members:
                os.kill(os.getpid(), signal.SIGKILL)
            return exchange(request, gradient, w, which)

        strategy._links._exchange = deadly  # type: ignore[method-assign]
    else:
        time.sleep(0.1)  # so that rank 0 is in time
    step(model, strategy, STEPS)
    strategy.state_dict()
    return [server.version for server in strategy.servers()]


@pytest.mark.parametrize(("workers", "backups"), [(2, 1), (3, 1), (3, 2)])
def test_a_member_that_dies_before_it_has_pushed_everywhere(workers: int, backups: int) -> None:
    lost, *results = run(dies_between, workers, backups, world="process")
    assert lost is None
    assert all(len(set(versions)) == 1 and versions == results[0] for versions in results)


def unequal(comm: Any) -> Any:
    model, strategy = build(comm)
    step(model, strategy, 2)
    if comm.rank == 0:
        return strategy.state_dict()
    return step(model, strategy)


@pytest.mark.parametrize("world", WORLDS)
def test_without_backups_nobody_goes_on_alone(world: str) -> None:
    with pytest.raises(minidp.CollectiveMismatch):
        run(unequal, 3, world=world)


# -- after a death -------------------------------------------------------------------------------------------


def loses(comm: Any, folder: Path, who: int, how: str) -> Any:
    model, strategy = build(comm, staleness=None)
    step(model, strategy, 2)
    if comm.rank == who:
        if how == "return":
            return "early"
        os.kill(os.getpid(), signal.SIGKILL)
    step(model, strategy, 3)
    strategy.save(folder)
    saved = strategy.state_dict()["w"]
    step(model, strategy)
    strategy.load(folder)
    loaded = strategy.state_dict()["w"]
    strategy.load_state_dict({"w": saved + 5})
    return bool((saved == loaded).all()), bool((strategy.state_dict()["w"] == saved + 5).all())


@pytest.mark.parametrize("who", [0, 2])
@pytest.mark.parametrize("how", ["kill", "return"])
def test_states_are_shared_by_those_who_are_left(tmp_path: Path, who: int, how: str) -> None:
    results = run(loses, 3, tmp_path, who, how, world="process")
    gone = results.pop(who)
    assert gone == ("early" if how == "return" else None)
    assert results == [(True, True)] * 2


def two_die(comm: Any) -> Any:
    model, strategy = build(comm, backup_workers=1)
    step(model, strategy, 2)
    if comm.rank > 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, strategy, 50)


def test_more_deaths_than_backups_are_deaths() -> None:
    with pytest.raises(minidp.RankFailed, match=r"has died|killed by SIGKILL") as caught:
        run(two_die, 3, world="process")
    assert not isinstance(caught.value, minidp.CollectiveMismatch)


def beside(comm: Any) -> Any:
    """A synchronous strategy and an asynchronous one: without the first's worker nothing goes on."""
    model, together = build(comm)
    other, alone = build(comm, staleness=None)
    step(other, alone)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, together)


def released(comm: Any) -> Any:
    """After the synchronous one is released, the asynchronous one does go on; and the other way round."""
    model, together = build(comm)
    step(model, together)
    together.release()
    other, alone = build(comm, staleness=None)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    step(other, alone, 3)
    return float(other.w.data[0]) <= -3


def released_late(comm: Any) -> Any:
    other, alone = build(comm, staleness=None)
    step(other, alone)
    alone.release()
    comm.barrier()
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return comm.barrier()


def test_who_can_be_spared() -> None:
    with pytest.raises(minidp.RankFailed, match=r"^rank 1 of 2 was killed by SIGKILL"):
        run(beside, 2, world="process")
    assert run(released, 2, world="process") == [True, None]
    with pytest.raises(minidp.RankFailed, match=r"^rank 1 of 2 was killed by SIGKILL"):
        run(released_late, 2, world="process")


# -- rules and counts ----------------------------------------------------------------------------------------


def counts_on(comm: Any, folder: Path, load: str) -> list[int]:
    model = Constant()
    rule = optim.SGD(model.parameters(), lr=1)
    if not load:
        strategy: Any = parallel.DataParallel(model, rule, comm)
        step(model, strategy, 5)
        strategy.save(folder)
        return []
    strategy = parallel.ParameterServer(model, rule, comm, staleness=0 if load == "sync" else None)
    strategy.load(folder)
    return [server.version for server in strategy.servers()]


def test_servers_count_on_from_a_checkpoint_without_servers(tmp_path: Path) -> None:
    """What schedules and Adam go by: synchronous steps as they are, pushes as many as all workers had steps."""
    run(counts_on, 3, tmp_path, "", world="virtual")
    assert run(counts_on, 3, tmp_path, "sync", world="virtual") == [[5, 5]] * 3
    assert run(counts_on, 3, tmp_path, "async", world="virtual") == [[15, 15]] * 3


def summed(g: Any, w: Any, given: Any, lo: int) -> Any:
    return g.sum()


def corrected(comm: Any) -> Any:
    model, strategy = build(comm, staleness=None, delay_compensation=summed)
    return step(model, strategy, 2)


@pytest.mark.parametrize("world", WORLDS)
def test_a_correction_of_another_shape(world: str) -> None:
    """A function of the user's, the same on all ranks wherever it lies in memory; what it returns is looked at."""
    with pytest.raises(minidp.RankFailed, match=r"server 0 of 1 raised ValueError: delay_compensation returned"):
        run(corrected, 2, world=world, servers=1)


def trains(comm: Any, staleness: int | None) -> Any:
    model, strategy = build(comm, staleness=staleness)
    step(model, strategy, 3)
    return strategy.state_dict()


def test_nothing_is_late_where_all_wait(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.log"
    run(trains, 2, 0, world="virtual", record=path)
    for what in ("dc-asgd", "staleness-aware"):
        with pytest.raises(NothingLate):
            rerun(event_log.read(path), revised(what))
        assert main([str(path), "--what-if", what]) == 1
        assert "no gradient was late" in capsys.readouterr().out
    assert main([str(path), "--what-if", "lr=0.5"]) == 0
    with pytest.raises(SystemExit):
        main([str(path), "--until-loss-exceeds", "nan"])


def test_a_line_that_is_missing_or_comes_twice(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    run(trains, 2, None, world="virtual", record=path, servers=1)
    lines = path.read_bytes().splitlines(keepends=True)
    for bad in ([*lines[:6], *lines[7:]], [*lines[:6], *lines[5:]], [*lines[:5], lines[6], lines[5], *lines[7:]]):
        path.write_bytes(b"".join(bad))
        with pytest.raises(DamagedLog, match="is damaged"):
            event_log.read(path)


def test_how_late_an_event_is() -> None:
    event = event_log.Event(0, event_log.Op.PUSH, 0, 1, version=7, pulled=4)
    assert event.staleness == 3
