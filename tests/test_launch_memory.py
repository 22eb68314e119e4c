"""Workers keep freed memory: what a step frees and takes again is not faulted in again."""

from __future__ import annotations

import ctypes
import resource
import sys
from typing import Any

import numpy as np
import pytest

import minidp
from minidp.launch import memory

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's mallopt"),
]


def faults_a_round(comm: Any) -> float:
    """Page faults of taking and giving back 4 × 3.2 MB, 800 pages each, after the first time."""
    for rounds in (1, 10):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            arrays = [np.ones(800_000, np.float32) for _ in range(4)]
            arrays.clear()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / rounds


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_memory_of_the_last_step_serves_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in memory.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    (faults,) = minidp.spawn(faults_a_round, 1)
    assert faults < 80, "a tenth of the pages of one array"


def test_the_users_settings_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072")
    assert not memory.keep()
