"""What `parallelize` makes of a model: masks of dropout, layers of users, models that can't be cut."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest

from minidp import nn, parallel
from minidp.data.sharding import cut
from minidp.nn import functional as F
from minidp.parallel.parallel_attention import PartDropout
from minidp.parallel.parallelize import cuts_of, parallelize, whole_or_not
from tests.told import told
from tests.training import spawned


def masks(comm: Any) -> None:
    t, rank, size = comm.world_size, comm.rank, 48
    model = nn.Sequential(nn.Linear(4, size), nn.Dropout(0.5), nn.Linear(size, 6), nn.Dropout(0.5), seed=1)
    model = nn.Sequential(nn.Identity(), model)  # "1.1" and "1.3"
    dense = copy.deepcopy(model)
    parallelize(model, comm)
    inside, outside = model[1][1], model[1][3]
    assert type(inside) is (PartDropout if t > 1 else nn.Dropout)
    assert type(outside) is nn.Dropout
    lo, hi = cut(size, t)[rank]
    for update, seed in ((0, 0), (0, 1), (3, 0)):
        seen, wanted = [], []
        for m, kept in ((model, seen), (dense, wanted)):
            width = hi - lo if m is model else size
            with nn.dropout_scope(seed=seed, update=update, rank=2):
                for _ in range(2):
                    kept.append(m[1][1](np.ones((5, 3, width), np.float32)).numpy() > 0)
                    kept.append(m[1][3](np.ones((5, 6), np.float32)).numpy() > 0)
        for i, (part, whole) in enumerate(zip(seen, wanted)):
            assert (part == (whole if i % 2 else whole[..., lo:hi])).all(), "the dense layer's mask, or its part"
        everybodys = comm.all_gather_object(seen)
        assert not (seen[0] == seen[2]).all(), "each call another one"
        for other in range(t):
            if other != rank:
                assert (everybodys[other][1] == seen[1]).all(), "the same where activations are the same"
                assert not np.array_equal(everybodys[other][0], seen[0]), "others where they are not"
    model.eval()
    assert (inside(np.ones((2, hi - lo), np.float32)).numpy() == 1).all()


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_dropout_masks_are_parts_of_the_dense_layers(parts: int) -> None:
    spawned(masks, parts, "virtual")


def refused(comm: Any) -> list[str]:
    untouched = nn.Sequential(nn.Linear(4, 6))
    tied = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
    tied[4].weight = tied[0].weight
    both = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    both[2].weight = both[0].weight  # by rows there, by columns here
    said = [
        told(lambda: parallel.ColumnParallelLinear(4, 10, comm)),
        told(lambda: parallel.ColumnParallelLinear(4, 2, comm, gather_output=True)),
        told(lambda: parallel.RowParallelLinear(10, 4, comm)),
        told(lambda: parallel.ParallelAttention(8, 4, comm)),
        told(lambda: parallel.VocabParallelEmbedding(2, 4, comm)),
        told(lambda: parallel.ParallelMLP(4, 9, 4, comm, activation="sine")),
        told(lambda: parallelize(nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 2)), comm)),
        told(lambda: parallelize(untouched, comm)),
        told(lambda: parallelize(tied, comm)),
        told(lambda: parallelize(both, comm)),
        told(lambda: parallel.RowParallelLinear(9, 4, comm)(np.zeros((2, 9), np.float32))),
        told(lambda: copy.deepcopy(parallel.ColumnParallelLinear(4, 9, comm))),
        told(lambda: pickle.dumps(parallel.ParallelMLP(4, 9, 4, comm))),
    ]
    assert cuts_of(untouched) == {}
    return said


def test_what_does_not_fit_is_refused_with_the_numbers_that_would() -> None:
    first, *others = spawned(refused, 3, "virtual")
    assert all(said == first for said in others)
    starts = (
        "ValueError: ColumnParallelLinear: out_features=10 does not divide into 3 equal parts: take tp of 1, 2, "
        "5, 10, or out_features=9 or 12",
        "ValueError: ColumnParallelLinear: out_features=2 can't be cut into 3 parts: take at most tp=2",
        "ValueError: RowParallelLinear: in_features=10 does not divide into 3 equal parts: take tp of 1, 2, 5, "
        "10, or in_features=9 or 12",
        "ValueError: ParallelAttention: num_heads=4 does not divide into 3 equal parts: take tp of 1, 2, 4, or "
        "num_heads=3 or 6",
        "ValueError: VocabParallelEmbedding: num_embeddings=2 can't be cut into 3 parts: take at most tp=2",
        "ValueError: ParallelMLP: activation='sine': valid: gelu, gelu_tanh, relu",
        "ValueError: layer 0, a Linear: out_features=10 does not divide into 3 equal parts: take tp of",
        "ValueError: tp=3: this model has no layers that can be cut",
        "ValueError: layer 0, a Linear: out_features=8 does not divide into 3",
        "ValueError: layer 0, a Linear: out_features=8 does not divide into 3",
        "ValueError: RowParallelLinear: this rank has 3 of 9 input features, and was given 9",
        "TypeError: a ColumnParallelLinear can't be copied or pickled",
        "TypeError: a ColumnParallelLinear can't be copied or pickled",
    )
    for said, start in zip(first, starts, strict=True):
        assert said.startswith(start), said
    tied = spawned(refused, 2, "virtual")[0]
    assert "4.weight is tied to 0.weight, and the two would be cut differently, or one of them not" in tied[8]
    assert "a parameter of shape (8, 8) has been cut to (4, 8)" in tied[9]
    assert spawned(refused, 1, "virtual")[0][10] == "nothing"


# -- layers of users, which say what they do by a forward of their own ---------------------------------------


class Scaled(nn.Embedding):
    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens) * 3.0


class Softmax(nn.Identity):
    def forward(self, x: Any) -> Any:
        return F.softmax(x)


class OwnBlock(nn.TransformerBlock):
    """Not elementwise inside."""

    def forward(self, x: Any) -> Any:
        x = x + self.self_attn(self.norm1(x))
        return x + self.linear2(F.softmax(self.linear1(x)))


class OwnDropout(nn.Dropout):
    def forward(self, x: Any) -> Any:
        return x * 2.0


class OwnGPT(nn.GPT):
    def forward(self, tokens: Any) -> Any:
        return super().forward(tokens) * 2.0


def two() -> tuple[nn.Module, ...]:
    return nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)


def own_layers(comm: Any) -> None:
    tokens = np.arange(12).reshape(3, 4)
    x = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)
    scaled_gpt = nn.GPT(12, 4, 8, 2, 1, seed=1)
    scaled_gpt.token_embedding = Scaled(12, 8)
    cases: list[tuple[nn.Module, Any]] = [
        (nn.Sequential(Scaled(12, 8), *two(), seed=1), tokens),
        (nn.Sequential(nn.Linear(8, 8), Softmax(), nn.Linear(8, 8), *two(), seed=1), x),
        (nn.Sequential(nn.Linear(8, 8), OwnDropout(0.5), nn.Linear(8, 8), *two(), seed=1), x),
        (nn.Sequential(OwnBlock(8, 2), *two(), seed=1), x),
        (nn.Sequential(OwnGPT(12, 4, 8, 2, 1, seed=1), nn.Linear(12, 8), *two()[1:]), tokens),
        (scaled_gpt, tokens),
    ]
    for model, given in cases:
        want = model(given).numpy()
        parallelize(model, comm)
        np.testing.assert_allclose(model(given).numpy(), want, rtol=1e-5, atol=1e-6, err_msg=repr(model))
        assert comm.world_size == 1 or cuts_of(model)
    assert (
        "this model has no layers that can be cut" in told(lambda: parallelize(OwnGPT(12, 4, 8, 2, 1), comm))
        or comm.world_size == 1
    )


@pytest.mark.parametrize("parts", [1, 2])
def test_layers_with_a_forward_of_their_own_keep_it(parts: int) -> None:
    spawned(own_layers, parts, "virtual")


def taken_back(comm: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.1), nn.Linear(8, 4), nn.GELU(), nn.Embedding(3, 4))
    model = nn.Sequential(model, nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 9), seed=3)
    before, text = model.state_dict(), repr(model)
    values = {p: p.data for p in model.parameters()}

    def fails() -> None:
        with whole_or_not(model):
            parallelize(model, comm)
            assert repr(model) != text
            raise KeyError

    assert told(fails).startswith("KeyError")
    assert repr(model) == text
    assert all(p.data is data for p, data in values.items())
    assert all((model.state_dict()[k] == v).all() for k, v in before.items())
    assert [m._path for m in model.modules()] == [name for name, _ in model.named_modules()]


def test_what_fails_half_way_is_taken_back() -> None:
    spawned(taken_back, 2, "virtual")
