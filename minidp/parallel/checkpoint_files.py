"""Files of checkpoints, and the folders that keep several.

    update-00000300.safetensors     model.<name>, <slot>.<name> of the optimizer; in its header facts, a checksum
                                    <slot>@<rank>.<name> where each rank has its own; outer.<slot>.<name>

A file appears whole or not at all: it is written beside its place, flushed to the disk, then renamed. What is
damaged afterwards is found by the checksum, and the file before it is used.
"""

from __future__ import annotations

import json
import logging
import platform
import re
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minidp.nn import read_file, remove_unfinished, save_file

Arrays = dict[str, np.ndarray]
FORMAT = 1
_FACTS = "minidp"
_NAME = re.compile(r"update-(\d+)\.safetensors")
_log = logging.getLogger("minidp.parallel")


class DamagedCheckpoint(ValueError):
    """No file of the folder, or not the one that was asked for, is as it was written."""


class Content(NamedTuple):
    """Of a file: arrays by name, and facts (JSON)."""

    arrays: Arrays
    facts: dict[str, Any]


def write(folder: Path, content: Content, keep: int) -> Path:
    """Write the checkpoint of ``facts["updates"]``; then delete all but the ``keep`` newest. May raise OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    path = folder / f"update-{content.facts['updates']:08d}.safetensors"
    facts = json.dumps(content.facts, sort_keys=True)
    save_file(content.arrays, path, {_FACTS: facts, "checksum": _checksum(content.arrays, facts)})
    for old in files(folder)[keep:]:
        if old != path:
            old.unlink(missing_ok=True)
    return path


def files(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the one that was written last first.

    By the time, not by the number of updates: a run that has gone back to an older one writes smaller numbers.
    """
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and path.is_file()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, updates_of(path)), reverse=True)


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
            content = read_one(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        except OSError as error:  # a bad sector, a file that another run has just replaced
            if len(candidates) == 1:
                raise
            damaged.append(f"{path} can't be read: {error}")
            continue
        for problem in damaged:
            _log.warning("%s; going on from the one before, %s", problem, path.name)
        return content, path, tuple(damaged)
    raise DamagedCheckpoint("; ".join(damaged))


def read_one(path: Path) -> Content:
    """The content of a file; DamagedCheckpoint, or another ValueError, if it is not as it was written."""
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
