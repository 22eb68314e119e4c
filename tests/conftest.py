"""Shared by all tests: functions of test modules travel to workers by value, GPUs are looked for once."""

from __future__ import annotations

import importlib.util
import os

import cloudpickle
import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # By value: a worker need not import the test module (and pytest, and hypothesis) to run one function of it.
    for module in {item.module for item in items if isinstance(item, pytest.Function)}:
        cloudpickle.register_pickle_by_value(module)
    if importlib.util.find_spec("cupy") is None:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and CuPy; CuPy is not installed"))
