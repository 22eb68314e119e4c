"""What can go wrong in a strategy."""

from __future__ import annotations


class NonFiniteGradient(FloatingPointError):
    """The averaged gradient holds NaN or infinity. Nothing was committed: parameters and state are whole.

    ``parameter``, ``rank`` and ``step`` tell where; rank is -1 if every rank's own gradient is finite and only
    their sum is not. It may be a batch norm's statistics instead (``what``); then ``parameter`` is that layer.
    """

    def __init__(self, parameter: str, rank: int, step: int, value: float, what: str = "gradient") -> None:
        where = f"on rank {rank}" if rank >= 0 else "in the sum over ranks (each rank's own is finite)"
        super().__init__(
            f"the {what} of {parameter!r} is {value} {where} at step {step}. The parameters are those of the "
            "last good step: call strategy.discard() to go on without this batch, lower the learning rate, give "
            "clip_norm=, or turn the check off by check_finite=False"
        )
        self.parameter, self.rank, self.step, self.value, self.what = parameter, rank, step, value, what

    def __reduce__(self) -> tuple[type[NonFiniteGradient], tuple[str, int, int, float, str]]:
        return type(self), (self.parameter, self.rank, self.step, self.value, self.what)

    def at_rank(self, rank: int) -> NonFiniteGradient:
        """The same, of a rank that is known by another number."""
        return type(self)(self.parameter, rank, self.step, self.value, self.what)


class CorruptGradient(RuntimeError):
    """A rank's gradients are not what it wrote: something changed them in memory. Nothing was committed.

    Raised on all ranks by ``DataParallel(checksum=True)``; ``rank`` and ``step`` tell where.
    """

    def __init__(self, rank: int, step: int) -> None:
        super().__init__(
            f"the gradients of rank {rank} at step {step} do not have the checksum that it computed when they "
            "were complete: something has changed them since (a stray write, or bad memory). The parameters are "
            "those of the last good step: call strategy.discard() and repeat the batch; if it comes again, change "
            "the machine"
        )
        self.rank, self.step = rank, step

    def __reduce__(self) -> tuple[type[CorruptGradient], tuple[int, int]]:
        return type(self), (self.rank, self.step)
