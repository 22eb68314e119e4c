"""The options of a parameter server, and which of them fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from minidp.parallel.delay import Correction, DelayCompensation
from minidp.parallel.followers import MOST_WORKERS


@dataclass(frozen=True)
class ServerOptions:
    """See ``ParameterServer``, whose arguments these are."""

    staleness: int | None
    staleness_aware: bool
    correction: Correction | None
    backup_workers: int
    nominal_batch: float | None

    @classmethod
    def checked(
        cls,
        workers: int,
        staleness: Any,
        staleness_aware: bool,
        delay_compensation: Any,
        backup_workers: Any,
        nominal_batch: Any,
    ) -> ServerOptions:
        """The options for so many workers. TypeError, ValueError for what makes no sense, alone or together."""
        if delay_compensation is not None and not callable(delay_compensation):
            delay_compensation = DelayCompensation(delay_compensation)
        staleness = _checked_bound(staleness)
        if (staleness_aware or delay_compensation is not None) and staleness == 0:
            raise ValueError(
                "staleness_aware and delay_compensation treat late gradients, and with staleness=0 none is late: "
                "give staleness=None or a bound of 1 or more"
            )
        if not isinstance(staleness_aware, bool):
            raise TypeError(f"staleness_aware={staleness_aware!r}: give True or False")
        if nominal_batch is not None and not _is_positive(nominal_batch):
            raise ValueError(f"nominal_batch={nominal_batch!r}: give a positive number of samples")
        if nominal_batch is not None and staleness == 0:
            raise ValueError(
                f"nominal_batch={nominal_batch} is for staleness other than 0, which divides by Σ n_i: leave it "
                "out"
            )
        b = backup_workers
        if not isinstance(b, int) or isinstance(b, bool) or not 0 <= b < workers:
            raise ValueError(f"backup_workers={b!r}: give a number from 0 to {workers - 1}, of {workers} workers")
        if b and workers > MOST_WORKERS:
            raise ValueError(f"backup_workers={b} of {workers} workers: with backups there can be {MOST_WORKERS}")
        if b and staleness != 0:
            raise ValueError("backup_workers are for staleness=0: otherwise nobody waits for the last one anyway")
        return cls(staleness, bool(staleness_aware), delay_compensation, b, nominal_batch)

    def describe(self) -> tuple[Any, ...]:
        """What all workers must agree about, without addresses of functions."""
        correction = getattr(self.correction, "__qualname__", None) or repr(self.correction)
        if " at 0x" in correction:
            correction = type(self.correction).__qualname__
        late = self.staleness_aware, correction
        return f"staleness={self.staleness}", *late, self.backup_workers, self.nominal_batch

    @property
    def together(self) -> bool:
        """Whether a step is one of all workers."""
        return self.staleness == 0 and not self.backup_workers


def _is_positive(value: Any) -> bool:
    return value is not True and isinstance(value, Real) and 0 < float(value) < float("inf")


def _checked_bound(staleness: Any) -> int | None:
    if staleness is None:
        return None
    text = f"staleness={staleness!r}: give 0 (synchronous), a bound s ≥ 1, or None (asynchronous)"
    if isinstance(staleness, bool) or not isinstance(staleness, int | np.integer):
        raise TypeError(text)
    if staleness < 0:
        raise ValueError(text)
    return int(staleness)
