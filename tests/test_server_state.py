"""States of parameter servers: shared, loaded, saved, let go; and several strategies on the same servers."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minidp import nn, optim, parallel
from minidp.nn import functional as F
from tests.servers import counter, decayed, served
from tests.test_data_parallel import dataset, same_bits, small_model

pytestmark = pytest.mark.timeout(60)

WORLDS = ("process", "virtual")


def stateful(comm: Any, staleness: int | None) -> list[dict[str, np.ndarray]]:
    """Ranks are built differently, make 3, 4 … steps, load rank 0's state, and go on."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), seed=comm.rank).astype("float64")
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=0.1), comm, staleness=staleness)
    x, y = dataset().arrays
    states = [s.state_dict()]
    comm.barrier()
    for _ in range(3 + (comm.rank if staleness != 0 else 0)):
        s.forward_backward(x[comm.rank :: 3], y[comm.rank :: 3], F.cross_entropy)
        s.step()
    states.append(s.state_dict())
    states.append({k: p.data.copy() for k, p in model.named_parameters()})
    comm.barrier()
    s.load_state_dict({name: value * 0 + 7 + comm.rank for name, value in states[1].items()})
    states.append(s.state_dict())
    comm.barrier()
    with pytest.raises(ValueError, match="read-only"):
        next(iter(model.parameters())).data[0] = 1.0
    s.forward_backward(x[:9], y[:9], F.cross_entropy)
    s.step()
    states.append(s.state_dict())
    s.release()
    next(iter(model.parameters())).data[...] = 1.0  # its own again
    with pytest.raises(RuntimeError, match="released"):
        s.step()
    return states


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("staleness", [0, 1, None])
def test_the_state_is_the_same_on_all_ranks(staleness: int | None, world: str) -> None:
    results = served(stateful, 2, 2, staleness, world=world)
    start, trained, mine, loaded, more = results[0]
    for states in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(states, results[0], strict=True))
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3), seed=0).astype("float64")
    assert same_bits(start, model.state_dict()), "rank 0's"
    assert same_bits({k: trained[k] for k in mine}, mine), "this rank computes from it as well"
    assert not same_bits(trained, start)
    assert all((value == 7).all() for value in loaded.values()), "rank 0's"
    assert not same_bits(more, loaded)


def slow_reader(comm: Any, staleness: int | None) -> float:
    model = counter(3)
    s = parallel.ParameterServer(model, optim.SGD(model.parameters(), lr=1), comm, staleness=staleness)
    if comm.rank == 1:
        reply = s._links._mail.reply
        s._links._mail.reply = lambda server: (time.sleep(0.2), reply(server))[1]  # type: ignore[method-assign]
    state = s.state_dict()
    model.step(s)
    return float(state["w"][0])


@pytest.mark.parametrize("staleness", [1, None])
def test_nobody_pushes_while_others_read_the_state(staleness: int | None) -> None:
    assert served(slow_reader, 2, 1, staleness, world="process") == [0, 0]


def saved(comm: Any, folder: Path, steps: int, staleness: int | None, resume: bool) -> tuple[Any, list[int]]:
    model = small_model()
    s = parallel.ParameterServer(model, optim.Adam(model.parameters(), lr=decayed), comm, staleness=staleness)
    if resume:
        s.load(folder)
    loaded = s.state_dict()
    x, y = dataset().arrays
    for _ in range(steps):
        rows = np.random.default_rng([comm.rank, s.updates]).integers(0, 90, 4 + comm.rank)
        s.forward_backward(x[rows], y[rows], F.cross_entropy)
        s.step()
    if not resume:
        s.save(folder)
    return (loaded, s.state_dict()), [i.version for i in s.servers()]


@pytest.mark.parametrize("world", WORLDS)
def test_a_synchronous_checkpoint_goes_on_to_the_bit(world: str, tmp_path: Path) -> None:
    at_once = served(saved, 2, 2, tmp_path / "whole", 6, 0, False, world=world)
    first = served(saved, 2, 2, tmp_path / "parts", 3, 0, False, world=world)
    then = served(saved, 2, 3, tmp_path / "parts", 3, 0, True, world=world)  # on another number of servers
    for rank in range(2):
        assert same_bits(then[rank][0][0], first[rank][0][1])
        assert same_bits(then[rank][0][1], at_once[rank][0][1])
        assert then[rank][1] == [6, 6, 6]


def several(comm: Any, at_once: bool) -> list[float]:
    """Two strategies on the same servers, one after the other, or in turns; of different models and rules."""
    models = [counter(40), counter(90)]
    build = [
        lambda: parallel.ParameterServer(models[0], optim.SGD(models[0].parameters(), lr=1), comm),
        lambda: parallel.ParameterServer(models[1], optim.SGD(models[1].parameters(), lr=2), comm, staleness=None),
    ]
    strategies = [build[0](), build[1]()] if at_once else [build[0]()]
    for i in range(3 if at_once else 1):
        models[0].step(strategies[0])
        if at_once:
            for _ in range(1 + i % 2):
                models[1].step(strategies[1])
    if not at_once:
        strategies[0].release()
        strategies.append(build[1]())
        models[1].step(strategies[1])
    last = float(strategies[1].state_dict()["w"][7])
    return [float(models[0].w.data[3]), last]


@pytest.mark.parametrize("world", WORLDS)
def test_several_strategies_on_the_same_servers(world: str) -> None:
    assert served(several, 2, 2, False, world=world) == [[-1.0, -4.0]] * 2
    assert served(several, 2, 2, True, world=world) == [[-3.0, -16.0]] * 2
