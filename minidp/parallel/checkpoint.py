"""Checkpoints: all that a training goes on from. What is in them, and how it comes back.

Nothing in one depends on how many ranks wrote it. minidp's random numbers need no state: they are functions of
seed and update (`backend.generator`). Generators of the user's own can be given. The files: `checkpoint_files`.
"""

from __future__ import annotations

import logging
import operator
import pickle
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minidp.comm import Communicator
from minidp.comm.errors import in_words
from minidp.nn.module import checked_state
from minidp.parallel.checkpoint_files import FORMAT, Arrays, Content, read, write

if TYPE_CHECKING:
    from minidp.parallel.strategy import Strategy

_log = logging.getLogger("minidp.parallel")


@dataclass(frozen=True)
class Checkpoint:
    """What a strategy was loaded from.

    Attributes:
        path: the file.
        updates: steps that had been made.
        position: (epoch, step) that the loader was to go on with, if ``save`` was told.
        extra: what else ``save`` was given.
        damaged: newer files of the folder that could not be used, and why.
    """

    path: Path
    updates: int
    position: tuple[int, int] | None
    extra: Any
    damaged: tuple[str, ...]


def save(
    strategy: Strategy,
    folder: Path,
    position: tuple[int, int] | None,
    extra: Any,
    generators: Mapping[str, np.random.Generator] | None,
    keep: int,
) -> Path:
    """See ``Strategy.save``."""
    comm = strategy.comm
    if any(comm.all_gather_int(strategy.in_step, "save")):
        raise RuntimeError(
            "save in the middle of a step, whose gradients would be lost: call strategy.step() or discard() first"
        )
    states = comm.all_gather_object(generator_states(generators), "save generators") if generators else []

    def written() -> Path:
        if keep < 1:
            raise ValueError(f"keep={keep}: a folder holds at least the checkpoint that is being written")
        arrays = {f"model.{name}": array for name, array in strategy.model.state_dict().items()}
        for slot, values in strategy.optimizer_state().items():
            arrays |= {f"{slot}.{name}": array for name, array in values.items()}
        facts = {
            "format": FORMAT,
            "updates": strategy.updates,
            "seed": strategy.seed,
            "position": None if position is None else _position(position),
            "extra": extra,
            "generators": states,
            "optimizer": type(strategy.optimizer).__name__,
            "slots": list(strategy.optimizer.slots),
            "surroundings": surroundings(),
        }
        return write(folder, Content({name: _plain_bytes(name, a) for name, a in arrays.items()}, facts), keep)

    path: Path = _at_rank_0(comm, written, "save")
    return path


def load(strategy: Strategy, place: Path, generators: Mapping[str, np.random.Generator] | None) -> Checkpoint:
    """See ``Strategy.load``."""
    comm = strategy.comm
    content, path, damaged = _at_rank_0(comm, lambda: read(place), "load")
    arrays, facts = content
    states: list[dict[str, Any]] = facts["generators"]
    mine = states[comm.rank] if generators and len(states) == comm.world_size else {}
    problem, model, state = "", {}, {}
    try:
        model = _of_model(arrays, strategy)
        state = {slot: _of_slot(arrays, slot, strategy, facts) for slot in _slots(strategy, facts)}
        check_generators(generators or {}, mine, len(states), comm.world_size)
    except ValueError as error:
        problem = str(error)
    # All or none: generators, and what a model's frozen parameters are, may fit on one rank only.
    for said in comm.all_gather_object(problem, "load check"):
        if said:
            raise ValueError(said)
    strategy.restore(model, state, facts["updates"], facts["seed"])
    for name, generator in (generators or {}).items():
        generator.bit_generator.state = mine[name]
    if comm.rank == 0:
        compare_surroundings(facts["surroundings"])
    position = None if facts["position"] is None else _position(facts["position"])
    return Checkpoint(path, facts["updates"], position, facts["extra"], damaged)


def _position(position: Any) -> tuple[int, int]:
    """(epoch, step), both whole numbers."""
    try:
        epoch, step = map(operator.index, position)
    except (TypeError, ValueError):
        raise ValueError(f"position={position!r}: give (epoch, step), as loader.position does") from None
    return epoch, step


def _plain_bytes(name: str, array: np.ndarray) -> np.ndarray:
    """Of the machine's byte order, as files have it."""
    if array.dtype.hasobject:
        raise TypeError(f"{name} holds Python objects: files hold numbers")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _of_model(arrays: Arrays, strategy: Strategy) -> Arrays:
    """Parameters and buffers; ValueError unless they have the names, shapes and dtypes of the model's."""
    model = {name.removeprefix("model."): array for name, array in arrays.items() if name.startswith("model.")}
    values = checked_state(strategy.model, model)
    for name, value in values.items():
        if model[name].dtype != value.dtype.newbyteorder("="):
            raise ValueError(
                f"{name} is {model[name].dtype} in the checkpoint, and {value.dtype} in the model: first convert "
                f'that by model.astype("{model[name].dtype}")'
            )
    return values


def _slots(strategy: Strategy, facts: dict[str, Any]) -> tuple[str, ...]:
    """The optimizer's; ValueError if the checkpoint is of another one."""
    optimizer = strategy.optimizer
    then, now = (facts["optimizer"], facts["slots"]), (type(optimizer).__name__, list(optimizer.slots))
    if then != now:
        raise ValueError(
            f"the checkpoint is of {then[0]} with the state {then[1]}, the strategy has {now[0]} with {now[1]}: "
            "load it with the kind of optimizer that it was saved from"
        )
    return optimizer.slots


def _of_slot(arrays: Arrays, slot: str, strategy: Strategy, facts: dict[str, Any]) -> Arrays:
    """One slot of the optimizer's state, by the names of parameters; ValueError if it is not as it should be."""
    found = {}
    for segment in strategy.layout.segments:
        array = arrays.get(f"{slot}.{segment.name}")
        if array is None or array.shape != segment.shape:
            shape = "no" if array is None else f"shape {array.shape} of"
            raise ValueError(
                f"the checkpoint, of {facts['optimizer']}, has {shape} {slot} of {segment.name} {segment.shape}: "
                "freeze the parameters that were frozen when it was saved, and no others"
            )
        found[segment.name] = array
    return found


def _at_rank_0(comm: Communicator, function: Callable[[], Any], what: str) -> Any:
    """What ``function`` returns on rank 0, on every rank; what it raises is raised by all."""
    outcome: tuple[Any, Exception | None] = None, None
    if comm.rank == 0:
        try:
            outcome = function(), None
        except Exception as error:  # such as a full disk: the others must not wait for what will not come
            outcome = None, _portable(error)
    value, problem = comm.broadcast_object(outcome, 0, what)
    if problem is not None:
        raise problem
    return value


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, if it does not survive the journey."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(in_words(error))
    return error


# --- facts ------------------------------------------------------------------------------------------------------


def surroundings() -> dict[str, str]:
    """What the bits of a training depend on besides program and data."""
    from importlib import metadata  # 16 ms, for this only

    import threadpoolctl

    try:
        version = metadata.version("minidp")
    except metadata.PackageNotFoundError:  # a checkout on the path
        version = "not installed"
    blas = sorted(
        f"{library['internal_api']} {library['version']} {library.get('architecture', '')}".strip()
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "blas"
    )
    return {
        "minidp": version,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "blas": ", ".join(blas),
    }


def compare_surroundings(then: Mapping[str, str]) -> None:
    """Say what has changed: training goes on, but not with the same bits as if nothing had."""
    now = surroundings()
    changed = [f"{name} {then[name]} → {now[name]}" for name in now if then.get(name, now[name]) != now[name]]
    if changed:
        _log.warning("the checkpoint was written with other software (%s): bits may differ", ", ".join(changed))


def generator_states(generators: Mapping[str, np.random.Generator] | None) -> dict[str, Any]:
    """The states of generators by name, as JSON."""
    return {name: _plain(generator.bit_generator.state) for name, generator in (generators or {}).items()}


def check_generators(
    generators: Mapping[str, np.random.Generator], states: Mapping[str, Any], saved: int, world_size: int
) -> None:
    """ValueError if ``states`` are of others; ``saved``: how many ranks' the checkpoint holds."""
    if generators and saved not in (0, world_size):
        raise ValueError(
            f"the checkpoint holds generators of {saved} ranks, here are {world_size}: give none, and draw from "
            "minidp.backend.generator(seed, purpose, update), which needs no state"
        )
    for name, generator in generators.items():
        kind = type(generator.bit_generator).__name__
        if name not in states or states[name]["bit_generator"] != kind:
            held = ", ".join(f"{n} ({s['bit_generator']})" for n, s in states.items()) or "none"
            raise ValueError(f"the checkpoint holds no generator {name!r} ({kind}); it holds {held}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
