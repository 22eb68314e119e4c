"""The floor of the house: array libraries, devices, moves between them, random numbers, the meter."""

from minidp.backend.arrays import (
    Array,
    array_module,
    array_types,
    asarray,
    find_module,
    item,
    register_array_type,
    synchronize,
    to_numpy,
)
from minidp.backend.counting import Meter, count, count_move, current_meter, meter
from minidp.backend.device import HOST, Device, DeviceUnavailable, get_device
from minidp.backend.kernels import Kernels
from minidp.backend.products import matmul, matmul_precision
from minidp.backend.randomness import generator, seed_sequence

__all__ = [
    "HOST",
    "Array",
    "Device",
    "DeviceUnavailable",
    "Kernels",
    "Meter",
    "array_module",
    "array_types",
    "asarray",
    "count",
    "count_move",
    "current_meter",
    "find_module",
    "generator",
    "get_device",
    "item",
    "matmul",
    "matmul_precision",
    "meter",
    "register_array_type",
    "seed_sequence",
    "synchronize",
    "to_numpy",
]
