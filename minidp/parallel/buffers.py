"""Buffers that each rank has moved by batches of its own, such as batch norm's running statistics, made one."""

from __future__ import annotations

import math

import numpy as np

from minidp.backend import array_module, asarray, to_numpy
from minidp.comm import Communicator
from minidp.comm.reduction import Array
from minidp.nn import Module


def mean_buffers(comm: Communicator, model: Module, weight: int) -> None:
    """Every rank's buffers become their mean over ranks, in place. Collective, if the model has any.

    Of floating ones (and Fractions) Σ n_i x_i / Σ n_i, in order of rank, at least in float64; of whole numbers and
    truths the maximum: num_batches_tracked is a count, and means of counts are none. Afterwards all ranks hold the
    same bits. What they agreed about before stays as it is, to the bit.

    Args:
        weight: n_i ≥ 0 of this rank, such as samples. If all are 0, all count alike.

    Sent: 8 bytes an element to each peer.
    """
    buffers = list(model.buffers())
    for whole in (False, True):
        of_kind = [buffer for buffer in buffers if (buffer.dtype.kind in "biu") == whole]
        if not of_kind:
            continue
        mine = [to_numpy(buffer).reshape(-1) for buffer in of_kind]
        flat = np.concatenate(mine, dtype=np.result_type(np.int64 if whole else np.float64, *mine))
        rows = np.empty((comm.world_size, flat.size), flat.dtype)
        comm.all_gather(rows, flat)
        one = rows.max(axis=0) if whole else _mean(rows, comm.all_gather_int(weight, "weights of buffers"))
        ends = np.cumsum([buffer.size for buffer in of_kind])[:-1]
        for buffer, values in zip(of_kind, np.split(one, ends)):
            buffer[...] = asarray(values.reshape(buffer.shape), array_module(buffer), buffer.dtype)


def least_weights(counts: list[int]) -> tuple[list[int], int]:
    """Whole weights in the proportions of ``counts``, as small as can be, and their sum; equal ones if all are 0.

    So ranks with equal shares are added and divided by their number, and a rank that is alone keeps its bits.
    """
    unit = math.gcd(*counts)
    weights = [count // unit for count in counts] if unit else [1] * len(counts)
    return weights, sum(weights)


def _mean(rows: Array, counts: list[int]) -> Array:
    """Σ n_i x_i / Σ n_i of rows x_i; a row of weight 0 has no say, though it be infinite."""
    weights, total = least_weights(counts)
    with np.errstate(all="ignore"):  # what is not finite is for others to find
        mean: Array = sum(weight * row for weight, row in zip(weights, rows) if weight) / total
    agreed = (rows == rows[0]).all(axis=0)
    mean[agreed] = rows[0, agreed]
    return mean
