"""``python -m minidp.doctor.cuda_probe``: look at the GPUs, from the driver up, and say each thing as it is found.

Run by ``probe.py``, in a process of its own. Whatever is touched here may hang, or end the process. So each line
of output, JSON, is either what will be done now, ``{"now": …}``, or what has been found, ``{"found": {…}}``, with
the names of ``facts.Cuda``; the last ``now`` tells where it ended. The first ``problem`` ends the search.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from minidp.backend import DeviceUnavailable, get_device
from minidp.doctor.lines import found, now

KERNEL = """extern "C" __global__ void three_more(float* x) { x[threadIdx.x] += 3.0f; }"""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # cuda.h: CUdevice_attribute
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_OLDEST = 12  # CUDA that CuPy 14 is made for


class Problem(Exception):
    """The search ends here. A sentence, and the command that would help."""

    def __init__(self, sentence: str, cure: str | None = None) -> None:
        super().__init__(sentence)
        self.cure = cure


def main() -> int:
    try:
        newest = _driver()
        xp = _cupy(newest)
        _memory(xp)
        _compiler(xp)
        _device()
        _nccl()
    except Problem as problem:
        found(problem=str(problem), cure=problem.cure)
    return 0


def _driver() -> int:
    """The GPUs, by the driver alone, whether there is CuPy or not; the newest CUDA that it knows, as 12080."""
    now("loads the driver")
    found(packages=_packages())
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        if "No such file" not in str(error):
            raise Problem(f"the NVIDIA driver can't be loaded: {error}") from None
        raise Problem("this machine has no NVIDIA driver (libcuda.so.1 is not there)") from None
    now("starts the driver")
    found(driver=_driver_version())
    status = cuda.cuInit(0)
    version = _number(cuda.cuDriverGetVersion)
    found(driver_cuda=_dotted(version))
    if status == _NO_DEVICE:
        raise Problem("there is an NVIDIA driver, but no GPU that this process may use")
    if status:
        raise Problem(f"the NVIDIA driver does not start: {_error(cuda, status)}")
    count = _number(cuda.cuDeviceGetCount)
    found(gpus=[_gpu(cuda, index) for index in range(count)])
    if count == 0:
        raise Problem("there is an NVIDIA driver, but no GPU that this process may use")
    reaches = [
        [i == j or bool(_number(cuda.cuDeviceCanAccessPeer, i, j)) for j in range(count)] for i in range(count)
    ]
    found(peers=reaches)
    return version


def _cupy(newest: int) -> Any:
    now("imports CuPy")
    if newest // 1000 < _OLDEST:
        raise Problem(
            f"the driver is too old: it knows CUDA up to {_dotted(newest)}, and CuPy needs {_OLDEST}.0 or newer"
        )
    extra = "gpu13" if newest >= 13000 else "gpu12"
    cure = f"pip install 'minidp[{extra}]'"
    packages = _packages()
    if not packages:
        raise Problem("CuPy is not installed", cure)
    try:
        xp = get_device("cuda").xp
    except Exception as error:  # of CuPy's own making, too
        many = f" (there are {len(packages)} of it: {', '.join(packages)})" if len(packages) > 1 else ""
        raise Problem(f"CuPy is installed{many}, but can't be imported: {_short(error)}", cure) from None
    runtime = xp.cuda.runtime.runtimeGetVersion()
    found(cupy=xp.__version__, runtime=_dotted(runtime))
    if runtime // 1000 > newest // 1000:
        here = f"CuPy here is for {_dotted(runtime)}"
        text = f"the driver is too old: it knows CUDA up to {_dotted(newest)}, and {here}"
        names = " ".join(package.split()[0] for package in packages)
        raise Problem(text, f"pip uninstall -y {names} && pip install 'minidp[{extra}]'")
    return xp


def _memory(xp: Any) -> None:
    now("takes a little GPU memory")
    try:
        x = xp.empty(32, np.float32)
        x.fill(1.0)
        right = bool((x.get() == 1.0).all())
    except Exception as error:
        raise Problem(f"CuPy can't use the GPU: {_short(error)}") from None
    if not right:
        raise Problem("GPU memory does not hold what is written: this GPU or its driver is broken")


def _compiler(xp: Any) -> None:
    now("compiles and runs a kernel")
    start = time.perf_counter()
    try:
        x = xp.arange(32, dtype=np.float32)
        xp.RawModule(code=KERNEL).get_function("three_more")((1,), (32,), (x,))
        right = bool((x.get() == np.arange(3, 35)).all())
    except Exception as error:
        cure = f"pip install '{_packages()[0].split()[0]}[ctk]'"  # CUDA's compiler, headers and libraries
        raise Problem(f"CuPy can't compile and run a kernel: {_short(error)}", cure) from None
    if not right:
        raise Problem("a tiny kernel gives wrong numbers: this GPU or its driver is broken")
    found(compiled_s=time.perf_counter() - start)


def _device() -> None:
    """What ``spawn(device="cuda")`` does on each rank."""
    now("starts device='cuda'")
    try:
        get_device("cuda").start()
    except DeviceUnavailable as error:
        raise Problem(_short(error).partition(". ")[0]) from None


def _nccl() -> None:
    now("looks for NCCL")
    from minidp.comm import nccl

    try:
        version = nccl.library().get_version()
    except ImportError:
        return
    found(nccl=f"{version // 10000}.{version // 100 % 100}.{version % 100}")


def _packages() -> list[str]:
    """``cupy-cuda12x 14.2.0``: the distributions that are CuPy, whether it can be imported or not."""
    names = {f"{dist.metadata['Name']} {dist.version}" for dist in metadata.distributions()}
    return sorted(name for name in names if re.match(r"cupy(-(cuda|rocm)[\w-]*)? ", name))


def _driver_version() -> str | None:
    for path, pattern in (
        ("/sys/module/nvidia/version", r"[\d.]+"),
        ("/proc/driver/nvidia/version", r"\d+\.[\d.]+"),
    ):
        try:
            match = re.search(pattern, Path(path).read_text())
        except OSError:
            continue
        if match:
            return match.group()
    return None


def _gpu(cuda: Any, index: int) -> dict[str, Any]:
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), index)
    size = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(size), index)
    major = _number(cuda.cuDeviceGetAttribute, _CAPABILITY_MAJOR, index)
    minor = _number(cuda.cuDeviceGetAttribute, _CAPABILITY_MINOR, index)
    text = name.value.decode(errors="replace")
    return {"index": index, "name": text, "memory": size.value, "capability": f"{major}.{minor}"}


def _number(call: Callable[..., int], *args: int) -> int:
    """The whole number that a call of the driver's writes to its first argument; 0 if it fails."""
    value = ctypes.c_int(0)
    return value.value if call(ctypes.byref(value), *args) == 0 else 0


def _error(cuda: Any, status: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(status, ctypes.byref(text))
    return f"{text.value.decode(errors='replace')} (error {status})" if text.value else f"error {status}"


def _dotted(version: int) -> str:
    """12080 → 12.8"""
    return f"{version // 1000}.{version % 1000 // 10}"


def _short(error: Exception) -> str:
    """What an error says, on one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and set(line) - set("=-"))
    return text[:300] or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
