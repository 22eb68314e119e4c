"""Fashion-MNIST: 70 000 photographs of clothes, as hard as MNIST is easy. Read from files that the user has."""

from __future__ import annotations

import os
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from minidp.data.dataset import ArrayDataset
from minidp.data.idx import read_idx

FOLDER = "/usr/share/datasets/fashion-mnist"  # where Debian's package dataset-fashion-mnist puts them
IMAGES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")
LABELS = ("train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
HOW_TO_GET = (
    "on Debian and Ubuntu `apt-get install dataset-fashion-mnist` puts them where they are looked for; elsewhere "
    "get the four files of data/fashion in the repository github.com/zalandoresearch/fashion-mnist and call "
    "load_fashion_mnist(folder=...)"
)

Stamp = tuple[str, int, int]  # path, bytes, time of last change in ns


def load_fashion_mnist(folder: str | os.PathLike[str] | None = None) -> tuple[ArrayDataset, ArrayDataset]:
    """The 28 × 28 grey images of Fashion-MNIST by Zalando Research: (train, test). `CLASSES` names the labels.

    x: float32 in [0, 1], shape (60000, 1, 28, 28) and (10000, 1, 28, 28). y: int64, 0 to 9, shape (60000,)
    and (10000,). The split is the authors'. The first call takes half a second; the result is kept, 220 MB
    for all who ask in this process, and its arrays are therefore read-only. A changed file is read anew.

    Args:
        folder: where the files {train,t10k}-{images-idx3,labels-idx1}-ubyte lie, each compressed (.gz) or not;
            where Debian's package puts them if None. Any set in MNIST's format will do, MNIST itself or a
            small sample: the numbers of images and their size are then those of the files.

    Raises:
        FileNotFoundError: no folder, or not all four files in it; the message says how to get them.
        ValueError: a file that is damaged or no idx file of the right magic, a label above 9, numbers of
            images and labels that differ, or images of one size in train and of another in test.
    """
    stamps = _stamps(FOLDER if folder is None else os.path.abspath(folder))
    x_train, y_train, x_test, y_test = _stored(stamps)
    return ArrayDataset(x_train, y_train), ArrayDataset(x_test, y_test)


def _stamps(folder: str) -> tuple[Stamp, ...]:
    """Which files to read, train's before test's and images before labels, and what tells if one has changed."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"Fashion-MNIST is not here, there is no folder {folder}: {HOW_TO_GET}")
    paths, missing = [], []
    for name in (name for pair in zip(IMAGES, LABELS) for name in pair):
        found = [p for p in (os.path.join(folder, f"{name}.gz"), os.path.join(folder, name)) if os.path.isfile(p)]
        paths += found[:1]
        missing += [] if found else [f"{name}.gz"]
    if missing:
        raise FileNotFoundError(f"the folder {folder} lacks {', '.join(missing)}: {HOW_TO_GET}")
    return tuple((path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in paths)


@lru_cache(maxsize=2)  # a thousand virtual ranks may ask, for MNIST beside Fashion-MNIST perhaps
def _stored(stamps: tuple[Stamp, ...]) -> tuple[npt.NDArray[np.float32] | npt.NDArray[np.int64], ...]:
    """(x_train, y_train, x_test, y_test) of these four files."""
    train_images, train_labels, test_images, test_labels = (path for path, _, _ in stamps)
    arrays = (*_part(train_images, train_labels), *_part(test_images, test_labels))
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        sizes = " and of ".join(f"{a.shape[2]} × {a.shape[3]}" for a in (arrays[0], arrays[2]))
        raise ValueError(f"{train_images} and {test_images} hold images of {sizes}: they are no one set")
    for array in arrays:
        array.flags.writeable = False
    return arrays


def _part(images_path: str, labels_path: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path} holds {len(images)} images, but {labels_path} {len(labels)} labels: they belong to "
            "different sets, or one was cut"
        )
    if labels.max() >= len(CLASSES):
        first = int(np.argmax(labels >= len(CLASSES)))
        raise ValueError(f"{labels_path} holds label {labels[first]} at index {first}: valid are 0 to 9")
    x = images[:, None].astype(np.float32)
    x /= np.float32(255)  # in two steps: np.divide with a dtype takes ten times as long, 0.4 s
    return x, labels.astype(np.int64)
