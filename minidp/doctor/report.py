"""The page: what the machine has, then what works. Fits 80 columns; commands are never broken."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from minidp.doctor.facts import Cuda, Gpu, Host, Machine, Software, Verdict

MARKS = {True: ("yes", "bold green"), False: ("no", "bold yellow"), None: ("–", "dim")}
WIDEST = 110  # longer lines are hard to read


def show(console: Console, machine: Machine, found: Sequence[Verdict]) -> None:
    width = min(console.width, WIDEST)
    console.print(
        Text.assemble((f"minidp {machine.software.minidp}", "bold"), ": this machine, and what works on it\n")
    )
    label = 2 + max(len(name) for name, _ in facts(machine))
    for name, text in facts(machine):
        _row(console, Text.assemble((f"  {name:{label}}", "dim")), text, width)
    console.print(Text("\nWhat works here\n", style="bold"))
    wide = 2 + max(len(verdict.name) for verdict in found)
    for verdict in found:
        mark, style = MARKS[verdict.works]
        head = Text.assemble("  ", (f"{mark:3}", style), "  ", (f"{verdict.name:{wide}}", "bold"))
        _row(console, head, verdict.reason, width)
        if verdict.command is not None:
            console.print(Text(" " * len(head) + verdict.command, style="cyan"), soft_wrap=True)


def _row(console: Console, head: Text, text: str, width: int) -> None:
    """The text beside the head, below itself where it is long."""
    lines = textwrap.wrap(text, max(30, width - len(head)), break_on_hyphens=False) or [""]
    console.print(head + Text(lines[0]), soft_wrap=True)
    for line in lines[1:]:
        console.print(Text(" " * len(head) + line), soft_wrap=True)


def facts(machine: Machine) -> list[tuple[str, str]]:
    """(name, what there is), line by line."""
    return [*_host(machine.host), *_software(machine.software), *_cuda(machine.cuda), *_extras(machine.software)]


def _host(host: Host) -> Iterator[tuple[str, str]]:
    cores = _number(host.cores, "core")
    if host.cores < host.cores_of_machine:
        cores += f" of {host.cores_of_machine}"
    if host.quota is not None and host.quota < host.cores:
        cores += f", of which the container may use {host.quota:g} cores' time"
    yield "processor", f"{host.cpu}, {cores}"
    memory = [f"{size(host.memory)}"] if host.memory is not None else []
    memory.append(f"{size(host.available)} free")
    if host.limit is not None and host.limit < (host.memory or host.limit + 1):
        memory.append(f"the container may use {size(host.limit)}")
    yield "memory", ", ".join(memory)
    kind = f"ranks share memory without a name ({host.shared}), as much as is free"
    yield "shared", kind if host.shared_problem is None else f"{host.shared} does not work: {host.shared_problem}"


def _software(software: Software) -> Iterator[tuple[str, str]]:
    yield "system", f"{software.system}, Python {software.python}"
    threads = "" if software.blas_threads is None else f", {_number(software.blas_threads, 'thread')}"
    yield "NumPy", f"{software.numpy} with {software.blas}{threads}"


def _cuda(cuda: Cuda) -> Iterator[tuple[str, str]]:
    if not cuda.gpus:
        yield "GPU", "none"
    for _, alike in groupby(cuda.gpus, key=lambda gpu: (gpu.name, gpu.memory, gpu.capability)):
        yield _gpus(list(alike))
    if cuda.driver_cuda is not None:
        yield "driver", f"{cuda.driver or 'of unknown version'}, for CUDA up to {cuda.driver_cuda}"
    yield "CuPy", _cupy(cuda)
    if cuda.cupy is not None and cuda.works:
        yield "NCCL", cuda.nccl or "not installed"
    if len(cuda.gpus) > 1:
        yield "peers", _peers(cuda)


def _gpus(gpus: list[Gpu]) -> tuple[str, str]:
    first, count = gpus[0], len(gpus)
    what = f"{first.name}, {size(first.memory)}, compute capability {first.capability}"
    if count == 1:
        return f"GPU {first.index}", what
    return f"GPU {first.index}–{gpus[-1].index}", f"{count} × {what}"


def _cupy(cuda: Cuda) -> str:
    if not cuda.packages:
        return "not installed"
    text = f"{' and '.join(cuda.packages)}"
    if cuda.runtime is not None:
        text += f", CUDA {cuda.runtime}"
    if cuda.compiled_s is not None:
        text += f"; compiled and ran a kernel in {cuda.compiled_s:.2g} s"
    return text


def _peers(cuda: Cuda) -> str:
    """Which GPUs reach the memory of which."""
    count = len(cuda.peers)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    reached = [(i, j) for i, j in pairs if cuda.peers[i][j]]
    if len(reached) == len(pairs):
        return "each GPU can reach the memory of each other"
    if not reached:
        return "no GPU can reach another's memory"
    return "can reach: " + ", ".join(f"{i} → {j}" for i, j in reached)


def _extras(software: Software) -> Iterator[tuple[str, str]]:
    mpi = [f"mpi4py {software.mpi4py}"] if software.mpi4py else ["no mpi4py"]
    mpi.append(f"{software.mpi or 'mpiexec'} ({software.mpiexec})" if software.mpiexec else "no mpiexec")
    yield "MPI", ", ".join(mpi) if software.mpi4py or software.mpiexec else "neither mpi4py nor mpiexec"
    others = {"matplotlib": software.matplotlib, "PyTorch": software.torch}
    yield "also", ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in others.items())


def size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3g} GiB" if nbytes < 999.5 * 2**30 else f"{nbytes / 2**40:.3g} TiB"


def _number(count: int, thing: str) -> str:
    return f"{count} {thing}{'s' * (count != 1)}"
