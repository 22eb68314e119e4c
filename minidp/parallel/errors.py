"""What can go wrong in a strategy."""

from __future__ import annotations


class NonFiniteGradient(FloatingPointError):
    """The averaged gradient holds NaN or infinity. Nothing was committed: parameters and state are whole.

    ``parameter``, ``rank`` and ``step`` tell where; rank is -1 if every rank's own gradient is finite and only
    their sum is not.
    """

    def __init__(self, parameter: str, rank: int, step: int, value: float) -> None:
        where = f"on rank {rank}" if rank >= 0 else "in the sum over ranks (each rank's own is finite)"
        super().__init__(
            f"the gradient of {parameter!r} is {value} {where} at step {step}. The parameters are those of the "
            "last good step: call strategy.discard() to go on without this batch, lower the learning rate, give "
            "clip_norm=, or turn the check off by check_finite=False"
        )
        self.parameter, self.rank, self.step, self.value = parameter, rank, step, value

    def __reduce__(self) -> tuple[type[NonFiniteGradient], tuple[str, int, int, float]]:
        return type(self), (self.parameter, self.rank, self.step, self.value)
