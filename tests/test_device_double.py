"""The engine on arrays that refuse to mix with NumPy, as a GPU's do: same code, same bits."""

from __future__ import annotations

import numpy as np
import pytest

import minidp
from minidp import backend, nn, optim
from minidp.autograd import Tensor
from minidp.nn import functional as F
from tests import device_double, host_cuda
from tests.device_double import DeviceArray, xp
from tests.test_autograd_ops import CASES, make


def to_device(model, grads=False):
    """Move a model's parameters, and the slots of its gradients, to slabs on the device."""
    layout = nn.Layout(model)
    params = xp.zeros(layout.size, layout.dtype)
    slots = xp.full(layout.size, np.nan, layout.dtype) if grads else None
    layout.pack(params)
    model.bind(params, slots)
    return layout, params, slots


# ── the double itself ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "mix",
    [
        lambda d, h: np.asarray(d),
        lambda d, h: np.add(d, h),
        lambda d, h: np.exp(d),
        lambda d, h: np.concatenate([d, d]),
        lambda d, h: np.sum(d),
        lambda d, h: d + h,
        lambda d, h: h + d,
        lambda d, h: h @ d,
        lambda d, h: d.__setitem__(slice(None), h),
        lambda d, h: h.__setitem__(slice(None), d),
        lambda d, h: np.copyto(h, d),
        lambda d, h: d.__iadd__(h),
        lambda d, h: h.__iadd__(d),
        lambda d, h: xp.multiply(d, h),
        lambda d, h: xp.exp(d, out=h),
        lambda d, h: d[h > 0],
        lambda d, h: xp.ascontiguousarray(h),
        lambda d, h: xp.lib.stride_tricks.as_strided(h, (3,), (8,)),
        lambda d, h: xp.lib.stride_tricks.as_strided(d, (3,), (16,)),
        lambda d, h: np.ascontiguousarray(d),
    ],
)
def test_the_double_refuses_to_mix(mix):
    with pytest.raises((TypeError, AssertionError)):
        mix(xp.asarray(np.ones(3)), np.ones(3))


def test_the_double_counts_scalar_reads():
    d = xp.asarray(np.ones(3))
    before = device_double.scalar_reads
    float(d.sum())
    bool(d[0])
    d.max().item()
    assert d.sum().shape == ()
    assert device_double.scalar_reads == before + 3


# ── the engine on it ────────────────────────────────────────────────────────────────────────────────────


# Lines of the table that hold a NumPy array themselves; below they are tested with one of the device.
HOLD_ARRAYS = ("index twice", "mask", "mse_loss of one")


@pytest.mark.parametrize(("op", "shapes"), [c for c in CASES if c.values[0].name not in HOLD_ARRAYS])
def test_every_operation_has_the_bits_of_numpy(op, shapes):
    host = [Tensor(x, requires_grad=True) for x in make(op, shapes)]
    device = [Tensor(xp.asarray(x), requires_grad=True) for x in make(op, shapes)]
    expected, out = op.function(*host), op.function(*device)
    assert type(out.data) is DeviceArray
    gradient = np.random.default_rng(0).standard_normal(out.shape)
    expected.backward(gradient)
    out.backward(xp.asarray(gradient))
    assert out.numpy().tobytes() == expected.numpy().tobytes()
    for h, d in zip(host, device):
        assert type(d.grad.data) is DeviceArray
        assert d.grad.numpy().tobytes() == h.grad.numpy().tobytes()


@pytest.mark.parametrize("index", [np.array([0, 2, 0, 0]), np.array([True, False, True])])
def test_arrays_of_the_device_as_indices(index):
    h, d = (
        Tensor(a, requires_grad=True)
        for a in (np.arange(12.0).reshape(3, 4), xp.asarray(np.arange(12.0).reshape(3, 4)))
    )
    (h[index] * 2).sum().backward()
    (d[xp.asarray(index)] * 2).sum().backward()
    assert np.array_equal(d.grad.numpy(), h.grad)


@pytest.mark.skipif(host_cuda.available() is not None, reason=str(host_cuda.available()))
@pytest.mark.parametrize("order", ["forward", "reverse", "shuffle"])
def test_picked_twice_is_added_in_one_order_by_kernels(order):
    rng = np.random.default_rng(0)
    a, rows = rng.standard_normal((5, 3)), np.array([[0, 4], [0, 0], [2, -1]])
    grad = rng.standard_normal((3, 2, 3))
    h, d = (Tensor(x, requires_grad=True) for x in (a, xp.asarray(a)))
    h[rows].backward(grad)
    with device_double.kernels(), host_cuda.order(order, 1):
        d[xp.asarray(rows)].backward(xp.asarray(grad))
        d2 = Tensor(xp.asarray(a), requires_grad=True)
        d2[
            xp.asarray(np.array([True, False, True, False, True])), xp.asarray(np.array([1, 1, 2]))
        ].sum().backward()
    assert np.allclose(d.grad.numpy(), h.grad, rtol=1e-15)
    assert d2.grad.numpy().tolist() == [[0, 1, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_mixing_tensors_of_host_and_device_raises():
    d, h = Tensor(xp.asarray(np.ones(3))), Tensor(np.ones(3))
    for mix in (
        lambda: d + h,
        lambda: h + d,
        lambda: d * np.ones(3),
        lambda: np.ones(3) * d,
        lambda: np.asarray(d),
    ):
        with pytest.raises(TypeError):
            mix()


def test_moves_and_what_a_device_tensor_can_do():
    assert backend.array_module(xp.asarray([1.0])) is xp
    d = minidp.tensor(xp.asarray(np.ones(3)), requires_grad=True)
    assert type(d.data) is DeviceArray
    assert type(d.numpy()) is np.ndarray
    assert type(backend.asarray(d.data, np)) is np.ndarray
    assert type(backend.asarray(np.ones(3), xp)) is DeviceArray
    assert backend.asarray(d.data, xp) is d.data
    assert "tensor([1., 1., 1.]" in repr(d)
    assert float(d.sum()) == 3
    backend.synchronize(xp)


RULES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {"weight_decay": 0.01}),
    ("AdamW", {}),
]


@pytest.mark.parametrize(("rule", "hyper"), RULES, ids=[f"{r} {h}" for r, h in RULES])
@pytest.mark.parametrize("loss", ["cross_entropy", "mse_loss"])
def test_training_has_the_bits_of_numpy_and_reads_few_scalars(rule, hyper, loss):
    """A whole training of an MLP with every layer, by `step` and by the rule on slabs."""

    def build():
        return nn.Sequential(
            nn.Flatten(), nn.Linear(8, 9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 9),
            nn.Tanh(), nn.Linear(9, 3),
        )  # fmt: skip

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 2)).astype(np.float32)
    y = np.array([2, 0]) if loss == "cross_entropy" else rng.standard_normal((2, 3)).astype(np.float32)
    host, device, slab = build(), build(), build()
    to_device(device)
    layout, params, grads = to_device(slab, grads=True)
    optimizers = [getattr(optim, rule)(model.parameters(), **hyper) for model in (host, device, slab)]
    state = {slot: xp.zeros(layout.size, layout.dtype) for slot in optimizers[2].slots}
    scratch = tuple(xp.empty(layout.size, layout.dtype) for _ in range(optimizers[2].scratch))
    layout.zero_unwritten(grads)
    for t in range(3):
        losses = []
        for model in (host, device, slab):
            a, b = (x, y) if model is host else (xp.asarray(x), xp.asarray(y))
            before = device_double.scalar_reads
            with nn.dropout_scope(update=t):
                losses.append(getattr(F, loss)(model(a), b))
            losses[-1].backward(2)
            assert device_double.scalar_reads == before
        assert len({value.item() for value in losses}) == 1
        before = device_double.scalar_reads
        for optimizer in optimizers[:2]:
            optimizer.step()
            optimizer.zero_grad()
        h = optimizers[2].hyper(0, t)
        optimizers[2].update(params, grads, state, params, state, lr=h["lr"], t=t, hyper=h, scratch=scratch)
        layout.zero_unwritten(grads)
        layout.clear_written()
        assert device_double.scalar_reads == before
    reference = host.state_dict()
    for model in (device, slab):
        found = model.state_dict()
        assert all(type(array) is np.ndarray for array in found.values())
        assert all(found[name].tobytes() == reference[name].tobytes() for name in reference)


def normalised_cnn():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=(2, 1), padding=(1, 0), bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.MaxPool2d(3, stride=1, padding=1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 6),
        nn.BatchNorm1d(6, momentum=None), nn.LayerNorm(6), nn.Linear(6, 3),
    )  # fmt: skip


def pictures(rng):
    return rng.standard_normal((5, 2, 7, 6)).astype(np.float32), rng.integers(0, 3, 5)


def text(rng):
    tokens = rng.integers(0, 11, (3, 7))
    return tokens[:, :-1], tokens[:, 1:]


@pytest.mark.parametrize(
    ("build", "batch", "reads"),
    [  # BatchNorm(momentum=None) reads its count
        pytest.param(lambda: nn.cnn((2, 7, 6), (3, 4), 3), pictures, 0, id="cnn"),
        pytest.param(lambda: nn.GPT(11, 6, 8, 2, 2), text, 0, id="GPT"),
        pytest.param(lambda: nn.GPT(11, 9, 8, 2, 1, dropout=0.2), text, 0, id="GPT with dropout"),
        pytest.param(normalised_cnn, pictures, 1, id="BatchNorm"),
    ],
)
def test_models_have_the_bits_of_numpy_and_read_few_scalars(build, batch, reads):
    """Training, with buffers and slots of gradients on the device too, then evaluation."""
    host, device = build(), build()
    to_device(device, grads=True)
    for module in device.modules():
        for name in module._buffers:
            setattr(module, name, xp.asarray(getattr(module, name)))
    optimizers = [optim.Adam(model.parameters(), lr=0.01) for model in (host, device)]
    for t in range(3):
        x, y = batch(np.random.default_rng(t))
        losses = []
        for model, a, b in ((host, x, y), (device, xp.asarray(x), xp.asarray(y))):
            before = device_double.scalar_reads
            with nn.dropout_scope(update=t):
                losses.append(F.cross_entropy(model(a), b))
            losses[-1].backward()
            assert device_double.scalar_reads - before == (0 if model is host else reads)
        assert losses[0].item() == losses[1].item()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(type(tensor.data) is DeviceArray for tensor in device.parameters())
    assert all(type(buffer) is DeviceArray for buffer in device.buffers())
    reference, found = host.state_dict(), device.state_dict()
    assert all(found[name].tobytes() == reference[name].tobytes() for name in reference)
    before = device_double.scalar_reads
    y = device.eval()(xp.asarray(x))
    assert device_double.scalar_reads == before
    assert y.numpy().tobytes() == host.eval()(x).numpy().tobytes()


def test_embeddings_of_the_device():
    tokens = np.array([[0, 2, 0], [1, 2, 2]])
    for place in (np, xp):
        weight = Tensor(place.asarray(np.ones((4, 2))), requires_grad=True)
        F.embedding(place.asarray(tokens), weight).sum().backward()
        assert weight.grad.numpy().tolist() == [[2, 2], [1, 1], [3, 3], [0, 0]]
    with pytest.raises(IndexError, match="token 4 at place 1"):
        F.embedding(np.array([[0], [4]]), weight)
    rows = F.embedding(xp.asarray(np.array([[0], [4], [-1]])), weight).numpy()  # there nobody looks, and waits
    assert np.isnan(rows).all(axis=2).ravel().tolist() == [False, True, True]


def test_a_model_on_the_device_takes_state_from_the_host_and_names_wrong_labels():
    model = nn.Linear(3, 2)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    to_device(model)
    model.load_state_dict(state)
    assert np.array_equal(model.state_dict()["weight"], state["weight"])
    model.initialize(3)
    assert np.array_equal(model.weight.numpy(), nn.Linear(3, 2).initialize(3).weight)
    logits = model(np.ones((2, 3)))
    with pytest.raises(ValueError, match="label 2 of sample 1"):
        F.cross_entropy(logits, np.array([0, 2]))
    assert np.isnan(F.cross_entropy(logits, xp.asarray(np.array([0, 2]))).item())
    model.unbind()
    model.astype("float64")
    assert type(model.weight.data) is DeviceArray


def test_files_take_device_arrays(tmp_path):
    model = nn.Linear(3, 2)
    to_device(model)
    nn.save_file(dict(model.named_parameters()), tmp_path / "m")
    assert np.array_equal(nn.load_file(tmp_path / "m")["weight"], model.weight.numpy())


def test_the_first_array_of_its_kind_is_known(monkeypatch):
    """As CuPy's are: nobody has registered them when a model moves there."""
    monkeypatch.delitem(backend.array_types, DeviceArray)
    model = nn.Linear(3, 2).to(device_double.DoubleDevice())
    assert type(model(np.ones((1, 3), np.float32)).data) is DeviceArray
