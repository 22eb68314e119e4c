"""Parts of fused operations: what they write and where, what moves, wrong labels and tokens, draws of masks."""

from __future__ import annotations

import numpy as np
import pytest

from minidp import nn
from minidp.autograd import Tensor, no_grad
from minidp.backend import generator, meter
from minidp.nn import activations, fused, fused_embedding, fused_linear
from minidp.nn import functional as F
from tests import device_double, host_cuda
from tests.device_double import DeviceArray, xp
from tests.test_device_double import to_device
from tests.test_fused import arrays_of, assert_close, both_ways, dtypes

pytestmark = pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))


@pytest.fixture(autouse=True)
def _kernels():
    with device_double.kernels():
        yield


# --- elementwise ---


@dtypes
def test_slopes_are_the_plain_formulas_to_the_bit(dtype):
    (x,) = arrays_of([(300,)], dtype)
    (y, slope), _ = both_ways(F.tanh, [x], xp)
    grad = np.random.default_rng(9).standard_normal(300).astype(dtype)
    assert slope.tobytes() == (grad * (1 - y * y)).tobytes()
    zeros = np.array([0.0, -0.0], dtype)
    assert np.signbit(both_ways(F.relu, [zeros], xp)[0][0]).tolist() == [False, False]


@pytest.mark.parametrize("function", [F.relu, F.tanh, F.gelu])
def test_images_of_convolutions_are_taken_as_they_lie(function, monkeypatch):
    """Stored (c, h, w, n), seen as (n, c, h, w): so are result and gradient, and nothing is copied."""
    (image,) = arrays_of([(2, 3, 4, 5)], "float32")
    x = Tensor(xp.asarray(image).transpose(3, 0, 1, 2), requires_grad=True)
    monkeypatch.setattr(xp, "ascontiguousarray", None)
    y = function(x)
    assert y.data.strides == x.data.strides
    y.backward(y.data)
    assert x.grad.data.strides == x.data.strides
    expected = Tensor(image.transpose(3, 0, 1, 2), requires_grad=True)
    y = function(expected)
    y.backward(y.data)
    assert_close([x.grad.numpy()], [expected.grad.numpy()], 1e-6)


# --- sums over rows ---


@pytest.mark.parametrize(
    "shape", [(0, 3), (1, 1), (32, 10), (127, 33), (128, 33), (1000, 1), (700, 500), (40000, 2)]
)
def test_column_sums(shape):
    """Whole numbers: any order gives the exact sums, and one that is left out or taken twice shows."""
    x, y = np.random.default_rng(0).integers(-9, 10, (2, *shape)).astype("float32")
    out, products, sums = (xp.full(shape[1], np.nan, dtype="float32") for _ in range(3))
    fused_linear.column_sum(xp.asarray(x), out, xp)
    fused_linear.column_sums(xp.asarray(x), xp.asarray(y), products, sums, xp)
    assert out.tolist() == sums.tolist() == x.sum(axis=0).tolist()
    assert products.tolist() == (x * y).sum(axis=0).tolist()


def test_column_sums_are_cut_by_the_shape_into_pieces_that_fill_a_gpu():
    assert fused_linear.cut(32, 10) == (1, 1)
    assert fused_linear.cut(4096, 4096) == (128, 4)
    assert fused_linear.cut(65536, 10) == (1, 512)
    assert fused_linear.cut(10, 10**6) == (31250, 1)


@pytest.mark.parametrize("columns", [1, 2, 3, 7, 50])
def test_threads_go_on_from_row_to_row(columns):
    """Biases, added by so few threads that each goes over many rows."""
    bias = np.arange(columns) + 1.0
    kernels = fused_linear.KERNELS.on(xp, bias.dtype)
    for blocks, threads in ((1, 1), (1, 5), (2, 7)):
        y = xp.zeros((40, columns))
        kernels.blocks("add_bias", blocks, threads, y.size, y, xp.asarray(bias), columns)
        assert y.tolist() == [bias.tolist()] * 40


def build(slots):
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))
    to_device(model, grads=slots) if slots is not None else None
    return model


@pytest.mark.parametrize("slots", [True, False])
@pytest.mark.parametrize("rows", [3, 300])
def test_gradients_of_parameters_are_where_they_belong(rows, slots):
    """In the slots of a slab, if there are some; of a second pass they are added."""
    tokens, labels = np.random.default_rng(0).integers(0, 2, (2, rows))
    device, host = build(slots), build(None)
    for model in (device, host):
        for _ in range(2):
            F.cross_entropy(model(tokens), labels).backward()
    for a, b in zip(device.parameters(), host.parameters()):
        assert_close([a.grad.numpy()], [b.grad.numpy()], 1e-5)  # sums of float32 on both sides
        assert not slots or a.grad.data._host.base is a._grad_slot._host.base


def test_the_gradient_of_one_parameter_alone():
    arrays = arrays_of([(5, 3), (3,), (3,)], "float64")
    expected, _ = both_ways(F.layer_norm, arrays, np)
    for k in range(3):
        tensors = [Tensor(xp.asarray(array), requires_grad=i == k) for i, array in enumerate(arrays)]
        grad = np.random.default_rng(9).standard_normal((5, 3))
        F.layer_norm(*tensors).backward(xp.asarray(grad))
        assert_close([tensors[k].grad.numpy()], [expected[1 + k]], 1e-14)


@pytest.mark.parametrize("shape", [(1,), (2,), (4, 3)])
def test_a_bias_of_another_shape_is_an_error_or_broadcast_as_ever_and_never_read_beyond(shape):
    x, weight, bias = arrays_of([(5, 3), (4, 3), shape], "float32")
    for function, w in ((F.linear, weight), (F.layer_norm, weight[0])):
        results = []
        for place in (np, xp):
            try:
                results.append(function(*map(place.asarray, (x, w, bias))).numpy().tolist())
            except ValueError as error:
                results.append(type(error))
        assert results[0] == results[1]


# --- labels and tokens ---


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("place", [np, xp])
def test_the_host_reads_nothing_and_only_labels_and_tokens_are_moved(place, dropout):
    model = nn.GPT(11, 6, 8, 2, 2, dropout=dropout)
    to_device(model, grads=True)
    tokens, labels = (place.asarray(a) for a in np.random.default_rng(0).integers(0, 11, (2, 3, 6)))
    before = device_double.scalar_reads
    with meter() as m:
        loss = F.cross_entropy(model(tokens), labels)
        loss.backward()
    assert type(loss.data) is DeviceArray
    assert device_double.scalar_reads == before
    moved = [] if place is xp else [tokens.nbytes, labels.nbytes]
    assert (m.moves, m.to_device, m.to_host) == (len(moved), sum(moved), 0)


@pytest.fixture(params=["fused", "plain"])
def device(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.delattr(xp, "RawModule")
    return xp


WRONG = [(-1, "int64"), (3, "int8"), (255, "uint8"), (2**40, "int64"), (2**63 + 1, "uint64")]


@pytest.mark.parametrize(("number", "dtype"), WRONG)
def test_a_wrong_label_is_named_on_the_host_and_seen_on_the_device(number, dtype, device):
    (logits,) = arrays_of([(4, 3)], "float32")
    labels = np.array([0, number, 2, 1], dtype)
    x = Tensor(device.asarray(logits), requires_grad=True)
    for given in (labels, labels.tolist())[: 1 + (number < 2**63)]:  # of a list of such NumPy makes floats
        with pytest.raises(ValueError, match=f"label {number} of sample 1 is outside 0 … 2"):
            F.cross_entropy(x, given)
    loss = F.cross_entropy(x, device.asarray(labels))
    loss.backward()
    assert np.isnan(loss.item())
    assert np.isnan(x.grad.numpy()).tolist() == [[i == 1] * 3 for i in range(4)]


@pytest.mark.parametrize(("number", "dtype"), WRONG)
def test_a_wrong_token_is_named_on_the_host_and_seen_on_the_device(number, dtype, device):
    (table,) = arrays_of([(3, 2)], "float32")
    tokens = np.array([[0, number], [2, 2]], dtype)
    weight = Tensor(device.asarray(table), requires_grad=True)
    for given in (tokens, tokens.tolist())[: 1 + (number < 2**63)]:
        with pytest.raises(IndexError, match=f"token {number} at place 1 is outside 0 … 2"):
            F.embedding(given, weight)
    y = F.embedding(device.asarray(tokens), weight)
    assert np.isnan(y.numpy()).tolist() == [[[False] * 2, [True] * 2], [[False] * 2] * 2]
    assert y.numpy()[1].tolist() == table[[2, 2]].tolist()
    y.sum().backward()
    assert weight.grad.numpy().tolist() == [[2, 2], [0, 0], [2, 2]]


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
def test_labels_and_tokens_of_any_kind_of_integer(dtype, device):
    (logits,) = arrays_of([(4, 3)], "float64")
    numbers = np.array([0, 2, 1, 2], dtype)
    for function in (F.cross_entropy, lambda x, numbers: F.embedding(numbers, x)):
        expected, _ = both_ways(lambda x: function(x, numbers), [logits], np)  # noqa: B023
        for given in (numbers, numbers.tolist(), device.asarray(numbers), device.asarray(numbers[::-1])[::-1]):
            found, _ = both_ways(lambda x: function(x, given), [logits], device)  # noqa: B023
            assert_close(found, expected, 1e-14)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 300])
def test_gradients_of_embeddings_are_added_in_the_order_of_places(count):
    """In float32, one after the other: the bits tell the order."""
    tokens = np.random.default_rng(0).choice([1, 3, 4], count)
    weight = Tensor(xp.zeros((6, 130), dtype="float32"), requires_grad=True)
    grad = np.random.default_rng(1).standard_normal((count, 130)).astype("float32")
    F.embedding(tokens, weight).backward(xp.asarray(grad))
    expected = np.zeros((6, 130), "float32")
    for token, row in zip(tokens, grad):
        expected[token] += row
    assert weight.grad.numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("places", [1, 7, 8, 9, 15, 16])
def test_what_lies_behind_the_places_of_a_token_is_not_added(places):
    """The kernel is given more of the same token than it shall take."""
    grad = np.random.default_rng(0).integers(-9, 10, (40, 3)).astype("float64")
    tokens, out = xp.full(40, 2, dtype="int64"), xp.zeros((4, 3))
    kernels = fused_embedding.KERNELS.on(xp, out.dtype)
    kernels.blocks("embedding_backward", places, 32, 3, places, tokens, xp.arange(40), xp.asarray(grad), out)
    assert out.tolist() == [[0] * 3, [0] * 3, grad[:places].sum(axis=0).tolist(), [0] * 3]


# --- rows ---


@dtypes
@pytest.mark.parametrize("size", [3, 40, 600])
@pytest.mark.parametrize("far", [-3000, 3000])
def test_the_largest_of_a_row_is_taken_off_wherever_it_lies(size, far, dtype):
    """float32 holds the shifted numbers exactly, so that nothing but overflow could tell the two apart."""
    x = np.random.default_rng(0).integers(-8, 8, (4, size)).astype(dtype)
    labels = np.arange(4) % size
    for function in (F.softmax, F.log_softmax, lambda x: F.cross_entropy(x, labels)):
        found, _ = both_ways(function, [x + far], xp)
        expected, _ = both_ways(function, [x], xp)
        assert [a.tobytes() for a in found] == [b.tobytes() for b in expected]


# --- dropout ---


@pytest.mark.parametrize("n", [0, 1, 2, 3, 31, 8191, 8192, 8193, 100_001, 4_400_000])
def test_masks_are_those_of_numpys_generator(n):
    """A block for each 8192 draws; from 4.3 million on there are no more blocks."""
    for seed, p in ((0, 0.5), (1, 0.1), (2**40, 0.7)):
        draws = generator(seed, "layer", n).random(n, dtype="float32")
        y = F.dropout(xp.ones(n, dtype="float32"), p, ("layer", n), seed)
        assert ((y.numpy() != 0) == (draws >= p)).all()
        assert np.isin(y.numpy(), np.array([0, 1 / (1 - p)], "float32")).all()


@pytest.mark.parametrize("n", [1000, 1001])
def test_threads_go_on_in_the_stream_of_draws(n):
    """A grid of three threads: each takes many draws, nothing depends on their number, and after n they stop."""
    operation = activations.Dropout.fused()
    operation.xp, operation.needs = xp, [False]
    operation.forward(xp.ones(1, dtype="float64"), p=0.25, seed=3, key=())
    x, out = xp.ones(1005), xp.zeros(1005)
    expected = (generator(3).random(n, dtype="float32") >= 0.25) / 0.75
    for blocks, threads in ((1, 3), (1, 32), (5, 7)):
        out[...] = 7
        operation.kernels.blocks("dropout", blocks, threads, n, x, out, *operation.saved)
        assert out.tolist() == [*expected.tolist(), *[7] * (1005 - n)]


def test_a_draw_that_equals_p_is_kept():
    draws = generator(0).random(100, dtype="float32")
    for p in map(float, draws[:10]):
        y = F.dropout(xp.ones(100, dtype="float32"), p, ())
        assert ((y.numpy() != 0) == (draws >= p)).all()


# --- the rule of fused classes ---


def test_operations_without_gradient_are_fused_too():
    with no_grad():
        y = F.softmax(xp.asarray(np.zeros((2, 3), "float32")))
    assert not y.requires_grad
    assert_close([y.numpy()], [np.full((2, 3), 1 / 3)], 1e-6)


def test_every_fused_class_is_its_operation():
    for operation in fused.Fused.__subclasses__():
        for cls in operation.__subclasses__() or [operation]:
            plain = cls.__mro__[cls.__mro__.index(fused.Fused) + 1]
            assert plain.fused is cls
            assert cls.fresh == plain.fresh
            assert cls.moves == plain.moves
