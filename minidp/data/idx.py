"""The idx format of MNIST and its kin: one array of unsigned bytes, of any shape, plain or compressed by gzip.

Big-endian: two zero bytes, the element type (0x08, unsigned byte), the number of dimensions; then each
dimension in four bytes; then the elements, the last axis fastest. The first four bytes are called the magic:
0x00000803 for images (n, height, width), 0x00000801 for labels (n,).
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from math import prod
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

CHUNK_BYTES = 1 << 20  # 47 MB of images take 0.2 s in pieces of 64 KiB to 4 MiB alike
MOST_DIMENSIONS = 64  # of a NumPy array


def read_idx(path: str | os.PathLike[str], ndim: int | None = None) -> npt.NDArray[np.uint8]:
    """The array that an idx file holds: uint8, C-contiguous, of the shape that its header names.

    Args:
        path: the file. A name that ends in ``.gz`` is read as gzip, every other one as it is.
        ndim: how many dimensions there must be; any number if None.

    No more memory is taken than the file has data for, whatever its header promises.

    Raises:
        FileNotFoundError: no such file (and other errors of the operating system as they are).
        ValueError: not gzip, damaged or cut off; another magic; an empty array; less or more data than the
            header promises. The message names the file, what was expected and what was found.
    """
    path = os.fspath(path)
    compressed = path.endswith(".gz")
    with cast(BinaryIO, gzip.open(path, "rb")) if compressed else open(path, "rb") as stream:
        try:
            return _read(stream, path, ndim)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no intact gzip file, {error}: get it anew") from error


def _read(stream: BinaryIO, path: str, ndim: int | None) -> npt.NDArray[np.uint8]:
    magic = stream.read(4)
    dimensions = magic[3] if len(magic) == 4 else 0
    if magic[:3] != b"\x00\x00\x08" or not 1 <= dimensions <= MOST_DIMENSIONS or ndim not in (None, dimensions):
        expected = "0x000008nn (unsigned bytes in nn dimensions)" if ndim is None else f"0x000008{ndim:02x}"
        found = f"0x{magic.hex()}" if magic else "nothing"
        hint = "compressed files need a name in .gz" if magic[:2] == b"\x1f\x8b" else "is it the right file?"
        raise ValueError(f"{path} should begin with the idx magic {expected}, found {found}: {hint}")
    header = stream.read(4 * dimensions)
    if len(header) < 4 * dimensions:
        raise ValueError(f"{path} ends within its header, after {4 + len(header)} bytes: get it anew")
    shape = struct.unpack(f">{dimensions}I", header)
    if 0 in shape:
        raise ValueError(f"{path} is empty: its header names the shape {shape}")
    promised = prod(shape)
    data = _read_up_to(stream, promised + 1)  # one more, to see what trails and to let gzip check its sum
    if len(data) != promised:
        follow = f"only {len(data)} follow" if len(data) < promised else "more follow"
        raise ValueError(f"{path} promises {promised} bytes, the shape {shape}, but {follow}: get it anew")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _read_up_to(stream: BinaryIO, limit: int) -> bytearray:
    """At most `limit` bytes. In pieces: ``stream.read(limit)`` would allocate what an untrusted header says."""
    data = bytearray()
    while piece := stream.read(min(CHUNK_BYTES, limit - len(data))):
        data += piece
    return data
