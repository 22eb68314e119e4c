"""Compressors on arrays that refuse to mix with NumPy, as a GPU's do: same code, same bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from minidp.compress import Pruned, bits, get, magnitude_masks
from minidp.compress.low_rank import Alone
from minidp.compress.sparsify import largest_positions
from tests import device_double
from tests.device_double import DeviceArray, xp
from tests.test_compress import DTYPES, SPECS, arrays_of, normal, state_bytes
from tests.test_compress_exchange import Memory, gradient, together

each = pytest.mark.parametrize("spec", [*SPECS, "topk:0.01", "topk:0.001+ef"])


def on_device(array: np.ndarray) -> DeviceArray:
    """In the same layout: what is transposed on the host is so on the device."""
    return DeviceArray(array)


def host(array: Any) -> np.ndarray:
    assert type(array) is DeviceArray
    return xp.asnumpy(array)


def same(one: np.ndarray, other: Any) -> None:
    back = host(other)
    assert (back.shape, back.dtype) == (one.shape, one.dtype)
    assert back.tobytes() == one.tobytes()


# -- the double itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda d: xp.argsort(d, kind="quicksort"),
        lambda d: xp.sort(d, kind="heapsort"),
        lambda d: xp.repeat(d, xp.asarray(np.array([1, 2, 3]))),
        lambda d: xp.repeat(d, np.array([1, 2, 3])),
        lambda d: xp.unpackbits(d.astype(np.uint8), count=3),
        lambda d: xp.packbits(d.astype(np.uint8), axis=0),
        lambda d: xp.packbits(d),  # of floating point
        lambda d: xp.concatenate([d, np.ones(3)]),
        lambda d: xp.bincount(np.arange(3)),
        lambda d: d / np.asarray(2.0),
        lambda d: d << np.ones(3, int),
        lambda d: np.array([d.sum()], np.float32),
        lambda d: xp.clip(d, np.zeros(3), 1),
        lambda d: d.std(where=True),
    ],
)
def test_the_double_refuses_what_cupy_does(call: Any) -> None:
    with pytest.raises((TypeError, ValueError, AssertionError, AttributeError)):
        call(xp.asarray(np.ones(3)))


def test_partition_says_only_what_is_at_its_place() -> None:
    d = xp.asarray(np.array([5.0, 1, 4, 2, 3]))
    for kth in range(5):
        out = host(xp.partition(d, kth))
        assert out[kth] == kth + 1
        assert set(out[:kth]) == set(range(1, kth + 1))


# -- all compressors --------------------------------------------------------------------------------------------


@each
def test_payloads_and_results_have_the_bits_of_numpy(spec: str) -> None:
    for dtype in DTYPES:
        one, other = get(spec), get(spec)
        for name, array in arrays_of(dtype).items():
            device = on_device(array)
            for _ in range(2):
                want, got = one.compress(array, name), other.compress(device, name)
                assert got.nbytes == want.nbytes
                for a, b in zip(want.arrays, got.arrays, strict=True):
                    same(a, b)
                same(np.asarray(one.decompress(want)), other.decompress(got))


@each
def test_exchange_has_the_bits_of_numpy(spec: str) -> None:
    def work(rank: int, reducer: Memory, device: bool) -> Any:
        compressor, found = get(spec, rank=rank), []
        for call in range(2):
            for shape in ((0,), (3,), (300,), (30, 20)):
                array = gradient(rank, call, shape)
                total = compressor.exchange(on_device(array) if device else array, f"{shape}", reducer)
                found.append(host(total) if device else total)
        return found

    want = together(2, lambda rank, reducer: work(rank, reducer, False))
    got = together(2, lambda rank, reducer: work(rank, reducer, True))
    assert [[a.tobytes() for a in of_rank] for of_rank in got] == [
        [a.tobytes() for a in of_rank] for of_rank in want
    ]


@each
def test_zeros_denormals_and_large_numbers(spec: str) -> None:
    for array in (
        np.zeros((30, 20), np.float32),
        np.full(9, 1e-45, np.float32),
        np.array([1e17, -1e-17, 0, 3] * 500, np.float32),
    ):
        if spec.startswith("fp16") and array.max() > 65504:
            with pytest.raises(ValueError, match=r"w holds 1e\+17, beyond float16"):
                get(spec).compress(on_device(array), "w")
            continue
        one, other = get(spec), get(spec)
        for _ in range(2):
            want, got = one.compress(array, "w"), other.compress(on_device(array), "w")
            same(one.decompress(want), other.decompress(got))


@each
def test_what_is_refused(spec: str) -> None:
    array = np.ones((4, 5), np.float32)
    array[2, 3] = np.nan
    with pytest.raises(ValueError, match="w is nan at element 13"):
        get(spec).compress(on_device(array), "w")
    with pytest.raises(TypeError, match="w is int64"):
        get(spec).compress(on_device(np.ones(3, np.int64)), "w")


@each
def test_state_is_on_the_host_and_goes_on_anywhere(spec: str) -> None:
    """Saved on a device and loaded beside the host, or the other way round: the next have the same bits."""
    arrays = [normal((30, 20), seed=call) for call in range(4)]
    on_host, device = get(spec), get(spec)
    for array in arrays[:2]:
        on_host.compress(array, "w")
        device.compress(on_device(array), "w")
    assert all(type(value) is np.ndarray for value in device.state_dict().values())
    assert state_bytes(device) == state_bytes(on_host)
    back, forth = get(spec), get(spec)
    back.load_state_dict(device.state_dict())
    forth.load_state_dict(on_host.state_dict())
    for array in arrays[2:]:
        want = on_host.compress(array, "w")
        for a, b, c in zip(
            want.arrays, back.compress(array, "w").arrays, forth.compress(on_device(array), "w").arrays
        ):
            assert a.tobytes() == b.tobytes() == host(c).tobytes()


@each
def test_pruned(spec: str) -> None:
    weights = {"w": normal((30, 20)), "b": normal(30)}
    masks = magnitude_masks({name: on_device(a) for name, a in weights.items()}, 0.3)
    assert all(type(mask) is np.ndarray for mask in masks.values())
    assert (masks["w"] == magnitude_masks(weights, 0.3)["w"]).all()
    one, other = Pruned(get(spec), masks), Pruned(get(spec), masks)
    for call in range(2):
        for name, w in weights.items():
            array = normal(w.shape, seed=call)
            want, got = one.compress(array, name), other.compress(on_device(array), name)
            same(one.decompress(want), other.decompress(got))
            same(one.exchange(array, f"{name}", Alone()), other.exchange(on_device(array), f"{name}", Alone()))


@pytest.mark.parametrize("k", [1, 30, 300, 3000, 9999, 10000])
def test_top_k_finds_the_same(k: int) -> None:
    for array in (normal(10000), np.ones(10000, np.float32), np.arange(10000.0) % 7):
        same(largest_positions(array, k), largest_positions(on_device(array), k))


def test_bits_and_positions() -> None:
    for width in range(1, 9):
        codes = np.random.default_rng(width).integers(0, 2**width, 77).astype(np.uint8)
        data = bits.pack(on_device(codes), width)
        same(bits.pack(codes, width), data)
        same(codes, bits.unpack(data, width, 77))
    for d, k in ((100, 0), (100, 100), (100, 30), (3000, 40), (200_000, 7)):
        where = np.sort(np.random.default_rng(d).choice(d, k, replace=False))
        data = bits.pack_positions(on_device(where), d)
        same(bits.pack_positions(where, d), data)
        same(where, bits.unpack_positions(data, k, d))


def test_few_scalars_are_read() -> None:
    """Each makes a GPU wait: a handful a call, however long the array is."""
    for spec in SPECS:
        counts = []
        for size in (1000, 300_000):
            compressor, array = get(spec), on_device(normal(size))
            before = device_double.scalar_reads
            compressor.decompress(compressor.compress(array, "w"))
            counts.append(device_double.scalar_reads - before)
        assert counts[0] <= 8, spec
        assert counts[1] <= 30, spec  # some work in chunks of 2¹⁷
