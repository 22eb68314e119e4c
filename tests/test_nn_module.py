"""Modules: names, tied and frozen parameters, initial values, state, dtypes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

from minidp import nn
from minidp.autograd import Tensor
from minidp.nn import functional as F


def mlp(seed=0):
    return nn.Sequential(
        nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 3), nn.Tanh()), nn.Linear(3, 2), seed=seed
    )


class Tied(nn.Module):
    """Encoder and decoder share one weight; the decoder's bias is frozen; a buffer counts."""

    def __init__(self):
        self.decode = nn.Linear(3, 3)
        self.encode = nn.Linear(3, 3, bias=False)
        self.encode.weight = self.decode.weight
        self.decode.bias.requires_grad = False
        self.scale = nn.Parameter(np.ones(2, np.float32))
        self.register_buffer("count", np.zeros((), np.float32))
        self.initialize(0)

    def forward(self, x):
        return self.decode(F.relu(self.encode(x)))


# ── names ───────────────────────────────────────────────────────────────────────────────────────────────


def test_names_are_dotted_paths_as_in_pytorch():
    model = mlp()
    assert [name for name, _ in model.named_parameters()] == [
        "0.weight", "0.bias", "2.0.weight", "2.0.bias", "3.weight", "3.bias",
    ]  # fmt: skip
    assert [name for name, _ in model.named_modules()] == ["", "0", "1", "2", "2.0", "2.1", "3"]
    assert len(list(model.modules())) == 7
    assert [p.shape for p in model.parameters()] == [(3, 4), (3,), (3, 3), (3,), (2, 3), (2,)]


def test_a_tied_parameter_counts_once_under_its_first_name_but_is_saved_under_both():
    model = Tied()
    assert [name for name, _ in model.named_parameters()] == ["scale", "decode.weight", "decode.bias"]
    assert set(model.state_dict()) == {"scale", "decode.weight", "decode.bias", "encode.weight", "count"}


def test_gradients_of_tied_uses_add_up():
    """Against the same model with two weights: its gradients' sum."""
    model, x = Tied().astype("float64"), np.random.default_rng(0).standard_normal((5, 3))
    model(x).sum().backward()
    w = model.decode.weight.numpy()
    w1, w2 = Tensor(w, requires_grad=True), Tensor(w.copy(), requires_grad=True)
    F.linear(F.relu(F.linear(x, w1)), w2, model.decode.bias).sum().backward()
    assert np.allclose(model.decode.weight.grad, w1.grad.numpy() + w2.grad.numpy(), rtol=1e-12)
    assert model.decode.bias.grad is None


def test_one_module_at_two_places():
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert set(model.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert [name for name, _ in model.named_modules()] == ["", "0", "1"]


def test_a_list_of_modules_is_refused_not_lost():
    class Net(nn.Module):
        def __init__(self):
            self.layers = [nn.Linear(2, 2)]

    with pytest.raises(TypeError, match=r"Net\.layers is a list.*nn\.Sequential"):
        Net()


def test_sequential_is_a_list_of_modules():
    model = mlp()
    assert len(model) == 4
    assert [type(layer).__name__ for layer in model] == ["Linear", "ReLU", "Sequential", "Linear"]
    assert model[-1] is model[3]
    with pytest.raises(IndexError):
        model[4]
    with pytest.raises(TypeError, match="layer 1 is a type"):
        nn.Sequential(nn.ReLU(), nn.ReLU)


def test_repr_shows_the_tree():
    assert repr(nn.Sequential(nn.Linear(4, 3, bias=False), nn.Sequential(nn.GELU(), nn.Dropout(0.1)))) == (
        "Sequential(\n  (0): Linear(4, 3, bias=False)\n  (1): Sequential(\n"
        "    (0): GELU(approximate='none')\n    (1): Dropout(p=0.1)\n  )\n)"
    )
    assert repr(nn.Flatten()) == "Flatten(start_dim=1)"
    assert repr(nn.Parameter([1.0])) == "Parameter(shape=(1,), dtype=float32)"
    assert repr(nn.Parameter([1.0], requires_grad=False)).endswith("frozen)")


def test_train_and_eval_reach_every_module():
    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(nn.Dropout(0.5)))
    assert all(m.training for m in model.modules())
    assert model.eval() is model
    assert not any(m.training for m in model.modules())
    model.train()
    assert all(m.training for m in model.modules())


# ── initial values ──────────────────────────────────────────────────────────────────────────────────────


def test_initial_values_depend_on_seed_and_name_alone():
    class Net(nn.Module):
        def __init__(self, order):
            for name in order:
                setattr(self, name, nn.Linear(4, 4))

    forth, back = Net("abc").initialize(5).state_dict(), Net("cba").initialize(5).state_dict()
    assert all(np.array_equal(forth[name], back[name]) for name in forth)
    other = Net("abc").initialize(6).state_dict()
    assert not any(np.array_equal(forth[name], other[name]) for name in forth)
    assert len({v.tobytes() for v in forth.values()}) == 6


def test_sequential_seed_is_initialize():
    def same(a, b):
        return all(np.array_equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))

    assert same(mlp(seed=3), mlp(seed=0).initialize(3))
    assert not same(mlp(seed=3), mlp(seed=0))


def test_a_lone_linear_is_initialised_within_pytorchs_bounds():
    layer = nn.Linear(100, 50)
    for values in (layer.weight.numpy(), layer.bias.numpy()):
        assert values.dtype == np.float32
        assert abs(values).max() <= 0.1
        assert abs(values).max() > 0.09
        assert abs(values.mean()) < 0.03


def test_initialize_writes_in_place_and_a_tied_weight_once():
    model = Tied()
    before = model.decode.weight.data
    model.initialize(4)
    assert model.decode.weight.data is before
    alone = nn.Sequential(nn.Linear(3, 3))
    alone.decode = nn.Linear(3, 3)
    alone.initialize(4)
    assert np.array_equal(alone.decode.weight, model.decode.weight)


# ── dtypes ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_one_dtype_throughout(dtype):
    model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Dropout(0.2), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3))
    assert model.astype(dtype) is model
    for x in (np.ones((2, 4)), np.ones((2, 4), np.float32), np.ones((2, 4), np.uint8)):
        out = model(x)
        loss = F.cross_entropy(out, np.array([0, 2]))
        assert out.dtype == loss.dtype == dtype
        loss.backward(2)
        assert all(p.grad.dtype == p.dtype == dtype for p in model.parameters())


def test_astype_takes_floating_buffers_along_and_drops_gradients():
    model = Tied()
    model.register_buffer("steps", np.zeros((), np.int64))
    model(np.ones((1, 3))).sum().backward()
    model.astype("float64")
    assert model.count.dtype == np.float64
    assert model.steps.dtype == np.int64
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(TypeError, match="int32"):
        model.astype("int32")


# ── state ───────────────────────────────────────────────────────────────────────────────────────────────


def test_state_dict_is_a_copy_and_loads_back_in_place():
    model, other = Tied(), Tied().initialize(9)
    model.count[...] = 5
    state = model.state_dict()
    arrays = {name: p.data for name, p in other.named_parameters()}
    other.load_state_dict(state)
    assert all(np.array_equal(state[name], value) for name, value in other.state_dict().items())
    assert all(p.data is arrays[name] for name, p in other.named_parameters())
    assert other.count == 5
    state["scale"][...] = 77
    assert np.array_equal(model.scale, [1, 1])
    assert other.encode.weight is other.decode.weight


def test_loading_takes_tensors_and_other_dtypes():
    model = nn.Linear(2, 1)
    model.load_state_dict({"weight": Tensor(np.array([[1.5, 2.5]])), "bias": [3]})
    assert model.weight.dtype == np.float32
    assert np.array_equal(model(np.ones((1, 2))), [[7]])


def test_loading_lists_all_that_is_wrong_and_then_writes_nothing():
    model = mlp()
    before = model.state_dict()
    state = {name: value + 1 for name, value in before.items()}
    del state["2.0.bias"]
    state["4.weight"] = np.ones(3)
    state["3.weight"] = np.ones((3, 2))
    with pytest.raises(ValueError, match="does not fit") as caught:
        model.load_state_dict(state)
    for part in ("missing 2.0.bias", "unexpected 4.weight", "3.weight has shape (3, 2), the model's has (2, 3)"):
        assert part in str(caught.value)
    assert all(np.array_equal(before[name], value) for name, value in model.state_dict().items())


def test_loading_wants_equal_values_for_tied_names():
    state = Tied().state_dict()
    state["encode.weight"] = state["encode.weight"] + 1
    with pytest.raises(ValueError, match=r"(decode|encode)\.weight and (decode|encode)\.weight are tied"):
        Tied().load_state_dict(state)


def test_loading_something_that_is_no_array_writes_nothing():
    model = nn.Linear(2, 1)
    before = model.state_dict()
    with pytest.raises((TypeError, ValueError)):
        model.load_state_dict({"weight": np.ones((1, 2)), "bias": ["zero"]})
    assert np.array_equal(before["weight"], model.weight)


def test_read_only_parameters_cannot_be_changed_by_the_way():
    model = mlp()
    flat = np.zeros(nn.Layout(model).size, np.float32)
    flat.flags.writeable = False
    model.bind(flat)
    for change in (
        model.initialize,
        lambda: model.load_state_dict(model.state_dict()),
        lambda: model.astype("float64"),
    ):
        with pytest.raises(RuntimeError, match=r"0\.weight is read-only.*strategy\.load_state_dict"):
            change()
    with pytest.raises(ValueError, match="read-only"):
        model[0].weight.data[0, 0] = 1


def test_copies_keep_ties_and_leave_slabs():
    model = Tied()
    layout = nn.Layout(model)
    slab = np.zeros(layout.size, np.float32)
    layout.pack(slab)
    model.bind(slab, np.zeros_like(slab))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.encode.weight is again.decode.weight
        assert again.decode.weight._grad_slot is None
        assert not np.shares_memory(again.decode.weight.data, slab)
        assert np.array_equal(again(np.ones((1, 3))), model(np.ones((1, 3))))
        assert not again.decode.bias.requires_grad


def test_buffers_have_names():
    model = nn.Sequential(Tied(), nn.Linear(1, 1))
    assert [name for name, _ in model.named_buffers()] == ["0.count"]
    assert [b.shape for b in model.buffers()] == [()]


def test_a_module_without_forward_says_so():
    class Net(nn.Module):
        pass

    with pytest.raises(NotImplementedError, match="Net has no forward"):
        Net()(1)
