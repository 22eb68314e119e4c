"""One tree of random generators, keyed by what they are for."""

from __future__ import annotations

import zlib

import numpy as np


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """Return the random generator at `key` in the tree that grows from `seed`.

    ``generator(0, "init", "0.weight")`` is the same stream in every process, whatever was drawn before:
    no global generator is read or written. Strings enter by their CRC-32 (Python's own ``hash`` differs
    between processes). Different keys, also one that continues another, give independent streams.
    """
    return np.random.default_rng(seed_sequence(seed, *key))


def seed_sequence(seed: int, *key: int | str) -> np.random.SeedSequence:
    """What the generator at `key` grows from: for other kinds of generators than NumPy's default."""
    path = tuple(zlib.crc32(part.encode()) if isinstance(part, str) else int(part) for part in key)
    return np.random.SeedSequence(int(seed), spawn_key=path)
