"""What the demo knows of compressors: in words, what float32 would send, and η of those that have no scale."""

from __future__ import annotations

from minidp import compress
from minidp.demo.tasks import Task

FLOAT32 = "float32"
"""How gradients without a compressor are called, beside those with one."""
SIGN_LR = 0.01
"""Of the usual η. Measured on the digits, both MLPs, SGD with and without momentum: 92 to 96 %; 0.03 is as good,
0.05 worse."""

_ABOUT = {
    "none": "float32 still, but in the way that payloads travel",
    "fp16": "float16: 11 bits of precision",
    "bf16": "the upper half of a float32: its range, 8 bits of precision",
    "int8": "255 levels, and a scale for each 2048 numbers",
    "qsgd": "{} levels up and down, at random so that the mean is right",
    "terngrad": "−1, 0 or 1 times the largest, at random as well",
    "sign": "one bit: up or down; the majority of ranks decides",
    "topk": "only the largest numbers, {:g} %, and where they are",
    "randomk": "only {:g} % of the numbers, in random places",
    "powersgd": "a matrix as the product of two that are {} wide",
}
_KINDS = {
    "fp16": "fewer bits",
    "bf16": "fewer bits",
    "int8": "fewer levels",
    "qsgd": "fewer levels",
    "terngrad": "fewer levels",
    "sign": "one bit",
    "topk": "fewer numbers",
    "randomk": "fewer numbers",
    "powersgd": "low rank",
}


def about(spec: str) -> str:
    """What it does, for who meets it first."""
    plain, feedback = spec.removesuffix("+ef"), spec.endswith("+ef")
    name, *arguments = plain.split(":")
    text = _ABOUT[name]
    if name in ("topk", "randomk"):
        text = text.format(100 * float(arguments[0]))
    elif name == "sign" and feedback:
        text = "one bit, times the mean magnitude"
    else:
        text = text.format(*arguments)
    return text


def kind(spec: str) -> str:
    """By what it makes gradients smaller: one of a few ways."""
    return _KINDS.get(spec.removesuffix("+ef").split(":")[0], FLOAT32)


def has_scale(spec: str | None) -> bool:
    """Whether w moves the farther, the longer the gradient is."""
    return spec is None or compress.get(spec).spec != "sign"


def rate(lr: float, optimizer: str, spec: str | None) -> float:
    """η of workers whose gradients travel as ``spec``. Adam divides by the gradient's length anyway."""
    return lr if has_scale(spec) or optimizer.startswith("adam") else SIGN_LR * lr


def float32_bytes(task: Task, workers: int) -> float:
    """What a worker sends in a step without compression: 2(N−1)/N of the parameters' bytes."""
    parameters = sum(parameter.size for parameter in task.build().parameters())
    return 2 * (workers - 1) / workers * 4 * parameters
