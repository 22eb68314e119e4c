"""Kernels: CUDA C++ beside the code that launches it.

A room with kernels has them in a ``.cu`` file, as templates over the type of its numbers, and says so::

    KERNELS = Kernels(Path(__file__).with_name("rules.cu"), "sgd", "adam")

    kernels = KERNELS.on(xp, w.dtype)          # None for NumPy: there the plain code is the fast one
    if kernels is not None:
        kernels.each("sgd", w.size, w, g, w_out, lr)

They are compiled when first used (a second or two, then kept on disk by CuPy), without contraction of a·b + c:
each operation is rounded as NumPy rounds it, so that the same formulas give the same bits on both. A kernel that
does nothing but arithmetic and square roots is promised to be equal to the plain code beside it, to the bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from minidp.backend.arrays import Array

THREADS = 256  # of a block, for work of which each element stands for itself
MOST_BLOCKS = 132 * 16  # as many as fill a large GPU; the threads of each stride over the rest
OPTIONS = ("--std=c++17", "--fmad=false")
TYPES = {"float32": "float", "float64": "double"}


class Kernels:
    """The kernels of one file.

    Args:
        path: of the file; `prelude.cuh` goes before what it holds.
        names: of its kernels, each a template of one type. An argument of theirs is a pointer to that type or to
            another, a ``long long``, or a ``double``, which they round to that type themselves.
    """

    def __init__(self, path: Path, *names: str) -> None:
        self.path, self.names = path, names
        self._compiled: dict[tuple[int, str], Launcher] = {}

    def on(self, xp: Any, dtype: np.dtype[Any]) -> Launcher | None:
        """These kernels for arrays of that module and type; None if they don't run there: use the plain code."""
        if xp is np or not hasattr(xp, "RawModule"):
            return None
        launcher = self._compiled.get((id(xp), dtype.name))
        if launcher is None:
            if dtype.name not in TYPES:
                return None
            launcher = self._compiled[id(xp), dtype.name] = Launcher(self, xp, TYPES[dtype.name])
        return launcher

    @property
    def source(self) -> str:
        prelude = Path(__file__).with_name("prelude.cuh").read_text()
        return f"{prelude}\n{self.path.read_text()}"


class Launcher:
    """The kernels of one file for one type. Arrays must be contiguous: a kernel gets the address of the first."""

    def __init__(self, kernels: Kernels, xp: Any, ctype: str) -> None:
        expressions = {name: f"{name}<{ctype}>" for name in kernels.names}
        module = xp.RawModule(
            code=kernels.source, options=OPTIONS, name_expressions=tuple(expressions.values()), backend="nvrtc"
        )
        self._functions = {name: module.get_function(text) for name, text in expressions.items()}

    def each(self, name: str, n: int, *args: Array | int | float) -> None:
        """Run a kernel whose threads take the elements 0 … n − 1 among themselves: ``name(n, *args)``."""
        if n:
            blocks = min(-(-n // THREADS), MOST_BLOCKS)
            self._functions[name]((blocks,), (THREADS,), (n, *args))

    def blocks(self, name: str, blocks: int | tuple[int, ...], threads: int, *args: Array | int | float) -> None:
        """Run a kernel on so many blocks of so many threads: ``name(*args)``; none for 0 blocks."""
        grid = blocks if isinstance(blocks, tuple) else (blocks,)
        if min(grid):
            self._functions[name](grid, (threads,), args)
