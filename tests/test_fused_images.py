"""Convolution, pooling and batch normalisation as kernels: equal to the plain ones, in any order of threads."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from minidp import nn, optim
from minidp.autograd import Tensor, no_grad
from minidp.autograd.images import chwn, nchw
from minidp.backend import matmul_precision, meter
from minidp.backend.kernels import Launcher
from minidp.nn import functional as F
from minidp.nn import fused_batch_norm, fused_images, normalization
from minidp.nn.fused_batch_norm import Lying, channel_sums
from tests import device_double, host_cuda
from tests.device_double import DeviceArray, xp
from tests.test_device_double import to_device
from tests.test_fused import assert_alike_beside, assert_close, both_ways, dtypes
from tests.test_nn_images import SMALL

pytestmark = pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))


@pytest.fixture(autouse=True)
def _kernels():
    with device_double.kernels():
        yield


TOLERANCE = {"float32": 1e-6, "float64": 1e-14}  # of the largest number of an array
IMAGES = [*((x, w, s, p) for x, w, s, p in SMALL if 0 not in x), ((3, 2, 9, 8), (5, 2, 3, 3), (2, 2), (1, 1))]
IMAGES += [((33, 3, 7, 6), (4, 3, 3, 2), (1, 2), (1, 0)), ((2, 3, 8, 9), (4, 3, 1, 1), (1, 1), (0, 0))]
POOLS = [  # images, window, stride, padding
    ((2, 3, 4, 6), (2, 2), (2, 2), (0, 0)),
    ((3, 2, 7, 5), (3, 2), (2, 1), (1, 1)),
    ((1, 1, 5, 5), (1, 1), (1, 1), (0, 0)),
    ((2, 6, 9, 8), (5, 3), (3, 2), (2, 1)),
    ((2, 1, 6, 7), (2, 3), (3, 4), (1, 0)),
    ((33, 2, 5, 4), (5, 4), (1, 1), (0, 0)),
    ((1, 2, 20, 17), (17, 17), (2, 1), (8, 3)),  # more pixels than a byte has numbers
]
BATCHES = [  # (n, c, ...)
    (2, 1), (7, 3), (300, 33), (3000, 5), (2, 3, 4), (2, 2, 3, 5), (5, 3, 8, 9), (1, 4, 70, 70), (40, 1, 9, 9),
]  # fmt: skip


def batch_norm(x, weight, bias, **options):
    return normalization.BatchNorm.apply(x, weight, bias, **options)


def given_moments(x, weight, bias):
    """As in evaluation."""
    c = x.shape[1]
    return batch_norm(x, weight, bias, moments=(np.linspace(-1, 1, c), np.linspace(0.5, 2, c)))


SUMS = {  # what adds up in another order
    "conv2d": [
        (partial(F.conv2d, stride=s, padding=p), shapes)
        for x, w, s, p in IMAGES for shapes in ([x, w, w[:1]], [x, w])
    ],
    "batch_norm": [(f, [x, x[1:2], x[1:2]]) for x in BATCHES for f in (batch_norm, given_moments)],
}  # fmt: skip
EXACT = {
    name: [(partial(f, kernel_size=k, stride=s, padding=p), [x]) for x, k, s, p in POOLS]
    for name, f in (("max_pool2d", F.max_pool2d), ("avg_pool2d", F.avg_pool2d))
}
TABLE = [
    pytest.param(f, s, n in EXACT, id=f"{n} {i}")
    for n, cases in (SUMS | EXACT).items()
    for i, (f, s) in enumerate(cases)
]


def samples_innermost(x):
    """The same numbers, lying as convolutions leave them."""
    return nchw(type_of(x).ascontiguousarray(chwn(x))) if x.ndim == 4 else x


def channels_innermost(x):
    axes = (0, *range(2, x.ndim), 1)
    return x.transpose(*axes).copy().transpose(*np.argsort(axes).tolist()) if x.ndim > 1 else x


def with_gaps(x):
    return xp.concatenate([x[..., None], x[..., None]], axis=-1)[..., 0]


def type_of(x):
    return xp if isinstance(x, DeviceArray) else np


def arrays_of(shapes, dtype, seed=0):
    """Few bits: many pixels are equal, and sums are the more exact."""
    rng = np.random.default_rng(seed)
    return [rng.integers(-9, 10, shape).astype(dtype) / 4 for shape in shapes]


@dtypes
@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
@pytest.mark.parametrize("turn", [samples_innermost, channels_innermost, with_gaps, lambda x: x])
def test_equals_the_plain_operation(function, shapes, exact, dtype, turn):
    arrays = arrays_of(shapes, dtype)
    found, node = both_ways(function, arrays, xp, turn)
    expected, plain = both_ways(function, arrays, np)
    assert type(node) is type(plain).fused
    assert all(array.dtype == dtype for array in found)
    if exact:
        for a, b in zip(found, expected, strict=True):
            assert np.array_equal(a, b)
    else:  # sums of float32 have rounding errors of their own: those of NumPy must not count
        expected, _ = both_ways(function, [array.astype("float64") for array in arrays], np)
        typical = np.sqrt(
            arrays[0].size / shapes[0][1]
        )  # of a sum over a channel of numbers about 1: it may cancel
        for a, b in zip(found, expected, strict=True):
            assert np.abs(a - b).max() <= TOLERANCE[dtype] * max(np.abs(b).max(), b.ndim == 1 and typical)


@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
def test_bits_do_not_depend_on_the_order_of_threads(function, shapes, exact):
    bits = set()
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffle", 1)):
        with host_cuda.order(order, seed):
            found, _ = both_ways(function, [np.pi * a for a in arrays_of(shapes, "float32")], xp)
        bits.add(b"".join(array.tobytes() for array in found))
    assert len(bits) == 1


@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
def test_few_threads_do_the_same(function, shapes, exact, monkeypatch):
    """A block that takes all pixels of all channels: each thread goes on to others."""
    arrays = arrays_of(shapes, "float32")
    expected, _ = both_ways(function, arrays, xp)
    monkeypatch.setattr(fused_images, "MOST_BLOCKS", 1)
    found, _ = both_ways(function, arrays, xp)
    assert [a.tobytes() for a in found] == [b.tobytes() for b in expected]


LAUNCHED = {
    "conv2d": ["patches", "put_with_bias", "channel_sum", "pixels"],
    "pointwise": ["put_with_bias", "channel_sum"],
    "max_pool2d": ["max_pool", "max_pool_backward"],
    "avg_pool2d": ["avg_pool", "avg_pool_backward"],
    "batch_norm": ["channel_sum", "channel_squares", "normalize", "channel_slopes", "normalize_backward"],
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_what_is_launched_and_nothing_else(name, monkeypatch):
    launched = []
    blocks = Launcher.blocks
    monkeypatch.setattr(Launcher, "blocks", lambda self, k, *args: launched.append(k) or blocks(self, k, *args))
    pointwise = F.conv2d, [(2, 3, 4, 5), (6, 3, 1, 1), (6,)]
    function, shapes = pointwise if name == "pointwise" else (SUMS | EXACT)[name][0]
    both_ways(function, arrays_of(shapes, "float32"), xp)
    assert sorted(launched) == sorted(LAUNCHED[name])


@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_where_it_is_in_the_plain_operation(function, shapes, exact, special):
    assert_alike_beside(special, function, lambda: arrays_of(shapes, "float64"))


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
@pytest.mark.parametrize(("shape", "window", "stride", "padding"), POOLS)
def test_gradients_of_pooling_that_are_not_finite(pool, shape, window, stride, padding):
    (image,) = arrays_of([shape], "float32")
    results = []
    for place in (np, xp):
        x = Tensor(place.asarray(image), requires_grad=True)
        y = pool(x, window, stride, padding)
        grad = np.ones(y.shape, "float32")
        grad.ravel()[[0, -1]] = np.inf, np.nan
        with np.errstate(all="ignore"):
            y.backward(place.asarray(grad))
        results.append(x.grad.numpy())
    assert np.array_equal(*results, equal_nan=True)


@pytest.mark.parametrize("window", [(1, 255), (16, 16), (1, 257), (3, 300)])
def test_the_last_of_many_pixels_wins(window):
    x = Tensor(xp.arange(window[0] * window[1], dtype="float32").reshape(1, 1, *window), requires_grad=True)
    F.max_pool2d(x, window).backward(xp.ones((1, 1, 1, 1), dtype="float32"))
    assert np.flatnonzero(x.grad.numpy()).tolist() == [x.data.size - 1]


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16"])
def test_pixels_of_any_kind(pool, dtype):
    x = np.arange(48).astype(dtype).reshape(2, 2, 3, 4)
    a, b = (pool(place.asarray(x), 2, padding=1) for place in (xp, np))
    assert a.dtype == b.dtype
    assert np.array_equal(a.numpy(), b.numpy())


def test_images_that_are_bytes_and_half_precision_weights():
    image = np.random.default_rng(0).integers(0, 255, (2, 3, 5, 5), dtype="uint8")
    for dtype, tolerance in (("float32", 1e-6), ("float16", 2e-3)):
        w, b = arrays_of([(4, 3, 3, 3), (4,)], dtype)
        x = image if dtype == "float32" else image // 64
        y, expected = (F.conv2d(x, place.asarray(w), place.asarray(b)) for place in (xp, np))
        assert y.dtype == dtype
        assert_close([y.numpy()], [expected.numpy()], tolerance)


@dtypes
@pytest.mark.parametrize(("function", "shapes"), [
    (F.conv2d, [(0, 2, 4, 5), (3, 2, 3, 2), (3,)]),
    (partial(F.max_pool2d, kernel_size=2), [(0, 2, 4, 4)]),
    (partial(F.avg_pool2d, kernel_size=2), [(2, 0, 4, 4)]),
    (batch_norm, [(0, 3), (3,), (3,)]),
    (batch_norm, [(0, 3, 2, 2), (3,), (3,)]),
])  # fmt: skip
def test_nothing_at_all(function, shapes, dtype):
    arrays = arrays_of(shapes, dtype)
    found, _ = both_ways(function, arrays, xp)
    expected, _ = both_ways(function, arrays, np)
    assert [a.tobytes() for a in found] == [b.tobytes() for b in expected]


@pytest.mark.parametrize(("x", "w", "b"), [
    ((2, 3, 4, 4), (2, 2, 3, 3), (2,)), ((2, 2, 4, 4), (2, 2, 3, 3), (1,)), ((2, 2, 4, 4), (2, 2, 5, 3), (2,)),
    ((2, 4, 4), (2, 2, 3, 3), (2,)), ((2, 2, 4, 4), (2, 2, 0, 3), (2,)),
])  # fmt: skip
def test_what_does_not_fit_is_refused_as_ever(x, w, b):
    messages = []
    for place in (xp, np):
        with pytest.raises(ValueError, match="conv2d") as error:
            F.conv2d(*(place.zeros(shape) for shape in (x, w, b)))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


# --- convolution: pieces, and what is kept ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("piece", [1, 3000, 10**6])
@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize(("x", "w", "stride", "padding"), IMAGES)
def test_pieces_and_what_is_kept_change_nothing_but_roundings(
    x, w, stride, padding, piece, kept, bias, monkeypatch
):
    monkeypatch.setattr(fused_images, "PIECE_BYTES", piece)
    monkeypatch.setattr(fused_images, "KEPT_BYTES", kept)
    function = partial(F.conv2d, stride=stride, padding=padding)
    arrays = arrays_of([x, w, w[:1]][: 2 + bias], "float64")
    found, _ = both_ways(function, arrays, xp)
    expected, _ = both_ways(function, arrays, np)
    assert_close(found, expected, 1e-14)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("kept", [0, 10**6])
def test_only_gradients_that_are_needed(wanted, kept, monkeypatch):
    monkeypatch.setattr(fused_images, "KEPT_BYTES", kept)
    for function, shapes in (
        (F.conv2d, [(2, 3, 5, 5), (4, 3, 3, 3), (4,)]),
        (F.conv2d, [(2, 3, 5, 5), (4, 3, 1, 1), (4,)]),
        (batch_norm, [(2, 3, 5, 5), (3,), (3,)]),
        (given_moments, [(2, 3, 5, 5), (3,), (3,)]),
    ):
        arrays = arrays_of(shapes, "float64")
        expected, _ = both_ways(function, arrays, np)
        before = [array.copy() for array in arrays]
        tensors = [Tensor(xp.asarray(a), requires_grad=bool(wanted >> i & 1)) for i, a in enumerate(arrays)]
        y = function(*tensors)
        y.backward(xp.asarray(np.random.default_rng(9).standard_normal(y.shape)))
        for i, tensor in enumerate(tensors):
            assert np.array_equal(tensor.numpy(), before[i]), "inputs belong to others"
            if tensor.requires_grad:
                assert_close([tensor.grad.numpy()], [expected[1 + i]], 1e-14)
            else:
                assert tensor.grad is None


def test_convolutions_multiply_in_the_precision_asked_for():
    """What multiplies are weights and pixels: biases and their gradients keep all their bits."""
    x, w, b = (1 + 2.0**-12 * np.ones(shape, "float32") for shape in ((1, 1, 2, 2), (1, 1, 2, 2), (1,)))
    with matmul_precision("bfloat16"):
        found, _ = both_ways(F.conv2d, [x, w, b], xp)
    grad = np.random.default_rng(9).standard_normal((1, 1, 1, 1)).astype("float32")
    assert found[0] == 4 + b
    assert found[3] == grad.ravel()
    assert not np.array_equal(found[1], grad * w)


@pytest.mark.parametrize("piece", [1, 10**6])
@pytest.mark.parametrize("window", [1, 3])
def test_small_gradients_are_scaled_before_they_are_rounded(window, piece, monkeypatch):
    monkeypatch.setattr(fused_images, "PIECE_BYTES", piece)
    x, w = arrays_of([(2, 3, 5, 5), (4, 3, window, window)], "float32")
    tensors = [Tensor(xp.asarray(array), requires_grad=True) for array in (x, w)]
    y = F.conv2d(*tensors)
    with matmul_precision("float16", gradient_scale=2.0**30):
        y.backward(xp.full(y.shape, 2.0**-30, dtype="float32"))
    ones = [Tensor(array, requires_grad=True) for array in (x, w)]
    F.conv2d(*ones).sum().backward()
    for tensor, expected in zip(tensors, ones):
        assert np.array_equal(tensor.grad.numpy() * 2.0**30, expected.grad.numpy())


# --- batch normalisation ---


def test_arrays_are_seen_as_they_lie():
    """(outer, channels, inner) and nothing is copied, whatever the order."""
    seen = []
    for order in ((0, 1, 2, 3), (1, 2, 3, 0), (0, 2, 3, 1), (1, 0, 2, 3)):
        back = np.argsort(order).tolist()
        x = Tensor(xp.zeros([(6, 5, 4, 3)[axis] for axis in order]).transpose(*back), requires_grad=True)
        y = batch_norm(x, xp.ones(5), xp.zeros(5))
        assert y.shape == (6, 5, 4, 3)
        assert y.data.strides == x.data.strides
        seen.append(tuple(y.grad_fn.saved[-1]))
        y.backward(y.data)
        assert x.grad.data.strides == x.data.strides
    assert seen == [(6, 5, 12), (1, 5, 72), (72, 5, 1), (1, 5, 72)]


@pytest.mark.parametrize("lying", [
    (0, 3, 1), (1, 1, 1), (32, 10, 1), (1000, 33, 1), (1, 3, 5000), (7, 5, 31), (50, 2, 33), (3, 40, 1000),
    (60000, 1, 1), (1, 1, 60000), (2500, 3, 7),
])  # fmt: skip
def test_sums_of_channels(lying):
    """Whole numbers: any order gives the exact sums, and one that is left out or taken twice shows."""
    x = np.random.default_rng(0).integers(-9, 10, lying).astype("float32")
    out = xp.full(lying[1], np.nan, dtype="float32")
    kernels = fused_batch_norm.KERNELS.on(xp, out.dtype)
    channel_sums(kernels, "channel_sum", Lying(*lying), (xp.asarray(x),), (out,), xp)
    assert out.tolist() == x.sum(axis=(0, 2)).tolist()


def test_sums_are_cut_by_the_shape_into_pieces_that_fill_a_gpu():
    assert (Lying(1, 64, 10**6).wide, Lying(1, 64, 10**6).grid) == (1, (64, 16))
    assert (Lying(65536, 10, 1).wide, Lying(65536, 10, 1).grid) == (16, (1, 512))
    assert (Lying(128, 256, 1).wide, Lying(128, 256, 1).grid) == (32, (8, 2))
    assert Lying(1, 1, 1).grid == (1, 1)
    assert Lying(64, 4096, 49).grid == (4096, 1)


def test_a_variance_far_from_zero_does_not_cancel():
    x = (np.random.default_rng(0).standard_normal((500, 2)) + 1e4).astype("float32")
    y = batch_norm(xp.asarray(x), xp.ones(2, "float32"), xp.zeros(2, "float32")).numpy()
    assert np.abs(y.std(axis=0) - 1).max() < 1e-3


class Doubled:
    """A pool in which somebody else has the same samples, moved by 2: both together."""

    def __init__(self):
        self.told = []

    def moments(self, count, mean, var):
        self.told.append((count, mean, var))
        return 2 * count, mean + 1, var + 1

    def total(self, *sums):
        self.told.append(sums)
        return tuple(2 * s for s in sums)


@dtypes
def test_samples_of_others_and_what_is_recorded(dtype):
    arrays = arrays_of([(4, 3, 5, 2), (3,), (3,)], dtype)
    heard = {}
    for place in (xp, np):
        pool, record = Doubled(), []
        found, _ = both_ways(
            lambda *tensors: batch_norm(*tensors, pool=pool, record=lambda *m: record.append(m)),  # noqa: B023
            arrays,
            place,
        )
        ((own, together),) = record
        told = [x for m in (*pool.told, own, together) for x in m]
        assert [own[0], together[0]] == [40, 80]
        moments = [x for x in told if not isinstance(x, int)]
        assert {type(x) for x in moments} == {place.ndarray}
        heard[place is xp] = [*found, *(Tensor(x).numpy() for x in moments)]
    assert_close(heard[True], heard[False], 2 * TOLERANCE[dtype])


def test_running_statistics_may_move_before_backward():
    layer = nn.BatchNorm2d(3).eval()
    to_device(layer)
    layer.running_mean, layer.running_var = xp.zeros(3, "float32"), xp.ones(3, "float32")
    expected = None
    for move in (False, True):
        x = Tensor(xp.asarray(np.ones((2, 3, 2, 2), "float32")), requires_grad=True)
        y = layer(x)
        if move:
            layer.running_var[...] = 9
        y.sum().backward()
        expected = x.grad.numpy() if expected is None else expected
        assert np.array_equal(x.grad.numpy(), expected)


# --- models ---


def small_cnn():
    return nn.cnn((1, 8, 8), (4, 6), classes=3)


def with_batch_norm():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.MaxPool2d(3, 1, 1),
        nn.Flatten(), nn.Linear(24, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3), seed=0,
    )  # fmt: skip


@pytest.mark.parametrize("build", [small_cnn, with_batch_norm])
@pytest.mark.parametrize("slots", [True, False])
def test_training_equals_that_on_the_host(build, slots):
    device, host = build(), build()
    to_device(device, grads=slots)
    for module in device.modules():
        for name in module._buffers:
            setattr(module, name, xp.asarray(getattr(module, name)))
    rng = np.random.default_rng(0)
    rules = [optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in (device, host)]
    before = device_double.scalar_reads
    for _ in range(4):
        images, labels = rng.standard_normal((5, 1, 8, 8)).astype("float32"), rng.integers(0, 3, 5)
        for model, rule in zip((device, host), rules):
            rule.zero_grad()
            with meter() as m:
                F.cross_entropy(model(images), labels).backward()
            if model is device:
                assert (m.moves, m.to_device, m.to_host) == (2, images.nbytes + labels.nbytes, 0)
                if slots:
                    assert all(p.grad.data._host.base is p._grad_slot._host.base for p in model.parameters())
            rule.step()
    assert device_double.scalar_reads == before
    for a, b in zip(device.state_dict().values(), host.state_dict().values()):
        assert_close([Tensor(a).numpy()], [Tensor(b).numpy()], 1e-5)
    device.eval(), host.eval()
    with no_grad():
        assert_close([device(images).numpy()], [host(images).numpy()], 1e-5)


def test_between_convolutions_nothing_is_copied(monkeypatch):
    model = with_batch_norm()
    to_device(model)
    image = nchw(xp.asarray(np.zeros((1, 8, 8, 5), "float32")))
    copied = []
    original = xp.ascontiguousarray
    monkeypatch.setattr(xp, "ascontiguousarray", lambda x, *a: copied.append(x.shape) or original(x, *a))
    y = Tensor(image)
    for layer in list(model)[:8]:
        y = layer(y)
    y.backward(y.data)
    assert copied == []
