"""``python -m minidp.doctor.pair_probe``: two ranks meet on GPU 0, and, with ``--two``, on GPUs 0 and 1.

Through ``spawn``, as any training: whether two processes can share GPU memory and events, only a try can tell.
Says what it finds as ``cuda_probe`` does.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np

import minidp
from minidp.backend import Device
from minidp.comm import Communicator
from minidp.doctor.lines import found, now

TIMEOUT_S = 30.0
SIZE = 2**20 + 3  # floats: more than a page, and no round number


def meet(comm: Communicator) -> tuple[str, bool, bool]:
    """(transport, whether memory is shared, whether sums are right), on each rank."""
    xp = comm.device.xp
    x = xp.arange(SIZE, dtype=np.float32) + np.float32(comm.rank)
    comm.all_reduce(x)
    right = bool((minidp.backend.to_numpy(x) == 2 * np.arange(SIZE, dtype=np.float32) + 1).all())
    transport: Any = comm.transport  # type: ignore[attr-defined]
    return transport.name, transport.shares_memory, right


def meeting(device: str | Device) -> dict[str, Any]:
    """A ``facts.Meeting`` of two ranks on that device."""
    told: list[str] = []
    log = logging.getLogger("minidp.comm")
    log.setLevel(logging.INFO)
    listener = _Listener(told)
    log.addHandler(listener)
    try:
        transport, shares, right = minidp.spawn(
            meet, 2, device=device, blas_threads=1, timeout_s=TIMEOUT_S, progress=False
        )[0]
    except (RuntimeError, OSError, MemoryError) as error:
        text = str(error).partition("\n")[0]
        return {"transport": "none", "shares_memory": False, "problem": text}
    finally:
        log.removeHandler(listener)
    # "2 ranks on …; between them TRANSPORT (why not a faster one)"
    _, _, note = " ".join(told).partition(f"between them {transport}")
    problem = None if right else f"the sum of two ranks is wrong over {transport}"
    return {
        "transport": transport,
        "shares_memory": shares,
        "note": note.strip().removeprefix("(").removesuffix(")"),
        "problem": problem,
    }


class _Listener(logging.Handler):
    def __init__(self, told: list[str]) -> None:
        super().__init__()
        self._told = told

    def emit(self, record: logging.LogRecord) -> None:
        self._told.append(record.getMessage())


def main(argv: list[str]) -> int:
    now("lets two ranks meet on GPU 0")
    found(one_gpu=meeting("cuda:0"))
    if "--two" in argv:
        now("lets two ranks meet on GPUs 0 and 1")
        found(two_gpus=meeting("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
