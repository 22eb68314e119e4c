"""From what a machine has to what works there. Pure: any machine that one can invent gets its verdicts."""

from __future__ import annotations

from minidp.doctor.facts import Cuda, Machine, Meeting, Verdict

DEMO = "python -m minidp.demo"


def verdicts(machine: Machine) -> list[Verdict]:
    """What works, in the order in which a person would try it."""
    return [
        cpu(machine),
        cuda(machine.cuda),
        *meetings(machine.cuda),
        _process(machine),
        _world(machine, "virtual", "virtual world", "any number of ranks in one process, on a virtual clock",
               f"{DEMO} --world virtual --workers 64"),
        _world(machine, "servers", "servers", "workers and parameter servers, each a process",
               f"{DEMO} --strategy async"),
        gpu_tests(machine.cuda),
        mpi(machine),
    ]  # fmt: skip


def cpu_works(machine: Machine) -> bool:
    """Whether training on the processor works, in each world: what this package needs of a machine."""
    return all(problem is None for problem in machine.worlds.values())


def cuda_works(machine: Machine) -> bool:
    """Whether ranks can use the GPUs, alone and together."""
    return machine.cuda.works and all(meeting.problem is None for meeting in machine.cuda.meetings)


def cpu(machine: Machine) -> Verdict:
    software = machine.software
    problem = machine.worlds.get("process") or machine.worlds.get("virtual")
    if machine.worlds.get("process") is not None and machine.worlds.get("virtual") is not None:
        return Verdict('device="cpu"', False, f"two ranks could not take a step: {problem}")
    return Verdict('device="cpu"', True, f"NumPy {software.numpy} with {software.blas}", DEMO)


def cuda(found: Cuda) -> Verdict:
    name = 'device="cuda"'
    if not found.works:
        reason = f"no GPU can be used: {found.problem}"
        if found.cure is not None:
            return Verdict(name, False, reason, found.cure)
        return Verdict(name, False, f"{reason}; the same runs on the processor:", DEMO)
    count = len(found.gpus)
    which = "a GPU" if count == 1 else f"{count} GPUs"
    return Verdict(
        name, True, f"{which} with CuPy {found.cupy}: a kernel was compiled and run", f"{DEMO} --device cuda"
    )


def meetings(found: Cuda) -> list[Verdict]:
    """How ranks on GPUs talk, where that was tried."""
    tries = [
        ("ranks on one GPU", found.one_gpu, "--device cuda:0"),
        ("a GPU a rank", found.two_gpus, "--device cuda"),
    ]
    return [_meeting(name, each, option) for name, each, option in tries if each is not None]


def _meeting(name: str, meeting: Meeting, option: str) -> Verdict:
    if meeting.problem is not None:
        return Verdict(name, False, meeting.problem)
    way = f"arrays go through {meeting.transport}"
    return Verdict(name, True, f"{way} ({meeting.note})" if meeting.note else way, f"{DEMO} {option} --workers 2")


def _process(machine: Machine) -> Verdict:
    cores = machine.host.cores
    room = f"each rank a process; {cores} core{'s' * (cores != 1)}, so up to {cores} gain"
    if cores == 1:
        room = "each rank a process; with one core they take turns"
    return _world(machine, "process", "process world", room, f"{DEMO} --workers {max(2, cores)}")


def _world(machine: Machine, key: str, name: str, reason: str, command: str) -> Verdict:
    problem = machine.worlds.get(key)
    if problem is not None:
        return Verdict(name, False, problem)
    return Verdict(name, True, reason, command)


def gpu_tests(found: Cuda) -> Verdict:
    if found.works:
        return Verdict("tests on a GPU", True, "they are among all tests, or alone", "python -m pytest -m gpu")
    return Verdict("tests on a GPU", False, "pytest skips them, and says why; all others run", "python -m pytest")


def mpi(machine: Machine) -> Verdict:
    software = machine.software
    has = [f"mpi4py {software.mpi4py}"] * (software.mpi4py is not None) + [software.mpi or ""] * bool(software.mpi)
    here = f" ({' and '.join(has)}, which this machine has, would be its base)" if has else ""
    return Verdict(
        "MPI world", None, f"not there yet: all ranks run on one machine{here}", f"{DEMO} --world process"
    )
