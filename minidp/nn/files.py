"""Models on disk, in the safetensors format that PyTorch reads and writes too."""

from __future__ import annotations

import json
import os
import re
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
    import tempfile

    from safetensors.numpy import save

    arrays = {}
    for name, value in state_dict.items():
        value = value.data if isinstance(value, Tensor) else value
        array = to_numpy(value) if type(value) in array_types else np.asarray(value)
        if array.dtype.kind == "O":
            raise TypeError(f"{name} holds Python objects: files hold numbers; convert it by .astype first")
        arrays[name] = np.array(array, order="C")  # safetensors writes the buffer as it lies
    path = Path(path)
    handle, temporary = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name}.{_writer(os.getpid())}.", suffix=_PART
    )
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(save(arrays, dict(metadata) if metadata is not None else None))
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
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
    """Delete what `save_file` has begun here and not ended, in processes of this machine that are no more."""
    for path in folder.glob(f".*{_PART}"):
        writer = re.search(r"\.([^.]*)-(\d+)\.[^.]*" + re.escape(_PART) + "$", path.name)
        if (
            writer is not None
            and _writer(int(writer[2])) == f"{writer[1]}-{writer[2]}"
            and not _alive(int(writer[2]))
        ):
            path.unlink(missing_ok=True)


def _writer(pid: int) -> str:
    return f"{os.uname().nodename.replace('.', '_')}-{pid}"


def _alive(pid: int) -> bool:
    """Whether there is such a process, other than one that has ended and waits to be noticed (Linux)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return not Path("/proc/self").exists()  # gone just now, or a system without /proc


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
