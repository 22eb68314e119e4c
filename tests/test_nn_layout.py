"""Layout and bind: parameters and gradients as views of flat slabs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidp import nn
from minidp.nn import functional as F

dtypes = st.sampled_from(["float16", "float32", "float64"])
shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)


class Loose(nn.Module):
    def __init__(self, shapes, dtype="float32"):
        for i, shape in enumerate(shapes):
            setattr(self, f"p{i}", nn.Parameter(np.full(shape, i + 1, dtype)))


@settings(derandomize=True, deadline=None)
@given(shapes, dtypes)
def test_segments_are_aligned_disjoint_and_in_order(shapes, dtype):
    layout = nn.Layout(Loose(shapes, dtype))
    assert [s.shape for s in layout.segments] == shapes
    assert layout.dtype == dtype
    assert layout.nbytes == layout.size * layout.itemsize
    assert layout.nbytes % 64 == 0
    end = 0
    for s in layout.segments:
        assert s.offset * layout.itemsize % 64 == 0
        assert end <= s.offset < end + 64
        assert s.size == np.prod(s.shape, dtype=int)
        end = s.offset + s.size
    assert end <= layout.size < end + 64


@settings(derandomize=True, deadline=None)
@given(shapes, dtypes, st.integers(0, 400), st.integers(0, 400))
def test_views_pack_and_names_agree_with_marking_each_element(shapes, dtype, lo, hi):
    layout = nn.Layout(Loose(shapes, dtype))
    flat = np.full(layout.size, -1, dtype)
    layout.pack(flat)
    owner = np.zeros(layout.size, int)  # 0: padding
    for i, s in enumerate(layout.segments, 1):
        owner[s.offset : s.offset + s.size] = i
    assert np.array_equal(flat, owner)
    for i, view in enumerate(layout.views(flat), 1):
        assert view.shape == shapes[i - 1]
        assert (view == i).all()
        assert view.size == 0 or np.shares_memory(view, flat)
    inside = sorted(set(owner[lo:hi].tolist()) - {0})
    assert layout.names_at(lo, hi) == [f"p{i - 1}" for i in inside]


def tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad = False
    return model


def test_tied_parameters_have_one_segment_and_frozen_ones_none():
    layout = nn.Layout(tied())
    assert [s.name for s in layout.segments] == ["0.weight", "0.bias", "1.bias", "2.bias"]
    assert layout.segments[0].names == ("0.weight", "1.weight")
    assert layout.describe()[0] == ("0.weight", (3, 3), "float32")
    assert "4 parameters" in repr(layout)


def test_mixed_dtypes_are_an_error_that_tells_the_way_out():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).astype("float64"))
    with pytest.raises(TypeError, match=r"0\.weight is float32, 1\.weight is float64.*astype"):
        nn.Layout(model)


def test_frozen_parameters_may_have_another_dtype():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).astype("float64"))
    model[1].weight.requires_grad = model[1].bias.requires_grad = False
    assert nn.Layout(model).dtype == np.float32


def test_slabs_of_the_wrong_kind_are_refused():
    layout = nn.Layout(nn.Linear(2, 2))
    for wrong in (np.zeros(layout.size + 1, "f"), np.zeros(layout.size, "d"), np.zeros(2 * layout.size, "f")[::2]):
        with pytest.raises(ValueError, match=f"contiguous 1-d array of {layout.size} float32"):
            layout.views(wrong)


def test_views_of_another_layout_are_refused():
    layout, other = nn.Layout(nn.Linear(2, 2)), nn.Layout(nn.Linear(2, 2, bias=False))
    views = other.views(np.zeros(other.size, np.float32))
    for point in (layout.point, layout.point_grads):
        with pytest.raises(ValueError, match="shorter"):
            point(views)


def bound(model):
    layout = nn.Layout(model)
    params, grads = np.zeros(layout.size, layout.dtype), np.full(layout.size, 7, layout.dtype)
    layout.pack(params)
    model.bind(params, grads)
    return layout, params, grads


def train_step(model, x, y, n=None):
    F.cross_entropy(model(x), y).backward(n)


X = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32)
Y = np.array([0, 1, 0, 1, 1, 0])


def test_bound_equals_unbound():
    """Slots, tied weights and frozen ones: the slab holds what .grad holds without a slab."""
    free, model = tied(), tied()
    layout, _, grads = bound(model)
    assert [p.data.base is not None for p in model.parameters() if p.requires_grad] == [True] * 4
    train_step(free, X, Y)
    train_step(model, X, Y)
    for (_, p), (_, q) in zip(free.named_parameters(), model.named_parameters()):
        assert np.array_equal(p, q)
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or p.grad.numpy().tobytes() == q.grad.numpy().tobytes()
    assert np.array_equal(layout.views(grads)[0], free[0].weight.grad)


def test_first_gradient_is_stored_later_ones_added_until_cleared():
    model = nn.Linear(3, 2)
    layout, _, grads = bound(model)
    assert model.weight.grad is None
    train_step(model, X, Y)  # the slab held 7s: they must be gone
    first = grads.copy()
    train_step(model, X, Y)
    for s in layout.segments:
        here = slice(s.offset, s.offset + s.size)
        assert np.array_equal(grads[here], 2 * first[here])
        assert not (first[here] == 7).any()
    layout.clear_written()
    assert model.weight.grad is None
    train_step(model, X, Y)
    assert np.array_equal(grads, first)
    assert (grads[layout.segments[0].size : layout.segments[1].offset] == 7).all()  # padding is left alone


def test_gemm_writes_into_the_slab_without_a_copy():
    model = nn.Linear(3, 2)
    layout, _, grads = bound(model)
    loss = F.cross_entropy(model(X), Y)
    asked = []
    node = loss.grad_fn.inputs[0].grad_fn
    original = type(node).grad_out

    def spy(self, k):
        asked.append(original(self, k))
        return asked[-1]

    type(node).grad_out = spy
    try:
        loss.backward()
    finally:
        type(node).grad_out = original
    assert [np.shares_memory(a, grads) for a in asked] == [True, True]
    assert np.array_equal(model.weight.grad, layout.views(grads)[0])


def test_a_non_contiguous_result_lands_in_the_slot():
    """An operation that knows nothing of slots: the engine copies."""
    model = Loose([(2, 3)])
    _, _, grads = bound(model)
    (model.p0.T * np.arange(6).reshape(3, 2)).sum().backward()
    assert np.array_equal(grads[:6].reshape(2, 3), np.arange(6).reshape(3, 2).T)


def test_zero_unwritten_zeroes_what_backward_did_not_reach():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(3, 2))
    layout, _, grads = bound(model)
    train_step(model[0], X, Y)
    layout.zero_unwritten(grads)
    used, unused = layout.views(grads)[:2], layout.views(grads)[2:]
    assert not any((view == 0).all() or (view == 7).any() for view in used)
    assert all((view == 0).all() for view in unused)


def test_setting_grad_writes_the_slot():
    model = nn.Linear(3, 2)
    _, _, grads = bound(model)
    model.weight.grad = np.ones((2, 3))
    assert np.array_equal(grads[:6], np.ones(6))
    assert np.array_equal(model.weight.grad, np.ones((2, 3)))
    model.weight.grad = None
    assert model.weight.grad is None
    train_step(model, X, Y)
    assert not (grads[:6] == 1).any()


def test_repointing_between_two_buffers_and_a_graph_that_is_under_way():
    """Data is re-pointed between forward and backward: the gradient is that of the forward."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    layout, params, _ = bound(model)
    other = layout.views(np.zeros_like(params))
    loss = F.cross_entropy(model(X), Y)
    layout.point(other)
    assert model[0].weight.data is other[0]
    loss.backward()
    second = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    train_step(second, X, Y)
    assert np.array_equal(model[0].weight.grad, second[0].weight.grad)
    assert (model(X).numpy() == 0).all()


def test_a_parameter_keeps_its_identity_and_unbind_gives_copies():
    model = nn.Sequential(nn.Linear(3, 2))
    before = list(model.parameters())
    values = model.state_dict()
    _, params, grads = bound(model)
    train_step(model, X, Y)
    gradient = model[0].weight.grad.numpy().copy()
    model.unbind()
    params[...] = grads[...] = -1
    assert all(a is b for a, b in zip(before, model.parameters()))
    assert np.array_equal(values["0.weight"], model[0].weight)
    assert np.array_equal(model[0].weight.grad, gradient)
    train_step(model, X, Y)
    assert np.array_equal(model[0].weight.grad, 2 * gradient)
    model[0].weight.data[...] = 0


def test_bind_refuses_before_it_changes_anything():
    model = nn.Linear(3, 2)
    before = model.weight.data
    with pytest.raises(ValueError, match="contiguous"):
        model.bind(np.zeros(nn.Layout(model).size, "f"), np.zeros(3, "f"))
    assert model.weight.data is before
    bound(model)
    with pytest.raises(RuntimeError, match="bound to a slab"):
        model.astype("float64")
