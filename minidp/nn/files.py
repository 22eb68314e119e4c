"""Models on disk, in the safetensors format that PyTorch reads and writes too."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minidp.autograd import Tensor
from minidp.backend import array_types, to_numpy

_PART = ".part"


def save_file(
    state_dict: Mapping[str, Any], path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write name → array to `path`, with optional text `metadata`.

    The file appears whole or not at all: it is written beside its place, synced, then renamed.
    """
    from safetensors.numpy import save

    arrays = {}
    for name, value in state_dict.items():
        value = value.data if isinstance(value, Tensor) else value
        array = to_numpy(value) if type(value) in array_types else np.asarray(value)
        if array.dtype.kind == "O":
            raise TypeError(f"{name} holds Python objects: files hold numbers; convert it by .astype first")
        arrays[name] = np.array(array, order="C")  # safetensors writes the buffer as it lies
    path = Path(path)
    handle, temporary = _begin(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(arrays, dict(metadata) if metadata is not None else None))
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)  # still locked: until it has its name nobody may take it for a dead one's
        _sync_folder(path.parent)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_file(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read name → array from a safetensors file, ours or PyTorch's.

    Raises FileNotFoundError if there is none, ValueError if it is damaged; both name the file.
    """
    return read_file(path)[0]


def read_file(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`load_file`, and the metadata that `save_file` was given."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: nn.save_file(model.state_dict(), path) writes one")
    try:
        data = path.read_bytes()
        arrays = dict(load(data))
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        return arrays, dict(header.get("__metadata__") or {})
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}): copy it again or save it anew"
        ) from error


def remove_unfinished(folder: Path) -> None:
    """Delete what `save_file` has begun here and nobody is writing any more: its writer was killed."""
    for path in folder.glob(f".*{_PART}"):
        with contextlib.suppress(OSError), path.open("rb") as file:  # somebody else may end or delete it just now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
            path.unlink()


def _begin(path: Path) -> tuple[int, str]:
    """A new file beside ``path``: its descriptor, which is locked as long as somebody writes, and its name."""
    import tempfile

    while True:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PART)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, temporary
        os.close(handle)  # taken for a dead one's before it was locked


def _sync_folder(folder: Path) -> None:
    """The new name is to be on the disk, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
