"""PyTorch as referee: layers and whole models with moved weights, forward, backward, training; files both ways."""

from __future__ import annotations

import numpy as np
import pytest

from minidp import nn, optim
from minidp.autograd import Tensor
from minidp.nn import functional as F

torch = pytest.importorskip("torch")
torch.set_num_threads(1)  # of arrays this small; two threads that wait for each other take 400 times as long
TF = torch.nn.functional

DTYPES = pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)], ids=["float64", "float32"]
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def shaken(ours, theirs, dtype="float64"):
    """Both with the same random weights (those that start as 0 and 1 would hide mistakes), moved by name."""
    for seed, p in enumerate(ours.parameters()):
        p.data[...] += normal(*p.shape, seed=100 + seed) * 0.3
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})
    return ours.astype(dtype), theirs.to(getattr(torch, dtype))


def agree(ours, theirs, tolerance):
    return np.allclose(ours, theirs.detach().numpy(), rtol=tolerance, atol=tolerance)


def same_step(ours, theirs, inputs, tolerance, call=None):
    """Output and all gradients, of inputs too, are equal; `call` is how PyTorch's module is called."""
    a = [Tensor(x, requires_grad=True) for x in inputs]
    b = [torch.tensor(x, requires_grad=True) for x in inputs]
    y, expected = ours(*a), (call or theirs)(*b)
    assert y.shape == tuple(expected.shape)
    assert agree(y, expected, tolerance)
    assert y.dtype == expected.detach().numpy().dtype == inputs[0].dtype
    gradient = normal(*y.shape, seed=9).astype(y.dtype)
    for p in ours.parameters():
        p.grad = None
    theirs.zero_grad(set_to_none=True)
    y.backward(gradient)
    expected.backward(torch.tensor(gradient))
    for x, t in zip(a, b):
        assert agree(x.grad, t.grad, tolerance)
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert agree(p.grad, named[name].grad, tolerance), name


# ── layers ──────────────────────────────────────────────────────────────────────────────────────────────


LAYERS = [  # name of the layer, its options, shape of the input
    ("Conv2d", (3, 4, 3), {}, (2, 3, 6, 7)),
    ("Conv2d", (3, 4, (3, 2)), {"stride": (2, 1), "padding": (1, 2)}, (2, 3, 6, 7)),
    ("Conv2d", (3, 5, 1), {"stride": 2, "bias": False}, (3, 3, 5, 4)),
    ("MaxPool2d", (2,), {}, (2, 3, 5, 6)),
    ("MaxPool2d", ((3, 2), 1, 1), {}, (2, 3, 5, 6)),
    ("MaxPool2d", (2,), {"stride": 3}, (2, 3, 5, 6)),
    ("AvgPool2d", (2,), {}, (2, 3, 5, 6)),
    ("AvgPool2d", ((3, 2), 1, 1), {}, (2, 3, 5, 6)),
    ("AvgPool2d", ((1, 3),), {"stride": (2, 4)}, (2, 3, 5, 8)),
    ("LayerNorm", (5,), {}, (2, 3, 5)),
    ("LayerNorm", ((3, 5),), {"eps": 0.1}, (2, 3, 5)),
    ("BatchNorm1d", (3,), {}, (4, 3)),
    ("BatchNorm1d", (3,), {"eps": 0.1}, (4, 3, 5)),
    ("BatchNorm2d", (3,), {}, (2, 3, 4, 5)),
]


@DTYPES
@pytest.mark.parametrize(
    ("name", "args", "options", "shape"), [pytest.param(*line, id=f"{line[0]} {line[1:3]}") for line in LAYERS]
)
def test_layers(name, args, options, shape, dtype, tolerance):
    ours, theirs = (getattr(module, name)(*args, **options) for module in (nn, torch.nn))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: tuple(v.shape) for k, v in theirs.state_dict().items()
    }
    shaken(ours, theirs, dtype)
    same_step(ours, theirs, [normal(*shape).astype(dtype)], tolerance)


@DTYPES
@pytest.mark.parametrize("tokens", [np.array([[0, 3, 0], [2, 2, 1]]), np.array(3), np.zeros((0, 2), int)])
def test_embedding(tokens, dtype, tolerance):
    ours, theirs = shaken(nn.Embedding(5, 4), torch.nn.Embedding(5, 4), dtype)
    y, expected = ours(tokens), theirs(torch.tensor(tokens))
    assert y.shape == tuple(expected.shape)
    assert agree(y, expected, 0)
    gradient = normal(*y.shape).astype(dtype)
    y.backward(gradient)
    expected.backward(torch.tensor(gradient))
    assert agree(ours.weight.grad, theirs.weight.grad, tolerance)


@pytest.mark.parametrize(("momentum", "eps"), [(0.1, 1e-5), (0.7, 0.1), (None, 1e-3)])
@pytest.mark.parametrize(
    ("name", "shape"), [("BatchNorm1d", (3,)), ("BatchNorm1d", (3, 5)), ("BatchNorm2d", (3, 4, 2))]
)
def test_training_with_batch_norm_then_evaluation(name, shape, momentum, eps):
    """Batches of different sizes, weights that move: outputs, gradients and running statistics at each step."""
    ours, theirs = shaken(*(getattr(m, name)(3, eps=eps, momentum=momentum) for m in (nn, torch.nn)))
    rule, reference = optim.SGD(ours.parameters(), lr=0.1), torch.optim.SGD(theirs.parameters(), lr=0.1)
    for step, n in enumerate((4, 2, 7, 3)):
        same_step(ours, theirs, [normal(n, *shape, seed=step) * (step + 1) + step], 1e-12)
        rule.step()
        reference.step()
        for (key, buffer), (their_key, expected) in zip(ours.named_buffers(), theirs.named_buffers()):
            assert key == their_key
            assert agree(buffer, expected, 1e-12), key
        assert ours.num_batches_tracked == step + 1
        assert ours.num_batches_tracked.dtype == np.int64
    before = ours.state_dict()
    ours.eval(), theirs.eval()
    for n in (1, 5):
        same_step(ours, theirs, [normal(n, *shape, seed=8)], 1e-12)
    assert all(np.array_equal(before[key], value) for key, value in ours.state_dict().items())


MASK = torch.ones(4, 6).triu(1).bool()


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("others", [0, 1, 2], ids=["self", "keys", "keys and values"])
def test_multi_head_attention(others, causal, bias, dtype, tolerance):
    ours = nn.MultiHeadAttention(8, 2, causal, bias=bias)
    theirs = torch.nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
    shaken(ours, theirs, dtype)
    query, rest = normal(3, 4, 8), [normal(3, 6, 8, seed=s + 1) for s in range(others)]

    def call(q, *others):
        k, v = (others * 2)[:2] if others else (q, q)
        mask = MASK[:, : k.shape[1]] if causal else None
        return theirs(q, k, v, need_weights=False, attn_mask=mask)[0]

    same_step(ours, theirs, [x.astype(dtype) for x in (query, *rest)], tolerance, call)


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "relu", "gelu_tanh"])
def test_transformer_block(activation, causal, dtype, tolerance):
    ours = nn.TransformerBlock(8, 2, 12, activation=activation, causal=causal)
    theirs = their_block(8, 2, 12, gelu_tanh if activation == "gelu_tanh" else activation)
    assert set(ours.state_dict()) == set(theirs.state_dict())
    shaken(ours, theirs, dtype)
    mask = MASK[:, :4] if causal else None
    same_step(ours, theirs, [normal(3, 4, 8).astype(dtype)], tolerance, lambda x: theirs(x, src_mask=mask))


def gelu_tanh(x):
    return TF.gelu(x, approximate="tanh")


def their_block(embed_dim, heads, inside, activation):
    return torch.nn.TransformerEncoderLayer(
        embed_dim, heads, inside, dropout=0.0, activation=activation, batch_first=True, norm_first=True
    )


# ── initial values ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda: nn.Conv2d(32, 400, (5, 4)), lambda: torch.nn.Conv2d(32, 400, (5, 4))),
        (lambda: nn.Embedding(400, 300), lambda: torch.nn.Embedding(400, 300)),
        (lambda: nn.LayerNorm((4, 5)), lambda: torch.nn.LayerNorm((4, 5))),
        (lambda: nn.BatchNorm2d(7), lambda: torch.nn.BatchNorm2d(7)),
        (lambda: nn.MultiHeadAttention(256, 4), lambda: torch.nn.MultiheadAttention(256, 4)),
    ],
    ids=["Conv2d", "Embedding", "LayerNorm", "BatchNorm2d", "MultiHeadAttention"],
)
def test_initial_values_have_the_same_distribution(ours, theirs):
    """Bounds and variance, ours from a seed, theirs from a global generator; constants are equal.

    But for attention's out_proj.bias: a Linear's here, 0 there.
    """
    ours, theirs = ours().initialize(3).state_dict(), theirs().state_dict()
    for name, a in ours.items():
        b = theirs[name].numpy()
        assert a.dtype == b.dtype
        if name == "out_proj.bias":
            assert abs(np.abs(a).max() - 1 / 16) < 0.01
        elif np.ptp(b) == 0:
            assert np.array_equal(a, b), name
        else:
            bound = 0.2 if a.ndim == 2 and "proj" not in name else 0.02  # a normal distribution's has none
            assert abs(np.abs(a).max() / np.abs(b).max() - 1) < bound, name
            assert abs(a.var() / b.var() - 1) < 0.2, name
            assert abs(a.mean()) < 0.1 * a.std(), name


# ── models: files and training ──────────────────────────────────────────────────────────────────────────


def their_cnn():
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
        torch.nn.Flatten(), torch.nn.Linear(6 * 2 * 3, 5),
    )  # fmt: skip


class TheirGPT(torch.nn.Module):
    """The twin of `nn.GPT` from PyTorch's own parts, with our names."""

    def __init__(self, vocab_size, context, embed_dim, heads, layers):
        super().__init__()
        self.token_embedding = torch.nn.Embedding(vocab_size, embed_dim)
        self.position_embedding = torch.nn.Embedding(context, embed_dim)
        blocks = [their_block(embed_dim, heads, 4 * embed_dim, gelu_tanh) for _ in range(layers)]
        self.blocks = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.LayerNorm(embed_dim)
        self.head = torch.nn.Linear(embed_dim, vocab_size)

    def forward(self, tokens):
        t = tokens.shape[1]
        x = self.token_embedding(tokens) + self.position_embedding(torch.arange(t))
        mask = torch.ones(t, t).triu(1).bool()
        for block in self.blocks:
            x = block(x, src_mask=mask)
        return self.head(self.norm(x))


def normalised(module):
    """The parts are in `nn` and `torch.nn` under the same names.

    No biases before normalisations: their gradient is 0 but for rounding, of which Adam would make steps.
    """
    return module.Sequential(
        module.Conv2d(1, 4, 3, bias=False), module.BatchNorm2d(4), module.ReLU(), module.AvgPool2d(2),
        module.Flatten(), module.Linear(4 * 3 * 5, 6, bias=False), module.BatchNorm1d(6, momentum=None),
        module.Tanh(), module.Linear(6, 5),
    )  # fmt: skip


def pictures(step, dtype):
    rng = np.random.default_rng(step)
    return rng.standard_normal((6, 1, 8, 12)).astype(dtype), rng.integers(0, 5, 6)


def text(step, dtype):
    tokens = np.random.default_rng(step).integers(0, 11, (4, 8))
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


MODELS = pytest.mark.parametrize(
    ("ours", "theirs", "batch"),
    [
        pytest.param(lambda seed: nn.cnn((1, 8, 12), (4, 6), 5, seed=seed), their_cnn, pictures, id="cnn"),
        pytest.param(
            lambda seed: nn.GPT(11, 9, 8, 2, 2, seed=seed), lambda: TheirGPT(11, 9, 8, 2, 2), text, id="GPT"
        ),
        pytest.param(
            lambda seed: normalised(nn).initialize(seed), lambda: normalised(torch.nn), pictures, id="batch norm"
        ),
    ],
)


@MODELS
def test_files_in_both_directions(ours, theirs, batch, tmp_path):
    """PyTorch's own reader takes ours, and ours PyTorch's: the same values and outputs."""
    files = pytest.importorskip("safetensors.torch")
    x, _ = batch(0, "float32")
    model, twin = ours(1), theirs()
    nn.save_file(model.state_dict(), tmp_path / "ours")
    loaded = files.load_file(tmp_path / "ours")
    twin.load_state_dict(loaded)
    assert {name: array.numpy().dtype for name, array in loaded.items()} == {
        name: value.dtype for name, value in model.state_dict().items()
    }
    assert agree(model(x), twin(torch.tensor(x)), 1e-5)

    twin, back = theirs(), ours(2)
    assert not agree(back(x), twin(torch.tensor(x)), 1e-2)
    files.save_file(twin.state_dict(), tmp_path / "theirs")
    back.load_state_dict(nn.load_file(tmp_path / "theirs"))
    for name, value in twin.state_dict().items():
        assert np.array_equal(back.state_dict()[name], value.numpy()), name
    assert agree(back(x), twin(torch.tensor(x)), 1e-5)


@MODELS
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_ten_steps_of_training_stay_together(ours, theirs, batch, rule):
    ours, theirs = ours(1).astype("float64"), theirs().double()
    theirs.load_state_dict({name: torch.tensor(value) for name, value in ours.state_dict().items()})
    hyper = {"lr": 0.1, "momentum": 0.9} if rule == "SGD" else {"lr": 0.01}
    optimizer = getattr(optim, rule)(ours.parameters(), **hyper)
    reference = getattr(torch.optim, rule)(theirs.parameters(), **hyper)
    start = ours.state_dict()
    for step in range(10):
        x, y = batch(step, "float64")
        optimizer.zero_grad()
        reference.zero_grad(set_to_none=True)
        loss = F.cross_entropy(ours(x), y)
        expected = TF.cross_entropy(theirs(torch.tensor(x)).flatten(0, -2), torch.tensor(y).flatten())
        loss.backward()
        expected.backward()
        optimizer.step()
        reference.step()
        assert abs(loss.item() - expected.item()) <= 1e-9
    state = theirs.state_dict()
    assert set(state) == set(start)
    for name, value in ours.state_dict().items():
        assert agree(value, state[name], 1e-9), name
        assert not np.array_equal(value, start[name]), name
    x, _ = batch(99, "float64")
    assert agree(ours.eval()(x), theirs.eval()(torch.tensor(x)), 1e-9)
