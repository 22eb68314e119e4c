"""The idx format, and Fashion-MNIST in it: what is read, what is refused, and what is kept."""

from __future__ import annotations

import gzip
import os
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minidp import data
from minidp.data import fashion_mnist
from minidp.data.idx import read_idx

NAMES = {
    (part, kind): f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
}


def idx(array):
    """The bytes of an idx file, as the format's description says."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write(path, content):
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.fixture
def small():
    """Seven training samples and three test samples, of 4 × 5 pixels, that hold all pixel values from 0 to 255."""
    pixels = np.random.default_rng(0).permutation(np.resize(np.arange(256), 10 * 4 * 5)).astype(np.uint8)
    pixels[:2], pixels[-2:] = (0, 255), (0, 255)
    images, labels = pixels.reshape(10, 4, 5), np.array([9, 0, 1, 2, 3, 4, 5, 6, 7, 8], np.uint8)
    return {
        ("train", "images-idx3"): images[:7],
        ("train", "labels-idx1"): labels[:7],
        ("t10k", "images-idx3"): images[7:],
        ("t10k", "labels-idx1"): labels[7:],
    }


@pytest.fixture(params=[".gz", ""], ids=["gzip", "plain"])
def suffix(request):
    return request.param


@pytest.fixture
def folder(tmp_path, small, suffix):
    for key, array in small.items():
        write(tmp_path / (NAMES[key] + suffix), idx(array))
    return tmp_path


@pytest.fixture(autouse=True)
def forget():
    """Leaves no sets in memory: the real one has 220 MB."""
    yield
    fashion_mnist._stored.cache_clear()


# --- the format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1,), (1 << 21,), (3, 4, 5), (1, 2, 3, 4, 5)])
def test_what_was_written_is_read(tmp_path, suffix, shape):
    array = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    path = write(tmp_path / f"array{suffix}", idx(array))
    for found in (read_idx(path), read_idx(str(path), ndim=len(shape))):
        assert (found.dtype, found.shape, found.flags.c_contiguous) == (np.uint8, shape, True)
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    ("content", "ndim", "message"),
    [
        (b"", None, "idx magic 0x000008nn .*, found nothing: is it the right file"),
        (b"\0\0\x08", 3, "idx magic 0x00000803, found 0x000008: is it the right file"),
        (b"PK\x03\x04 and so on", 1, "idx magic 0x00000801, found 0x504b0304: is it the right file"),
        (
            b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0",
            None,
            "0x000008nn .unsigned bytes in nn dimensions., found 0x00000d01",
        ),
        (b"\0\0\x08\0\0", None, "found 0x00000800"),
        (idx(np.ones((2, 3), np.uint8)), 3, "idx magic 0x00000803, found 0x00000802"),
        (b"\0\0\x08\x02\0\0\0\x01\0\0", None, "ends within its header, after 10 bytes"),
        (idx(np.ones((0, 3), np.uint8)), None, r"is empty: its header names the shape \(0, 3\)"),
        (
            idx(np.ones((2, 3), np.uint8))[:-1],
            2,
            r"promises 6 bytes, the shape \(2, 3\), but only 5 follow: get it",
        ),
        (
            idx(np.ones((2, 3), np.uint8)) + b"\0",
            2,
            r"promises 6 bytes, the shape \(2, 3\), but more follow: get it",
        ),
        (idx(np.ones(2, np.uint8))[:8], None, r"promises 2 bytes, the shape \(2,\), but only 0 follow"),
    ],
)
def test_files_that_are_no_idx_file(tmp_path, suffix, content, ndim, message):
    path = write(tmp_path / f"array{suffix}", content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} .*{message}"):
        read_idx(path, ndim)


def test_a_gzip_file_needs_its_name(tmp_path):
    content = idx(np.ones((2, 3), np.uint8))
    for name, stored, message in (
        ("plain.gz", content, "is no intact gzip file, Not a gzipped file"),
        ("compressed", gzip.compress(content), "found 0x1f8b08..: compressed files need a name in .gz"),
    ):
        (tmp_path / name).write_bytes(stored)
        with pytest.raises(ValueError, match=f"{name} .*{message}"):
            read_idx(tmp_path / name)


@pytest.mark.parametrize("at", ["block", "data", "sum", "length"])
def test_damaged_gzip(tmp_path, at):
    array = np.random.default_rng(2).integers(0, 256, (50, 8)).astype(np.uint8)  # incompressible: stored as it is
    content = bytearray(gzip.compress(idx(array)))
    content[{"block": 10, "data": 200, "sum": -8, "length": -4}[at]] ^= 6  # block: of no known type, for zlib
    path = tmp_path / "array.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"array\.gz is no intact gzip file, .+: get it anew"):
        read_idx(path)


def test_gzip_cut_off_anywhere(tmp_path):
    content = gzip.compress(idx(np.arange(40, dtype=np.uint8)))
    path = tmp_path / "array.gz"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"array\.gz (is no intact gzip file|.*found nothing)"):
            read_idx(path)


@pytest.mark.parametrize("shape", [(1 << 20, 1 << 10, 1 << 10), (2**32 - 1,) * 3])
def test_a_header_is_not_believed(tmp_path, suffix, shape):
    path = write(tmp_path / f"array{suffix}", struct.pack(">HBB3I", 0, 8, 3, *shape) + b"few")
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="but only 3 follow"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_no_file(tmp_path, suffix):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_idx(tmp_path / f"nowhere{suffix}")


# --- Fashion-MNIST ----------------------------------------------------------------------------------------------


def test_a_small_sample(folder, small):
    for part, loaded in zip(("train", "t10k"), data.load_fashion_mnist(folder)):
        images, labels = small[part, "images-idx3"], small[part, "labels-idx1"]
        assert type(loaded) is data.ArrayDataset
        x, y = loaded.arrays
        assert (x.dtype, x.shape) == (np.float32, (len(images), 1, 4, 5))
        assert (y.dtype, y.shape) == (np.int64, (len(labels),))
        assert (x.min(), x.max()) == (0, 1)
        np.testing.assert_array_equal(x[:, 0], images.astype(np.float32) / np.float32(255))
        np.testing.assert_array_equal(y, labels)


def test_the_real_files():
    if not os.path.isdir(fashion_mnist.FOLDER):
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    for part, n in zip(data.load_fashion_mnist(), (60000, 10000)):
        x, y = part.arrays
        assert (x.shape, x.dtype, y.shape, y.dtype) == ((n, 1, 28, 28), np.float32, (n,), np.int64)
        assert (x.min(), x.max()) == (0, 1)
        np.testing.assert_array_equal(np.bincount(y), np.full(10, n // 10))
    train_set, _ = data.load_fashion_mnist()
    middle = [train_set.arrays[0][train_set.arrays[1] == label].mean(axis=0) for label in range(10)]
    brightness = {name: float(image.mean()) for name, image in zip(fashion_mnist.CLASSES, middle)}
    darkest = sorted(brightness, key=brightness.__getitem__)[:3]
    assert set(darkest) == {"Sandal", "Sneaker", "Trouser"}, "few pixels belong to these"


def test_the_arrays_are_held_once_and_cannot_be_spoilt(folder):
    first, again = data.load_fashion_mnist(folder), data.load_fashion_mnist(str(folder))
    for one, other in zip(first, again):
        assert one is not other
        for a, b in zip(one.arrays, other.arrays):
            assert a is b
            with pytest.raises(ValueError, match="read-only"):
                a[0] = 0
    x, _ = first[0].take(np.array([1, 0]))
    x += 1  # a batch is the caller's own


def test_a_changed_file_is_read_anew(folder, small, suffix):
    data.load_fashion_mnist(folder)
    path = folder / (NAMES["train", "labels-idx1"] + suffix)
    before = path.stat()
    flipped = small["train", "labels-idx1"][::-1]
    path.write_bytes(idx(flipped) if not suffix else gzip.compress(idx(flipped)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    train_set, _ = data.load_fashion_mnist(folder)
    np.testing.assert_array_equal(train_set.arrays[1], flipped)


def test_no_folder_no_files(tmp_path, monkeypatch):
    how = r"apt-get install dataset-fashion-mnist.*zalandoresearch/fashion-mnist.*load_fashion_mnist\(folder="
    with pytest.raises(FileNotFoundError, match=f"there is no folder {re.escape(str(tmp_path))}/nowhere: .*{how}"):
        data.load_fashion_mnist(tmp_path / "nowhere")
    monkeypatch.setattr(fashion_mnist, "FOLDER", str(tmp_path / "package"))
    with pytest.raises(FileNotFoundError, match=f"there is no folder {re.escape(str(tmp_path))}/package: .*{how}"):
        data.load_fashion_mnist()
    with pytest.raises(FileNotFoundError, match=f"lacks {', '.join(f'{n}.gz' for n in NAMES.values())}: .*{how}"):
        data.load_fashion_mnist(tmp_path)


@pytest.mark.parametrize("key", NAMES)
def test_a_missing_file_is_named(folder, suffix, key):
    (folder / (NAMES[key] + suffix)).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {NAMES[key]}.gz: "):
        data.load_fashion_mnist(folder)


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_parts_that_do_not_fit(folder, small, suffix, part):
    images, labels = small[part, "images-idx3"], small[part, "labels-idx1"].copy()
    labels_path, images_path = (folder / (NAMES[part, kind] + suffix) for kind in ("labels-idx1", "images-idx3"))

    def refused(path, content, message):
        kept = path.read_bytes()
        write(path, content)
        with pytest.raises(ValueError, match=message):
            data.load_fashion_mnist(folder)
        path.write_bytes(kept)

    n = len(labels)
    refused(
        labels_path,
        idx(labels[:-1]),
        f"{images_path.name} holds {n} images, but .*{labels_path.name} {n - 1} labels: they belong to different",
    )
    refused(images_path, idx(labels), f"{images_path.name} should begin with .*0x00000803, found 0x00000801")
    refused(labels_path, idx(images), f"{labels_path.name} should begin with .*0x00000801, found 0x00000803")
    refused(images_path, idx(images[:0]), f"{images_path.name} is empty")
    refused(
        images_path, idx(images[:, 1:]), "hold images of ([34]) × 5 and of (?!\\1)[34] × 5: they are no one set"
    )
    labels[1] = 10
    refused(labels_path, idx(labels), f"{labels_path.name} holds label 10 at index 1: valid are 0 to 9")
    data.load_fashion_mnist(folder)  # what was refused was not kept


def test_classes():
    assert fashion_mnist.CLASSES[0] == "T-shirt/top"
    assert len(set(fashion_mnist.CLASSES)) == 10
    assert Path(fashion_mnist.FOLDER).is_absolute()
