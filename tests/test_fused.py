"""Fused operations, their kernels run by `host_cuda`: equal to the plain ones on NumPy, in any order of threads.

Except where NumPy is the reference, everything here is on the double of a device, with kernels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from minidp.autograd import Tensor
from minidp.backend import array_module
from minidp.backend.kernels import Launcher
from minidp.nn import attention
from minidp.nn import functional as F
from minidp.nn.activations import ReLU
from tests import device_double, host_cuda
from tests.device_double import xp

pytestmark = pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))


@pytest.fixture(autouse=True)
def _kernels():
    with device_double.kernels():
        yield


TOLERANCE = {"float32": 1e-6, "float64": 1e-14}  # of the largest number of an array
ROWS = (1, 31, 32, 33, 1000, 5000)


def labelled(x):
    """Cross entropy with labels of its own."""
    return F.cross_entropy(x, np.random.default_rng(5).integers(0, x.shape[-1], x.shape[:-1]))


def embedded(weight, count=50):
    """Few tokens, each at many places, and some that occur nowhere."""
    return F.embedding(np.random.default_rng(6).integers(0, (len(weight.data) + 1) // 2, (count, 2)), weight)


def packed(x, causal=False):
    return attention.SelfAttention.apply(x, heads=2, causal=causal)


attend, causal = F.scaled_dot_product_attention, partial(F.scaled_dot_product_attention, causal=True)
SETS = [
    ((2, 3, 4), (2, 5, 4), (2, 5, 4)),
    ((33, 2), (40, 2), (40, 2)),
    ((1, 2, 70, 3), (1, 2, 65, 3), (1, 2, 65, 3)),
]
CASES = {
    "tanh": (F.tanh, [((7,),), ((2, 3, 257),), ((),)]),
    "gelu": (F.gelu, [((7,),), ((2, 3, 257),), ((),)]),
    "gelu tanh": (partial(F.gelu, approximate="tanh"), [((7,),), ((2, 3, 257),), ((),)]),
    "linear": (F.linear, [((5, 3), (4, 3), (4,)), ((2, 150, 3), (33, 3), (33,)), ((3,), (2, 3), (2,))]),
    "linear without bias": (F.linear, [((2, 15, 3), (33, 3))]),
    "layer_norm": (F.layer_norm, [((3, n), (n,), (n,)) for n in ROWS[1:]] + [((2, 70, 4, 3), (4, 3), (4, 3))]),
    "softmax": (F.softmax, [((2, 1, n),) for n in ROWS]),
    "log_softmax": (F.log_softmax, [((2, 1, n),) for n in ROWS]),
    "softmax along the first axis": (partial(F.softmax, axis=0), [((5, 3),)]),
    "log_softmax along the second of three axes": (partial(F.log_softmax, axis=1), [((2, 5, 3),)]),
    "attention": (attend, SETS),
    "causal attention": (causal, SETS),
    "self-attention": (packed, [((2, 5, 12),)]),
    "causal self-attention": (partial(packed, causal=True), [((2, 35, 12),)]),
    "cross_entropy": (labelled, [((3, n),) for n in ROWS] + [((2, 3, 4, 5),), ((600, 3),)]),
    "embedding": (embedded, [((5, 3),), ((60, 33),), ((1, 200),)]),
}
EXACT = {
    "relu": (F.relu, [((7,),), ((2, 3, 257),), ((),)]),
    "dropout": (partial(F.dropout, p=0.3, key=("a", 1), seed=2), [((7,),), ((2, 3, 257),), ((),)]),
    "all dropped": (partial(F.dropout, p=1, key=("a", 1)), [((7,),)]),
}
TABLE = [pytest.param(f, s, n in EXACT, id=f"{n} {s}") for n, (f, sets) in (CASES | EXACT).items() for s in sets]
dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


def arrays_of(shapes, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(dtype) * 2 for shape in shapes]


def both_ways(function, arrays, place, turn=lambda x: x):
    """The result and the gradients of all inputs, on the host again; `turn` changes how arrays lie in memory."""
    tensors = [Tensor(turn(place.asarray(array)), requires_grad=True) for array in arrays]
    y = function(*tensors)
    grad = np.random.default_rng(9).standard_normal(y.shape).astype(y.dtype)
    node = y.grad_fn
    y.backward(turn(place.asarray(grad)))
    assert all(array_module(t.grad.data) is place and t.grad.shape == t.shape for t in tensors)
    return [y.numpy(), *(t.grad.numpy() for t in tensors)], node


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) <= tolerance * np.abs(b).max(initial=0)


@dtypes
@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
def test_equals_the_plain_operation(function, shapes, exact, dtype):
    arrays = arrays_of(shapes, dtype)
    found, node = both_ways(function, arrays, xp)
    expected, plain = both_ways(function, arrays, np)
    assert type(node) is type(plain).fused
    assert all(array.dtype == dtype for array in found)
    if exact:
        assert [a.tobytes() for a in found] == [b.tobytes() for b in expected]
    else:  # sums in float32 have rounding errors of their own: those of NumPy must not count
        expected, _ = both_ways(function, [array.astype("float64") for array in arrays], np)
        assert_close(found, expected, TOLERANCE[dtype])


@dtypes
@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
def test_bits_do_not_depend_on_the_order_of_threads(function, shapes, exact, dtype):
    bits = set()
    for order, seed in (("forward", 0), ("reverse", 0), ("shuffle", 1), ("shuffle", 2)):
        with host_cuda.order(order, seed):
            found, _ = both_ways(function, arrays_of(shapes, dtype), xp)
        bits.add(b"".join(array.tobytes() for array in found))
    assert len(bits) == 1


def assert_alike_beside(special, function, make):
    """With that number at the first place, in the middle and at the last, of each array of ``make()`` in turn."""
    for k in range(len(make())):
        for share in (0, 0.5, 1):
            arrays = make()
            arrays[k].ravel()[int(share * (arrays[k].size - 1))] = special
            with np.errstate(all="ignore"):
                found, _ = both_ways(function, arrays, xp)
                expected, _ = both_ways(function, arrays, np)
            for a, b in zip(found, expected, strict=True):
                assert np.array_equal(np.isnan(a), np.isnan(b))
                assert np.array_equal(a[np.isinf(a)], b[np.isinf(a)])
                assert np.array_equal(np.isinf(a), np.isinf(b))


@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf, -0.0])
def test_what_is_not_finite_is_where_it_is_in_the_plain_operation(function, shapes, exact, special):
    assert_alike_beside(special, function, lambda: arrays_of(shapes, "float64"))


LAUNCHED = {
    "relu": ["relu", "relu_backward"],
    "tanh": ["tanh_forward", "tanh_backward"],
    "gelu": ["gelu"],
    "gelu tanh": ["gelu_tanh"],
    "linear": ["add_bias", "column_sum"],
    "layer_norm": ["layer_norm", "layer_norm_backward", "column_sums"],
    "softmax": ["softmax", "softmax_backward"],
    "log_softmax": ["log_softmax", "log_softmax_backward"],
    "causal attention": ["softmax", "softmax_backward"],
    "self-attention": ["softmax", "softmax_backward"],
    "cross_entropy": ["cross_entropy", "mean", "cross_entropy_backward"],
    "embedding": ["embedding", "embedding_backward"],
    "dropout": ["dropout", "dropout"],
}


@pytest.mark.parametrize("name", LAUNCHED)
def test_each_way_is_one_pass(name, monkeypatch):
    launched = []
    for how in ("each", "blocks"):
        launch = getattr(Launcher, how)
        monkeypatch.setattr(
            Launcher,
            how,
            lambda self, kernel, *a, launch=launch: launched.append(kernel) or launch(self, kernel, *a),
        )
    function, (shapes, *_) = (CASES | EXACT)[name]
    both_ways(function, arrays_of(shapes, "float32"), xp)
    assert launched == LAUNCHED[name]


def lying_across(x):
    return x if x.ndim < 2 else x.swapaxes(0, -1).copy().swapaxes(0, -1)


def with_gaps(x):
    return x if x.ndim < 1 else xp.concatenate([x[..., None], x[..., None]], axis=-1)[..., 0]


@pytest.mark.parametrize(("function", "shapes", "exact"), TABLE)
@pytest.mark.parametrize("turn", [lying_across, with_gaps])
def test_arrays_that_are_not_contiguous(function, shapes, exact, turn):
    arrays = arrays_of(shapes, "float64")
    found, _ = both_ways(function, arrays, xp, turn)
    expected, _ = both_ways(function, arrays, np)
    assert_close(found, expected, 0 if exact else 1e-14)


@pytest.mark.parametrize("name", CASES | EXACT)
def test_half_precision_is_the_plain_operation(name):
    function, (shapes, *_) = (CASES | EXACT)[name]
    arrays = arrays_of(shapes, "float16")
    found, _ = both_ways(function, arrays, xp)
    expected, _ = both_ways(function, arrays, np)
    assert all(a.dtype == b.dtype for a, b in zip(found, expected))
    assert_close(found, expected, 1e-3)


@dtypes
@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        *((f, [(0, 3)]) for f in (F.relu, F.tanh, F.gelu, F.softmax, F.log_softmax, labelled)),
        (packed, [(0, 2, 6)]),
        (partial(F.dropout, p=0.5, key=()), [(3, 0)]),
        (F.linear, [(0, 3), (2, 3), (2,)]),
        (F.layer_norm, [(0, 3), (3,), (3,)]),
        (attend, [(0, 2, 3), (0, 4, 3), (0, 4, 3)]),
        (causal, [(2, 0, 3), (2, 4, 3), (2, 4, 3)]),
        (causal, [(2, 4, 3), (2, 0, 3), (2, 0, 3)]),
        (partial(embedded, count=0), [(4, 3)]),
    ],
)
def test_nothing_at_all(function, shapes, dtype):
    arrays = arrays_of(shapes, dtype)
    found, _ = both_ways(function, arrays, xp)
    expected, _ = both_ways(function, arrays, np)
    assert [a.tobytes() for a in found] == [b.tobytes() for b in expected]


class Leaky(ReLU):
    """A user's own, derived from an operation that has kernels."""

    def forward(self, x):
        return self.xp.maximum(x, x * 0.5)


def test_a_derived_operation_is_not_replaced():
    with device_double.kernels():
        assert Leaky.apply(xp.asarray(np.array([-2.0, 2.0]))).numpy().tolist() == [-1, 2]
