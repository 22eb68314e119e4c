"""minidp: data parallelism that one can read in an evening, run on a laptop, and trust on a cluster.

Names are loaded on first use (PEP 562), so that ``import minidp`` costs little more than NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minidp import autograd, comm, compress, data, launch, nn, optim, parallel, sim, trace
    from minidp.autograd import Tensor, no_grad, tensor
    from minidp.comm import (
        CollectiveMismatch,
        CollectiveTimeout,
        CommError,
        Communicator,
        RankFailed,
        RankLost,
        ReduceOp,
    )
    from minidp.launch.spawn import spawn

__version__ = "0.1.0"

_HOME = {
    "Tensor": "minidp.autograd",
    "no_grad": "minidp.autograd",
    "tensor": "minidp.autograd",
    "CollectiveMismatch": "minidp.comm",
    "CollectiveTimeout": "minidp.comm",
    "CommError": "minidp.comm",
    "Communicator": "minidp.comm",
    "RankFailed": "minidp.comm",
    "RankLost": "minidp.comm",
    "ReduceOp": "minidp.comm",
    "spawn": "minidp.launch",
}
_ROOMS = ("autograd", "backend", "comm", "compress", "data", "launch", "nn", "optim", "parallel", "sim", "trace")

__all__ = [
    "CollectiveMismatch",
    "CollectiveTimeout",
    "CommError",
    "Communicator",
    "RankFailed",
    "RankLost",
    "ReduceOp",
    "Tensor",
    "autograd",
    "comm",
    "compress",
    "data",
    "launch",
    "nn",
    "no_grad",
    "optim",
    "parallel",
    "sim",
    "spawn",
    "tensor",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = import_module(f"minidp.{name}")
    else:
        raise AttributeError(f"module 'minidp' has no attribute {name!r}; public names: {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
