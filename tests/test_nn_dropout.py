"""Dropout: inverted, and a function of (seed, layer, update, rank, call)."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from minidp import nn
from minidp.nn import functional as F

X = np.ones((20, 30), np.float32)


def two_layers(p=0.5):
    return nn.Sequential(nn.Dropout(p), nn.Sequential(nn.Dropout(p)))


def masks(model, **scope):
    with nn.dropout_scope(**scope):
        return [layer(X).numpy().tobytes() for layer in (model[0], model[1][0])]


def test_elements_are_zero_or_scaled_in_the_right_proportion():
    y = F.dropout(np.ones(100_000, np.float32), 0.3, key=(0,)).numpy()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.7)}
    assert abs((y == 0).mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / 100_000)
    assert y.dtype == np.float32


def test_gradient_passes_where_the_value_passed():
    model = nn.Dropout(0.4)
    x = nn.Parameter(X)
    y = model(x)
    (y * 3).sum().backward()
    assert np.array_equal(x.grad, 3 * y.numpy())


def test_identity_in_evaluation_and_for_p_0_and_nothing_for_p_1():
    x = nn.Parameter(X)
    assert nn.Dropout(0.5).eval()(x) is x
    assert nn.Dropout(0)(x) is x
    assert np.array_equal(nn.Dropout(0.5).eval()(X), X)
    assert not nn.Dropout(1)(X).numpy().any()
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            nn.Dropout(p)
        with pytest.raises(ValueError, match="probability"):
            F.dropout(X, p, key=())


def test_equal_keys_give_equal_masks_whatever_ran_before():
    model = two_layers()
    first = masks(model, seed=1, update=5, rank=2)
    model(X)
    masks(model, seed=1, update=6, rank=2)
    assert masks(model, seed=1, update=5, rank=2) == first
    assert masks(two_layers(), seed=1, update=5, rank=2) == first


def test_the_key_is_layer_update_rank_and_call():
    model = two_layers(0.3)
    with nn.dropout_scope(seed=7, update=5, rank=2):
        outputs = [model[1][0](X) for _ in range(3)]
    for call, y in enumerate(outputs):
        assert np.array_equal(y, F.dropout(X, 0.3, key=("dropout", "1.0", 5, 2, call), seed=7))


def test_each_part_of_the_key_matters():
    model = two_layers()
    keys = [{}, {"seed": 1}, {"update": 1}, {"rank": 1}, {"update": 1, "rank": 1}, {"seed": 1, "update": 1}]
    found = [mask for key in keys for mask in masks(model, **key)]
    assert len(set(found)) == 2 * len(keys)


def test_a_layer_called_twice_in_a_scope_draws_two_masks_and_again_the_same_two():
    layer = nn.Dropout(0.5)

    def twice():
        with nn.dropout_scope(update=3):
            return layer(X).numpy().tobytes(), layer(X).numpy().tobytes()

    first, second = twice()
    assert first != second
    assert twice() == (first, second)


def test_outside_a_scope_successive_calls_differ_and_a_copy_repeats_them():
    layer = nn.Dropout(0.5)
    twin = copy.deepcopy(layer)
    a, b = layer(X).numpy(), layer(X).numpy()
    assert not np.array_equal(a, b)
    assert np.array_equal(twin(X), a)


def test_layers_of_one_model_differ_without_a_strategy_too():
    class Net(nn.Module):
        def __init__(self):
            self.a, self.b = nn.Dropout(0.5), nn.Dropout(0.5)

    net = Net()
    assert not np.array_equal(net.a(X), net.b(X))


def test_the_key_uses_the_dotted_name_in_the_whole_tree():
    """A block that is built first and put into a model later is named by its final place."""
    block = nn.Sequential(nn.Dropout(0.5))
    model = nn.Sequential(nn.ReLU(), block)
    other = nn.Sequential(nn.ReLU(), nn.Sequential(nn.Dropout(0.5)))
    with nn.dropout_scope():
        a = block(X)
    with nn.dropout_scope():
        b = other(X)
    assert np.array_equal(a, b)
    assert model[1][0]._path == "1.0"


def test_dtypes_share_their_masks():
    with nn.dropout_scope(update=1):
        a = nn.Dropout(0.5)(X)
    with nn.dropout_scope(update=1):
        b = nn.Dropout(0.5)(X.astype(np.float64))
    assert (a.dtype, b.dtype) == (np.float32, np.float64)
    assert np.array_equal(a, b)


def test_scopes_nest_end_with_their_block_and_can_be_entered_again():
    layer = nn.Dropout(0.5)
    outer = nn.dropout_scope(update=1)
    with outer:
        a = layer(X).numpy()
        with pytest.raises(KeyError), nn.dropout_scope(update=2):
            raise KeyError
        b = layer(X).numpy()
    with outer:
        c = layer(X).numpy()
    with nn.dropout_scope(update=1):
        again = [layer(X).numpy() for _ in range(3)]
    assert all(np.array_equal(p, q) for p, q in zip((a, b, c), again))
    assert not np.array_equal(b, c)


def test_a_layer_follows_a_scope_that_goes_on_from_update_to_update():
    layer, scope = nn.Dropout(0.5), nn.DropoutScope()
    layer.follow(scope)
    masks = {}
    for update in (4, 5, 4):
        scope.begin(update)
        a, b = layer(X).numpy(), layer(X).numpy()
        assert not np.array_equal(a, b)
        masks.setdefault(update, (a, b))
        assert all(np.array_equal(m, n) for m, n in zip(masks[update], (a, b)))
    assert not np.array_equal(masks[4][0], masks[5][0])
    with nn.dropout_scope(update=4):
        assert np.array_equal(layer(X), masks[4][0])
