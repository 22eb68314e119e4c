"""Real handwritten digits, small enough to travel inside the package (see digits.LICENSE.txt)."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import import_module

import numpy as np

from minidp import backend
from minidp.data.dataset import ArrayDataset
from minidp.data.sharding import proportional

PATH = os.path.join(os.path.dirname(__file__), "digits.npz")  # importlib.resources would cost 20 ms
TEST_SAMPLES = 360


def load_digits() -> tuple[ArrayDataset, ArrayDataset]:
    """The 1797 8 × 8 digits of the UCI set "Optical Recognition of Handwritten Digits": (train, test).

    x: float32 in [0, 1], shape (1437, 64) and (360, 64). y: int64, 0 to 9, shape (1437,) and (360,).

    The split is fixed: a random sample, stratified by class and seeded. It is not writer-disjoint: both
    parts come from the same 13 writers, so test accuracy is that for known hands, higher than for new ones.
    """
    images, labels, in_test = _stored()
    x = images.astype(np.float32) / np.float32(16)
    y = labels.astype(np.int64)
    return ArrayDataset(x[~in_test], y[~in_test]), ArrayDataset(x[in_test], y[in_test])


@lru_cache(maxsize=1)
def _stored() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the file holds; read once, since a thousand virtual ranks may ask."""
    with np.load(PATH) as stored:
        return stored["images"], stored["labels"], stored["in_test"]


def stratified_split(labels: np.ndarray, test_samples: int, seed: int = 0) -> np.ndarray:
    """Mask (n,) of a random test set: each class in proportion to its size, drawn without replacement."""
    classes, counts = np.unique(labels, return_counts=True)
    in_test = np.zeros(len(labels), bool)
    for label, size in zip(classes.tolist(), proportional(test_samples, counts.tolist())):
        members = np.flatnonzero(labels == label)
        in_test[backend.generator(seed, "stratified split", label).permutation(members)[:size]] = True
    return in_test


def export(path: str) -> None:
    """Write digits.npz anew, as it was made once: from scikit-learn's copy of the data, not needed otherwise.

    images: uint8 (1797, 64) in 0 … 16; labels: uint8 (1797,); in_test: bool (1797,).
    """
    bunch = import_module("sklearn.datasets").load_digits()
    images, labels = bunch.data.astype(np.uint8), bunch.target.astype(np.uint8)
    np.savez_compressed(path, images=images, labels=labels, in_test=stratified_split(labels, TEST_SAMPLES))
