"""Convolution and pooling: equal to their definitions written as loops, exactly, however they are cut."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from minidp import nn
from minidp.autograd import Tensor, conv
from minidp.autograd.images import chwn, nchw
from minidp.nn import functional as F
from tests.test_autograd_exact import all_exact, exact

# Images, weights, stride, padding.
SMALL = [
    ((2, 2, 4, 5), (3, 2, 3, 2), (1, 1), (0, 0)),
    ((1, 2, 5, 4), (2, 2, 2, 3), (2, 1), (0, 0)),
    ((2, 1, 5, 4), (2, 1, 2, 3), (1, 2), (0, 0)),
    ((1, 3, 4, 3), (1, 3, 3, 3), (1, 1), (1, 1)),
    ((2, 1, 3, 4), (2, 1, 3, 2), (1, 1), (1, 2)),
    ((1, 2, 5, 6), (2, 2, 3, 2), (3, 2), (2, 1)),
    ((2, 2, 3, 4), (2, 2, 1, 1), (1, 1), (0, 0)),
    ((2, 2, 3, 4), (1, 2, 1, 1), (2, 3), (0, 0)),
    ((2, 2, 3, 4), (2, 2, 3, 4), (1, 1), (0, 0)),
    ((1, 1, 2, 2), (1, 1, 4, 4), (1, 1), (1, 1)),
    ((0, 2, 4, 5), (3, 2, 3, 2), (1, 1), (0, 0)),
    ((1, 1, 1, 1), (1, 1, 1, 1), (1, 1), (0, 0)),
]
cases = pytest.mark.parametrize(("image", "weight", "stride", "padding"), SMALL)


def by_definition(x, w, b, stride, padding, grad):
    """y, ∂x, ∂w, ∂b of a convolution, number by number: y[·, o, p, q] = b[o] + Σ_kij w[o, k, i, j] · pixel."""
    (n, c, height, width), (out, _, rows, columns) = x.shape, w.shape
    (s, t), (above, left) = stride, padding
    down, along = (height + 2 * above - rows) // s + 1, (width + 2 * left - columns) // t + 1
    y, grad_x, grad_w = (np.full(shape, Fraction(0)) for shape in ((n, out, down, along), x.shape, w.shape))
    grad_b = np.full(b.shape, Fraction(0))
    for m, o, p, q in itertools.product(range(n), range(out), range(down), range(along)):
        y[m, o, p, q] = b[o]
        grad_b[o] += grad[m, o, p, q]
        for k, i, j in itertools.product(range(c), range(rows), range(columns)):
            row, column = s * p + i - above, t * q + j - left
            if 0 <= row < height and 0 <= column < width:
                y[m, o, p, q] += w[o, k, i, j] * x[m, k, row, column]
                grad_x[m, k, row, column] += w[o, k, i, j] * grad[m, o, p, q]
                grad_w[o, k, i, j] += x[m, k, row, column] * grad[m, o, p, q]
    return y, grad_x, grad_w, grad_b


def convolve(x, w, b, stride, padding, grad):
    tensors = [Tensor(t, requires_grad=True) for t in (x, w, b)]
    y = F.conv2d(*tensors, stride=stride, padding=padding)
    assert y.shape == grad.shape
    y.backward(grad)
    return [y.numpy(), *(t.grad.numpy() for t in tensors)]


def out_shape(image, weight, stride, padding):
    size = [(a + 2 * p - k) // s + 1 for a, k, s, p in zip(image[2:], weight[2:], stride, padding)]
    return image[0], weight[0], *size


# ── convolution ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("piece_bytes", [1, 400, 2**19])  # a place at a time, parts of rows or rows, everything
@cases
def test_convolution_equals_its_definition(image, weight, stride, padding, piece_bytes, monkeypatch):
    monkeypatch.setattr(conv, "PIECE_BYTES", piece_bytes)
    x, w, b = exact(*image), exact(*weight, seed=1), exact(weight[0], seed=2)
    grad = exact(*out_shape(image, weight, stride, padding), seed=3)
    found = convolve(x, w, b, stride, padding, grad)
    for ours, expected in zip(found, by_definition(x, w, b, stride, padding, grad)):
        assert all_exact(ours)
        assert ours.shape == expected.shape
        assert ours.tolist() == expected.tolist()
    without = F.conv2d(x, w, stride=stride, padding=padding).numpy()
    assert without.tolist() == (found[0] - b[:, None, None]).tolist()


def test_the_layer_equals_the_definition_too():
    """`Conv2d`, with pairs and in Fractions by astype; names, shapes and order of its options."""
    layer = nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 0)).astype(object)
    assert {name: p.shape for name, p in layer.named_parameters()} == {"weight": (3, 2, 3, 2), "bias": (3,)}
    x = exact(2, 2, 5, 4)
    y = layer(x)
    grad = exact(*y.shape, seed=1)
    expected = by_definition(x, layer.weight.data, layer.bias.data, (2, 1), (1, 0), grad)
    assert y.numpy().tolist() == expected[0].tolist()
    y.backward(grad)
    assert layer.weight.grad.numpy().tolist() == expected[2].tolist()
    assert layer.bias.grad.numpy().tolist() == expected[3].tolist()
    assert nn.Conv2d(2, 3, 1, bias=False).bias is None
    assert repr(nn.Conv2d(2, 3, 1, bias=False)) == (
        "Conv2d(2, 3, kernel_size=(1, 1), stride=(1, 1), padding=(0, 0), bias=False)"
    )


@pytest.mark.parametrize("piece_bytes", [1, 1000, 5000, 20000])
@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
def test_results_do_not_depend_on_the_size_of_pieces(piece_bytes, stride, monkeypatch):
    """Integers: exactly. Other numbers: to rounding, since sums of a matrix product may take another order."""
    rng = np.random.default_rng(0)
    image, weight = (3, 4, 11, 13), (5, 4, 3, 2)
    shapes = [image, weight, (5,), out_shape(image, weight, stride, (1, 2))]
    integers = [rng.integers(-3, 4, shape).astype(float) for shape in shapes]
    reals = [rng.standard_normal(shape) for shape in shapes]
    for (x, w, b, grad), tolerance in ((integers, 0), (reals, 1e-12)):
        whole = convolve(x, w, b, stride, (1, 2), grad)
        with monkeypatch.context() as m:
            m.setattr(conv, "PIECE_BYTES", piece_bytes)
            cut = convolve(x, w, b, stride, (1, 2), grad)
        assert all(np.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(whole, cut))


def test_pieces_are_as_large_as_said(monkeypatch):
    """No piece's patches exceed PIECE_BYTES, unless a single place's do."""
    tiles = conv.tiles
    asked = []

    def spy(rows, columns, most):
        cut = list(tiles(rows, columns, most))
        asked.append((most, len(cut)))
        return iter(cut)

    monkeypatch.setattr(conv, "tiles", spy)
    monkeypatch.setattr(conv, "PIECE_BYTES", 7000)
    F.conv2d(np.ones((2, 4, 9, 9)), np.ones((20, 4, 5, 5)), np.ones(20))
    patch = (4 * 5 * 5 + 1) * 2 * 8  # of both images, float64, with the row of ones
    assert asked == [(7000 // patch, 10)]  # 4 places at a time: each of 5 rows of 5 in two parts


def test_tiles_cover_each_place_once_in_order():
    for rows, columns, most in itertools.product(range(1, 9), range(1, 9), range(1, 70)):
        found, sizes = [], []
        for top, bottom, left, right in conv.tiles(rows, columns, most):
            places = [i * columns + j for i in range(top, bottom) for j in range(left, right)]
            assert 0 < len(places) <= most
            assert places == list(range(places[0], places[-1] + 1))  # one run of memory
            found += places
            sizes.append((bottom - top, right - left))
        assert found == list(range(rows * columns))
        for side in zip(*sizes):
            assert max(side) - min(side) <= 1
        whole_rows = max(1, min(rows, most // columns))
        assert len(sizes) <= (-(-rows // whole_rows)) * max(1, -(-columns // most))  # and no more than needed


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("padding", [0, 1])
def test_weights_decide_the_dtype(dtype, padding):
    """Images are cast first: float64 ones give the bits of the same in the model's dtype."""
    layer, x = nn.Conv2d(1, 2, 3, padding=padding).astype(dtype), np.random.default_rng(0).random((2, 1, 4, 4)) * 9
    for image in (x, x.astype(np.float32), x.astype(np.uint8)):
        results = []
        for given in (image, image.astype(dtype)):
            layer.weight.grad = layer.bias.grad = None
            y = layer(given)
            y.sum().backward()
            assert y.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == dtype
            results.append([y.numpy().tobytes(), *(p.grad.numpy().tobytes() for p in layer.parameters())])
        assert results[0] == results[1]


def test_nan_is_seen_where_its_windows_are_and_nowhere_else():
    x = np.ones((2, 1, 5, 5))
    x[1, 0, 2, 3] = np.nan
    y = F.conv2d(x, np.ones((2, 1, 2, 2)), np.zeros(2)).numpy()
    expected = np.zeros((2, 2, 4, 4), bool)
    expected[1, :, 1:3, 2:4] = True
    assert np.array_equal(np.isnan(y), expected)
    for pool in (F.max_pool2d, F.avg_pool2d):
        assert np.array_equal(np.isnan(pool(x, 2, stride=1).numpy()), expected[:, :1])


# ── order in memory ─────────────────────────────────────────────────────────────────────────────────────


OPERATIONS = [
    pytest.param(lambda x: F.conv2d(x, np.ones((4, 3, 2, 2)) / 7, np.ones(4) / 3, (2, 1), 1), id="conv2d"),
    pytest.param(lambda x: F.conv2d(x, np.ones((4, 3, 1, 1)) / 7), id="conv2d 1x1"),
    pytest.param(lambda x: F.max_pool2d(x, 2), id="max_pool2d"),
    pytest.param(lambda x: F.max_pool2d(x, 3, 2, 1), id="max_pool2d padding"),
    pytest.param(lambda x: F.max_pool2d(x, 1), id="max_pool2d 1x1"),
    pytest.param(lambda x: F.avg_pool2d(x, 2), id="avg_pool2d"),
    pytest.param(lambda x: F.avg_pool2d(x, 3, 1, 1), id="avg_pool2d padding"),
]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_results_lie_with_the_samples_innermost(operation, n):
    x = np.random.default_rng(0).standard_normal((n, 3, 6, 7))
    y = operation(Tensor(x, requires_grad=True))
    for image in (y.data, F.relu(y).data):
        assert chwn(image).flags.c_contiguous
        assert image.shape == y.shape
    assert not np.shares_memory(x, y.data)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_inputs_of_any_order_in_memory_give_the_same_bits(operation):
    x = np.random.default_rng(0).standard_normal((3, 3, 6, 7))
    wide = np.zeros((6, 6, 12, 14))
    wide[::-2, 1::2, ::2, ::-2] = x
    orders = [x, np.asfortranarray(x), nchw(np.ascontiguousarray(chwn(x))), wide[::-2, 1::2, ::2, ::-2]]
    orders.append(np.ascontiguousarray(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2))
    results = []
    for image in orders:
        assert np.array_equal(image, x)
        t = Tensor(image, requires_grad=True)
        y = operation(t)
        y.backward(np.sin(np.arange(y.size)).reshape(y.shape))
        results.append((y.numpy().tobytes(), t.grad.numpy().tobytes()))
    assert len(set(results)) == 1


# ── pooling ─────────────────────────────────────────────────────────────────────────────────────────────


# Kernel, stride, padding on images of 5 × 6.
POOLS = [(2, None, 0), (2, 1, 0), (3, 2, 1), ((2, 3), (3, 1), (1, 0)), (2, 3, 0), ((5, 6), None, 0), (1, 2, 0),
         ((1, 2), None, (0, 1)), (3, (1, 4), 1), (4, 4, 2)]  # fmt: skip


def windows_by_definition(size, kernel, stride, padding):
    """For each place of the window, row by row, the pixels of the image that it sees, row by row."""
    kernel, padding = ((v, v) if isinstance(v, int) else v for v in (kernel, padding))
    stride = kernel if stride is None else (stride, stride) if isinstance(stride, int) else stride
    down, along = ((a + 2 * p - k) // s + 1 for a, k, s, p in zip(size, kernel, stride, padding))
    for p, q in itertools.product(range(down), range(along)):
        rows = range(p * stride[0] - padding[0], p * stride[0] - padding[0] + kernel[0])
        columns = range(q * stride[1] - padding[1], q * stride[1] - padding[1] + kernel[1])
        yield (p, q), [(r, c) for r in rows for c in columns if 0 <= r < size[0] and 0 <= c < size[1]]


def ties(n, c, height, width, seed=0):
    """Few values, all negative, so that many are equal and nothing is smaller than a padding of zeros."""
    out = np.empty((n, c, height, width), dtype=object)
    out.ravel()[...] = [Fraction(-int(v), 3) for v in np.random.default_rng(seed).integers(1, 4, out.size)]
    return out


@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLS)
def test_pools_equal_their_definitions(kernel, stride, padding):
    """Largest value, whose first place gets the gradient; mean, with a padding of zeros. Exactly."""
    x, n, c = ties(2, 3, 5, 6), 2, 3
    area = kernel * kernel if isinstance(kernel, int) else kernel[0] * kernel[1]
    for pool in (F.max_pool2d, F.avg_pool2d):
        t = Tensor(x, requires_grad=True)
        y = pool(t, kernel, stride, padding)
        grad = exact(*y.shape, seed=1)
        y.backward(grad)
        expected, expected_grad = np.full(y.shape, None), np.full(x.shape, Fraction(0))
        for (p, q), pixels in windows_by_definition((5, 6), kernel, stride, padding):
            for m, k in itertools.product(range(n), range(c)):
                values = [x[m, k, r, s] for r, s in pixels]
                if pool is F.max_pool2d:
                    expected[m, k, p, q] = max(values)
                    first = pixels[values.index(max(values))]
                    expected_grad[m, k, first[0], first[1]] += grad[m, k, p, q]
                else:
                    expected[m, k, p, q] = sum(values) / Fraction(area)
                    for r, s in pixels:
                        expected_grad[m, k, r, s] += grad[m, k, p, q] / area
        assert y.numpy().tolist() == expected.tolist()  # also: as many windows as there should be
        assert all_exact(t.grad.data)
        assert t.grad.numpy().tolist() == expected_grad.tolist()


def test_the_first_of_ties_gets_the_gradient():
    x = Tensor(np.zeros((1, 1, 4, 4)), requires_grad=True)
    F.max_pool2d(x, 2).backward(np.array([[[[1.0, 2], [3, 4]]]]))
    assert x.grad.numpy()[0, 0].tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    x = Tensor(np.zeros((1, 1, 3, 3)), requires_grad=True)
    F.max_pool2d(x, 2, 1, 1).backward(np.ones((1, 1, 4, 4)))  # first in the window, not in its padding
    assert x.grad.numpy()[0, 0].tolist() == [[4, 2, 2], [2, 1, 1], [2, 1, 1]]


def test_windows_of_more_than_256_places():
    """The winner's place must not be cut to a byte."""
    x = np.zeros((1, 1, 17, 34))
    x[0, 0, 16, 5], x[0, 0, 15, 33] = 1, 2
    t = Tensor(x, requires_grad=True)
    y = F.max_pool2d(t, 17)
    y.backward(np.array([[[[3.0, 4.0]]]]))
    assert y.numpy().ravel().tolist() == [1, 2]
    assert np.array_equal(t.grad, 3 * (x == 1) + 4 * (x == 2))


def test_means_hand_on_as_much_gradient_as_they_get():
    """Σ ∂x = Σ ∂y without padding; with it, what falls on the padding is lost. Pixels in no window get nothing."""
    for kernel, stride, padding, lost in ((2, 2, 0, 0), (2, 1, 0, 0), (3, 3, 0, 0), (2, 1, 1, 13), (2, 2, 1, 7)):
        x = Tensor(exact(1, 1, 6, 6), requires_grad=True)
        y = F.avg_pool2d(x, kernel, stride, padding)
        y.backward(np.full(y.shape, Fraction(1)))
        assert y.size - x.grad.numpy().sum() == lost  # ¾ of each corner's window, ½ of each edge's
    x = Tensor(np.ones((1, 1, 5, 5)), requires_grad=True)
    F.avg_pool2d(x, 2, 3).sum().backward()
    assert (x.grad.numpy()[0, 0] > 0).tolist() == [[i % 3 < 2 and j % 3 < 2 for j in range(5)] for i in range(5)]


def test_layers_and_functions_agree():
    x = np.random.default_rng(0).standard_normal((2, 3, 6, 7))
    for options in ({"kernel_size": 2}, {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)}):
        assert np.array_equal(nn.MaxPool2d(**options)(x), F.max_pool2d(x, **options))
        assert np.array_equal(nn.AvgPool2d(**options)(x), F.avg_pool2d(x, **options))
    assert repr(nn.MaxPool2d(2, padding=1)) == "MaxPool2d(kernel_size=(2, 2), stride=(2, 2), padding=(1, 1))"


# ── whole models, slabs ─────────────────────────────────────────────────────────────────────────────────


def test_no_images_go_through_a_whole_cnn():
    model = nn.cnn((1, 8, 8), (2, 3), 4)
    x = Tensor(np.zeros((0, 1, 8, 8), np.float32), requires_grad=True)
    logits = model(x)
    assert logits.shape == (0, 4)
    loss = F.cross_entropy(logits, np.zeros(0, int))
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, 1, 8, 8)
    assert all(np.array_equal(p.grad, np.zeros(p.shape)) for p in model.parameters())


def test_the_layers_of_a_cnn():
    model = nn.cnn((3, 13, 9), (4, 5, 6), 7, seed=3)
    assert {name: p.shape for name, p in model.named_parameters()} == {
        "0.weight": (4, 3, 3, 3), "0.bias": (4,), "3.weight": (5, 4, 3, 3), "3.bias": (5,),
        "6.weight": (6, 5, 3, 3), "6.bias": (6,), "10.weight": (7, 6), "10.bias": (7,),
    }  # fmt: skip
    assert model(np.zeros((2, 3, 13, 9))).shape == (2, 7)
    assert [type(layer).__name__ for layer in model][:4] == ["Conv2d", "ReLU", "MaxPool2d", "Conv2d"]
    again, other = nn.cnn((3, 13, 9), (4, 5, 6), 7, seed=3), nn.cnn((3, 13, 9), (4, 5, 6), 7, seed=4)
    for a, b, c in zip(model.parameters(), again.parameters(), other.parameters()):
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)


def test_batch_norm_of_half_precision_and_of_nan():
    """Sums are wider than float16, whose squares of 1000 are infinite; a NaN stays in its channel."""
    x = np.linspace(-1000, 1000, 48, dtype=np.float16).reshape(4, 2, 3, 2)
    layer, t = nn.BatchNorm2d(2).astype("float16"), Tensor(x, requires_grad=True)
    y = layer(t)
    y.backward(np.cos(np.arange(48)).reshape(y.shape).astype(np.float16))
    assert y.dtype == t.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == np.float16
    assert np.allclose(y.numpy().astype(float).var(axis=(0, 2, 3)), 1, rtol=1e-2)
    t = Tensor(np.random.default_rng(0).standard_normal((3, 2, 2, 2)), requires_grad=True)
    t.data[1, 0, 1, 1] = np.nan
    y = nn.BatchNorm2d(2).astype("float64")(t)
    y.backward(np.cos(np.arange(24.0)).reshape(y.shape))
    for array in (y.numpy(), t.grad.numpy()):
        assert np.isnan(array[:, 0]).all()
        assert np.isfinite(array[:, 1]).all()


def test_exact_cnn_of_means_gives_the_sum_of_its_samples_gradients():
    """Fractions through convolution, ReLU, means and a linear layer: n · mean = Σ, with ==."""
    model = nn.Sequential(
        nn.Conv2d(1, 2, 2, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(2, 1),
    ).astype(object)
    x, y = exact(3, 1, 3, 3), exact(3, 1, seed=1)
    F.mse_loss(model(x), y).backward(3)
    whole = [p.grad.numpy() for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    for i in range(3):
        F.mse_loss(model(x[i : i + 1]), y[i : i + 1]).backward(1)
    assert all(all_exact(g) for g in whole)
    assert [g.tolist() for g in whole] == [p.grad.numpy().tolist() for p in model.parameters()]
    assert all(g.any() for g in whole)


class Pictured(nn.Module):
    """Tokens become images: both operations that write into slots by themselves."""

    def __init__(self):
        self.rows = nn.Embedding(4, 12)
        self.conv = nn.Conv2d(3, 2, 2)
        self.initialize(0)

    def forward(self, tokens):
        return self.conv(self.rows(tokens).reshape(len(tokens), 3, 2, 2))


@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_written_into_slots_at_first_and_then_added(bias, monkeypatch):
    tokens = np.array([2, 0, 2])
    free, model = Pictured(), Pictured()
    if not bias:
        free.conv.bias = model.conv.bias = None
    layout = nn.Layout(model)
    params, grads = np.zeros(layout.size, np.float32), np.full(layout.size, np.nan, np.float32)
    layout.pack(params)
    model.bind(params, grads)
    free(tokens).sum().backward()
    written = []
    monkeypatch.setattr(
        nn.Parameter, "_accumulate", lambda p, g, fresh, old=nn.Parameter._accumulate: (
            written.append(g is p._grad_slot), old(p, g, fresh))
    )  # fmt: skip
    model(tokens).sum().backward()
    assert written == [True] * (2 + bias)  # straight into the slot, no copy
    for p, q in zip(free.parameters(), model.parameters()):
        assert np.shares_memory(q.grad.data, grads)
        assert p.grad.numpy().tobytes() == q.grad.numpy().tobytes()
    first = grads.copy()
    model(tokens).sum().backward()
    assert written[2 + bias :] == [False] * (2 + bias)
    for segment in layout.segments:
        here = slice(segment.offset, segment.offset + segment.size)
        assert np.array_equal(grads[here], 2 * first[here])
        assert np.isfinite(first[here]).all()


def test_frozen_weights_and_images_get_no_gradient(monkeypatch):
    """Nor does it cost anything: no image's gradient is gathered where none is asked for."""
    monkeypatch.delattr(conv.Conv2d, "add_back")
    layer = nn.Conv2d(1, 2, 2)
    layer.weight.requires_grad = False
    layer(np.ones((1, 1, 3, 3))).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad.numpy().tolist() == [4, 4]


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────


IMAGE = np.zeros((2, 3, 4, 5), np.float32)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda: nn.Conv2d(3, 2, 5)(IMAGE), r"conv2d: a window of 5×5 is larger than the images of 4×5: take"),
        (
            lambda: nn.Conv2d(3, 2, (4, 9), padding=(0, 1))(IMAGE),
            r"conv2d: a window of 4×9 is larger than the images of 4×5 \(with padding 4×7\): take a smaller",
        ),
        (lambda: F.max_pool2d(IMAGE, (5, 1)), "max_pool2d: a window of 5×1 is larger than the images of 4×5"),
        (lambda: F.avg_pool2d(IMAGE, 6), "avg_pool2d: a window of 6×6 is larger than the images of 4×5"),
        (lambda: nn.Conv2d(4, 2, 3)(IMAGE), r"images of shape \(2, 3, 4, 5\) .* weight of shape \(2, 4, 3, 3\)"),
        (lambda: F.conv2d(IMAGE, np.zeros((2, 3, 3))), r"conv2d: .* for a weight of shape \(2, 3, 3\)"),
        (lambda: nn.Conv2d(3, 2, 3)(IMAGE[0]), r"must have shape \(n, channels, height, width\), not \(3, 4, 5\)"),
        (lambda: nn.MaxPool2d(2)(IMAGE[0]), r"max_pool2d: images must have shape .* not \(3, 4, 5\)"),
        (lambda: nn.AvgPool2d(2)(IMAGE[None]), r"avg_pool2d: images must have shape .* not \(1, 2, 3, 4, 5\)"),
        (lambda: nn.Conv2d(0, 2, 3), "channels must be positive, not 0 → 2"),
        (lambda: nn.Conv2d(2, 0, 3), "channels must be positive, not 2 → 0"),
        (lambda: nn.Conv2d(3, 2, 0), "Conv2d: kernel_size=0: give a whole number from 1 on, or a pair"),
        (lambda: nn.Conv2d(3, 2, -1), "Conv2d: kernel_size=-1"),
        (lambda: nn.Conv2d(3, 2, 3.0), r"Conv2d: kernel_size=3\.0"),
        (lambda: nn.Conv2d(3, 2, (3, 0)), r"Conv2d: kernel_size=\(3, 0\)"),
        (lambda: nn.Conv2d(3, 2, (3, 3, 3)), r"Conv2d: kernel_size=\(3, 3, 3\)"),
        (lambda: nn.Conv2d(3, 2, 3, stride=0), "Conv2d: stride=0: give a whole number from 1 on"),
        (lambda: nn.Conv2d(3, 2, 3, padding=-1), "Conv2d: padding=-1: give a whole number from 0 on"),
        (lambda: F.conv2d(IMAGE, np.zeros((2, 3, 1, 1)), stride=1.5), r"conv2d: stride=1\.5"),
        (lambda: nn.MaxPool2d(0), "MaxPool2d: kernel_size=0"),
        (lambda: nn.AvgPool2d(2.5), r"AvgPool2d: kernel_size=2\.5"),
        (lambda: nn.MaxPool2d(2, -2), "MaxPool2d: stride=-2"),
        (lambda: F.avg_pool2d(IMAGE, 0), "avg_pool2d: kernel_size=0"),
        (lambda: F.max_pool2d(IMAGE, "2"), "max_pool2d: kernel_size='2'"),
        (lambda: nn.MaxPool2d(3, padding=2), "MaxPool2d: padding=.* is more than half of kernel_size=.*no image"),
        (lambda: F.avg_pool2d(IMAGE, (4, 2), padding=(2, 2)), r"avg_pool2d: padding=\(2, 2\) is more than half"),
        (lambda: nn.cnn((1, 7, 28), (4, 4, 4)), "cnn: images of 7×28 can't be halved 3 times"),
    ],
)  # fmt: skip
def test_wrong_images_and_windows_are_told(run, message):
    with pytest.raises(ValueError, match=message):
        run()


def test_the_largest_padding_and_halvings_that_fit():
    assert nn.MaxPool2d(4, padding=2)(IMAGE).shape == (2, 3, 2, 2)
    assert nn.AvgPool2d((1, 2), padding=(0, 1))(IMAGE).shape == (2, 3, 4, 3)
    assert nn.cnn((1, 8, 15), (4, 4, 4))(np.zeros((1, 1, 8, 15))).shape == (1, 10)


@pytest.mark.parametrize("pool", [F.max_pool2d, F.avg_pool2d])
def test_bytes_are_pooled_as_numbers(pool):
    x = np.array([[200, 250], [0, 130]], np.uint8).reshape(1, 1, 2, 2)
    for padding in (0, 1):
        y = pool(x, 2, padding=padding)
        assert y.dtype == np.float32
        assert np.array_equal(y, pool(x.astype(np.float32), 2, padding=padding))


def test_a_mean_of_exact_zeros_stays_exact():
    """ReLU puts Python's 0 among Fractions; 0 / 9 would be a float, and so would all that follows."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, stride=2), nn.ReLU(), nn.AvgPool2d(3)).astype(object)
    x = np.array([Fraction(i % 7 - 3) for i in range(36)], dtype=object).reshape(1, 1, 6, 6)
    y = model(x)
    y.sum().backward()
    for array in (y.numpy(), model[0].weight.grad.numpy(), model[0].bias.grad.numpy()):
        assert {type(value) for value in array.ravel()} <= {Fraction, int}


def test_a_mean_of_large_half_precision_numbers_does_not_overflow():
    assert float(F.avg_pool2d(np.full((1, 1, 4, 4), 60000, np.float16), 4).numpy().item()) == 60000


@pytest.mark.parametrize("number", [np.uint8(2), np.int64(2)])
def test_sizes_may_be_numbers_of_numpy_or_lists(number):
    x = np.ones((1, 1, 300, 6), np.float32)
    assert nn.MaxPool2d(number)(x).shape == nn.MaxPool2d([number, 2])(x).shape == (1, 1, 150, 3)
    assert nn.Conv2d(1, 1, 3, padding=np.uint8(130))(x).shape == (1, 1, 558, 264)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: F.conv2d(x, np.ones((4, 1, 3, 3)), np.ones(1)), ValueError, r"a bias of shape \(1,\)"),
        (lambda x: F.conv2d(x, np.ones((0, 1, 3, 3))), ValueError, "has no elements"),
        (lambda x: F.conv2d(x, np.ones((2, 1, 0, 0))), ValueError, "has no elements"),
        (lambda x: F.conv2d(x.astype("U"), np.ones((2, 1, 3, 3))), TypeError, "images must hold numbers, not <U"),
        (lambda x: F.max_pool2d(x, True), ValueError, "kernel_size=True"),
    ],
)
def test_further_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((1, 1, 5, 5)))
