"""Every operation against finite differences: a line each, with broadcast, 0-d, empty and strided inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import minidp
from minidp.autograd import Function, Tensor, conv, gradcheck, ops, pooling, unbroadcast
from minidp.backend import array_module, meter
from minidp.nn import activations, attention, losses, normalization
from minidp.nn import functional as F

ONE = [[(3, 4)], [()], [(0, 4)], [(2, 3, 4)]]
TWO = [[(3, 4), (3, 4)], [(3, 4), (4,)], [(3, 1), (1, 4)], [(2, 3, 4), (3, 1)], [(), ()], [(), (2, 3)],
       [(2, 3), ()], [(0, 4), (4,)], [(1, 3), (0, 3)], [(1,), (1, 1)]]  # fmt: skip
REDUCED = [[(2, 3, 4)], [(3, 0, 4)]]
PRODUCTS = [[(3, 4), (4, 5)], [(4,), (4, 5)], [(3, 4), (4,)], [(4,), (4,)], [(2, 3, 4), (4, 5)],
            [(2, 3, 4), (2, 4, 5)], [(2, 1, 3, 4), (5, 4, 2)], [(2, 3, 4), (4,)], [(4,), (2, 4, 5)],
            [(0, 4), (4, 5)], [(3, 0), (0, 5)]]  # fmt: skip
LINEAR = [[(5, 4), (3, 4)], [(4,), (3, 4)], [(2, 5, 4), (3, 4)], [(0, 4), (3, 4)], [(2, 0, 4), (3, 4)],
          [(2, 8), (3, 8)], [(5, 0), (3, 0)]]  # fmt: skip
IMAGES = [[(2, 3, 4)], [(0, 3, 4)], [(5,)], [(2, 1, 3, 4)]]
LOGITS = [[(5, 3)], [(1, 1)], [(0, 3)], [(2, 3, 4)], [(2, 0, 4)], [(0, 3, 4)], [(2, 1, 3, 2)]]
# Images (n, c, h, w), weights (out, c, rows, columns), biases: usual, 1 × 1, as large as the image, no images.
CONVOLUTIONS = [[(2, 3, 5, 6), (4, 3, 3, 2), (4,)], [(2, 3, 4, 5), (2, 3, 1, 1), (2,)],
                [(2, 3, 4, 5), (1, 3, 4, 5), (1,)], [(0, 3, 5, 6), (4, 3, 3, 2), (4,)],
                [(1, 1, 1, 1), (1, 1, 1, 1), (1,)]]  # fmt: skip
WITHOUT_BIAS = [shapes[:2] for shapes in CONVOLUTIONS]
PICTURES = [[(2, 3, 6, 8)], [(1, 2, 5, 7)], [(0, 3, 4, 4)], [(3, 1, 3, 3)]]
LAYERS = [[(5, 4), (4,), (4,)], [(2, 3, 4), (4,), (4,)], [(4,), (4,), (4,)], [(0, 4), (4,), (4,)],
          [(3, 1), (1,), (1,)]]  # fmt: skip
LAYERS_2 = [[(2, 3, 4), (3, 4), (3, 4)], [(3, 4), (3, 4), (3, 4)], [(2, 0, 3, 4), (3, 4), (3, 4)]]
ATTENTION = [[(2, 3, 4)] * 3, [(2, 2, 5, 3), (2, 2, 4, 3), (2, 2, 4, 3)], [(3, 4), (5, 4), (5, 4)],
             [(0, 3, 4)] * 3, [(2, 0, 4), (2, 3, 4), (2, 3, 4)], [(2, 3, 4), (2, 0, 4), (2, 0, 4)],
             [(1, 1, 1)] * 3]  # fmt: skip
PACKED = [[(2, 3, 12)], [(1, 1, 6)], [(0, 3, 6)], [(2, 0, 6)]]
BATCHES = [[(5, 3), (3,), (3,)], [(2, 3, 2, 4), (3,), (3,)], [(4, 2, 3), (2,), (2,)], [(0, 3), (3,), (3,)],
           [(0, 3, 2, 2), (3,), (3,)]]  # fmt: skip
EMBEDDINGS = [[(3, 4)], [(4, 1)], [(3, 0)]]


def labels(z: Tensor) -> np.ndarray:
    return (np.arange(np.prod(z.shape[:-1], dtype=int)) * 7 % max(z.shape[-1], 1)).reshape(z.shape[:-1])


def moments(x: Tensor) -> tuple[Any, Any]:
    """Means and variances of channels that `x` does not have, where it is."""
    of_channels = array_module(x.data).arange(1, x.shape[1] + 1).astype(x.dtype)
    return of_channels / 4, of_channels / 2


def packed(x: Tensor, causal: bool) -> Tensor:
    return attention.SelfAttention.apply(x, heads=2, causal=causal)


class Op(NamedTuple):
    name: str
    function: Callable[..., Tensor]
    shapes: list[list[tuple[int, ...]]]
    domain: str = "real"  # or "positive"; both keep away from 0, where ReLU and others have kinks


OPS = [
    Op("add", lambda a, b: a + b, TWO),
    Op("add number", lambda a: 2 + a, ONE),
    Op("sub", lambda a, b: a - b, TWO),
    Op("number sub", lambda a: 2 - a, ONE),
    Op("mul", lambda a, b: a * b, TWO),
    Op("mul number", lambda a: 3 * a, ONE),
    Op("div", lambda a, b: a / b, TWO),
    Op("number div", lambda a: 2 / a, ONE),
    Op("neg", lambda a: -a, ONE),
    Op("square", lambda a: a**2, ONE),
    Op("pow 0", lambda a: a**0, ONE),
    Op("pow -1.5", lambda a: a**-1.5, ONE, "positive"),
    Op("exp", lambda a: a.exp(), ONE),
    Op("log", lambda a: a.log(), ONE, "positive"),
    Op("sqrt", lambda a: a.sqrt(), ONE, "positive"),
    Op("matmul", lambda a, b: a @ b, PRODUCTS),
    Op("sum", lambda a: a.sum(), ONE),
    Op("sum axis", lambda a: a.sum(axis=1), REDUCED),
    Op("sum axes kept", lambda a: a.sum(axis=(0, -1), keepdims=True), REDUCED),
    Op("mean", lambda a: a.mean(), ONE),
    Op("mean axis", lambda a: a.mean(axis=-1), REDUCED),
    Op("mean axes kept", lambda a: a.mean(axis=(0, 1), keepdims=True), REDUCED),
    Op("max", lambda a: a.max(), [[(3, 4)], [()], [(2, 3, 4)]]),
    Op("max axis", lambda a: a.max(axis=1), [[(2, 3, 4)], [(0, 3)]]),
    Op("max axis kept", lambda a: a.max(axis=-1, keepdims=True), [[(2, 3, 4)], [(0, 3)]]),
    Op("reshape", lambda a: a.reshape(a.size), ONE),
    Op("reshape tuple", lambda a: a.reshape((1, a.size)), ONE),
    Op("flatten", lambda a: a.flatten(), ONE),
    Op("transpose", lambda a: a.T, ONE),
    Op("transpose axes", lambda a: a.transpose(1, 2, 0), REDUCED),
    Op("index", lambda a: a[1], [[(3, 4)], [(2, 0)]]),
    Op("slice", lambda a: a[::-2, 1:], [[(3, 4)], [(0, 4)]]),
    Op("index twice", lambda a: a[np.array([0, 2, 0, 0])], [[(3, 4)], [(3,)]]),
    Op("mask", lambda a: a[np.array([True, False, True])], [[(3, 4)]]),
    Op("linear", lambda x, w: F.linear(x, w), LINEAR),
    Op("linear bias", lambda x, w: F.linear(x, w, w.sum(axis=1)), LINEAR),
    Op("relu", lambda a: F.relu(a), ONE),
    Op("tanh", lambda a: F.tanh(a), ONE),
    Op("gelu", lambda a: F.gelu(a), ONE),
    Op("gelu tanh", lambda a: F.gelu(a, "tanh"), ONE),
    Op("dropout", lambda a: F.dropout(a, 0.4, key=(1, "x")), ONE),
    Op("dropout all", lambda a: F.dropout(a, 1, key=(1,)), ONE),
    Op("flatten from 1", lambda a: F.flatten(a), IMAGES),
    Op("flatten from 2", lambda a: F.flatten(a, 2), [[(2, 3, 4, 5)], [(2, 0, 3, 4)]]),
    Op("softmax", lambda a: F.softmax(a), [[(3, 4)], [(0, 4)], [(5,)]]),
    Op("softmax axis", lambda a: F.softmax(a, axis=1), REDUCED[:1]),
    Op("log_softmax", lambda a: F.log_softmax(a), [[(3, 4)], [(0, 4)], [(5,)]]),
    Op("log_softmax axis", lambda a: F.log_softmax(a, axis=0), REDUCED[:1]),
    Op("cross_entropy", lambda z: F.cross_entropy(z, labels(z)), LOGITS),
    Op("conv2d", lambda x, w, b: F.conv2d(x, w, b), CONVOLUTIONS),
    Op("conv2d without bias", lambda x, w: F.conv2d(x, w), WITHOUT_BIAS),
    Op("conv2d strides", lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1)), CONVOLUTIONS),
    Op("conv2d padding", lambda x, w, b: F.conv2d(x, w, b, padding=(1, 2)), CONVOLUTIONS),
    Op("conv2d both", lambda x, w: F.conv2d(x, w, stride=(1, 3), padding=(2, 1)), WITHOUT_BIAS),
    Op("max_pool2d", lambda x: F.max_pool2d(x, 2), PICTURES),
    Op("max_pool2d overlapping", lambda x: F.max_pool2d(x, (3, 2), stride=1), PICTURES),
    Op("max_pool2d padding", lambda x: F.max_pool2d(x, (2, 3), stride=(2, 1), padding=1), PICTURES),
    Op("max_pool2d gaps", lambda x: F.max_pool2d(x, 2, stride=3), PICTURES),
    Op("avg_pool2d", lambda x: F.avg_pool2d(x, 2), PICTURES),
    Op("avg_pool2d overlapping", lambda x: F.avg_pool2d(x, (3, 2), stride=1), PICTURES),
    Op("avg_pool2d padding", lambda x: F.avg_pool2d(x, (2, 3), stride=(2, 1), padding=1), PICTURES),
    Op("avg_pool2d gaps", lambda x: F.avg_pool2d(x, 2, stride=3), PICTURES),
    Op("layer_norm", lambda x, w, b: F.layer_norm(x, w, b), LAYERS),
    Op("layer_norm two axes", lambda x, w, b: F.layer_norm(x, w, b, eps=0.1), LAYERS_2),
    Op("batch norm", lambda x, w, b: normalization.BatchNorm.apply(x, w, b), BATCHES),
    Op("batch norm moments", lambda x, w, b: normalization.BatchNorm.apply(x, w, b, moments=moments(x)), BATCHES),
    Op("embedding", lambda w: F.embedding(np.array([[0, 2, 0], [1, 2, 2]]), w), EMBEDDINGS),
    Op("embedding of one", lambda w: F.embedding(np.array(2), w), EMBEDDINGS),
    Op("embedding of nothing", lambda w: F.embedding(np.zeros((0, 3), int), w), EMBEDDINGS),
    Op("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v), ATTENTION),
    Op("attention causal", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, causal=True), ATTENTION),
    Op("attention packed", lambda x: packed(x, False), PACKED),
    Op("attention packed causal", lambda x: packed(x, True), PACKED),
    Op("mse_loss", lambda a, b: F.mse_loss(a, b), [[(3, 4)] * 2, [()] * 2, [(0, 4)] * 2]),
    Op("mse_loss of one", lambda a: F.mse_loss(a, np.ones(a.shape)), ONE),
    Op("one tensor twice", lambda a: a * a + a, ONE),
]
CASES = [pytest.param(op, shapes, id=f"{op.name} {shapes}") for op in OPS for shapes in op.shapes]


def make(op: Op, shapes: list[Any], layout: str = "C", dtype: Any = np.float64) -> list[np.ndarray]:
    """Distinct values, at least 0.05 apart and from 0, in C or Fortran order or reversed every other element."""
    rng = np.random.default_rng(0)
    arrays = []
    for shape in shapes:
        size = int(np.prod(shape))
        x = rng.permutation(np.arange(1, size + 1) * 0.05 + 0.3)
        if op.domain == "real":
            x *= rng.choice([-1, 1], size)
        x = x.reshape(shape).astype(dtype)
        if layout == "F":
            x = np.array(x, order="F")
        elif layout == "strided" and x.ndim:
            wide = np.zeros(tuple(2 * n for n in shape), dtype)
            wide[(slice(None, None, -2),) * x.ndim] = x
            x = wide[(slice(None, None, -2),) * x.ndim]
            assert x.size < 2 or not x.flags.c_contiguous
        arrays.append(x)
    return arrays


@pytest.mark.parametrize("layout", ["C", "F", "strided"])
@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_gradient_equals_finite_differences(op, shapes, layout):
    gradcheck(op.function, *make(op, shapes, layout))


@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_float32_and_float16_stay_what_they_are(op, shapes):
    for dtype in (np.float32, np.float16):
        tensors = [Tensor(x, requires_grad=True) for x in make(op, shapes, dtype=dtype)]
        out = op.function(*tensors)
        assert out.dtype == dtype
        if any(t.requires_grad for t in tensors):
            out.backward(np.ones(out.shape, dtype))
        assert all(t.grad.dtype == dtype for t in tensors)


@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_inputs_and_incoming_gradient_are_left_alone(op, shapes):
    arrays = make(op, shapes)
    tensors = [Tensor(x.copy(), requires_grad=True) for x in arrays]
    out = op.function(*tensors)
    gradient = np.random.default_rng(1).standard_normal(out.shape)
    given = gradient.copy()
    out.backward(given)
    assert np.array_equal(given, gradient)
    assert all(np.array_equal(t.data, x) for t, x in zip(tensors, arrays))


@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_incoming_gradient_may_have_any_memory_order(op, shapes):
    """A sum hands back one number seen as an array, which can't be written to; a transpose hands back a view."""
    out = op.function(*(Tensor(x, requires_grad=True) for x in make(op, shapes)))
    full = np.random.default_rng(1).standard_normal(out.shape)
    for strange in (np.broadcast_to(np.float64(0.7), out.shape), np.array(full, order="F"), np.flip(full)):
        found = []
        for gradient in (strange, strange.copy()):
            tensors = [Tensor(x, requires_grad=True) for x in make(op, shapes)]
            op.function(*tensors).backward(gradient)
            found.append([t.grad.numpy() for t in tensors])
        assert all(np.allclose(a, b, rtol=1e-12, atol=1e-12) for a, b in zip(*found))


@pytest.mark.parametrize(("op", "shapes"), [c for c in CASES if len(c.values[1]) > 1])
def test_each_gradient_is_the_same_where_the_others_are_not_needed(op, shapes):
    whole = [Tensor(x, requires_grad=True) for x in make(op, shapes)]
    out = op.function(*whole)
    gradient = np.random.default_rng(1).standard_normal(out.shape)
    out.backward(gradient)
    for k in range(len(shapes)):
        alone = [Tensor(x, requires_grad=i == k) for i, x in enumerate(make(op, shapes))]
        op.function(*alone).backward(gradient)
        assert [t.grad is None for t in alone] == [i != k for i in range(len(shapes))]
        assert np.array_equal(alone[k].grad, whole[k].grad)


@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_every_operation_can_be_metered(op, shapes):
    """The virtual world does it both ways; forward counts the same where nothing is recorded."""
    arrays = make(op, shapes)
    with meter() as frozen:
        op.function(*map(Tensor, arrays))
    with meter() as forward:
        out = op.function(*(Tensor(x, requires_grad=True) for x in arrays))
    with meter() as backward:
        out.backward(np.ones(out.shape))
    assert (frozen.operations, frozen.flops, frozen.nbytes) == (forward.operations, forward.flops, forward.nbytes)
    for m in (forward, backward):
        assert m.operations >= 1
        assert np.isfinite([m.flops, m.nbytes]).all()
        assert min(m.flops, m.nbytes) >= 0


@pytest.mark.parametrize(("op", "shapes"), CASES)
def test_gradients_are_nobody_elses_memory(op, shapes):
    """What `fresh` promises, and what the engine copies where it is not promised."""
    tensors = [Tensor(x, requires_grad=True) for x in make(op, shapes)]
    out = op.function(*tensors)
    gradient = np.ones(out.shape)
    out.backward(gradient)
    grads = [t._grad for t in tensors]
    assert all(type(grad) is np.ndarray for grad in grads)  # never a scalar of NumPy
    for i, grad in enumerate(grads):
        others = [gradient, out.data, *(t.data for t in tensors), *grads[:i]]
        assert not any(np.shares_memory(grad, other) for other in others)
        assert grad.flags.writeable


def test_every_operation_is_in_the_table():
    """Each Function of the package was applied by some line above."""
    applied = set()
    modules = ops, conv, pooling, activations, attention, losses, normalization
    classes = {c for m in modules for c in vars(m).values() if _is_operation(c)}

    def spy(cls, *inputs, **options):
        applied.add(cls)
        return original.__func__(cls, *inputs, **options)

    original = Function.__dict__["apply"]
    Function.apply = classmethod(spy)
    try:
        for op in OPS:
            op.function(*(Tensor(x) for x in make(op, op.shapes[0])))
    finally:
        Function.apply = original
    assert classes - applied == set()


def _is_operation(thing: Any) -> bool:
    """What operations share without being one, as Pool2d does, has no forward of its own."""
    operation = isinstance(thing, type) and issubclass(thing, Function) and thing is not Function
    return operation and "forward" in vars(thing)


def test_a_wrong_derivative_is_found_and_reported():
    class Wrong(Function):
        def forward(self, a, b):
            self.saved = a, b
            return a * b

        def backward(self, grad):
            a, b = self.saved
            wrong = grad * b
            wrong[-1] += 1e-4  # one element of one input, by little
            return wrong, grad * a

    def wrong_product(a, b):
        return Wrong.apply(a, b)

    with pytest.raises(AssertionError, match=r"(?s)wrong_product\(float64\[5\], .*\): analytic .* numeric"):
        gradcheck(wrong_product, np.arange(1.0, 6.0), np.arange(2.0, 7.0))


def test_gradcheck_names_the_operation():
    class Cube(Function):
        def forward(self, x):
            return x**3

        def backward(self, grad):
            return 2 * grad

    with pytest.raises(AssertionError, match=r"gradcheck of Cube\(float64\[5\]\)"):
        gradcheck(Cube.apply, np.arange(5.0))


def test_gradcheck_wants_a_gradient_for_each_argument():
    with pytest.raises(AssertionError, match="argument 1 got no gradient"):
        gradcheck(lambda a, b: a * b.data, np.ones(3), np.ones(3))


def test_gradcheck_fails_on_nan():
    with pytest.raises(AssertionError, match="nan"), np.errstate(invalid="ignore"):
        gradcheck(lambda a: a.log(), np.array([-1.0]))


def test_ties_of_max_share_the_gradient():
    x = minidp.tensor([[1.0, 3.0, 3.0], [2.0, 1.0, 0.0]], requires_grad=True)
    x.max(axis=1).backward(np.array([1.0, 1.0]))
    assert np.array_equal(x.grad, [[0, 0.5, 0.5], [1, 0, 0]])


@settings(derandomize=True, deadline=None)
@given(st.data())
def test_unbroadcast_is_the_adjoint_of_broadcasting(data):
    """⟨unbroadcast(g), x⟩ = ⟨g, broadcast(x)⟩ for all g and x: on small integers, exactly."""
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
    bigger = data.draw(hnp.broadcastable_shapes(shape, min_dims=len(shape), max_dims=4, min_side=0, max_side=3))
    full = np.broadcast_shapes(shape, bigger)
    small = st.integers(-5, 5)
    x = data.draw(hnp.arrays(np.int64, shape, elements=small))
    g = data.draw(hnp.arrays(np.int64, full, elements=small))
    back = unbroadcast(g, shape)
    assert back.shape == shape
    assert (back * x).sum() == (g * np.broadcast_to(x, full)).sum()
