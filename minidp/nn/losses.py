"""The losses as operations: each a mean over samples or elements, 0 with zero gradient over none."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minidp.autograd.function import Function, nbytes_of, rows
from minidp.backend import Array, asarray, find_module


class CrossEntropy(Function):
    """− 1/n Σ_i log softmax(z_i)[label_i] for logits z (..., C) and integer labels (...) → a scalar; n labels.

    Softmax and loss are one node, because the gradient then is simply (softmax(z) − onehot(label)) / n.

    A label that is no class is an error where the host sees it. Labels that lie on a device already it could see
    only by waiting for the device: there such a label makes the loss NaN, and its sample's gradient.
    """

    fresh = True

    def forward(self, logits: Array, labels: Array) -> Array:
        xp = self.xp
        labels = check_labels(logits, labels, xp)
        shape, logits = logits.shape, rows(logits)
        n, classes = logits.shape
        if n == 0:
            self.saved = logits, None, shape
            return xp.zeros((), dtype=logits.dtype)
        wrong = None
        if xp is not np:
            wrong = labels.view("uint64") >= classes
            labels = xp.where(wrong, 0, labels)
        # Position of each sample's label in the flattened (n, C) array: take() is cheaper than [rows, labels].
        at = labels + xp.arange(0, n * classes, classes)
        p = xp.empty(logits.shape, dtype=logits.dtype)  # in C order, whatever order the logits have
        xp.subtract(logits, logits.max(axis=1, keepdims=True), out=p)
        picked = p.ravel().take(at)
        xp.exp(p, out=p)
        total = p.sum(axis=1, keepdims=True)
        if wrong is not None:
            total = xp.where(wrong.reshape(n, 1), total.dtype.type(math.nan), total)
        p /= total
        self.saved = p, at, shape
        return (xp.log(total).ravel() - picked).sum() / n

    def backward(self, grad: Array) -> Any:
        p, at, shape = self.saved
        if at is None:
            return self.xp.zeros(shape, dtype=p.dtype), None
        flat = p.ravel()  # p is this node's own array, contiguous: reuse it
        flat[at] -= 1
        p *= grad / len(p)
        return p.reshape(shape), None

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 6.0 * inputs[0].size, 2.0 * inputs[0].size

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        logits = nbytes_of(inputs[0])
        return 8 * logits, 2 * logits  # max, subtract, exp, sum, divide: 5 reads of all and 3 writes; p *= …


def check_labels(logits: Array, labels: Any, xp: Any) -> Array:
    """Return `labels`, flat, as int64 beside the logits; raise an error that tells what is wrong with them.

    Which number a label is can be told only of those on the host.
    """
    if logits.ndim < 2:
        raise ValueError(f"cross_entropy: logits must have shape (n, ..., classes), not {logits.shape}")
    *leading, classes = logits.shape
    labels = asarray(labels, xp if find_module(labels) is xp else np)
    if labels.dtype.kind not in "iu":
        raise TypeError(f"cross_entropy: labels must be integers in 0 … {classes - 1}, not {labels.dtype}")
    if labels.shape != tuple(leading):
        raise ValueError(
            f"cross_entropy: logits of shape {logits.shape} need labels of shape {tuple(leading)}, not "
            f"{labels.shape}; classes come last, and labels are integers, no one-hot rows"
        )
    given, labels = labels, labels.ravel().astype("int64", copy=False)
    if type(labels) is not np.ndarray:
        return labels
    wrong = labels.view("uint64") >= classes  # a negative label, seen as unsigned, is larger than any class
    if wrong.any():
        where = int(wrong.argmax())
        raise ValueError(
            f"cross_entropy: label {given.ravel()[where]} of sample {where} is outside 0 … {classes - 1} "
            f"({classes} classes, as the logits have columns)"
        )
    return labels if xp is np else asarray(labels, xp)


class MSELoss(Function):
    """Σ (prediction − target)² / (number of elements) → a scalar; exact on Fractions."""

    fresh = True
    moves = True

    def forward(self, prediction: Array, target: Array) -> Array:
        if prediction.shape != target.shape:
            raise ValueError(
                f"mse_loss: prediction of shape {prediction.shape} and target of shape {target.shape} "
                "would be broadcast against each other: reshape one of them"
            )
        if target.dtype != prediction.dtype:
            target = target.astype(prediction.dtype)
        self.saved = difference = prediction - target
        return (difference * difference).sum() / max(difference.size, 1)

    def backward(self, grad: Array) -> Any:
        difference = self.saved
        difference *= 2 * grad / max(difference.size, 1)
        return difference, -difference if self.needs[1] else None

    def flops(self, out: Any, *inputs: Any) -> tuple[float, float]:
        return 3.0 * inputs[0].size, float(inputs[0].size * sum(self.needs))

    def traffic(self, out: Any, *inputs: Any) -> tuple[float, float]:
        size = nbytes_of(inputs[0])
        return 6 * size, 2 * size * sum(self.needs)  # subtract, square, sum; one factor, one change of sign
