"""Attention, the transformer's block and GPT: what may see what, two ways to the same numbers, names, errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minidp import nn, optim
from minidp.autograd import Tensor
from minidp.nn import functional as F
from minidp.nn.attention import attend


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def close(a, b):
    return np.allclose(a, b, rtol=1e-12, atol=1e-12)


def grads(model):
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def forget(model):
    for p in model.parameters():
        p.grad = None


def gpt(**options):
    return nn.GPT(**({"vocab_size": 7, "context": 6, "embed_dim": 8, "num_heads": 2, "num_layers": 2} | options))


TOKENS = np.random.default_rng(0).integers(0, 7, (3, 6))

# ── the formula ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_its_formula_place_by_place(causal):
    q, k, v = normal(2, 4, 3), normal(2, 5, 3, seed=1), normal(2, 5, 3, seed=2)
    y = F.scaled_dot_product_attention(q, k, v, causal).numpy()
    for b in range(2):
        for t in range(4):
            seen = range(t + 1) if causal else range(5)
            share = [math.exp(math.fsum(q[b, t] * k[b, s]) / math.sqrt(3)) for s in seen]
            assert close(y[b, t], sum(w * v[b, s] for w, s in zip(share, seen)) / math.fsum(share))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [0, 1, 1e3, 1e150])
def test_shares_add_to_1_however_large_the_scores(causal, scale):
    """Largest first: no overflow; of what comes later nothing, exactly."""
    q, k, v = normal(2, 5, 3) * scale, normal(2, 5, 3, seed=1), normal(2, 5, 3, seed=2)
    y, p = attend(q, k, v, causal, np)
    assert close(p.sum(axis=-1), 1)
    assert (p >= 0).all()
    assert np.isfinite(y).all()
    if causal:
        assert not p[:, *np.triu_indices(5, 1)].any()
        assert close(y[:, 0], v[:, 0])
    ones = F.scaled_dot_product_attention(q, k, np.ones(v.shape), causal)
    assert close(ones, 1)  # whatever the scores: a mean


def test_wrong_shapes_are_told():
    x = np.zeros((2, 3, 4))
    for q, k, v in ((x, x, x[:, :2]), (x, x[..., :3], x), (x[:1], x, x), (x, x, x[..., :2])):
        with pytest.raises(
            ValueError, match=r"attention: queries of shape \(.*\), keys \(.*\), values \(.*\): they"
        ):
            F.scaled_dot_product_attention(q, k, v)
    for wrong in (np.zeros((3, 4)), np.zeros((2, 3, 5)), np.zeros((1, 2, 3, 4))):
        with pytest.raises(
            ValueError, match=r"MultiHeadAttention: inputs must have shape \(batch, length, 4\), not"
        ):
            nn.MultiHeadAttention(4, 2)(wrong)
        with pytest.raises(ValueError, match=r"\(batch, length, 4\)"):
            nn.MultiHeadAttention(4, 2)(x, wrong)
    with pytest.raises(ValueError, match=r"layer_norm: input of shape \(2, 3\) must end in the shape \(4,\)"):
        nn.LayerNorm(4)(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"input of shape \(4,\) must end in the shape \(4, 4\)"):
        nn.LayerNorm((4, 4))(np.zeros(4))


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (
            lambda: nn.MultiHeadAttention(12, 5),
            "5 heads do not divide embed_dim=12 .* take one of 1, 2, 3, 4, 6, 12 heads",
        ),
        (lambda: nn.TransformerBlock(6, 4), "take one of 1, 2, 3, 6 heads"),
        (lambda: gpt(num_heads=3), "3 heads do not divide embed_dim=8"),
        (lambda: nn.MultiHeadAttention(0, 1), "embed_dim=0, num_heads=1: give 1 or more"),
        (lambda: nn.MultiHeadAttention(4, 0), "embed_dim=4, num_heads=0: give 1 or more"),
        (
            lambda: nn.TransformerBlock(4, 2, activation="swish"),
            "activation='swish': valid: gelu, gelu_tanh, relu",
        ),
        (lambda: nn.MultiHeadAttention(4, 2, dropout=1.5), "probability"),
        (lambda: nn.LayerNorm(0), "LayerNorm: normalized_shape=0: give positive sizes"),
        (lambda: nn.LayerNorm(()), r"LayerNorm: normalized_shape=\(\)"),
        (lambda: nn.LayerNorm(3, eps=0), "LayerNorm: eps=0: give a small positive number"),
        (lambda: nn.Embedding(0, 3), "Embedding: sizes must be positive, not 0 × 3"),
    ],
)
def test_wrong_options_are_told(run, message):
    with pytest.raises(ValueError, match=message):
        run()


# ── what may see what ───────────────────────────────────────────────────────────────────────────────────


def outputs_and_slopes(model, x):
    """Outputs, and how the sum of the outputs at places 0 … 2 depends on the input at each place."""
    t = Tensor(x, requires_grad=True)
    y = model(t)
    gradient = np.zeros(y.shape)
    gradient[:, :3] = normal(*y[:, :3].shape, seed=5)
    y.backward(gradient)
    return y.numpy(), t.grad.numpy()


@pytest.mark.parametrize(
    "build",
    [
        lambda causal: nn.MultiHeadAttention(8, 2, causal=causal),
        lambda causal: nn.MultiHeadAttention(8, 4, causal=causal, bias=False),
        lambda causal: nn.MultiHeadAttention(8, 2, causal=causal, dropout=0.3),
        lambda causal: nn.TransformerBlock(8, 2, causal=causal),
    ],
    ids=["packed", "without bias", "in parts", "block"],
)
@pytest.mark.parametrize("causal", [True, False])
def test_no_place_sees_later_ones_if_causal(build, causal):
    """Forward: earlier outputs do not change. Backward: their gradients are exactly zero at later places."""
    model, x = build(causal).astype("float64"), normal(2, 6, 8)
    other = x.copy()
    other[:, 3:] = normal(2, 3, 8, seed=9)
    with nn.dropout_scope():
        before, slopes = outputs_and_slopes(model, x)
    with nn.dropout_scope():
        after, _ = outputs_and_slopes(model, other)
    assert close(before[:, :3], after[:, :3]) == causal
    assert not np.isclose(before[:, 3:], after[:, 3:]).any(axis=-1).all()
    assert (slopes[:, 3:] == 0).all() == causal
    assert (slopes[:, :3] != 0).all()


def test_later_tokens_change_no_earlier_logits_of_gpt():
    model = gpt().astype("float64")
    for changed in range(6):
        other = TOKENS.copy()
        other[:, changed:] = (other[:, changed:] + 1) % 7
        before, after = model(TOKENS).numpy(), model(other).numpy()
        assert close(before[:, :changed], after[:, :changed])
        assert not np.isclose(before[:, changed:], after[:, changed:], rtol=1e-6).all(axis=-1).any()


def test_a_shorter_text_has_the_logits_of_its_beginning_in_a_longer_one():
    model = gpt().astype("float64")
    whole = model(TOKENS).numpy()
    assert whole.shape == (3, 6, 7)
    for t in range(7):
        assert model(TOKENS[:, :t]).shape == (3, t, 7)
        assert close(model(TOKENS[:, :t]), whole[:, :t])
    assert close(model(TOKENS[1:2]), whole[1:2])  # nor does one text see another


# ── two ways to the same numbers ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("e", "heads"), [(8, 1), (8, 2), (6, 6)])
def test_the_packed_way_equals_the_one_in_parts(causal, bias, e, heads):
    model, x = nn.MultiHeadAttention(e, heads, causal, bias=bias).astype("float64"), normal(3, 5, e)
    results = []
    for way in (
        lambda t: model(t),
        lambda t: model._in_parts(t, t, t),
        lambda t: model(t, t, t),
        lambda t: model(t, t),
    ):
        forget(model)
        t = Tensor(x, requires_grad=True)
        y = way(t)
        y.backward(normal(*y.shape, seed=1))
        results.append({"y": y.numpy(), "x": t.grad.numpy()} | grads(model))
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all(close(other[name], results[0][name]) for name in other)


def test_keys_and_values_may_come_from_elsewhere():
    """value defaults to key; each of the three gets the gradient of its own part."""
    model = nn.MultiHeadAttention(6, 2).astype("float64")
    q, k, v = normal(2, 3, 6), normal(2, 5, 6, seed=1), normal(2, 5, 6, seed=2)
    assert model(q, k, v).shape == (2, 3, 6)
    assert close(model(q, k), model(q, k, k))
    assert not close(model(q, k), model(q, k, v))
    tensors = [Tensor(x, requires_grad=True) for x in (q, k, v)]
    model(*tensors).sum().backward()
    assert [t.grad.shape for t in tensors] == [q.shape, k.shape, v.shape]
    order = [3, 0, 4, 1, 2]  # of keys and values together: it does not matter
    assert close(model(q, k[:, order], v[:, order]), model(q, k, v))


def test_heads_are_groups_of_features_side_by_side():
    """Two heads: each as if alone with its half of queries, keys and values."""
    model, x = nn.MultiHeadAttention(6, 2, bias=False).astype("float64"), normal(2, 4, 6)
    w = model.in_proj_weight.numpy().reshape(3, 2, 3, 6)
    mixed = [F.scaled_dot_product_attention(*(x @ w[i, head].T for i in range(3))).numpy() for head in range(2)]
    assert close(model(x), np.concatenate(mixed, axis=-1) @ model.out_proj.weight.numpy().T)


def test_a_block_is_what_its_docstring_says():
    block, x = nn.TransformerBlock(6, 2, 10, activation="gelu_tanh").astype("float64"), normal(2, 4, 6)
    y = x + block.self_attn(block.norm1(x)).numpy()
    z = y + block.linear2(F.gelu(block.linear1(block.norm2(y)), "tanh")).numpy()
    assert close(block(x), z)
    assert nn.TransformerBlock(6, 2).linear1.out_features == 24
    assert block.self_attn.causal
    assert "MultiHeadAttention" in repr(block)
    assert repr(nn.MultiHeadAttention(6, 2, True)).startswith("MultiHeadAttention(\n  (out_proj)")


# ── layer norm ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("shape", "axes"), [((5,), (-1,)), ((4, 5), (-2, -1))])
def test_layer_norm_has_mean_0_and_variance_1(shape, axes):
    layer, x = nn.LayerNorm(shape).astype("float64"), normal(3, 4, 5) * 7 + 100
    y = layer(x).numpy()
    assert np.allclose(y.mean(axis=axes), 0, atol=1e-12)
    assert np.allclose(y.var(axis=axes), 1, rtol=1e-5)
    layer.weight.data[...], layer.bias.data[...] = normal(*shape), normal(*shape, seed=1)
    by_hand = (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)
    assert close(layer(x), by_hand * layer.weight.numpy() + layer.bias.numpy())


def test_layer_norm_of_equal_of_offset_and_of_half_values():
    equal = Tensor(np.full((2, 8), 3.0, np.float32), requires_grad=True)
    y = nn.LayerNorm(8)(equal)
    y.backward(normal(2, 8).astype(np.float32))
    assert np.array_equal(y, np.zeros((2, 8)))
    assert np.isfinite(equal.grad.numpy()).all()
    far = (normal(3, 64) + 1e4).astype(np.float32)  # not E[x²] − μ², which would cancel
    exact = nn.LayerNorm(64).astype("float64")(far.astype(np.float64))
    assert np.allclose(nn.LayerNorm(64)(far), exact, atol=2e-3)  # float32 knows these x to 5e-4
    half = nn.LayerNorm(300).astype("float16")(np.linspace(-1000, 1000, 300, dtype=np.float16).reshape(1, 300))
    assert half.dtype == np.float16
    assert abs(half.numpy().astype(float).var() - 1) < 1e-2  # squares are beyond float16


def test_nan_stays_in_its_sample():
    layer, x = nn.LayerNorm(4).astype("float64"), Tensor(normal(3, 4), requires_grad=True)
    x.data[1, 2] = np.nan
    y = layer(x)
    y.backward(normal(3, 4, seed=1))
    for array in (y.numpy(), x.grad.numpy()):
        assert np.isnan(array).all(axis=1).tolist() == [False, True, False]
        assert np.isfinite(array[::2]).all()


# ── dropout ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "build",
    [
        lambda p: nn.MultiHeadAttention(8, 2, dropout=p),
        lambda p: nn.TransformerBlock(8, 2, dropout=p),
        lambda p: gpt(dropout=p),
    ],
    ids=["attention", "block", "GPT"],
)
def test_dropout_is_that_of_the_scope_and_in_training_only(build):
    model, plain = build(0.4), build(0)
    model.load_state_dict(plain.state_dict())
    x = TOKENS if isinstance(model, nn.GPT) else normal(3, 5, 8).astype(np.float32)

    def step(model, **scope):
        forget(model)
        with nn.dropout_scope(**scope):
            y = model(x)
        y.backward(np.ones(y.shape, np.float32))
        return [y.numpy().tobytes(), *(g.tobytes() for g in grads(model).values())]

    first = step(model, seed=1, update=2, rank=3)
    step(model, seed=1, update=4)
    assert step(model, seed=1, update=2, rank=3) == first
    for other in (
        {"seed": 2, "update": 2, "rank": 3},
        {"seed": 1, "update": 3, "rank": 3},
        {"seed": 1, "update": 2},
    ):
        assert step(model, **other)[0] != first[0]
    assert step(plain) == step(plain.eval())  # p = 0 drops nothing
    assert step(model.eval()) == step(plain)  # nor does evaluation


def test_each_dropout_of_a_block_draws_its_own_mask():
    block = nn.TransformerBlock(8, 2, 8, dropout=0.5)
    masks = []
    for layer in (block.self_attn.dropout, block.dropout, block.dropout1, block.dropout2):
        with nn.dropout_scope():
            masks.append(layer(np.ones((4, 5, 8), np.float32)).numpy().tobytes())
    assert len(set(masks)) == 4


def test_where_a_block_drops():
    """On the shares of attention, inside, and on both parts' results: by hand, with the same masks."""
    block, x = nn.TransformerBlock(8, 2, 12, dropout=0.3), normal(3, 5, 8).astype(np.float32)
    with nn.dropout_scope(update=4):
        y = x + block.dropout1(block.self_attn(block.norm1(x)))
        inside = block.dropout(block.activation(block.linear1(block.norm2(y))))
        by_hand = y + block.dropout2(block.linear2(inside))
    with nn.dropout_scope(update=4):
        assert np.array_equal(block(x), by_hand)
    assert {m.p for m in block.modules() if isinstance(m, nn.Dropout)} == {0.3}


def test_dropout_is_on_the_shares_of_attention():
    """Values of ones: what comes out is the sum of the shares that were kept, over 1 − p."""
    q = normal(1, 2, 50, 4)
    y = F.scaled_dot_product_attention(
        q, q, np.ones((1, 2, 50, 4)), dropout=lambda p: F.dropout(p, 0.5, key=(0,))
    ).numpy()
    shares = F.softmax(Tensor(q @ q.swapaxes(-1, -2) / 2))
    assert close(y, np.repeat(F.dropout(shares, 0.5, key=(0,)).numpy().sum(-1, keepdims=True), 4, axis=-1))
    assert abs(y.mean() - 1) < 0.1
    assert y.std() > 0.01


# ── embedding ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint64])
def test_an_embedding_picks_rows_and_adds_up_their_gradients(dtype):
    tokens, weight = np.array([[2, 0, 2], [3, 2, 0]], dtype), Tensor(normal(5, 3), requires_grad=True)
    y = F.embedding(tokens, weight)
    assert np.array_equal(y, weight.numpy()[tokens.astype(int)])
    grad = np.arange(18.0).reshape(2, 3, 3)
    y.backward(grad)
    expected = np.zeros((5, 3))
    for i in range(2):
        for j in range(3):
            expected[int(tokens[i, j])] += grad[i, j]
    assert np.array_equal(weight.grad, expected)


def test_an_embedding_takes_tensors_lists_and_one_token():
    layer = nn.Embedding(5, 3)
    rows = layer.weight.numpy()
    for tokens in (Tensor(np.array([1, 4])), [1, 4], np.array([9, 1, 9, 4])[1::2]):
        assert np.array_equal(layer(tokens), rows[[1, 4]])
    assert np.array_equal(layer(np.array(4)), rows[4])
    assert layer(np.zeros((0, 3), int)).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (
            [0, 5],
            IndexError,
            r"embedding: token 5 at place 1 is outside 0 … 4, the rows of a weight of shape \(5, 3\)",
        ),
        ([[0, 1], [-1, 2]], IndexError, "token -1 at place 2 is outside 0 … 4"),
        ([0.0, 1.0], TypeError, "tokens must be integers in 0 … 4, not float64"),
        ([True, False], TypeError, "not bool"),
    ],
)
def test_wrong_tokens_are_told(tokens, error, message):
    with pytest.raises(error, match=message):
        nn.Embedding(5, 3)(np.array(tokens))


# ── GPT ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_names_and_shapes_of_parameters():
    """Pinned: files, strategies and PyTorch's twin of the model know them by these names."""
    block = {
        "self_attn.in_proj_weight": (24, 8), "self_attn.in_proj_bias": (24,),
        "self_attn.out_proj.weight": (8, 8), "self_attn.out_proj.bias": (8,),
        "linear1.weight": (32, 8), "linear1.bias": (32,), "linear2.weight": (8, 32), "linear2.bias": (8,),
        "norm1.weight": (8,), "norm1.bias": (8,), "norm2.weight": (8,), "norm2.bias": (8,),
    }  # fmt: skip
    assert {name: p.shape for name, p in nn.TransformerBlock(8, 2).named_parameters()} == block
    whole = {"token_embedding.weight": (7, 8), "position_embedding.weight": (6, 8)}
    for i in range(2):
        whole |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    whole |= {"norm.weight": (8,), "norm.bias": (8,), "head.weight": (7, 8), "head.bias": (7,)}
    assert {name: p.shape for name, p in gpt().named_parameters()} == whole
    assert list(gpt().state_dict()) == list(whole)
    assert not list(gpt().named_buffers())


def test_a_seed_gives_a_model():
    model, again, other = gpt(seed=3), gpt(seed=3), gpt(seed=4)
    for (name, a), b, c in zip(model.named_parameters(), again.parameters(), other.parameters()):
        assert np.array_equal(a, b)
        constant = "norm" in name or name.endswith("in_proj_bias")
        assert np.array_equal(a, c) == constant, name
    for built in (model, nn.TransformerBlock(8, 2, 8)):  # no two parameters are drawn from one stream
        drawn = [
            p.numpy().ravel()[:8].tobytes()
            for name, p in built.named_parameters()
            if not ("norm" in name or name.endswith("in_proj_bias"))
        ]
        scaled = [np.frombuffer(d, np.float32) for d in drawn]
        assert len({tuple(np.round(s / np.abs(s).max(), 4)) for s in scaled}) == len(drawn)


def test_initial_values():
    """Within 5 σ of the standard deviation; constants, again after `initialize`."""
    model = gpt(vocab_size=60, context=50, embed_dim=64).initialize(5)
    lone = nn.Embedding(60, 64), nn.Embedding(60, 64, std=3)
    tables = model.token_embedding, model.position_embedding, *lone
    for table, std in zip(tables, (0.02, 0.02, 1, 3)):
        values = table.weight.numpy()
        assert abs(values.std() / std - 1) < 5 / np.sqrt(2 * values.size)
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size)
    assert np.array_equal(model.norm.weight, np.ones(64))
    assert np.array_equal(model.norm.bias, np.zeros(64))
    assert np.array_equal(model.blocks[1].self_attn.in_proj_bias, np.zeros(192))


@pytest.mark.parametrize("shape", [(0, 6), (0, 3), (2, 0), (1, 1)])
def test_no_texts_or_texts_of_nothing(shape):
    model = gpt()
    loss = F.cross_entropy(model(np.zeros(shape, int)), np.zeros(shape, int))
    loss.backward()
    assert np.isfinite(loss.item())
    if shape[0] * shape[1] == 0:
        assert loss.item() == 0
        assert all(np.array_equal(p.grad, np.zeros(p.shape)) for p in model.parameters())


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (np.zeros((2, 7), int), ValueError, r"GPT: tokens must have shape \(batch, at most 6\), not \(2, 7\)"),
        (np.zeros(6, int), ValueError, r"not \(6,\)"),
        (np.zeros((2, 6, 7)), ValueError, r"not \(2, 6, 7\)"),
        (np.full((2, 6), 7), IndexError, "token 7 at place 0 is outside 0 … 6"),
        (np.zeros((2, 6)), TypeError, "tokens must be integers"),
    ],
)
def test_wrong_texts_are_told(tokens, error, message):
    with pytest.raises(error, match=message):
        gpt()(tokens)


@pytest.mark.parametrize("shape", [(6, 3), (18,), (3, 5), (3, 6, 1), (3, 6, 7)])
def test_labels_of_text_have_the_shape_of_the_tokens(shape):
    with pytest.raises(ValueError, match=r"logits of shape \(3, 6, 7\) need labels of shape \(3, 6\), not"):
        F.cross_entropy(gpt()(TOKENS), np.zeros(shape, int))
    with pytest.raises(ValueError, match=r"label 7 of sample 8 is outside 0 … 6"):
        F.cross_entropy(gpt()(TOKENS), np.where(np.arange(18) == 8, 7, 0).reshape(3, 6))


def test_the_same_dtype_throughout():
    for dtype in ("float16", "float32", "float64"):
        model = gpt(dropout=0.1).astype(dtype)
        loss = F.cross_entropy(model(TOKENS), TOKENS)
        loss.backward(18)
        assert loss.dtype == dtype
        assert all(p.grad.dtype == dtype for p in model.parameters())


def test_a_bound_model_has_the_gradients_of_a_free_one():
    free, model = gpt(), gpt()
    layout = nn.Layout(model)
    params, slots = np.zeros(layout.size, np.float32), np.full(layout.size, np.nan, np.float32)
    layout.pack(params)
    model.bind(params, slots)
    for m in (free, model):
        F.cross_entropy(m(TOKENS), TOKENS).backward()
    for p, q in zip(free.parameters(), model.parameters()):
        assert np.shares_memory(q.grad.data, slots)
        assert p.grad.numpy().tobytes() == q.grad.numpy().tobytes()


def test_gpt_learns_a_repeating_text():
    """Two letters tell the third, one does not. Who looks back has (¼ log 2 + ¾ log 3) / 8 = 0.125, others 1.0."""
    text = np.array([0, 1, 0, 2, 1, 1, 2, 2] * 4)
    x = np.stack([text[i : i + 8] for i in range(8)])
    y = np.stack([text[i + 1 : i + 9] for i in range(8)])
    model = gpt(vocab_size=3, context=8, embed_dim=16, num_layers=1)
    optimizer = optim.Adam(model.parameters(), lr=0.005)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert 0.1246 < losses[-1] < 0.15
    assert (model(x).numpy()[:, 1:].argmax(-1) == y[:, 1:]).all()


def test_what_is_wrong_with_one_token_stays_with_its_row():
    weight = Tensor(np.ones((3, 1)), requires_grad=True)
    F.embedding([0, 1, 2, 0], weight).backward(np.array([[1], [np.inf], [2], [3]]))
    assert weight.grad.numpy().ravel().tolist() == [4, np.inf, 2]


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_written_goes_on_from_the_last_tokens_alone():
    model = nn.GPT(7, context=4, embed_dim=8, num_heads=2, num_layers=1, dropout=0.5)
    long, short = (
        model.generate([1, 2, 3, 4, 5, 6], 1, temperature=0),
        model.generate([3, 4, 5, 6], 1, temperature=0),
    )
    assert (long.dtype, long.shape) == (np.int64, (7,))
    assert long.tolist() == [1, 2, *short.tolist()]
    expected = model.eval()(np.array([[3, 4, 5, 6]])).numpy()[0, -1].argmax()
    assert short[-1] == expected
    assert model.generate([3], 0).tolist() == [3]


def test_writing_is_drawn_by_the_seed_and_by_chance_as_the_model_says():
    model = nn.GPT(3, context=2, embed_dim=4, num_heads=1, num_layers=1)
    model.load_state_dict({**model.state_dict(), "head.weight": np.zeros((3, 4)), "head.bias": np.log([1, 2, 5])})
    drawn = model.generate([0], 4000, seed=1)
    assert drawn.tolist() == model.generate([0], 4000, seed=1).tolist()
    assert drawn.tolist() != model.generate([0], 4000, seed=2).tolist()
    shares = np.bincount(drawn[1:], minlength=3) / 4000
    assert np.abs(shares - np.array([1, 2, 5]) / 8).max() < 5 * np.sqrt(0.25 / 4000)
    colder = np.bincount(model.generate([0], 4000, temperature=0.5)[1:], minlength=3) / 4000
    assert np.abs(colder - np.array([1, 4, 25]) / 30).max() < 5 * np.sqrt(0.25 / 4000)


def test_writing_leaves_each_layers_mode():
    model = nn.GPT(5, context=4, embed_dim=4, num_heads=1, num_layers=1, dropout=0.5)
    model.blocks.eval()
    model.generate([1], 2)
    assert (model.training, model.norm.training, model.blocks.training) == (True, True, False)


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        ([], {}, ValueError, "one sequence of integer tokens"),
        ([[1]], {}, ValueError, "one sequence of integer tokens"),
        ([1.5], {}, ValueError, "one sequence of integer tokens"),
        ([1], {"temperature": -1}, ValueError, "temperature=-1"),
        ([1], {"temperature": float("nan")}, ValueError, "temperature=nan"),
        ([9], {}, IndexError, "token 9"),
    ],
)
def test_what_can_not_be_written(tokens, options, error, message):
    with pytest.raises(error, match=message):
        nn.GPT(5, context=4, embed_dim=4, num_heads=1, num_layers=1).generate(tokens, 1, **options)


def test_a_model_that_has_diverged_does_not_write():
    model = nn.GPT(5, context=4, embed_dim=4, num_heads=1, num_layers=1)
    model.head.bias.data[0] = np.nan
    with pytest.raises(FloatingPointError, match="has its training diverged"):
        model.generate([1], 1)


# ── further bad input ───────────────────────────────────────────────────────────────────────────────────


def test_keys_of_another_batch_are_refused_with_and_without_dropout():
    for dropout in (0.0, 0.5):
        layer = nn.MultiHeadAttention(4, 2, dropout=dropout)
        with pytest.raises(ValueError, match="they must agree in all but the length of queries"):
            layer(np.ones((2, 3, 4), np.float32), np.ones((1, 3, 4), np.float32))
        assert layer(np.ones((2, 3, 4), np.float32), np.ones((2, 0, 4), np.float32)).shape == (2, 3, 4)


@pytest.mark.parametrize("shape", [(3,), (2, 3, 0)])
def test_attention_of_vectors_or_of_nothing(shape):
    with pytest.raises(ValueError, match="attention: queries of shape"):
        F.scaled_dot_product_attention(*[np.ones(shape)] * 3)


def test_lists_of_tokens_and_large_ones():
    assert nn.GPT(5, context=4, embed_dim=4, num_heads=1, num_layers=1)([[1, 2]]).shape == (1, 2, 5)
    assert nn.Embedding(5, 3)([]).shape == (0, 3)
    with pytest.raises(IndexError, match="token 9223372036854775809 at place 1"):
        F.embedding(np.array([0, 2**63 + 1], np.uint64), np.ones((3, 2)))


def test_an_embeddings_sums_are_in_the_order_of_places():
    rng = np.random.default_rng(0)
    tokens, grad = rng.integers(0, 3, 200), rng.standard_normal((200, 2)).astype(np.float32)
    weight = Tensor(np.zeros((3, 2), np.float32), requires_grad=True)
    F.embedding(tokens, weight).backward(grad)
    expected = [np.add.reduceat(grad[tokens == t], [0], axis=0)[0] for t in range(3)]
    assert np.array_equal(weight.grad, expected)
