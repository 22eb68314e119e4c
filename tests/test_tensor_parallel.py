"""Layers cut over ranks are the dense layers: in Fractions ``==``, forward and backward, values and errors."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

from minidp import nn, parallel
from minidp.autograd import Tensor
from minidp.data.sharding import cut
from minidp.parallel.cuts import Cut
from minidp.parallel.parallelize import cuts_of, parallelize
from tests.meshes import exact, is_exact
from tests.told import told
from tests.training import spawned

PARTS = (1, 2, 3, 4)


def joined(comm: Any, cuts: dict[str, Cut], name: str, part: np.ndarray) -> np.ndarray:
    """The whole of a part; of one that is not cut itself, the same on all ranks."""
    everybodys = comm.all_gather_object(part)
    if name in cuts:
        return cuts[name].join(everybodys)
    assert all(other.tobytes() == part.tobytes() or (other == part).all() for other in everybodys), name
    return part


def compare(comm: Any, model: nn.Module, inputs: Any, weigh: Any, compared: Any) -> None:
    """Cut ``model`` by `parallelize`; result, ∂x and all gradients of Σ weigh · y² must be those of the dense."""
    dense = copy.deepcopy(model)
    identities = dict(model.named_parameters())
    cuts = parallelize(model, comm)
    assert dict(model.named_parameters()) == identities, "Parameters stay the objects that they are"
    assert bool(cuts) == (comm.world_size > 1)
    results = []
    for m in (dense, model):
        x = [Tensor(v.copy(), requires_grad=v.dtype.kind in "fO") for v in inputs]
        y = m(*x)
        (y * y * weigh).sum().backward()
        results.append((y.numpy(), [v.grad.numpy() for v in x if v.requires_grad], m))
    (y0, x0, _), (y1, x1, _) = results
    compared(y0, y1, "y")
    for a, b in zip(x0, x1, strict=True):
        compared(a, b, "∂x")
    gradients = dict(dense.named_parameters())
    for name, p in model.named_parameters():
        compared(gradients[name].data, joined(comm, cuts, name, p.data), name)
        compared(gradients[name].grad.numpy(), joined(comm, cuts, name, p.grad.numpy()), f"∂{name}")
    for name, p in identities.items():
        assert p.shape == (cuts[name].shape() if name in cuts else gradients[name].shape)


def equal(a: np.ndarray, b: np.ndarray, what: str) -> None:
    assert is_exact(a), what
    assert is_exact(b), what
    assert a.shape == b.shape
    assert (a == b).all(), what


def close(a: np.ndarray, b: np.ndarray, what: str) -> None:
    assert a.shape == b.shape
    np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-12 * abs(a).max(initial=0), err_msg=what)


# -- linear layers, in Fractions -----------------------------------------------------------------------------


def in_fractions(*layers: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*layers)
    for i, p in enumerate(model.parameters()):
        p.data = exact(*p.shape, seed=i)
    return model


def mlp(comm: Any) -> None:
    for bias in (True, False):
        for samples in (0, 1, 4):
            model = in_fractions(nn.Linear(5, 12, bias), nn.ReLU(), nn.Linear(12, 3, bias))
            compare(comm, model, [exact(samples, 5)], exact(3), equal)
    inside = nn.Sequential(nn.Linear(5, 12), nn.Identity(), nn.ReLU(), nn.Linear(12, 3))
    deep = in_fractions(inside, nn.ReLU(), nn.Linear(3, 12), nn.Linear(12, 2))
    compare(comm, deep, [exact(3, 5)], exact(2), equal)
    # A layer by itself stays whole; of three in a row the first two are cut.
    three = in_fractions(nn.Linear(5, 12), nn.Linear(12, 4), nn.Linear(4, 2))
    compare(comm, three, [exact(3, 5)], exact(2), equal)
    assert type(three[2]) is nn.Linear


@pytest.mark.parametrize("parts", PARTS)
def test_two_linear_layers_equal_the_dense_ones(parts: int) -> None:
    spawned(mlp, parts, "virtual")


def single_layers(comm: Any) -> None:
    t, rank = comm.world_size, comm.rank
    for features in (12, 13, 17):  # parts that differ by one are allowed where they are joined again
        dense = nn.Linear(5, features)
        dense.weight.data, dense.bias.data = exact(features, 5), exact(features)
        x = Tensor(exact(4, 5), requires_grad=True)
        weigh = exact(4, features, seed=3)
        y = dense(x)
        (y * weigh).sum().backward()

        gathers = features % t != 0 or features == 12
        layer = parallel.ColumnParallelLinear.of(copy.deepcopy(dense), comm, gather_output=gathers)
        mine = Tensor(exact(4, 5), requires_grad=True)
        out = layer(mine)
        lo, hi = cut(features, t)[rank]
        equal(y.numpy() if gathers else y.numpy()[:, lo:hi], out.numpy(), "column")
        (out * (weigh if gathers else weigh[:, lo:hi])).sum().backward()
        equal(x.grad.numpy(), mine.grad.numpy(), "∂x")
        equal(dense.weight.grad.numpy()[lo:hi], layer.weight.grad.numpy(), "∂weight")
        equal(dense.bias.grad.numpy()[lo:hi], layer.bias.grad.numpy(), "∂bias")

    dense = nn.Linear(12, 3)
    dense.weight.data, dense.bias.data = exact(3, 12), exact(3)
    x = Tensor(exact(4, 12), requires_grad=True)
    y = dense(x)
    (y * exact(4, 3)).sum().backward()
    layer = parallel.RowParallelLinear.of(copy.deepcopy(dense), comm)
    lo, hi = cut(12, t)[rank]
    mine = Tensor(exact(4, 12)[:, lo:hi], requires_grad=True)
    out = layer(mine)
    equal(y.numpy(), out.numpy(), "row: the bias is added once, after the sum")
    (out * exact(4, 3)).sum().backward()
    equal(x.grad.numpy()[:, lo:hi], mine.grad.numpy(), "∂x")
    equal(dense.weight.grad.numpy()[:, lo:hi], layer.weight.grad.numpy(), "∂weight")
    equal(dense.bias.grad.numpy(), layer.bias.grad.numpy(), "∂bias: the same on all, not T times")


@pytest.mark.parametrize("parts", PARTS)
def test_columns_and_rows_equal_the_dense_layer(parts: int) -> None:
    spawned(single_layers, parts, "virtual")


def conjugates(comm: Any) -> None:
    """Forward and backward of each, from values that tell ranks apart."""
    t, rank = comm.world_size, comm.rank
    own, grads = exact(2, 3, seed=rank), [exact(2, 3, seed=10 + r) for r in range(t)]

    x = Tensor(own.copy(), requires_grad=True)
    y = parallel.copy_to_ranks(x, comm)
    equal(own, y.numpy(), "f forward: nothing")
    (y * grads[rank]).sum().backward()
    equal(sum(grads), x.grad.numpy(), "f backward: the sum")

    x = Tensor(own.copy(), requires_grad=True)
    y = parallel.sum_over_ranks(x, comm)
    equal(sum(exact(2, 3, seed=r) for r in range(t)), y.numpy(), "g forward: the sum")
    equal(own, x.numpy(), "what is summed stays as it is")
    (y * grads[0]).sum().backward()
    equal(grads[0], x.grad.numpy(), "g backward: nothing")

    for size in (t, 6, 7, 11):
        whole, weigh = exact(2, size), exact(2, size, seed=5)
        lo, hi = cut(size, t)[rank]
        x = Tensor(whole[:, lo:hi].copy(), requires_grad=True)
        y = parallel.join_ranks(x, size, comm)
        equal(whole, y.numpy(), "join forward")
        (y * weigh).sum().backward()
        equal(weigh[:, lo:hi], x.grad.numpy(), "join backward: its part")
    empty = parallel.sum_over_ranks(Tensor(np.zeros((0, 4))), comm)
    assert empty.shape == (0, 4)


@pytest.mark.parametrize("parts", PARTS)
def test_forward_of_one_is_backward_of_the_other(parts: int) -> None:
    spawned(conjugates, parts, "virtual")


# -- attention, embeddings, whole models ---------------------------------------------------------------------


class Cross(nn.Module):
    def __init__(self, **options: Any) -> None:
        self.inner = nn.Sequential(nn.MultiHeadAttention(12, 12, **options))

    def forward(self, *inputs: Any) -> Any:
        return self.inner[0](*inputs)


@parallel.cut_layers.register
def _(module: Cross, comm: Any) -> None:
    parallel.cut_layers(module.inner, comm)


def attention(comm: Any) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, n, 12)) for n in (5, 4, 4))
    weigh = rng.standard_normal((2, 5, 12))
    for options in ({"causal": True}, {}, {"bias": False}, {"dropout": 0.3, "causal": True}):
        model = Cross(**options).initialize(3).astype("float64")
        for p in model.parameters():
            p.data = rng.standard_normal(p.shape)
        compare(comm, copy.deepcopy(model), [q], weigh, close)
        compare(comm, copy.deepcopy(model), [q[:0]], 1.0, close)
        if "causal" not in options:
            compare(comm, copy.deepcopy(model), [q, k, v], weigh, close)
            compare(comm, copy.deepcopy(model), [q, k], weigh, close)


@pytest.mark.parametrize("parts", PARTS)
def test_attention_by_heads_equals_the_dense_one(parts: int) -> None:
    spawned(attention, parts, "virtual")


def embedding(comm: Any) -> None:
    for vocabulary, dtype in ((13, "int64"), (13, "uint8"), (600, "uint8"), (600, "int16")):
        model = nn.Sequential(nn.Embedding(vocabulary, 6), seed=2)
        dense = copy.deepcopy(model)
        cuts = parallelize(model, comm)
        tokens = (np.arange(40).reshape(8, 5) * 7 % min(vocabulary, 250)).astype(dtype)
        weigh = np.random.default_rng(1).standard_normal((8, 5, 6)).astype(np.float32)
        for given in (tokens, tokens[:0], Tensor(tokens)):
            a, b = dense(given), model(given)
            assert a.numpy().tobytes() == b.numpy().tobytes(), "the dense layer's bits"
            for m, y in ((dense, a), (model, b)):
                m[0].weight.grad = None
                (y * weigh[: len(given)]).sum().backward()
            whole = joined(comm, cuts, "0.weight", model[0].weight.grad.numpy())
            np.testing.assert_allclose(whole, dense[0].weight.grad.numpy(), rtol=1e-4, atol=1e-6)
        for wrong in (np.array([[vocabulary]]), np.array([-1])):
            said = told(lambda: model(wrong))  # noqa: B023
            assert said == told(lambda: dense(wrong))  # noqa: B023
            assert f"outside 0 … {vocabulary - 1}" in said
        for row in (0, 7):
            m = copy.deepcopy(dense)
            m[0].weight.data[row] = np.nan
            parallelize(m, comm)
            said = m(tokens).numpy()
            assert (np.isnan(said).any(axis=-1) == (tokens == row)).all(), (
                "NaN stays in the row that was asked for"
            )


@pytest.mark.parametrize("parts", PARTS)
def test_an_embedding_by_rows_has_the_dense_ones_bits(parts: int) -> None:
    spawned(embedding, parts, "virtual")


def gpt(seed: int = 3, dropout: float = 0.0, heads: int = 12) -> nn.Module:
    return nn.GPT(13, 4, 24, heads, 2, dropout=dropout, seed=seed).astype("float64")


def whole_models(comm: Any) -> None:
    rng = np.random.default_rng(0)
    tokens, weigh = rng.integers(0, 13, (3, 4)), rng.standard_normal((3, 4, 13))
    for dropout in (0.0, 0.4):  # masks are parts of the dense masks: so the results are the dense ones
        compare(comm, gpt(dropout=dropout), [tokens], weigh, close)
    compare(comm, gpt(), [tokens[:0]], 1.0, close)
    compare(comm, gpt().eval(), [tokens], weigh, close)
    tied = gpt()
    tied.head.weight = tied.token_embedding.weight
    compare(comm, tied, [tokens], weigh, close)
    assert tied.head.weight is tied.token_embedding.weight


@pytest.mark.parametrize(("parts", "world"), [*((t, "virtual") for t in PARTS), (2, "process"), (3, "process")])
def test_a_gpt_equals_the_dense_one(parts: int, world: str) -> None:
    spawned(whole_models, parts, world)


def initial_values(comm: Any) -> None:
    t = comm.world_size
    for build in (gpt, lambda seed: nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3), seed=seed)):
        cut_first = build(seed=0)
        cuts = parallelize(cut_first, comm)
        cut_first.initialize(5)
        for name, p in build(seed=0).initialize(5).named_parameters():
            part = dict(cut_first.named_parameters())[name]
            want = cuts[name].part(p.data) if name in cuts else p.data
            assert part.data.tobytes() == want.astype(part.dtype).tobytes(), name
    dense = nn.Sequential(nn.Linear(5, 12), nn.GELU(), nn.Linear(12, 3), seed=7)
    ours = parallel.ParallelMLP(5, 12, 3, comm, seed=7)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in dense.named_parameters()]
    for name, p in dense.named_parameters():
        assert (joined(comm, cuts_of(ours), name, dict(ours.named_parameters())[name].data) == p.data).all()
    x = np.ones((2, 5), np.float32)
    np.testing.assert_allclose(ours(x).numpy(), dense(x).numpy(), rtol=1e-5)
    alone = parallel.ParallelAttention(12, 12, comm, causal=True).initialize(4)
    other = nn.MultiHeadAttention(12, 12, causal=True).initialize(4)
    assert (alone.out_proj.weight.data == other.out_proj.weight.data[:, slice(*cut(12, t)[comm.rank])]).all()
    assert (Cut((36, 12), 0, comm.rank, t, 3).part(other.in_proj_weight.data) == alone.in_proj_weight.data).all()
    rows = parallel.VocabParallelEmbedding(13, 3, comm).initialize(4)
    lo, hi = cut(13, t)[comm.rank]
    assert (nn.Embedding(13, 3).initialize(4).weight.data[lo:hi] == rows.weight.data).all()


@pytest.mark.parametrize("parts", PARTS)
def test_a_seed_means_the_same_model_however_it_is_cut(parts: int) -> None:
    spawned(initial_values, parts, "virtual")
