"""``python -m minidp.doctor``: on this machine, and on machines that one can only invent."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import minidp
from minidp.backend import Device
from minidp.doctor import cuda_probe, host, pair_probe, probe, report
from minidp.doctor.__main__ import as_json, main
from minidp.doctor.facts import Cuda, Gpu, Host, Machine, Meeting, Software, Verdict
from minidp.doctor.lines import understand
from minidp.doctor.verdicts import cpu_works, cuda_works, verdicts
from tests.device_double import DoubleDevice

GIB = 2**30
NO_DRIVER = "this machine has no NVIDIA driver (libcuda.so.1 is not there)"
FINE: dict[str, str | None] = {"process": None, "virtual": None, "servers": None}
H200 = Gpu(0, "NVIDIA H200", 140 * GIB, "9.0")
SHARED = Meeting("memory of the device that all ranks see", True)


def machine(cuda: Cuda, **changes: Any) -> Machine:
    of_host = Host("Xeon", 16, 32, None, 128 * GIB, 100 * GIB, None, "memfd")
    software = Software("0.1.0", "3.11.7", "2.4.6", "OpenBLAS 0.3.31", 16, "Linux 6.1")
    return replace(Machine(of_host, software, cuda, FINE), **changes)


def with_gpus(*gpus: Gpu, **changes: Any) -> Cuda:
    """What is found where everything works."""
    fine = Cuda(
        None, driver="570.86", driver_cuda="12.8", gpus=gpus, peers=((True,) * len(gpus),) * len(gpus),
        packages=("cupy-cuda12x 14.2.0",), cupy="14.2.0", runtime="12.9", compiled_s=0.31, nccl="2.32.3",
        one_gpu=SHARED,
    )  # fmt: skip
    return replace(fine, **changes)


def page(found: Machine, width: int = 80) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    report.show(console, found, verdicts(found))
    console.file.close()
    return console.export_text()


def verdict(found: Machine, name: str) -> Verdict:
    (one,) = [each for each in verdicts(found) if each.name == name]
    return one


FOUR = tuple(replace(H200, index=index) for index in range(4))
MACHINES: dict[str, tuple[Machine, bool, list[str]]] = {
    # name: (machine, whether CUDA works, what the page says)
    "no GPU": (
        machine(Cuda(NO_DRIVER)),
        False,
        [
            "GPU none",
            "CuPy not installed",
            f"no GPU can be used: {NO_DRIVER}",
            "the processor: python -m minidp.demo",
        ],
    ),
    "one H200": (
        machine(with_gpus(H200)),
        True,
        [
            "GPU 0 NVIDIA H200, 140 GiB, compute capability 9.0",
            "driver 570.86, for CUDA up to 12.8",
            "CuPy cupy-cuda12x 14.2.0, CUDA 12.9; compiled and ran a kernel in 0.31 s",
            "NCCL 2.32.3",
            "yes ranks on one GPU arrays go through memory of the device that all ranks see",
            "python -m minidp.demo --device cuda",
            "python -m pytest -m gpu",
        ],
    ),
    "four GPUs with NCCL, no peer access": (
        machine(
            with_gpus(
                *FOUR,
                peers=tuple(tuple(i == j for j in range(4)) for i in range(4)),
                two_gpus=Meeting("NCCL", False),
            )
        ),
        True,
        [
            "GPU 0–3 4 × NVIDIA H200",
            "no GPU can reach another's memory",
            "yes a GPU a rank arrays go through NCCL",
        ],
    ),
    "no CUDA IPC": (
        machine(with_gpus(H200, one_gpu=Meeting("host memory", False, "the driver gives no handles"))),
        True,
        ["arrays go through host memory (the driver gives no handles)"],
    ),
    "two ranks get wrong sums": (
        machine(with_gpus(H200, one_gpu=Meeting("NCCL", False, "", "the sum of two ranks is wrong over NCCL"))),
        False,
        ["no ranks on one GPU the sum of two ranks is wrong over NCCL"],
    ),
    "driver too old": (
        machine(
            Cuda(
                "the driver is too old: it knows CUDA up to 12.8, and CuPy here is for 13.0",
                cure="pip uninstall -y cupy-cuda13x && pip install 'minidp[gpu12]'",
                driver_cuda="12.8",
                gpus=(H200,),
                packages=("cupy-cuda13x 14.2.0",),
            )
        ),
        False,
        ["GPU 0 NVIDIA H200", "it knows CUDA up to 12.8", "cupy-cuda13x && pip install 'minidp[gpu12]'"],
    ),
    "CuPy missing": (
        machine(Cuda("CuPy is not installed", "pip install 'minidp[gpu13]'", driver_cuda="13.0", gpus=(H200,))),
        False,
        ["driver of unknown version, for CUDA up to 13.0", "CuPy not installed", "pip install 'minidp[gpu13]'"],
    ),
    "CuPy without a driver": (
        machine(Cuda(NO_DRIVER, packages=("cupy-cuda12x 14.2.0",))),
        False,
        ["GPU none", "CuPy cupy-cuda12x 14.2.0", NO_DRIVER],
    ),
    "a probe that hung": (
        machine(probe.conclude({}, "hangs: after 90 s it still starts the driver")),
        False,
        ["the process that looked at the GPU hangs: after 90 s it still starts the driver"],
    ),
    "a probe that crashed": (
        machine(probe.conclude({"gpus": [vars(H200)]}, "was killed by SIGSEGV while it imports CuPy")),
        False,
        ["GPU 0 NVIDIA H200", "was killed by SIGSEGV while it imports CuPy"],
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_the_page_of_a_machine(name: str) -> None:
    found, cuda, says = MACHINES[name]
    for width in (80, 120):
        text = page(found, width)
        for words in says:
            assert words in " ".join(text.split())
        commands = [each.command for each in verdicts(found) if each.command is not None]
        assert all(f" {command}\n" in text for command in commands), "on a line, to be copied"
        longest = max(len(line) for line in text.splitlines() if not any(command in line for command in commands))
        assert longest <= width
    assert cpu_works(found), "a machine without a GPU is healthy"
    assert cuda_works(found) is cuda
    assert verdict(found, 'device="cuda"').works is found.cuda.works
    assert verdict(found, "MPI world").works is None
    back = json.loads(as_json(found))
    assert back["works"] == {"cpu": True, "cuda": cuda}
    assert len(back["verdicts"]) == len(verdicts(found))


def test_small_and_broken_processors() -> None:
    broken = {"process": "rank 0 of 2 was killed by SIGKILL", "virtual": None, "servers": "no room"}
    small = Host("Pi", 1, 4, 0.5, 8 * GIB, GIB, 2 * GIB, "POSIX shared memory", "No space left on device")
    found = machine(Cuda(NO_DRIVER), host=small, worlds=broken)
    assert not cpu_works(found)
    assert [each.works for each in verdicts(found)] == [True, False, False, True, False, False, None]
    text = " ".join(page(found).split())
    assert "Pi, 1 core of 4, of which the container may use 0.5 cores' time" in text
    assert "8 GiB, 1 GiB free, the container may use 2 GiB" in text
    assert "POSIX shared memory does not work: No space left on device" in text
    assert "no process world rank 0 of 2 was killed by SIGKILL" in text
    nothing = replace(found, worlds=dict.fromkeys(FINE, "SIGILL"))
    assert verdict(nothing, 'device="cpu"') == Verdict(
        'device="cpu"', False, "two ranks could not take a step: SIGILL"
    )


# -- probes ------------------------------------------------------------------------------------------------------


def child(program: str) -> list[str]:
    return [sys.executable, "-S", "-c", program]


SAYS = "import json, os, sys, time\ndef say(**x): print(json.dumps(x), flush=True)\n"


def test_a_probe_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    program = SAYS + (
        "import subprocess\nsay(now='starts the driver')\nsay(found={'driver_cuda': '12.8'})\n"
        f"child = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(60)"
    )
    start = time.monotonic()
    found = probe.look_at_cuda(single=child(program), limit_s=1.0)
    assert time.monotonic() - start < 8
    assert found.problem == "the process that looked at the GPU hangs: after 1 s it still starts the driver"
    assert found.driver_cuda == "12.8", "what it has said is known"
    for _ in range(100):
        state = Path("/proc", pid.read_text(), "stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError("its child lives")


def test_a_probe_that_crashes() -> None:
    program = (
        SAYS + "say(now='imports CuPy')\nsys.stderr.write('Segmentation fault')\nsys.stderr.flush()\nos.abort()"
    )
    found = probe.look_at_cuda(single=child(program))
    assert found.problem == (
        "the process that looked at the GPU was killed by SIGABRT while it imports CuPy: Segmentation fault"
    )
    found = probe.look_at_cuda(single=child("raise SystemExit(3)"))
    assert found.problem == "the process that looked at the GPU exited with code 3 while it starts"


def test_two_ranks_that_crash_or_hang() -> None:
    single = child(SAYS + f"say(found={{'gpus': [{vars(H200)}, {vars(H200)}], 'cupy': '14.2.0'}})")
    met = {"transport": "NCCL", "shares_memory": False, "note": "", "problem": None}
    program = SAYS + f"say(found={{'one_gpu': {met}}})\nsay(now='lets two ranks meet on GPUs 0 and 1')\nos.abort()"
    found = probe.look_at_cuda(single=single, pair=child(program))
    assert found.works
    assert found.one_gpu == Meeting("NCCL", False)
    assert found.two_gpus is not None
    assert found.two_gpus.problem == ("the try was killed by SIGABRT while it lets two ranks meet on GPUs 0 and 1")
    assert not cuda_works(machine(found))
    assert probe.look_at_cuda(pairs=False, single=single, pair=child("wrong")).one_gpu is None


def test_what_is_no_message_is_passed_over() -> None:
    said = 'NCCL version 2\n[1]\n{"now": "a"}\n{"found": {"x": 1}}\n{"now": "b"}\n{"found": {"x": 2, "y"'
    assert understand(said) == ({"x": 1}, "b")


@pytest.mark.parametrize(
    ("device", "transport", "shares", "note"),
    [
        (DoubleDevice(), SHARED.transport, True, ""),
        (DoubleDevice(shareable=False), "host memory", False, "it is not the same on all ranks"),
    ],
    ids=("shares memory", "shares none"),
)
def test_two_ranks_meet(device: Device, transport: str, shares: bool, note: str) -> None:
    """On a stand-in for a GPU, through ``spawn``."""
    found = Meeting(**pair_probe.meeting(device))
    assert (found.transport, found.shares_memory, found.problem) == (transport, shares, None)
    assert note in found.note
    assert bool(note) is bool(found.note)


def test_two_ranks_that_can_not_meet() -> None:
    class Broken(DoubleDevice):
        def start(self, local_rank: int = 0) -> None:
            raise OSError("burnt out")

    found = Meeting(**pair_probe.meeting(Broken()))
    assert found.problem is not None
    assert "burnt out" in found.problem


# -- the driver and CuPy, of stand-ins ---------------------------------------------------------------------------

LIBCUDA = """
#include <stdlib.h>
#include <string.h>
int cuInit(unsigned flags) { return atoi(getenv("FAKE_STATUS")); }
int cuDriverGetVersion(int* v) { *v = atoi(getenv("FAKE_CUDA")); return 0; }
int cuDeviceGetCount(int* n) { *n = 2; return 0; }
int cuDeviceGetName(char* name, int length, int device) { strncpy(name, "Fake GPU", length); return 0; }
int cuDeviceTotalMem_v2(size_t* size, int device) { *size = 1ul << 34; return 0; }
int cuDeviceGetAttribute(int* v, int attribute, int device) { *v = attribute == 75 ? 8 : 6; return 0; }
int cuDeviceCanAccessPeer(int* v, int a, int b) { *v = a < b; return 0; }
int cuGetErrorString(int error, const char** text) { *text = "unknown error"; return 0; }
"""


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a ``libcuda.so.1`` that says what the environment tells it to."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "cuda.c").write_text(LIBCUDA)
    command = ["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "cuda.c")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a C compiler, to make a driver that is none")
    return folder


@pytest.mark.parametrize(
    ("status", "version", "problem", "cure"),
    [
        ("0", "12080", "CuPy is not installed", "pip install 'minidp[gpu12]'"),
        ("0", "13000", "CuPy is not installed", "pip install 'minidp[gpu13]'"),
        ("0", "11040", "the driver is too old: it knows CUDA up to 11.4, and CuPy needs 12.0 or newer", None),
        ("100", "12080", "there is an NVIDIA driver, but no GPU that this process may use", None),
        ("999", "12080", "the NVIDIA driver does not start: unknown error (error 999)", None),
    ],
)
def test_a_driver(
    status: str, version: str, problem: str, cure: str | None, driver: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", str(driver))
    monkeypatch.setenv("FAKE_STATUS", status)
    monkeypatch.setenv("FAKE_CUDA", version)
    program = (
        "from minidp.doctor import cuda_probe\ncuda_probe._packages = list\ncuda_probe.main()"  # without CuPy
    )
    found = probe.look_at_cuda(single=[sys.executable, "-c", program])
    assert (found.problem, found.cure) == (problem, cure)
    assert found.driver_cuda == f"{version[:2]}.{version[3]}"
    if status == "0":
        assert found.gpus == (Gpu(0, "Fake GPU", 2**34, "8.6"), Gpu(1, "Fake GPU", 2**34, "8.6"))
        assert found.peers == ((True, True), (False, True))


def test_what_errors_say_fits_a_line() -> None:
    error = ImportError("\n====\nFailed to import CuPy.\n\nTry this:\n  pip\n====\n")
    assert cuda_probe._short(error) == "Failed to import CuPy. Try this: pip"
    assert cuda_probe._short(RuntimeError()) == "RuntimeError"


# -- this machine ------------------------------------------------------------------------------------------------


def write(root: Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name.replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_a_container_allows(tmp_path: Path) -> None:
    two, one, none = tmp_path / "v2", tmp_path / "v1", tmp_path / "none"
    write(two / "proc/self", cgroup="0::/a/b\n")
    write(two / "sys/fs/cgroup/a", cpu_DOT_max="150000 100000\n", memory_DOT_max="max\n")
    write(two / "sys/fs/cgroup/a/b", cpu_DOT_max="max 100000\n", memory_DOT_max="1048576\n")
    write(one / "proc/self", cgroup="4:cpu,cpuacct:/x\n5:memory:/x\n1:name=systemd:/x\n")
    write(one / "sys/fs/cgroup/cpu", cpu_DOT_cfs_quota_us="50000\n", cpu_DOT_cfs_period_us="100000\n")
    write(one / "sys/fs/cgroup/cpu/x", cpu_DOT_cfs_quota_us="-1\n", cpu_DOT_cfs_period_us="100000\n")
    write(one / "sys/fs/cgroup/memory/x", memory_DOT_limit_in_bytes="9223372036854771712\n")
    write(one / "sys/fs/cgroup/memory", memory_DOT_limit_in_bytes="2097152\n")
    assert (host.quota(two), host.memory_limit(two)) == (1.5, 2**20)
    assert (host.quota(one), host.memory_limit(one)) == (0.5, 2**21)
    assert (host.quota(none), host.memory_limit(none)) == (None, None)


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("HYDRA build details:\n    Version:   5.0.2\n", "MPICH 5.0.2"),
        ("mpiexec (OpenRTE) 4.1.4\n\nReport bugs", "Open MPI 4.1.4"),
        ("Intel(R) MPI Library for Linux* OS\nCopyright", "Intel(R) MPI Library for Linux* OS"),
        ("", None),
    ],
)
def test_which_mpi(said: str, name: str | None) -> None:
    assert host.name_of_mpi(said) == name


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the GPUs, which are of a stand-in, is really tried."""
    monkeypatch.setattr(probe, "look_at_cuda", lambda: Cuda(NO_DRIVER))
    file = tmp_path / "facts.json"
    assert main(["--json", str(file)]) == 0
    out, _ = capsys.readouterr()
    assert f"minidp {minidp.__version__}: this machine, and what works on it" in out
    assert f"Facts: {file}" in out
    facts = json.loads(file.read_text())
    assert facts["works"] == {"cpu": True, "cuda": False}
    assert facts["worlds"] == FINE
    assert facts["host"]["cores"] >= 1
    assert 0 < facts["host"]["available"] <= facts["host"]["memory"]
    assert facts["software"]["minidp"] == minidp.__version__


def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from minidp.doctor import __main__ as command

    found = machine(Cuda(NO_DRIVER))
    monkeypatch.setattr(command, "examine", lambda console: found)
    assert main([]) == main(["--device", "cpu"]) == 0
    assert main(["--device", "cuda"]) == 1
    capsys.readouterr()
    assert main(["--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["cuda"]["problem"] == NO_DRIVER, "and nothing else there"
    found = machine(with_gpus(H200))
    assert main(["--device", "cuda"]) == 0
    found = machine(with_gpus(H200), worlds=FINE | {"process": "no room"})
    assert main([]) == 1
    with pytest.raises(SystemExit) as caught:
        main(["--json", "/no such folder/x"])
    assert caught.value.code == 2


def test_cuda_is_looked_at_elsewhere() -> None:
    """A real look, whatever this machine has: in another process, and this one loads nothing of CUDA."""
    program = (
        "import sys; from minidp.doctor import probe; found = probe.look_at_cuda(pairs=False)\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libcuda' not in maps and 'cupy' not in sys.modules\nprint(found.works or found.problem)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
