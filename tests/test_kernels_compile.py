"""All CUDA kernels, compiled for real GPUs by NVIDIA's compiler; no GPU is needed, but CuPy and its compiler are.

pip install 'minidp[gpu13]'        # or gpu12
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest

import minidp
from minidp.backend import Kernels
from minidp.backend.kernels import OPTIONS, TYPES

PACKAGE = Path(minidp.__file__).parent


def all_kernels() -> dict[str, Kernels]:
    """By file, from every module beside a .cu file."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        if "Kernels(" in file.read_text():
            module = import_module(".".join(["minidp", *file.relative_to(PACKAGE).with_suffix("").parts]))
            for value in vars(module).values():
                if isinstance(value, Kernels):
                    found[value.path.name] = value
    return found


KERNELS = all_kernels()


def test_every_file_of_kernels_has_an_owner_who_names_all_of_them():
    files = {file.name: file.read_text() for file in PACKAGE.rglob("*.cu")}
    assert sorted(KERNELS) == sorted(files)
    for name, kernels in KERNELS.items():
        assert files[name].count("__global__") == len(kernels.names) == len(set(kernels.names))
        assert all(f" {kernel}(" in files[name] for kernel in kernels.names)


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile(name, arch):
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy is not installed")
    core = import_module("cupy._core.core")
    kernels = KERNELS[name]
    program = nvrtc.createProgram(kernels.source, name, (), ())
    expressions = [f"{kernel}<{ctype}>" for kernel in kernels.names for ctype in TYPES.values()]
    for expression in expressions:
        nvrtc.addNameExpression(program, expression)
    options = (*core.assemble_cupy_compiler_options(OPTIONS), "-ftz=true", f"-arch={arch}")
    try:
        nvrtc.compileProgram(program, options)
    except Exception:
        pytest.fail(nvrtc.getProgramLog(program))
    assert len(nvrtc.getCUBIN(program)) > 1000
    assert all(nvrtc.getLoweredName(program, expression) for expression in expressions)
    nvrtc.destroyProgram(program)
