"""Shared by all tests: functions of test modules travel to workers by value, a GPU is looked for at most once."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from functools import cache

import cloudpickle
import pytest

from minidp.bench.leftovers import processes

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # By value: a worker need not import the test module (and pytest, and hypothesis) to run one function of it.
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


@cache
def why_no_gpu() -> str | None:
    """Why tests that are marked ``gpu`` can't run here; None: they can.

    Asked when the first of them is about to run. What CUDA is tried for that, a process of its own tries: this one
    stays as it was, for tests that fork.
    """
    from minidp.backend import DeviceUnavailable, get_device
    from minidp.doctor.probe import look_at_cuda

    try:
        get_device("cuda").check()
    except DeviceUnavailable as error:
        return f"no GPU: {error}"
    problem = look_at_cuda(pairs=False).problem
    return None if problem is None else f"no GPU: {problem}"


@pytest.fixture
def token() -> Iterator[str]:
    """For the environment of a kernel; every process that has it must be gone soon after the test."""
    token = secrets.token_hex(8)
    try:
        yield token
        deadline = time.monotonic() + 20  # it is waited for only as long as there is one
        while processes(token) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not processes(token), "a process outlived the kernel"
    finally:
        for pid in processes(token):
            os.kill(pid, 9)
