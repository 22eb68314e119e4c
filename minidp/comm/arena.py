"""The shared memory of one run: a single file without a name, one region for each rank.

A memfd (Linux) or an at once unlinked POSIX segment (elsewhere) is made by the parent, and its descriptor is
passed on. It never has a name while workers run, so nothing can be left in /dev/shm, whoever is killed when.

The file is sparse and far larger than any memory: every rank owns a region of 1 TiB of it and hands out pieces
from its own region only. Thus allocation needs no lock and no server; a peer needs an offset to map a piece.
Pages cost memory once they are reserved. ``reserve`` asks the kernel for them before anybody touches them, so
a lack of memory is a ``MemoryError`` in bytes, never a SIGBUS in the middle of a step.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import secrets
import sys
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE = mmap.ALLOCATIONGRANULARITY
REGION = 1 << 40
_POPULATE = getattr(mmap, "MAP_POPULATE", 0)  # maps reserved pages at once: first touch costs 0.7 ms a MB

Bytes = npt.NDArray[np.uint8]


def round_up(nbytes: int, unit: int = PAGE) -> int:
    """The smallest multiple of ``unit`` that is at least ``nbytes``."""
    return -(-nbytes // unit) * unit


class Arena:
    """The run's shared file. Pickles to another process as a duplicate of its descriptor."""

    def __init__(self, fd: int, regions: int) -> None:
        self.fd = fd
        self.regions = regions
        self.taken: dict[int, int] = {}  # bytes handed out of each region, by this process

    @classmethod
    def create(cls, regions: int) -> Arena:
        """A new, empty arena with ``regions`` regions; its size is sealed, so that no peer can shrink it."""
        fd = _anonymous_file()
        os.ftruncate(fd, regions * REGION)
        if hasattr(fcntl, "F_ADD_SEALS"):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        return cls(fd, regions)

    def __reduce__(self) -> tuple[Any, ...]:
        return _attach, (reduction.DupFd(self.fd), self.regions)

    def take(self, region: int, nbytes: int) -> int:
        """Offset of the next ``nbytes`` of ``region``, page-aligned. Only the region's owner may call this."""
        start = self.taken.get(region, 0)
        if start + nbytes > REGION:
            raise MemoryError(f"{nbytes:,} bytes asked for: a rank's region of shared memory holds {REGION:,}")
        self.taken[region] = start + round_up(nbytes)
        return region * REGION + start

    def reserve(self, offset: int, nbytes: int) -> None:
        """Make the kernel keep pages for these bytes. MemoryError if they are not to be had."""
        if nbytes == 0:
            return
        free = available_bytes()
        if nbytes > free:
            raise MemoryError(not_enough(nbytes, free))
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.fd, offset, nbytes)
        except OSError as error:
            raise MemoryError(f"{not_enough(nbytes, free)} ({error})") from error

    def map(self, offset: int, nbytes: int, populate: bool = False) -> Bytes:
        """``nbytes`` bytes at ``offset`` as a writable uint8 array, the same memory in every process."""
        return np.asarray(_Mapping(self.fd, offset, nbytes, populate)) if nbytes else np.zeros(0, np.uint8)

    def peek(self, offset: int) -> int:
        """The int64 at ``offset``, read without mapping it."""
        return int.from_bytes(os.pread(self.fd, 8, offset), sys.byteorder, signed=True)

    def close(self) -> None:
        """Close the descriptor. A mapping lives as long as an array looks into it; the kernel frees the rest."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


class _Mapping:
    """Mapped bytes as an array interface. Python's own mmap keeps a descriptor a mapping; this keeps none."""

    def __init__(self, fd: int, offset: int, nbytes: int, populate: bool) -> None:
        self._nbytes = round_up(nbytes)
        flags = mmap.MAP_SHARED | (_POPULATE if populate else 0)
        address = _mmap(None, self._nbytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, offset)
        if address in (None, _MAP_FAILED):
            self._address = None
            problem = os.strerror(ctypes.get_errno())
            raise MemoryError(f"{nbytes:,} bytes of shared memory can't be mapped: {problem}")
        self._address = address
        self.__array_interface__ = {"data": (address, False), "shape": (nbytes,), "typestr": "|u1", "version": 3}

    def __del__(self) -> None:
        if self._address is not None:
            _munmap(self._address, self._nbytes)


_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_MAP_FAILED = ctypes.c_void_p(-1).value


def _attach(duplicate: Any, regions: int) -> Arena:
    return Arena(duplicate.detach(), regions)


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("minidp", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    import _posixshmem  # type: ignore[import-not-found, unused-ignore]

    # Named for the few microseconds between these two calls.
    name = f"/minidp-{secrets.token_hex(8)}"
    fd: int = _posixshmem.shm_open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, mode=0o600)
    _posixshmem.shm_unlink(name)
    return fd


def address_of(view: Bytes) -> int:
    """The address of an array's first byte."""
    return int(view.ctypes.data)


def available_bytes() -> int:
    """Memory that can be had without swapping, in bytes: the machine's, or the container's if that is less."""
    limits = [_meminfo(), *_cgroup_room()]
    known = [limit for limit in limits if limit is not None]
    return min(known) if known else sys.maxsize


def not_enough(nbytes: int, free: int) -> str:
    """The message for memory that is not to be had, in bytes, with what to do about it."""
    return (
        f"{nbytes:,} bytes of shared memory are needed and {free:,} are available: use fewer ranks, a smaller "
        "model or a smaller optimizer state, or free memory"
    )


def _meminfo() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _cgroup_room() -> list[int]:
    """Room under each memory limit between this process's cgroup (version 2) and the root."""
    room: list[int] = []
    try:
        path = Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        folder = Path("/sys/fs/cgroup") / path
        for place in (folder, *folder.parents):
            if not place.is_relative_to("/sys/fs/cgroup"):
                break
            limit = place / "memory.max"
            if limit.exists() and (text := limit.read_text().strip()) != "max":
                room.append(int(text) - int((place / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return room
