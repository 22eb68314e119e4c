"""What can go wrong between ranks. Three cases, never mixed up: dead, disagreeing, absent."""

from __future__ import annotations


class CommError(RuntimeError):
    """Base of all errors of communication."""


class RankFailed(CommError):
    """A rank is dead: it raised, was killed, or exited without a word.

    ``rank`` names it. In the parent, ``spawn`` raises this for the first failure of a run, and the
    worker's own exception is its ``__cause__``.
    """

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank

    def __reduce__(self) -> tuple[type[RankFailed], tuple[str, int]]:
        return type(self), (str(self), self.rank)


class RankLost(RankFailed):
    """A rank is dead and the run goes on without it (``Communicator.expendable``); but here it was waited for."""


class CollectiveMismatch(CommError):
    """The ranks are all there, but they disagree: about the operation, its order, shape, dtype or ReduceOp.

    Raised on every rank that takes part; the message tells what each was doing.
    """


class CollectiveTimeout(CommError):
    """A rank did not come within ``timeout_s``; it is not known to be dead. The message names the absent."""


class RankMismatch(RankFailed, CollectiveMismatch):
    """What ``spawn`` raises when the first failure of a run is a rank's CollectiveMismatch: both can be caught."""


class RankTimeout(RankFailed, CollectiveTimeout):
    """What ``spawn`` raises when the first failure of a run is a rank's CollectiveTimeout: both can be caught."""


def in_words(error: BaseException) -> str:
    """``KeyError: 'x'``, whatever the error's own ``__str__`` does."""
    try:
        text = str(error)
    except BaseException as failed:  # it is the user's, and may do anything
        text = f"(its __str__ raised {type(failed).__name__})"
    return f"{type(error).__name__}: {text}"
