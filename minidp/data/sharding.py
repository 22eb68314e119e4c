"""Who gets which samples: D → D_1 ∪ … ∪ D_N, as pure functions of numbers.

No ranks, no communication: every worker computes the same cut by itself, because it depends on the arguments
only. Random orders come from one tree of seeds (`minidp.backend.generator`); NumPy's global generator is
neither read nor written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import isfinite

import numpy as np
import numpy.typing as npt

from minidp import backend

Indices = npt.NDArray[np.intp]


def block(n: int, index: int, count: int) -> tuple[int, int]:
    """The `index`-th of `count` consecutive blocks of n samples, as (start, stop), by recursive halving.

    The left ⌈count/2⌉ blocks together get ⌈n · ⌈count/2⌉ / count⌉ samples, the right ones the rest, and so on
    down to one block. Guaranteed: the blocks are disjoint and cover n, sizes differ by at most 1, a block
    never shrinks when n grows, and for powers of two the cut into 2k refines the cut into k: a block of the
    latter is exactly two blocks of the former. That is what makes micro-shards independent of N.
    """
    start = 0
    while count > 1:
        left = -(-count // 2)
        left_n = -(-n * left // count)
        if index < left:
            n, count = left_n, left
        else:
            start, n, index, count = start + left_n, n - left_n, index - left, count - left
    return start, start + n


def halve(n: int, count: int) -> list[int]:
    """Sizes of the `count` blocks of `block`: n samples for `count` workers, each within 1 of the others."""
    return [stop - start for start, stop in (block(n, index, count) for index in range(count))]


def proportional(n: int, weights: Sequence[float]) -> list[int]:
    """Share n samples in proportion to `weights` (speeds): sizes that sum to n, by largest remainder.

    Each size is within 1 of n · w_i / Σ w; of equal remainders the first wins; weight 0 gets nothing. Exact
    rational arithmetic, so that all workers agree to the last sample.
    """
    from fractions import Fraction  # 8 ms of import, for this only

    ratios = [Fraction(w) for w in weights]
    quotas = [n * r / sum(ratios) for r in ratios]
    sizes = [int(q) for q in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: sizes[i] - quotas[i])  # stable: ties by index
    for i in by_remainder[: n - sum(sizes)]:
        sizes[i] += 1
    return sizes


def cut(n: int, count: int, weights: Sequence[float] | None = None) -> list[tuple[int, int]]:
    """n samples in `count` consecutive blocks (start, stop): equal ones by halving, or proportional ones."""
    if weights is None:
        return [block(n, index, count) for index in range(count)]
    stops = list(accumulate(proportional(n, weights)))
    return list(zip([0, *stops[:-1]], stops))


def share(n: int, index: int, count: int, weights: Sequence[float] | None = None) -> tuple[int, int]:
    """One worker's block of `cut`. Equal ones are found without the others: N workers cut N times, not N²."""
    return block(n, index, count) if weights is None else cut(n, count, weights)[index]


def epoch_order(n: int, shuffle: bool, seed: int, epoch: int, *key: int | str) -> Indices:
    """Order in which an epoch visits n samples: 0 … n−1, or a permutation that (seed, epoch, key) decides.

    Returns shape (n,), dtype intp. The same on all workers, another one each epoch.
    """
    if not shuffle:
        return np.arange(n)
    return backend.generator(seed, "epoch order", epoch, *key).permutation(n)


def dataset_cut(
    n: int, index: int, count: int, shuffle: bool, seed: int, weights: Sequence[float] | None = None
) -> Indices:
    """D_i, the samples that worker `index` of `count` keeps for all epochs: shape (|D_i|,), dtype intp.

    A consecutive block of D, or (with `shuffle`) a random sample without replacement that the seed decides.
    """
    start, stop = share(n, index, count, weights)
    order = backend.generator(seed, "dataset cut").permutation(n) if shuffle else np.arange(n)
    return order[start:stop].copy()


def consumed(n: int, index: int, count: int) -> int:
    """Samples of its D_i that worker `index` has used when all workers together have used n.

    Step s of partition="dataset" ends at n = s · global batch; its batch is what lies between two of these.
    So a step takes exactly the global batch in all, also where `count` does not divide it or exceeds it.
    """
    start, stop = block(n, index, count)
    return stop - start


def consumed_weighted(n: int, total: int, own: int) -> int:
    """The same for weighted shards: of `own` = |D_i| samples, the share n / |D|. Never decreases, ends at own.

    A step's batch is within 1 of the worker's fair share of the global batch.
    """
    return own * n // total


def check_weights(weights: Sequence[float], count: int) -> tuple[float, ...]:
    """The weights as a tuple; ValueError unless there are `count`, finite, none negative, not all 0."""
    checked = tuple(float(w) for w in weights)
    if len(checked) != count:
        raise ValueError(f"weights has {len(checked)} entries for {count} shards; give one weight for each shard")
    if any(not isfinite(w) or w < 0 for w in checked):
        raise ValueError(f"weights must be finite and not negative: {checked}")
    if not any(checked):
        raise ValueError("weights are all 0: no shard would get a sample")
    return checked
