"""Checkpoints: all that a training goes on from. What is in them, and how it comes back.

Nothing in one depends on how many ranks wrote it, unless each had an optimizer's state of its own. minidp's
random numbers need no state: they are functions of seed and update (`backend.generator`). Generators of the user's
own can be given. The files: `checkpoint_files`.
"""

from __future__ import annotations

import operator
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minidp.backend import Array, to_numpy
from minidp.comm.errors import in_words
from minidp.optim import Optimizer
from minidp.parallel import compressor_state
from minidp.parallel.checkpoint_files import (
    FORMAT,
    Arrays,
    Content,
    check_generators,
    compare_surroundings,
    generator_states,
    read,
    surroundings,
    write,
)

if TYPE_CHECKING:
    from minidp.parallel.present import Group
    from minidp.parallel.state import Stateful


@dataclass(frozen=True)
class Checkpoint:
    """What a strategy was loaded from.

    Attributes:
        path: the file.
        updates: steps that had been made, by rank 0 where each counts its own.
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
    strategy: Stateful,
    folder: Path,
    position: tuple[int, int] | None,
    extra: Any,
    generators: Mapping[str, np.random.Generator] | None,
    keep: int,
) -> Path:
    """See ``Strategy.save``."""
    comm = strategy.group
    if any(comm.all_gather_int(strategy.in_step, "save")):
        raise RuntimeError(
            "save in the middle of a step, whose gradients would be lost: call strategy.step() or discard() first"
        )
    strategy.consolidate()
    states = comm.all_gather_object(generator_states(generators), "save generators") if generators else []
    private = strategy.private_state
    private_updates = comm.all_gather_int(strategy.updates, "save updates") if private else None
    private_arrays = _gathered(strategy) if private else {}
    compressor_arrays, compressor_facts = compressor_state.gathered(strategy)

    def written() -> Path:
        if keep < 1:
            raise ValueError(f"keep={keep}: a folder holds at least the checkpoint that is being written")
        arrays = {f"model.{name}": array for name, array in strategy.model_state().items()}
        arrays |= private_arrays if private else _flat(strategy.optimizer_state())
        arrays |= _flat(strategy.outer_state(), "outer.") | compressor_arrays
        facts = {
            "format": FORMAT,
            "updates": strategy.updates,
            "seed": strategy.seed,
            "position": None if position is None else _position(position),
            "extra": extra,
            "generators": states,
            "optimizer": type(strategy.optimizer).__name__,
            "slots": list(strategy.optimizer.slots),
            "private_updates": private_updates,  # of each rank; None where ranks have no states of their own
            "outer": _outer_facts(strategy),
            "compress": compressor_facts,
            "server_updates": strategy.server_updates(),
            "surroundings": surroundings(),
        }
        return write(folder, Content({name: _plain_bytes(name, a) for name, a in arrays.items()}, facts), keep)

    try:
        path: Path = _at_rank_0(comm, written, "save")
    finally:
        strategy.forget()
    return path


def load(strategy: Stateful, place: Path, generators: Mapping[str, np.random.Generator] | None) -> Checkpoint:
    """See ``Strategy.load``."""
    comm = strategy.group
    content, path, damaged = _at_rank_0(comm, lambda: read(place), "load")
    arrays, facts = content
    states: list[dict[str, Any]] = facts["generators"]
    mine = states[comm.rank] if generators and len(states) == comm.world_size else {}
    outer = facts.get("outer")  # which files of older versions lack
    problem, model, state, outer_state, compressor = "", {}, {}, {}, {}
    try:
        model = _of_model(arrays, strategy)
        state = _of_optimizer(arrays, strategy, facts)
        if outer is not None:
            outer_state = _of_outer(arrays, strategy, outer)
        compressor = compressor_state.of_compressor(arrays, strategy, facts.get("compress"))
        check_generators(generators or {}, mine, len(states), comm.world_size)
    except ValueError as error:
        problem = str(error)
    # All or none: generators, and what a model's frozen parameters are, may fit on one rank only.
    for said in comm.all_gather_object(problem, "load check"):
        if said:
            raise ValueError(said)
    strategy.restore(model, state, _updates(strategy, facts), facts["seed"])
    strategy.restore_outer(outer_state, 0 if outer is None else outer["updates"])
    strategy.restore_servers(facts.get("server_updates"))
    strategy.restore_compressor(compressor)
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


def _plain_bytes(name: str, array: Array) -> np.ndarray:
    """On the host and of the machine's byte order, as files have it."""
    if array.dtype.hasobject:
        raise TypeError(f"{name} holds Python objects: files hold numbers")
    return to_numpy(array).astype(array.dtype.newbyteorder("="), copy=False)


def _of_model(arrays: Arrays, strategy: Stateful) -> Arrays:
    """Parameters and buffers; ValueError unless they have the names, shapes and dtypes of the model's."""
    model = {name.removeprefix("model."): array for name, array in arrays.items() if name.startswith("model.")}
    values = strategy.checked_model(model)
    for name, value in values.items():
        if model[name].dtype != value.dtype.newbyteorder("="):
            raise ValueError(
                f"{name} is {model[name].dtype} in the checkpoint, and {value.dtype} in the model: first convert "
                f'that by model.astype("{model[name].dtype}")'
            )
    return values


def _at_rank_0(comm: Group, function: Callable[[], Any], what: str) -> Any:
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


# --- optimizers' state ------------------------------------------------------------------------------------------

ALONE = "or give its parameters alone, model.<name> of nn.load_file(…), to strategy.load_state_dict"


def _flat(state: Mapping[str, Arrays], prefix: str = "") -> Arrays:
    """By the names of the file."""
    return {f"{prefix}{slot}.{name}": array for slot, values in state.items() for name, array in values.items()}


def _gathered(strategy: Stateful) -> Arrays:
    """Every rank's own state, by the names of the file, on rank 0. Collective."""
    arrays = {}
    for slot, values in strategy.optimizer_state().items():
        for name, array in values.items():
            everybody = strategy.comm.gather(to_numpy(array), 0)
            for rank, own in enumerate(() if everybody is None else everybody):
                arrays[f"{_own(slot, rank)}.{name}"] = own
    return arrays


def _own(slot: str, rank: int) -> str:
    return f"{slot}@{rank}"


def _outer_facts(strategy: Stateful) -> dict[str, Any] | None:
    rule = strategy.outer
    if rule is None:
        return None
    return {"optimizer": type(rule).__name__, "slots": list(rule.slots), "updates": strategy.outer_updates}


def _updates(strategy: Stateful, facts: dict[str, Any]) -> int:
    """How many this rank goes on from."""
    everybodys: list[int] = facts.get("private_updates") or []
    own = strategy.private_state and len(everybodys) == strategy.comm.world_size
    return everybodys[strategy.comm.rank] if own else int(facts["updates"])


def _of_optimizer(arrays: Arrays, strategy: Stateful, facts: dict[str, Any]) -> dict[str, Arrays]:
    """This rank's state by slot and parameter; ValueError unless it is of such an optimizer, on as many ranks."""
    _check_rule(strategy.optimizer, facts, "")
    slots, everybodys, comm = strategy.optimizer.slots, facts.get("private_updates"), strategy.comm
    if not slots or everybodys is None:
        return {slot: _of_slot(arrays, slot, strategy, facts) for slot in slots}
    ranks = len(everybodys)
    if not strategy.private_state or ranks != comm.world_size:
        here = f"here are {comm.world_size}" if strategy.private_state else "here all ranks have one together"
        raise ValueError(
            f"the checkpoint holds a state of {facts['optimizer']} for each of {ranks} ranks, {here}: load it by "
            f"the same strategy on {ranks} ranks, {ALONE}"
        )
    return {slot: _of_slot(arrays, _own(slot, comm.rank), strategy, facts) for slot in slots}


def _of_outer(arrays: Arrays, strategy: Stateful, facts: dict[str, Any]) -> dict[str, Arrays]:
    """The outer optimizer's state by slot and parameter; ValueError if that would be lost."""
    rule = strategy.outer
    if rule is None:
        if facts["slots"]:
            raise ValueError(
                f"the checkpoint is of outer {facts['optimizer']} with the state {facts['slots']}, the strategy "
                f"has no outer optimizer: load it by LocalSGD(…, outer=…), {ALONE}"
            )
        return {}
    _check_rule(rule, facts, "outer ")
    return {slot: _of_slot(arrays, f"outer.{slot}", strategy, facts) for slot in rule.slots}


def _check_rule(optimizer: Optimizer, facts: dict[str, Any], which: str) -> None:
    """ValueError if the checkpoint is of another one."""
    then, now = (facts["optimizer"], facts["slots"]), (type(optimizer).__name__, list(optimizer.slots))
    if then != now:
        raise ValueError(
            f"the checkpoint is of {which}{then[0]} with the state {then[1]}, the strategy has {which}{now[0]} "
            f"with {now[1]}: load it with the kind of optimizer that it was saved from"
        )


def _of_slot(arrays: Arrays, slot: str, strategy: Stateful, facts: dict[str, Any]) -> Arrays:
    """One slot of an optimizer's state, by the names of parameters; ValueError if it is not as it should be."""
    found = {}
    for name, shape in strategy.shapes.items():
        array = arrays.get(f"{slot}.{name}")
        if array is None or array.shape != shape:
            there = "no" if array is None else f"shape {array.shape} of"
            raise ValueError(
                f"the checkpoint, of {facts['optimizer']}, has {there} {slot} of {name} {shape}: "
                "freeze the parameters that were frozen when it was saved, and no others"
            )
        found[name] = array
    return found
