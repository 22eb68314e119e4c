"""Who can compete: ourselves and the peers, what each needs, and how its processes are launched."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import which
from typing import Literal

from minidp.bench import machine


@dataclass(frozen=True)
class Entrant:
    """A contestant that may be installed here or not.

    Args:
        name: in tables and messages.
        short: in ratios.
        key: in JSON files; also names its socket.
        module: of ``minidp.bench.peers``; after a colon, which way of several it is to go.
        world_size: ranks.
        packages: distributions that it needs.
        install: the command that brings them.
        launch: ``"each"``: every rank is launched by itself; ``"one"``: a process that starts the others;
            ``"mpiexec"``.
    """

    name: str
    short: str
    key: str
    module: str
    world_size: int
    packages: tuple[str, ...] = ()
    install: str = ""
    launch: Literal["each", "one", "mpiexec"] = "each"

    def missing(self) -> str | None:
        """One sentence that says what is not installed and what installs it; None if nothing is missing."""
        absent = [package for package in self.packages if machine.version_of(package) is None]
        if not absent and self.launch == "mpiexec" and mpiexec() is None:
            absent = ["mpiexec"]
        if not absent:
            return None
        verb = "is" if len(absent) == 1 else "are"
        return f"{self.name} is missing: {' and '.join(absent)} {verb} not installed here; {self.install}"

    def commands(self) -> list[list[str]]:
        """What to launch, for ``Team``."""
        start = [sys.executable, "-m", "minidp.bench.peers", self.module, "SOCKET", str(self.world_size)]
        if self.launch == "mpiexec":
            return [[mpiexec() or "mpiexec", "-n", str(self.world_size), *start]]
        if self.launch == "one" or self.world_size == 1:
            return [start]
        return [[*start, str(rank)] for rank in range(self.world_size)]


def mpiexec() -> str | None:
    """The launcher of the ``mpich`` wheel, which lies beside this interpreter; else one on the PATH."""
    beside = Path(sys.executable).with_name("mpiexec")
    return str(beside) if beside.exists() else which("mpiexec")


_TORCH = "python -m pip install torch==2.13.0"
_MPI = "python -m pip install mpi4py mpich"

OURS_1 = Entrant("minidp ×1", "ours", "ours_1", "ours", 1, launch="one")
OURS_2 = Entrant("minidp ×2", "ours", "ours", "ours", 2, launch="one")
ALONE = Entrant("one worker", "one", "alone", "ways:alone", 1, launch="one")
BY_DATA = Entrant("DataParallel", "data", "data", "ways:data", 2, launch="one")
BY_DP = Entrant("mesh dp=2", "dp", "dp", "ways:dp", 2, launch="one")
BY_TP = Entrant("mesh tp=2", "tp", "tp", "ways:tp", 2, launch="one")
BY_PP = Entrant("mesh pp=2", "pp", "pp", "ways:pp", 2, launch="one")
SHARDED_1 = Entrant("sharded, stage 1", "stage 1", "sharded_1", "ways:sharded_1", 2, launch="one")
SHARDED_2 = Entrant("sharded, stage 2", "stage 2", "sharded_2", "ways:sharded_2", 2, launch="one")
PS_SYNC = Entrant("minidp s=0", "ours", "ours_sync", "ps", 1, launch="one")
PS_ASYNC = Entrant("minidp s=None", "ours", "ours", "ps_async", 1, launch="one")
SLAB = Entrant("minidp slab", "slab", "slab", "slab", 2, launch="one")
EAGER = Entrant("PyTorch eager", "eager", "torch", "eager", 1, ("torch",), _TORCH)
CHANNELS_LAST = Entrant("channels_last", "channels_last", "channels_last", "channels_last", 1, ("torch",), _TORCH)
OURS_CUDA = Entrant("minidp on CUDA", "ours", "ours_cuda", "ours_cuda", 1, launch="one")
EAGER_CUDA = Entrant("PyTorch eager on CUDA", "eager", "torch_cuda", "eager_cuda", 1, ("torch",), _TORCH)
DDP = Entrant("PyTorch DDP", "DDP", "ddp", "ddp", 2, ("torch",), _TORCH)
GLOO = Entrant("gloo", "gloo", "gloo", "ddp", 2, ("torch",), _TORCH)
MPICH = Entrant("MPICH", "MPICH", "mpich", "mpich", 2, ("mpi4py", "mpich"), _MPI, "mpiexec")
TORCH_MPICH = Entrant(
    "PyTorch+MPICH",
    "MPICH",
    "torch_mpich",
    "mpich",
    2,
    ("torch", "mpi4py", "mpich"),
    f"{_TORCH} mpi4py mpich",
    "mpiexec",
)
RAY = Entrant("Ray actor", "Ray", "ray", "ray", 1, ("ray",), "python -m pip install ray", "one")
