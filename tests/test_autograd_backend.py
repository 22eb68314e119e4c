"""The floor: array modules, moves, the tree of random generators, the meter."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from minidp import backend, nn
from minidp.autograd import Tensor
from minidp.nn import functional as F


def test_array_module_of_numpy_and_of_what_is_no_array():
    class Sub(np.ndarray):
        pass

    assert backend.array_module(np.ones(3)) is np
    assert backend.array_module(np.float32(3)) is np
    assert backend.array_module(np.ones(3).view(Sub)) is np
    for thing in ([1.0], 1.0, None, "array"):
        with pytest.raises(TypeError, match=type(thing).__name__):
            backend.array_module(thing)


def test_moves_on_the_host_copy_nothing():
    x = np.ones(3)
    assert backend.to_numpy(x) is x
    assert backend.asarray(x, np) is x
    assert backend.asarray(x, np, np.float32).dtype == np.float32
    assert backend.asarray([1, 2], np).tolist() == [1, 2]
    backend.synchronize(np)


def test_importing_the_engine_does_not_import_cupy_or_torch():
    code = "import sys, minidp.optim; sys.exit(any(m in sys.modules for m in ('cupy', 'torch', 'safetensors')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_generator_is_a_function_of_its_key():
    def draw(*key):
        return backend.generator(*key).random(4).tolist()

    assert draw(0, "init", "0.weight") == draw(0, "init", "0.weight")
    keys = [(0,), (1,), (0, 0), (0, 0, 0), (0, "init"), (0, "init", 0), (0, 1, "init"), (0, "init", "0.bias")]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)


def test_generator_is_the_same_in_every_process_and_leaves_the_global_one_alone():
    np.random.seed(7)
    state = np.random.get_state()[1].tolist()
    code = "from minidp import backend; print(backend.generator(3, 'init', 'a.b').integers(1 << 60))"
    other = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(other) == backend.generator(3, "init", "a.b").integers(1 << 60)
    nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))(np.ones((2, 3)))
    assert np.random.get_state()[1].tolist() == state


def test_meter_counts_operations_and_flops_each_way():
    x, w, b = np.ones((5, 3)), np.ones((7, 3)), np.ones(7)
    W, B = Tensor(w, requires_grad=True), Tensor(b, requires_grad=True)
    with backend.meter() as m:
        y = F.linear(x, W, B)
    assert (m.operations, m.flops) == (1, 2 * 5 * 3 * 7 + 35)
    with backend.meter() as m:
        y.backward(np.ones((5, 7)))
    assert (m.operations, m.flops) == (1, 2 * 5 * 3 * 7 + 35)  # dW and db, no dx
    with backend.meter() as m:
        y = F.linear(Tensor(x, requires_grad=True), W, B)
        y.backward(np.ones((5, 7)))
    assert (m.operations, m.flops) == (2, 3 * 2 * 5 * 3 * 7 + 70)
    with backend.meter() as m:
        (Tensor(w, requires_grad=True) @ np.ones((3, 2))).sum()
    assert m.operations == 2
    assert m.flops == 2 * 7 * 3 * 2 + 14
    with backend.meter() as m:
        (Tensor(w, requires_grad=True) @ Tensor(np.ones((3, 2)), requires_grad=True)).backward(np.ones((7, 2)))
    assert (m.operations, m.flops) == (2, 3 * 2 * 7 * 3 * 2)


@pytest.mark.parametrize(
    ("function", "inputs", "forward", "backward"),
    [
        (lambda a: F.relu(a), [(5, 4)], 20, 20),
        (lambda a, b: a + b, [(5, 4), (4,)], 20, 40),  # an elementwise operation: one per element of the result
        (lambda a: a.sum(), [(5, 4)], 20, 20),  # a reduction: one per element of the input
        (lambda a: F.cross_entropy(a, np.zeros(5, int)), [(5, 4)], 120, 40),
        (lambda a, b: F.mse_loss(a, b), [(5, 4), (5, 4)], 60, 40),
        (lambda a, b, c: F.linear(a, b, c), [(5, 4), (3, 4), (3,)], 120 + 15, 240 + 15),
        (lambda a, b: F.linear(a, b), [(5, 4), (3, 4)], 120, 240),
    ],
)
def test_estimates_of_flops(function, inputs, forward, backward):
    tensors = [Tensor(np.ones(shape), requires_grad=True) for shape in inputs]
    with backend.meter() as m:
        out = function(*tensors)
    assert m.flops == forward
    with backend.meter() as m:
        out.backward(np.ones(out.shape))
    assert m.flops == backward


@pytest.mark.parametrize(
    ("function", "inputs", "forward", "backward"),  # in elements: a is (5, 4)
    [
        (F.relu, [(5, 4)], 40, 60),  # by default: inputs and output; gradient, inputs and their gradients
        (lambda a, b: a * b, [(5, 4), (4,)], 44, 44 + 24),
        (lambda a: 2 / a, [(5, 4)], 40, 60),
        (lambda a, b: a + b, [(5, 4), (5, 4)], 60, 0),  # the gradient is handed on
        (lambda a, b: a + b, [(5, 4), (4,)], 44, 24),  # a sum over the rows
        (lambda a, b: a - b, [(5, 4), (4,)], 44, 24 + 40),
        (lambda a, b: a @ b, [(5, 4), (4, 3)], 20 + 12 + 15, 2 * (20 + 12 + 15)),
        (lambda a: a.reshape(4, 5), [(5, 4)], 0, 0),
        (lambda a: F.flatten(a), [(5, 2, 2)], 0, 0),
        (lambda a: a.T, [(5, 4)], 0, 0),
        (lambda a: a[1:3], [(5, 4)], 16, 20 + 24),
        (lambda a: a.sum(), [(5, 4)], 21, 0),
        (lambda a: a.mean(axis=0), [(5, 4)], 24, 8),
        (lambda a: F.cross_entropy(a, np.zeros(5, int)), [(5, 4)], 160, 40),
        (lambda a, b: F.mse_loss(a, b), [(5, 4), (5, 4)], 120, 80),
        (lambda a: F.softmax(a), [(5, 4)], 160, 180),
        (lambda a: F.log_softmax(a), [(5, 4)], 160, 160),
        (lambda a: F.gelu(a), [(5, 4)], 1200, 60),
        (lambda a: F.dropout(a, 0.5, key=(0,)), [(5, 4)], 160, 60),
        (lambda a, b, c: F.linear(a, b, c), [(5, 4), (3, 4), (3,)], 47 + 33, 94 + 18),
        (lambda a, b: F.linear(a, b), [(5, 4), (3, 4)], 47, 94),
    ],
)
def test_estimates_of_memory_traffic(function, inputs, forward, backward):
    for dtype, itemsize in ((np.float32, 4), (np.float64, 8)):
        tensors = [Tensor(np.ones(shape, dtype), requires_grad=True) for shape in inputs]
        with backend.meter() as m:
            out = function(*tensors)
        assert m.nbytes == forward * itemsize
        with backend.meter() as m:
            out.backward(np.ones(out.shape, dtype))
        assert m.nbytes == backward * itemsize


def test_only_gradients_that_are_needed_are_traffic():
    x, w = np.ones((5, 3)), Tensor(np.ones((7, 3)), requires_grad=True)
    with backend.meter() as m:
        F.linear(x, w).backward(np.ones((5, 7)))
    assert m.nbytes == 2 * 8 * (15 + 21 + 35)
    with backend.meter() as m:
        (w * np.ones((7, 3))).backward(np.ones((7, 3)))
    assert m.nbytes == 8 * 21 * (3 + 4)


def test_exact_fractions_are_metered_like_everything_else():
    x = Tensor(np.array([[Fraction(1, 3), Fraction(2)]], dtype=object), requires_grad=True)
    with backend.meter() as m:
        (2 * x + 1).sum().backward()
    assert (m.operations, m.nbytes) == (6, 8 * ((4 + 4 + 3) + (0 + 0 + 6)))


def test_meters_nest_and_end_with_their_block():
    assert backend.current_meter() is None
    with backend.meter() as outer:
        backend.count(1)
        with contextlib.suppress(KeyError), backend.meter() as inner:
            backend.count(10)
            raise KeyError
        assert backend.current_meter() is outer
        backend.count(100, 7)
        backend.count(nbytes=1)
    assert (inner.operations, inner.flops, inner.nbytes) == (1, 10, 0)
    assert (outer.operations, outer.flops, outer.nbytes) == (4, 111, 8)
    assert backend.current_meter() is None
    backend.count(5, 5)
    assert (outer.flops, outer.nbytes) == (111, 8)
    assert repr(outer) == "Meter(operations=4, flops=111, nbytes=8)"
