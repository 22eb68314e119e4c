"""CuPy's RawModule without a GPU: the same CUDA C++ source, compiled by g++ and run on the host's memory.

So the tests prove the kernels themselves and the Python that launches them. CuPy passes arguments as bytes and
checks nothing; here a kernel's own parameter types are known, and whatever does not fit them is refused. Writing
beyond an array, reading shared memory that nobody wrote and waiting where others don't are errors, and the order
in which threads and blocks run can be chosen: a result that depends on it is a race.

Not shown: what a GPU's own mathematics (exp, tanh …) rounds otherwise, blocks that wait for one another (they run
one by one), and what NVRTC refuses but g++ takes, beyond standard headers and their names.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

HEADER = Path(__file__).with_name("host_cuda.h")
# Products and sums are rounded apart, as NVRTC does with --fmad=false; nothing is visible but the two entries.
FLAGS = ["-O2", "-std=c++17", "-shared", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-fno-gnu-unique"]
FLAGS += ["-fno-extern-tls-init", "-U_FORTIFY_SOURCE"]
HARMLESS = re.compile(r"--?(fmad=false|std=c\+\+(14|17)|prec-div=true|prec-sqrt=true|ftz=false)|-default-device")
DYNAMIC_SHARED = 48 << 10
CANARY = 16 << 10  # bytes before and after each array: more than a block of 1024 threads, 8 bytes each, oversteps
CTYPES = {"f2": "__half", "f4": "float", "f8": "double", "b1": "bool", "i1": "signed char", "u1": "unsigned char"}
CTYPES |= {"i2": "short", "u2": "unsigned short", "i4": "int", "u4": "unsigned", "i8": "long long"}
CTYPES |= {"u8": "unsigned long long", "v": "void"}

guard = True  # look for writes beyond the arrays' ends; costs two copies of each array
_order = (0, 0)


class CompileError(Exception):
    """The compiler's words, lines counted in the kernel's source."""


class LaunchError(RuntimeError):
    """What CUDA would refuse, leave undefined or hang on."""


@contextlib.contextmanager
def order(kind: str, seed: int = 0) -> Iterator[None]:
    """Within, blocks and the threads of each run "forward", in "reverse", or by a seeded "shuffle"."""
    global _order
    before, _order = _order, (("forward", "reverse", "shuffle").index(kind), seed)
    try:
        yield
    finally:
        _order = before


def available() -> str | None:
    """Why kernels cannot run here, or None. A header that does not compile is no reason: it is an error."""
    if not sys.platform.startswith("linux"):
        return f"the kernels' host needs Linux; this is {sys.platform}"
    return None if shutil.which("g++") else "no C++ compiler: g++ is not in PATH"


def cache_folder() -> Path:
    """Compiled code is loaded from here, so nobody else may write into it."""
    folder = Path(tempfile.gettempdir()) / f"minidp-host-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not folder.is_dir() or folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")
    return folder


def put(path: Path, fill: Any) -> None:
    """Make a file by `fill(temporary path)`; other processes see all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent)
    os.close(handle)
    try:
        fill(Path(name))
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def compiled(source: str, defines: list[str]) -> ctypes.PyDLL:
    """The library of a source text. PyDLL: the interpreter stays locked, for blocks run on one OS thread."""
    compiler = shutil.which("g++")
    assert compiler is not None, available()
    status = os.stat(compiler)
    key = [source, HEADER.read_text(), *FLAGS, *defines, compiler, str(status.st_mtime_ns), str(status.st_size)]
    folder = cache_folder()
    library = folder / (hashlib.sha256("\0".join(key).encode()).hexdigest() + ".so")
    if not library.exists():
        fp16 = folder / "cuda_fp16.h"
        put(fp16, lambda path: path.write_text("#define HOST_CUDA_FP16\n#include <host_cuda.h>\n"))

        def compile_to(path: Path) -> None:
            where = ["-I", str(folder), "-I", str(HEADER.parent), "-include", str(HEADER)]
            command = [compiler, *FLAGS, *defines, *where, "-x", "c++", "-", "-o", str(path)]
            result = subprocess.run(command, input=source, capture_output=True, text=True)
            if result.returncode:
                raise CompileError(result.stderr)

        put(library, compile_to)
    return ctypes.PyDLL(str(library))


class RawModule:
    """As cupy.RawModule: compiled when the first kernel is asked for."""

    def __init__(
        self,
        *,
        code: str,
        options: tuple[str, ...] = (),
        name_expressions: Sequence[str] | None = None,
        backend: str = "nvrtc",
    ) -> None:
        assert backend == "nvrtc", "only NVRTC has name expressions"
        assert isinstance(options, tuple), "CuPy takes a tuple of options"
        assert {"--fmad=false", "-fmad=false"} & set(options), "without --fmad=false a GPU's bits would differ"
        self.defines = [option for option in options if option.startswith("-D")]
        for option in options:
            assert option in self.defines or HARMLESS.fullmatch(option), f"no meaning on the host: {option}"
        self.code, self.name_expressions = code, list(name_expressions or ())

    @functools.cached_property
    def kernels(self) -> dict[str, RawKernel]:
        code = self.code
        plain = re.sub(r"//[^\n]*|/\*.*?\*/", "", code, flags=re.S)
        includes = set(re.findall(r"^\s*#\s*include\s*(\S+)", plain, flags=re.M))
        if includes - {"<cuda_fp16.h>", '"cuda_fp16.h"'}:
            raise CompileError(f"NVRTC has no {', '.join(sorted(includes))}")
        bounds = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
        names = re.findall(rf'extern\s+"C"\s+__global__\s+{bounds}void\s+{bounds}(\w+)\s*\(', plain)
        names = list(dict.fromkeys(self.name_expressions + names))
        extern = re.findall(r"extern\s+__shared__\s+(?:__align__\(\d+\)\s*)?([\w ]+?)\s*(\w+)\s*\[\s*\]", plain)
        dynamic = "nullptr"
        if extern:
            assert len(set(extern)) == 1, f"one name and type for a module's dynamic shared memory, not {extern}"
            ((kind, dynamic),) = set(extern)
            code += f"\nalignas(256) thread_local {kind} {dynamic}[{DYNAMIC_SHARED} / sizeof({kind})];"
        table = ", ".join(f"{{host::Kernel<&{n}>::signature(), host::Kernel<&{n}>::threads}}" for n in names)
        source = f"""#line 1 "kernel.cu"
{code}
#line 1 "names of kernels"
static host::Entry host_kernels[] = {{{table}}};
#define HOST_ENTRY extern "C" __attribute__((visibility("default"))) const char*
HOST_ENTRY host_signature(int kernel) {{ return host_kernels[kernel].signature.c_str(); }}
static unsigned char* host_dynamic() {{ return (unsigned char*){dynamic}; }}
HOST_ENTRY host_launch(int kernel, void** args, const unsigned* dims, size_t bytes, int how, size_t seed) {{
    return host::launch(host_kernels[kernel].threads, args, dims, host_dynamic(), bytes, how, seed);
}}
"""
        library = compiled(source, self.defines)
        library.host_signature.restype = library.host_launch.restype = ctypes.c_char_p
        return {name: RawKernel(library, index, name) for index, name in enumerate(names)}

    def get_function(self, name: str) -> RawKernel:
        if name not in self.kernels:
            raise KeyError(f'{name} is neither a name expression nor an extern "C" kernel: {list(self.kernels)}')
        return self.kernels[name]


class RawKernel:
    """As cupy.RawKernel, but strict. A kernel is given the pointer to an array's first element and nothing else,
    so an array that is not contiguous is refused, unless `any_strides` is set."""

    any_strides = False

    def __init__(self, library: ctypes.PyDLL, index: int, name: str) -> None:
        self.library, self.index, self.name = library, index, name
        self.wants: list[str] = library.host_signature(index).decode().split()

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], args: Any, *, shared_mem: int = 0) -> None:
        if not isinstance(grid, tuple) or not isinstance(block, tuple):
            raise TypeError(f"{self.name}: CuPy takes grid and block as tuples, not {grid!r} and {block!r}")
        dims = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3]]
        limits = (2**31 - 1, 65535, 65535, 1024, 1024, 64)
        fit = all(1 <= n <= limit for n, limit in zip(dims, limits))
        if not fit or not 1 <= len(grid) <= 3 or not 1 <= len(block) <= 3 or math.prod(dims[3:]) > 1024:
            raise LaunchError(f"{self.name}: no launch has a grid of {grid} and a block of {block}")
        if not 0 <= shared_mem <= DYNAMIC_SHARED:
            raise LaunchError(f"{self.name}: {shared_mem} bytes of dynamic shared memory")
        if len(args) != len(self.wants):
            raise TypeError(f"{self.name} wants {len(self.wants)} arguments, not {len(args)}")
        values = [self.value(i, arg, want) for i, (arg, want) in enumerate(zip(args, self.wants))]
        arrays = {i: v for i, v in enumerate(values) if isinstance(v, np.ndarray)}
        with guarded(self.name, arrays) as addresses:
            cells = [np.array(addresses.get(i, v)) for i, v in enumerate(values)]
            pointers = (ctypes.c_void_p * len(cells))(*(cell.ctypes.data for cell in cells))
            size = ctypes.c_size_t
            how, seed = _order
            error = self.library.host_launch(
                self.index, pointers, (ctypes.c_uint * 6)(*dims), size(shared_mem), how, size(seed)
            )
            if error:
                raise LaunchError(f"{self.name}: {error.decode()}")

    def value(self, position: int, arg: Any, want: str) -> Any:
        """The array of the host that holds `arg`, or the NumPy scalar whose bytes CuPy would pass."""
        from tests.device_double import DeviceArray  # here, for it imports this module

        wanted = CTYPES[want.strip("*")] + "*" * want.count("*")
        if isinstance(arg, DeviceArray):
            has = "*" + arg.dtype.str[1:]
            if not (has == want or want == "*v" or {has, want} == {"*b1", "*u1"}):
                raise TypeError(f"{self.name}, argument {position}: {wanted} was given an array of {arg.dtype}")
            if not (arg.flags.c_contiguous or self.any_strides):
                raise TypeError(f"{self.name}, argument {position}: the array is not contiguous")
            return arg._host
        number: Any = None
        for python, numpy in ((bool, np.bool_), (int, np.int64), (float, np.float64)):
            if type(arg) is python:
                number = numpy(arg)
        if isinstance(arg, np.generic):
            number = arg
        if number is None or number.dtype.str[1:] != want:
            what = (
                type(arg).__name__ if number is None or number is arg else f"{type(arg).__name__} ({number.dtype})"
            )
            raise TypeError(f"{self.name}, argument {position}: {wanted} was given {what}")
        return number


@contextlib.contextmanager
def guarded(name: str, arrays: dict[int, np.ndarray]) -> Iterator[dict[int, np.uintp]]:
    """The addresses to pass for arrays, within copies that lie between canaries, and the copying back.
    Arrays that overlap are copied as one, so they still overlap."""
    spans = {i: np.lib.array_utils.byte_bounds(array) for i, array in arrays.items()}
    if not guard:
        yield {i: np.uintp(array.ctypes.data) for i, array in arrays.items()}
        return
    regions: list[list[int]] = []
    for low, high in sorted(set(spans.values())):
        if regions and low < regions[-1][1]:
            regions[-1][1] = max(high, regions[-1][1])
        else:
            regions.append([low, high])
    copies = []
    for low, high in regions:
        copy = np.full(2 * CANARY + 256 + high - low, 0xFF, np.uint8)  # read as floats: NaN
        start = CANARY + -(copy.ctypes.data + CANARY) % 256  # aligned as memory of a GPU is
        ctypes.memmove(copy.ctypes.data + start, low, high - low)
        copies.append((low, high, start, copy))
    moved = {}
    for i, (low, _) in spans.items():
        first, _, start, copy = next(c for c in copies if c[0] <= low < c[1] or c[0] == low)
        moved[i] = np.uintp(copy.ctypes.data + start + arrays[i].ctypes.data - first)
    yield moved
    for low, high, start, copy in copies:
        for side, canary in (("before", copy[:start]), ("beyond", copy[start + high - low :])):
            if canary.min() != 0xFF:
                touched = [i for i, span in spans.items() if low <= span[0] and span[1] <= high]
                raise LaunchError(f"{name} wrote {side} the memory of argument {touched}")
        ctypes.memmove(low, copy.ctypes.data + start, high - low)
