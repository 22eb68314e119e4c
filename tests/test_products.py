"""Matrix products with rounded factors, and what cuBLAS would be told of them."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from minidp import backend, data, nn, optim, parallel
from minidp.backend import cublas, products
from minidp.comm import comm_self
from minidp.nn import functional as F
from tests import device_double, host_cuda
from tests.device_double import DeviceArray, xp

PRECISIONS = ("tf32", "bfloat16", "float16")


# -- rounding ------------------------------------------------------------------------------------------------


def nearest(x: float, bits: int) -> float:
    """The nearest number with so many bits of fraction, ties to even; by arithmetic in float64, which is exact."""
    if not np.isfinite(x) or x == 0:
        return x
    unit = 2.0 ** (np.floor(np.log2(abs(x))) - bits)
    return float(np.rint(x / unit) * unit)


@pytest.mark.parametrize(("to", "bits"), [("tf32", 10), ("bfloat16", 7)])
def test_rounding_is_to_nearest_ties_to_even(to, bits):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(4000) * 2.0 ** rng.integers(-60, 60, 4000)).astype(np.float32)
    ties = np.float32(1) + np.arange(8, dtype=np.float32) * np.float32(2.0 ** -(bits + 1))
    x = np.concatenate([x, ties, -ties]).astype(np.float32)
    assert products.rounded(x, to).tolist() == [nearest(float(v), bits) for v in x]


@pytest.mark.parametrize("to", PRECISIONS)
def test_what_is_not_finite_and_zeros_stay(to):
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32)
    y = products.rounded(x, to)
    assert np.isnan(y[0])
    assert y[1:].tobytes() == x[1:].tobytes()


def test_float16_has_its_own_range():
    assert products.rounded(np.array([1e-9, 1e6], np.float32), "float16").tolist() == [0, np.inf]


@pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))
def test_the_kernel_rounds_as_the_plain_code():
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    x = bits.view(np.float32)
    with device_double.kernels():
        half = cublas._fewer(xp.asarray(x), "bfloat16", 1.0, xp).get()
        scaled = cublas._fewer(xp.asarray(x), "bfloat16", 4.0, xp).get()
    wide = (half.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        expected, expected_scaled = (
            products.rounded(x, "bfloat16"),
            products.rounded(x * np.float32(4), "bfloat16"),
        )
    assert np.array_equal(wide, expected, equal_nan=True)
    assert np.array_equal((scaled.astype(np.uint32) << 16).view(np.float32), expected_scaled, equal_nan=True)


# -- products ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", PRECISIONS)
def test_a_product_is_that_of_rounded_factors(to):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((3, 4, 5), (5, 6)))
    plain = backend.matmul(a, b)
    assert plain.tobytes() == (a @ b).tobytes()
    with backend.matmul_precision(to):
        found = backend.matmul(a, b)
        assert found.tobytes() == (products.rounded(a, to) @ products.rounded(b, to)).tobytes()
        assert not np.array_equal(found, plain)
        assert backend.matmul(a.astype(np.float64), b.astype(np.float64)).dtype == np.float64
        with backend.matmul_precision("float32"):
            assert backend.matmul(a, b).tobytes() == plain.tobytes()
        out = np.empty((3, 4, 6), np.float32)
        assert backend.matmul(a, b, out=out) is out
        assert out.tobytes() == found.tobytes()
    assert backend.matmul(a, b).tobytes() == plain.tobytes()


def test_gradients_that_float16_loses_are_kept_by_their_scale():
    gradient, w = np.full((2, 3), 2.0**-27, np.float32), np.ones((3, 2), np.float32)
    with backend.matmul_precision("float16"):
        assert not backend.matmul(gradient, w, gradient=0).any()
    with backend.matmul_precision("float16", gradient_scale=1024):
        assert (backend.matmul(gradient, w, gradient=0) == np.float32(3 * 2.0**-27)).all()
        assert (backend.matmul(w.T, gradient.T, gradient=1) == np.float32(3 * 2.0**-27)).all()
        assert not backend.matmul(gradient, w).any(), "what is no gradient is not scaled"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("int8",), "unknown precision 'int8'"), (("float16", 3), "power of two"), (("float16", -2), "power of two")],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message), backend.matmul_precision(*arguments):
        pass


@pytest.mark.parametrize("to", PRECISIONS)
def test_training_with_rounded_factors_learns_and_keeps_float32(to):
    train_set, test_set = data.load_digits()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10), seed=0)
    strategy = parallel.DataParallel(model, optim.SGD(model.parameters(), lr=0.3), comm_self())
    loader = data.DataLoader(train_set, batch_size=64, shuffle=True, seed=0)
    with backend.matmul_precision(to, gradient_scale=256):
        for epoch in range(3):
            for x, y in loader.epoch(epoch):
                strategy.forward_backward(x, y, F.cross_entropy)
                strategy.step()
    state = strategy.state_dict()
    assert all(array.dtype == np.float32 for array in state.values())
    x, y = test_set[:]
    assert (model(x).numpy().argmax(axis=1) == y).mean() > 0.85
    strategy.release()


# -- what cuBLAS is told -------------------------------------------------------------------------------------


KINDS = {0: np.float32, 1: np.float64, 2: np.float16, 14: np.uint16}


def columns_first(address, kind, ld, stride, batch, rows, columns, transposed):
    """What cuBLAS reads there: op(matrix), for each of the batch."""
    stored = (columns, rows) if transposed else (rows, columns)
    count = (batch - 1) * stride + ld * stored[1]
    dtype = np.dtype(KINDS[kind])
    flat = np.frombuffer((ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype)
    for i in range(batch):
        matrix = flat[i * stride : i * stride + ld * stored[1]].reshape(stored[1], ld)[:, : stored[0]].T
        if kind == 14:
            matrix = (matrix.astype(np.uint32) << 16).view(np.float32)
        yield matrix.T if transposed else matrix


def gemm(handle, op_a, op_b, m, n, k, alpha, a, a_kind, lda, a_stride, b, b_kind, ldb, b_stride, beta,
         c, c_kind, ldc, c_stride, batch, compute, algo):  # fmt: skip
    """``cublasGemmStridedBatchedEx`` by its documentation: column-major, C = alpha op(A) op(B) + beta C."""
    assert (handle, algo) == (77, -1)
    number = ctypes.c_double if compute == 70 else ctypes.c_float
    alpha, beta = (number.from_address(at).value for at in (alpha, beta))
    assert beta == 0
    lefts = columns_first(a, a_kind, lda, a_stride, batch, m, k, op_a)
    rights = columns_first(b, b_kind, ldb, b_stride, batch, k, n, op_b)
    dtype = np.dtype(KINDS[c_kind])
    target = np.frombuffer((ctypes.c_char * (batch * c_stride * dtype.itemsize)).from_address(c), dtype)
    for i, (left, right) in enumerate(zip(lefts, rights)):
        if compute == 77:
            left, right = (products.rounded(np.ascontiguousarray(x), "tf32") for x in (left, right))
        wide = np.float64 if compute == 70 else np.float32
        result = alpha * (left.astype(wide) @ right.astype(wide))
        target[i * c_stride : i * c_stride + m * n].reshape(n, ldc)[:] = result.T
    calls.append((compute, a_kind))


calls: list = []


@pytest.fixture
def fake(monkeypatch):
    """The double as CuPy, with a cuBLAS that reads addresses."""
    calls.clear()
    library = SimpleNamespace(gemmStridedBatchedEx=gemm)
    for name in ("cupy_backends", "cupy_backends.cuda"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", SimpleNamespace(cublas=library))
    module = SimpleNamespace(**vars(xp))
    module.cuda = SimpleNamespace(device=SimpleNamespace(get_cublas_handle=lambda: 77))
    module.empty = lambda shape, dtype: DeviceArray(np.full(shape, 77, dtype))
    return module


def factors(shape_a, shape_b, dtype, turned=()):
    rng = np.random.default_rng(0)
    arrays = []
    for i, shape in enumerate((shape_a, shape_b)):
        if i in turned:
            arrays.append(rng.standard_normal((*shape[:-2], shape[-1], shape[-2])).astype(dtype).swapaxes(-1, -2))
        else:
            arrays.append(rng.standard_normal(shape).astype(dtype))
    return arrays


SHAPES = [
    ((3, 4), (4, 5)),
    ((2, 3, 4), (2, 4, 5)),
    ((2, 3, 1, 4), (2, 3, 4, 5)),
    ((2, 3, 4), (4, 5)),
    ((3, 4), (2, 4, 5)),
    ((2, 1, 3, 4), (3, 4, 1)),
]


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("turned", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_layout_is_told_as_it_is(fake, shapes, turned, dtype):
    a, b = factors(*shapes, dtype, turned)
    found = cublas.product(DeviceArray(a), DeviceArray(b), None, None, None, fake)
    assert np.allclose(found._host, a @ b, rtol=1e-5 if dtype == "float32" else 1e-12)
    assert calls[0][0] == (68 if dtype == "float32" else 70)


def test_heads_of_attention_are_copied_and_right(fake):
    packed = np.random.default_rng(0).standard_normal((2, 5, 3, 4)).astype(np.float32)
    q = packed.transpose(0, 2, 1, 3)
    found = cublas.product(DeviceArray(q), DeviceArray(q.swapaxes(-1, -2)), None, None, None, fake)
    assert np.allclose(found._host, q @ q.swapaxes(-1, -2), rtol=1e-5)


@pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))
@pytest.mark.parametrize("to", PRECISIONS)
@pytest.mark.parametrize("gradient", [None, 0, 1])
def test_fewer_bits_are_asked_for(fake, to, gradient):
    fake.RawModule = host_cuda.RawModule
    a, b = factors((2, 3, 4), (2, 4, 5), "float32", (1,))
    found = cublas.product(DeviceArray(a), DeviceArray(b), None, products.Precision(to, 16.0), gradient, fake)
    with backend.matmul_precision(to, 16.0):
        expected = backend.matmul(a, b, gradient=gradient)
    assert np.allclose(found._host, expected, rtol=1e-6, atol=1e-7)
    assert not np.allclose(found._host, a @ b, rtol=1e-6, atol=1e-7)
    assert calls == [{"tf32": (77, 0), "bfloat16": (68, 14), "float16": (68, 2)}[to]]


def test_outputs(fake):
    a, b = factors((3, 4), (4, 5), "float32")
    for out in (np.empty((3, 5), np.float32), np.empty((5, 3), np.float32).T):
        target = DeviceArray(out)
        assert cublas.product(DeviceArray(a), DeviceArray(b), target, None, None, fake) is target
        assert np.allclose(out, a @ b, rtol=1e-5)
    with pytest.raises(ValueError, match="4 columns, 3 rows"):
        cublas.product(DeviceArray(a), DeviceArray(a), None, None, None, fake)
