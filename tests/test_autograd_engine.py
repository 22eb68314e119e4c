"""The backward pass and the traps that others fell into."""

from __future__ import annotations

import contextvars
import gc
import weakref

import numpy as np
import pytest

import minidp
from minidp import nn
from minidp.autograd import Function, Tensor, is_grad_enabled
from minidp.nn import functional as F


def leaf(*values, dtype=np.float64):
    return Tensor(np.array(values, dtype=dtype), requires_grad=True)


# ── accumulation ────────────────────────────────────────────────────────────────────────────────────────


def test_diamond_graph_adds_gradients():
    """x reaches the loss on several ways; `grad =` instead of `grad +=` would keep only one."""
    x = leaf(3.0)
    a = x * 2
    (a * a + a + x).backward()
    assert x.grad.item() == 8 * 3 + 2 + 1


def test_a_node_waits_for_all_its_consumers():
    """A depth-first walk without order would run `a` before the long way round has reached it."""
    calls = []

    class Count(Function):
        def forward(self, x):
            return x * 1

        def backward(self, grad):
            calls.append(grad.item())
            return grad

    x = leaf(1.0)
    a = Count.apply(x)
    long_way = a
    for _ in range(5):
        long_way = long_way * 2
    (a + long_way + a).backward()
    assert calls == [34.0]
    assert x.grad.item() == 34


def test_backward_adds_to_grad_until_it_is_set_to_none():
    x = leaf(1.0, 2.0)
    (x * x).sum().backward()
    (x * 3).sum().backward()
    assert np.array_equal(x.grad, [5, 7])
    x.grad = None
    (x * 3).sum().backward()
    assert np.array_equal(x.grad, [3, 3])


def test_two_leaves_of_one_sum_do_not_share_a_gradient():
    """Add hands the same array to both inputs: adding into one in place would change the other."""
    a, b = leaf(1.0), leaf(2.0)
    (a + b).sum().backward()
    (a * 10).sum().backward()
    assert (a.grad.item(), b.grad.item()) == (11, 1)
    a.grad.data[...] = 100
    assert b.grad.item() == 1


def test_an_aliased_gradient_inside_the_graph_is_not_added_into():
    """y's gradient is first an alias of what flows to z; the second contribution must not leak into z's."""
    x, z = leaf(1.0), leaf(1.0)
    y = x * 1
    ((y + z) + y * 5).sum().backward()
    assert (x.grad.item(), z.grad.item()) == (6, 1)


def test_the_given_gradient_stays_the_callers():
    x = leaf(1.0, 2.0)
    g = np.array([1.0, 1.0])
    x.reshape(2).backward(g)
    x.reshape(2).backward(g)
    assert np.array_equal(g, [1, 1])
    g[...] = 7
    assert np.array_equal(x.grad, [2, 2])


def test_setting_grad_copies():
    x, g = leaf(1.0, 2.0), np.zeros(2)
    x.grad = g
    (x * 1).sum().backward()
    assert np.array_equal(g, [0, 0])
    with pytest.raises(ValueError, match=r"gradient of shape \(3,\) for a tensor of shape \(2,\)"):
        x.grad = np.zeros(3)


def test_gradient_of_a_leaf_itself():
    x = leaf(2.0).reshape(()).detach()
    x = Tensor(x.data, requires_grad=True)
    x.backward(5)
    assert x.grad.item() == 5


def test_float32_leaf_of_a_float64_sum_gets_a_float32_gradient():
    x = leaf(1.0, dtype=np.float32)
    (x * np.array([0.1])).sum().backward()
    assert x.grad.dtype == np.float32


def test_gradient_number_scales():
    x = leaf(1.0, 2.0)
    (x * x).mean().backward(2)
    assert np.array_equal(x.grad, [2, 4])


# ── errors ──────────────────────────────────────────────────────────────────────────────────────────────


def test_second_backward_through_a_used_graph_raises_before_it_changes_anything():
    x, w = leaf(1.0), leaf(5.0)
    shared = x * x
    shared.sum().backward()
    with pytest.raises(RuntimeError, match="used already"):
        (w * 1 + shared).sum().backward()
    assert x.grad.item() == 2
    assert w.grad is None


def test_backward_of_what_needs_no_gradient_raises():
    with pytest.raises(RuntimeError, match="requires_grad"):
        Tensor(np.ones(())).backward()


def test_backward_of_a_vector_wants_a_gradient_of_its_shape():
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match=r"shape \(2,\)"):
        (x * 1).backward()
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        (x * 1).backward(np.ones(3))


def test_integers_have_no_gradient():
    with pytest.raises(TypeError, match="int64"):
        minidp.tensor([1, 2], requires_grad=True)


def test_python_data_is_refused_with_a_hint():
    with pytest.raises(TypeError, match=r"list.*minidp\.tensor"):
        F.relu([1.0, 2.0])


# ── recording ───────────────────────────────────────────────────────────────────────────────────────────


def test_no_grad_records_nothing_and_keeps_nothing_alive():
    seen = []

    class Spy(Function):
        def forward(self, x):
            seen.append(weakref.ref(self, lambda _: seen.append("freed")))
            self.saved = x
            assert not any(self.needs)
            return x * 1

    Spy.__slots__ = ()
    x = leaf(1.0)
    with minidp.no_grad():
        y = Spy.apply(x)
    assert not y.requires_grad
    assert y.grad_fn is None
    assert seen[1:] == ["freed"]


def test_no_grad_is_restored_after_an_exception_and_nests():
    def fail():
        with minidp.no_grad():
            raise KeyError("in the block")

    with pytest.raises(KeyError):
        fail()
    assert is_grad_enabled()
    with minidp.no_grad():
        with pytest.raises(KeyError):
            fail()
        assert not is_grad_enabled()
    assert is_grad_enabled()


def test_no_grad_decorates():
    @minidp.no_grad()
    def evaluate(depth):
        assert not is_grad_enabled()
        return evaluate(depth - 1) if depth else (leaf(1.0) * 2)

    assert not evaluate(3).requires_grad
    assert is_grad_enabled()


def test_no_grad_does_not_leak_into_other_contexts():
    with minidp.no_grad():
        assert contextvars.Context().run(is_grad_enabled)


def test_a_used_graph_frees_its_arrays_although_the_loss_lives():
    x = leaf(*range(5))
    y = x * 2
    loss = (y * y).sum()
    kept = weakref.ref(y)
    del y
    gc.disable()  # freed by reference counts alone: the graph has no cycles
    try:
        assert kept() is not None
        loss.backward()
        assert kept() is None
    finally:
        gc.enable()


def test_a_chain_of_30_000_operations():
    """No recursion: neither in the walk nor when the graph is freed."""
    x = leaf(1.0)
    y = x
    for _ in range(30_000):
        y = y + 0
    y.sum().backward()
    assert x.grad.item() == 1
    for _ in range(30_000):
        y = y + 0
    del y


# ── hooks ───────────────────────────────────────────────────────────────────────────────────────────────


def test_hook_sees_the_whole_gradient_once_and_the_parameter_itself():
    """A hook that fires at the first contribution would see 5; one that is handed data would see 2."""
    p, seen = nn.Parameter(np.array(2.0)), []
    p.register_post_accumulate_grad_hook(lambda parameter: seen.append((parameter, parameter.grad.item())))
    (p * 5 + p * p).backward()
    assert seen == [(p, 9.0)]


def test_hooks_fire_in_each_pass_until_removed_and_before_the_pass_ends():
    order = []
    first, last = nn.Parameter(np.array(2.0)), nn.Parameter(np.array(3.0))
    first.register_post_accumulate_grad_hook(lambda p: order.append(("first", last.grad is not None)))
    remove = last.register_post_accumulate_grad_hook(lambda p: order.append(("last", first.grad is not None)))
    (first * 1 * 1 * 1 * last).backward()
    assert order == [("last", False), ("first", True)]
    remove()
    (first * last).backward()
    assert order[2:] == [("first", True)]
    assert last._hooks is None


def test_mean_of_nothing_is_zero():
    x = Tensor(np.zeros((0, 3)), requires_grad=True)
    loss = x.mean()
    loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, 3)
