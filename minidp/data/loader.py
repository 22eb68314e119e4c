"""The loader: which samples, in which order, in batches of which size, on which worker."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

from minidp.data.dataset import Batch, Dataset, fetch
from minidp.data.sharding import (
    Indices,
    check_weights,
    consumed,
    consumed_weighted,
    dataset_cut,
    epoch_order,
    share,
)

PARTITIONS = ("batch", "dataset")


class DataLoader:
    """Batches for one worker of many: ``for x, y in loader.epoch(e): …``.

    Args:
        dataset: anything with ``len()`` and ``[i]``; an `ArrayDataset` is the fastest.
        batch_size: samples per shard and step; the global batch is batch_size · count.
        global_batch_size: samples per step of all shards together. Exactly one of the two sizes must be
            given; this one keeps the steps the same for every number of workers. It may be smaller than that
            number: then some shards get no sample in some steps.
        shard: (index, count), this worker's place among the data-parallel workers: ``strategy.shard``.
        shuffle: a new order each epoch, decided by (seed, epoch): the same on all workers.
        seed: the root of all that is random here.
        partition: ``"batch"``: one order for the epoch, and each step's global batch is cut into `count`
            consecutive blocks, so that the samples of a step are the same set for every count. ``"dataset"``:
            D is cut once into D_1 … D_N, consecutive blocks or (with `shuffle`) at random, and worker i stays
            with D_i in all epochs (article 3.2.1).
        weights: one for each shard: samples in proportion to speed (article 2.4); equal shares if None.

    Guaranteed for all workers built alike: in an epoch every sample is visited exactly once by exactly one of
    them; nothing is padded or dropped (the last batch may be short); all have the same number of steps,
    ``len(loader)``; a worker without samples in a step gets arrays of length 0 with the right shape and dtype.

    Raises:
        TypeError: `dataset` has no length or items; a size or shard is no integer.
        ValueError: anything out of range; the message says what is valid.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        shard: tuple[int, int] = (0, 1),
        shuffle: bool = False,
        seed: int = 0,
        partition: str = "batch",
        weights: Sequence[float] | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise TypeError(f"a dataset needs __len__ and __getitem__, which {type(dataset).__name__} lacks")
        if len(dataset) == 0:
            raise ValueError("the dataset is empty: there is nothing to load")
        if partition not in PARTITIONS:
            raise ValueError(f"unknown partition {partition!r}; valid: {', '.join(PARTITIONS)}")
        self.dataset = dataset
        self.shard = index, count = _shard(shard)
        self.global_batch_size = _global_batch_size(batch_size, global_batch_size, count)
        self.shuffle = bool(shuffle)
        self.seed = _integer("seed", seed, 0)
        self.partition = partition
        self.weights = None if weights is None else check_weights(weights, count)
        self._samples = len(dataset)
        self._own: Indices | None = None  # D_i
        if partition == "dataset":
            self._own = dataset_cut(self._samples, index, count, self.shuffle, self.seed, self.weights)

    def __len__(self) -> int:
        """Steps of an epoch: ⌈|D| / global batch⌉, the same on every shard."""
        return (self._samples + self.global_batch_size - 1) // self.global_batch_size

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """This worker's batches of one epoch, from step `start_step` on: tuples of host arrays, (n_i, …) each.

        The same (epoch, start_step) always gives the same batches, so a run resumes where it stopped.
        Arguments are checked at once, not at the first batch.
        """
        epoch = _integer("epoch", epoch, 0)
        start_step = _integer("start_step", start_step, 0)
        if start_step > len(self):
            raise ValueError(f"start_step {start_step} lies behind the epoch's end: it has {len(self)} steps")
        return self._batches(epoch, start_step)

    def position(self, batches: int) -> tuple[int, int]:
        """(epoch, step) of the batch that follows so many, for ``epoch(epoch, start_step=step)``.

        A training of one update a batch goes on at ``loader.position(strategy.updates)``.
        """
        return divmod(_integer("batches", batches, 0), len(self))

    def _batches(self, epoch: int, start_step: int) -> Iterator[Batch]:
        order = self._order(epoch)
        for start, stop in self._spans(start_step):
            yield fetch(self.dataset, order[start:stop])

    def _order(self, epoch: int) -> Indices:
        if self._own is None:
            return epoch_order(self._samples, self.shuffle, self.seed, epoch)
        return self._own[epoch_order(len(self._own), self.shuffle, self.seed, epoch, *self.shard)]

    def _spans(self, start_step: int) -> Iterator[tuple[int, int]]:
        """Where this worker's batch of each step lies in its order."""
        (index, count), size, n = self.shard, self.global_batch_size, self._samples
        steps = range(start_step, len(self))
        if self._own is not None:
            if self.weights is None:
                used = partial(consumed, index=index, count=count)
            else:
                used = partial(consumed_weighted, total=n, own=len(self._own))
            start = used(min(start_step * size, n))
            for step in steps:
                stop = used(min((step + 1) * size, n))
                yield start, stop
                start = stop
            return
        start, stop = share(size, index, count, self.weights)
        for step in steps:
            offset = step * size
            if offset + size > n:  # the last batch is short, and cut anew
                start, stop = share(n - offset, index, count, self.weights)
            yield offset + start, offset + stop

    def __iter__(self) -> NoReturn:
        raise TypeError(
            "iterate over loader.epoch(e), for e = 0, 1, …: the epoch's number decides the order, and a "
            "loader that counted by itself would repeat or skip orders after a restart"
        )

    def __repr__(self) -> str:
        index, count = self.shard
        return (
            f"DataLoader({self._samples} samples, global_batch_size={self.global_batch_size}, {len(self)} steps "
            f"an epoch, shard {index} of {count}, partition={self.partition!r}, shuffle={self.shuffle})"
        )


def _integer(name: str, value: Any, least: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
    return number


def _shard(shard: tuple[int, int]) -> tuple[int, int]:
    try:
        index, count = shard
    except (TypeError, ValueError):
        raise TypeError(f"shard must be a pair (index, count), such as strategy.shard, not {shard!r}") from None
    count = _integer("shard count", count, 1)
    index = _integer("shard index", index, 0)
    if index >= count:
        raise ValueError(f"shard index {index} is out of range for {count} shards: valid are 0 to {count - 1}")
    return index, count


def _global_batch_size(batch_size: int | None, global_batch_size: int | None, count: int) -> int:
    if (batch_size is None) == (global_batch_size is None):
        raise ValueError(
            "give exactly one of batch_size (samples per shard) and global_batch_size (of all shards together), "
            f"not {'neither' if batch_size is None else 'both'}"
        )
    if batch_size is not None:
        return _integer("batch_size", batch_size, 1) * count
    return _integer("global_batch_size", global_batch_size, 1)
