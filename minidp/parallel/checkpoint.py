"""Checkpoints: all that a training goes on from, in one file, of which a folder keeps several.

    update-00000300.safetensors     model.<name>, <slot>.<name> of the optimizer; in its header facts, a checksum

A file appears whole or not at all: it is written beside its place, flushed to the disk, then renamed. What is
damaged afterwards is found by the checksum, and the file before it is used. Nothing in a file depends on how many
ranks wrote it. minidp's random numbers need no state: they are functions of seed and update (`backend.generator`).
Generators of the user's own can be given.
"""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import threadpoolctl

from minidp.comm import Communicator
from minidp.nn import read_file, save_file
from minidp.nn.module import checked_state

if TYPE_CHECKING:
    from minidp.parallel.strategy import Strategy

Arrays = dict[str, np.ndarray]
FORMAT = 1
_FACTS = "minidp"
_NAME = re.compile(r"update-(\d+)\.safetensors")
_log = logging.getLogger("minidp.parallel")


class DamagedCheckpoint(ValueError):
    """No file of the folder, or not the one that was asked for, is as it was written."""


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


class Content(NamedTuple):
    """Of a file: arrays by name, and facts (JSON)."""

    arrays: Arrays
    facts: dict[str, Any]


def write(folder: Path, content: Content, keep: int) -> Path:
    """Write the checkpoint of ``facts["updates"]``; then delete all but the ``keep`` newest. May raise OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob(".update-*.part"):  # of a rank that was killed while it wrote
        unfinished.unlink(missing_ok=True)
    path = folder / f"update-{content.facts['updates']:08d}.safetensors"
    facts = json.dumps(content.facts, sort_keys=True)
    save_file(content.arrays, path, {_FACTS: facts, "checksum": _checksum(content.arrays, facts)})
    for old in files(folder)[keep:]:
        if old != path:
            old.unlink(missing_ok=True)
    return path


def files(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the one of the most updates first."""
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=updates_of, reverse=True)


def updates_of(path: Path) -> int:
    """The updates that had been made, by the name of the file."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def read(place: Path) -> tuple[Content, Path, tuple[str, ...]]:
    """The newest good checkpoint of a folder, or the one file: content, path, and what is wrong with newer ones.

    Raises FileNotFoundError if there is none, DamagedCheckpoint if there is none that is good.
    """
    if not place.exists():
        raise FileNotFoundError(f"no checkpoint: there is no file or folder {place}")
    candidates = files(place) if place.is_dir() else [place]
    if not candidates:
        raise FileNotFoundError(f"no checkpoint in {place}: strategy.save(folder) writes one")
    damaged: list[str] = []
    for path in candidates:
        try:
            content = _read(path)
        except (ValueError, FileNotFoundError) as error:  # also of a file that another run has just replaced
            damaged.append(str(error))
            continue
        for problem in damaged:
            _log.warning("%s; going on from the one before, %s", problem, path.name)
        return content, path, tuple(damaged)
    raise DamagedCheckpoint("; ".join(damaged))


def _read(path: Path) -> Content:
    arrays, header = read_file(path)
    facts = header.get(_FACTS)
    if facts is None:
        raise DamagedCheckpoint(f"{path} is no checkpoint: its header lacks {_FACTS!r}")
    if header.get("checksum") != _checksum(arrays, facts):
        raise DamagedCheckpoint(f"{path} is damaged: its checksum is not that of its content")
    parsed: dict[str, Any] = json.loads(facts)
    if parsed["format"] != FORMAT:
        raise DamagedCheckpoint(f"{path} has format {parsed['format']}, this version of minidp reads {FORMAT}")
    return Content(arrays, parsed)


def _checksum(arrays: Mapping[str, np.ndarray], facts: str) -> str:
    digest = blake2b(facts.encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


# --- of a strategy ----------------------------------------------------------------------------------------------


def save(
    strategy: Strategy,
    folder: Path,
    position: tuple[int, int] | None,
    extra: Any,
    generators: Mapping[str, np.random.Generator] | None,
    keep: int,
) -> Path:
    """See ``Strategy.save``."""
    if keep < 1:
        raise ValueError(f"keep={keep}: a folder holds at least the checkpoint that is being written")
    comm = strategy.comm
    if any(comm.all_gather_int(strategy.in_step, "save")):
        raise RuntimeError(
            "save in the middle of a step, whose gradients would be lost: call strategy.step() or discard() first"
        )
    states = comm.all_gather_object(generator_states(generators), "save generators") if generators else []

    def written() -> Path:
        arrays = {f"model.{name}": array for name, array in strategy.model.state_dict().items()}
        for slot, values in strategy.optimizer_state().items():
            arrays |= {f"{slot}.{name}": array for name, array in values.items()}
        facts = {
            "format": FORMAT,
            "updates": strategy.updates,
            "seed": strategy.seed,
            "position": position,
            "extra": extra,
            "generators": states,
            "strategy": repr(strategy),
            "optimizer": repr(strategy.optimizer),
            "surroundings": surroundings(),
        }
        return write(folder, Content(arrays, facts), keep)

    path: Path = _at_rank_0(comm, written, "save")
    return path


def load(strategy: Strategy, place: Path, generators: Mapping[str, np.random.Generator] | None) -> Checkpoint:
    """See ``Strategy.load``."""
    comm = strategy.comm
    content, path, damaged = _at_rank_0(comm, lambda: read(place), "load")
    arrays, facts = content
    states: list[dict[str, Any]] = facts["generators"]
    if generators and len(states) not in (0, comm.world_size):
        raise ValueError(
            f"the checkpoint holds generators of {len(states)} ranks, here are {comm.world_size}: give none, and "
            "draw from minidp.backend.generator(seed, purpose, update), which needs no state"
        )
    model = {name.removeprefix("model."): array for name, array in arrays.items() if name.startswith("model.")}
    model = checked_state(strategy.model, model)
    state = {slot: _of_slot(arrays, slot, strategy, facts["optimizer"]) for slot in strategy.optimizer.slots}
    mine = states[comm.rank] if generators and states else {}
    check_generators(generators or {}, mine)
    strategy.restore(model, state, facts["updates"], facts["seed"])
    for name, generator in (generators or {}).items():
        generator.bit_generator.state = mine[name]
    if comm.rank == 0:
        compare_surroundings(facts["surroundings"])
    position = None if facts["position"] is None else (facts["position"][0], facts["position"][1])
    return Checkpoint(path, facts["updates"], position, facts["extra"], damaged)


def _of_slot(arrays: Arrays, slot: str, strategy: Strategy, optimizer: str) -> Arrays:
    """One slot of the optimizer's state, by the names of parameters; ValueError if it is not as it should be."""
    found = {}
    for segment in strategy.layout.segments:
        array = arrays.get(f"{slot}.{segment.name}")
        if array is None or array.shape != segment.shape:
            shape = "no" if array is None else f"shape {array.shape} of"
            raise ValueError(
                f"the checkpoint, of {optimizer}, has {shape} {slot} of {segment.name} {segment.shape}: load it "
                f"into the model and the kind of optimizer that it was saved from, not {strategy.optimizer!r}"
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
            outcome = None, error
    value, problem = comm.broadcast_object(outcome, 0, what)
    if problem is not None:
        raise problem
    return value


# --- facts ------------------------------------------------------------------------------------------------------


def surroundings() -> dict[str, str]:
    """What the bits of a training depend on besides program and data."""
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


def check_generators(generators: Mapping[str, np.random.Generator], states: Mapping[str, Any]) -> None:
    """ValueError if ``states`` are of others."""
    for name, generator in generators.items():
        kind = type(generator.bit_generator).__name__
        if name not in states or states[name]["bit_generator"] != kind:
            held = ", ".join(f"{n} ({s['bit_generator']})" for n, s in states.items()) or "none"
            raise ValueError(f"the checkpoint holds no generator {name!r} ({kind}); it holds {held}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
