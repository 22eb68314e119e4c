"""What can be known of a machine, as plain values: found by the probes, invented by tests, written as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Host:
    """The processor and its memory, as far as this process may use them. Sizes in bytes."""

    cpu: str
    cores: int
    """That this process may run on."""
    cores_of_machine: int
    quota: float | None
    """Cores' worth of time that a container may take; None: no limit."""
    memory: int | None
    available: int
    """To a run: what shared memory may grow to."""
    limit: int | None
    """Of a container; None: no limit."""
    shared: str
    """The kind of memory that ranks share: ``memfd``, or ``POSIX shared memory``."""
    shared_problem: str | None = None
    """Why ranks can't share memory; None: they can, it was tried."""


@dataclass(frozen=True)
class Software:
    """Versions; None: not installed."""

    minidp: str
    python: str
    numpy: str
    blas: str
    """Name and version of NumPy's linear algebra."""
    blas_threads: int | None
    system: str
    matplotlib: str | None = None
    torch: str | None = None
    mpi4py: str | None = None
    mpi: str | None = None
    """What ``mpiexec`` says it is."""
    mpiexec: str | None = None
    """Where it is."""


@dataclass(frozen=True)
class Gpu:
    """One GPU, as the driver tells."""

    index: int
    name: str
    memory: int
    capability: str
    """Compute capability, such as ``9.0``."""


@dataclass(frozen=True)
class Meeting:
    """Two ranks that have met on GPUs."""

    transport: str
    """How their arrays went to each other: ``comm.transport.name``."""
    shares_memory: bool
    """Whether each sees the other's GPU memory (CUDA IPC, ordered by events)."""
    note: str = ""
    """Why it was no faster way."""
    problem: str | None = None
    """What went wrong; None: their sums were right."""


@dataclass(frozen=True)
class Cuda:
    """GPUs, from the driver up. What was not reached is None or empty."""

    problem: str | None
    """The first thing that is missing or broken, in a sentence; None: ``device="cuda"`` works, it was tried."""
    cure: str | None = None
    """The command that would help, if there is one."""
    driver: str | None = None
    """Its version, such as ``580.65.06``."""
    driver_cuda: str | None = None
    """The newest CUDA that the driver knows."""
    gpus: tuple[Gpu, ...] = ()
    peers: tuple[tuple[bool, ...], ...] = ()
    """``peers[i][j]``: whether GPU i can reach the memory of GPU j."""
    packages: tuple[str, ...] = ()
    """Installed distributions that are CuPy, with their versions."""
    cupy: str | None = None
    runtime: str | None = None
    """The CUDA that CuPy brings."""
    compiled_s: float | None = None
    """What a tiny kernel took to be compiled and run; None: it was not, or gave nonsense."""
    nccl: str | None = None
    one_gpu: Meeting | None = None
    """Two ranks on GPU 0."""
    two_gpus: Meeting | None = None
    """Two ranks, on GPUs 0 and 1."""

    @property
    def works(self) -> bool:
        """Whether a rank can use it."""
        return self.problem is None

    @property
    def meetings(self) -> tuple[Meeting, ...]:
        """Those that were tried."""
        return tuple(meeting for meeting in (self.one_gpu, self.two_gpus) if meeting is not None)


@dataclass(frozen=True)
class Machine:
    """All of it. ``worlds``: what was tried on the CPU, and why it failed; None: it works."""

    host: Host
    software: Software
    cuda: Cuda
    worlds: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """Whether something works here.

    Attributes:
        name: what it is.
        works: None: there is no such thing yet.
        reason: why so, in words.
        command: what would make it work, what works instead, or what uses it.
    """

    name: str
    works: bool | None
    reason: str
    command: str | None = None
