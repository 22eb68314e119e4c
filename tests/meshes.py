"""What tests of hybrid parallelism share: meshes, a small GPT, and one training loop for it in any way."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from itertools import product
from typing import Any

import numpy as np

from minidp import nn, optim, parallel
from minidp.data.sharding import cut
from minidp.nn import functional as F

VOCABULARY, CONTEXT = 32, 4
RULES: dict[str, Any] = {
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: optim.Adam(p, lr=1e-3),
}
State = dict[str, np.ndarray]


def factorisations(ranks: int) -> list[tuple[int, int, int]]:
    """(dp, tp, pp) of all meshes of that many ranks."""
    sizes = range(1, ranks + 1)
    return [(dp, tp, pp) for dp, tp, pp in product(sizes, sizes, sizes) if dp * tp * pp == ranks]


def gpt(dropout: float = 0.0, blocks: int = 2, heads: int = 4, seed: int = 3) -> nn.GPT:
    return nn.GPT(VOCABULARY, CONTEXT, 16, heads, blocks, dropout=dropout, seed=seed).astype("float64")


def batch(step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of a step."""
    tokens = np.random.default_rng([7, step]).integers(0, VOCABULARY, (size, CONTEXT + 1))
    return tokens[:, :-1], tokens[:, 1:]


def build(comm: Any, mesh: Any, rule: str = "adam", m: int = 1, **options: Any) -> Any:
    """HybridParallel on a mesh (dp, tp, pp); DataParallel on all ranks, which gets its micro-batches one by one,
    where ``mesh`` is None."""
    model = gpt(**{name: options.pop(name) for name in ("dropout", "blocks", "heads", "seed") if name in options})
    optimizer = RULES[rule](model.parameters())
    if mesh is None:
        return parallel.DataParallel(model, optimizer, comm, accumulation_steps=m, **options)
    dp, tp, pp = mesh
    place = parallel.Mesh(comm, dp=dp, tp=tp, pp=pp)
    return parallel.HybridParallel(model, optimizer, place, micro_batches=m, **options)


def forward(s: Any, step: int, size: int, m: int = 1) -> float:
    """n_i L_i of this rank's shard of a step's global batch."""
    index, count = s.shard
    lo, hi = cut(size, count)[index]
    x, y = (array[lo:hi] for array in batch(step, size))
    if isinstance(s, parallel.HybridParallel):
        return float(s.forward_backward(x, y, F.cross_entropy)) * (hi - lo)
    total = 0.0
    for i, j in cut(hi - lo, m):
        total += float(s.forward_backward(x[i:j], y[i:j], F.cross_entropy)) * (j - i)
    return total


def train(
    comm: Any, mesh: Any, sizes: list[int], m: int, options: dict[str, Any]
) -> tuple[list[float], State, dict[str, float], tuple[int, int]]:
    """(n_i L_i of each step, the whole model, metrics, shard)."""
    s = build(comm, mesh, m=m, **options)
    losses = []
    for step, size in enumerate(sizes):
        losses.append(forward(s, step, size, m))
        s.step()
    assert s.updates == len(sizes)
    return losses, s.state_dict(), s.metrics, s.shard


def losses_of(results: list[Any], sizes: list[int]) -> np.ndarray:
    """Σ n_i L_i / Σ n_i of each step; that all ranks of a replica were told the same."""
    by_shard: dict[int, list[float]] = {}
    for losses, _, _, (index, _) in results:
        assert by_shard.setdefault(index, losses) == losses
    return np.sum(list(by_shard.values()), axis=0) / np.maximum(sizes, 1)


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and a[k].tobytes() == b[k].tobytes() for k in a)


def distance(a: State, b: State) -> float:
    """max|Δw| / max|w|."""
    assert a.keys() == b.keys()
    return max(np.abs(a[k] - b[k]).max() for k in a) / max(np.abs(a[k]).max() for k in a)


def everything(s: Any) -> State:
    """w, buffers and the optimizer's state, whole, on every rank. Collective."""
    s.consolidate()
    found = {f"model.{name}": array.copy() for name, array in s.state_dict().items()}
    for slot, arrays in s.optimizer_state().items():
        found |= {f"{slot}.{name}": np.array(array) for name, array in arrays.items()}
    s.forget()
    return found


@cache
def exact(*shape: int, seed: int = 0) -> Any:
    rng = np.random.default_rng([seed, *shape])
    out = np.empty(shape, object)
    for i in np.ndindex(shape):
        out[i] = Fraction(int(rng.integers(-9, 10)), int(rng.integers(1, 8)))
    return out


def is_exact(array: np.ndarray) -> bool:
    return array.dtype == object and all(isinstance(v, Fraction | int) for v in array.ravel())
