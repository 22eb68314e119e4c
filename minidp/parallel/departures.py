"""Departures: how gradients leave for those ranks whose shares they are, and how all know what has left.

Buckets leave in the order of their numbers. One is on its way at a time, in the one buffer there is: before the
next is filled, the one before has arrived, and what of it is this rank's is stored. In stage 1 of ZeRO all leave
in ``step``. In stage 2 they leave in each backward, which is a round of all ranks; before it, and in ``step``,
they tell each other in a number what they are about to do:

    n_i ≥ 0          I am in step(), with so many samples
    BACKWARD         I am in a backward, and its first bucket is complete: let us make a round
    VOID_…           the same, and I have discarded what had left in this step

Who is in ``step`` takes part in the rounds of the others, with zeros, until all are. If all have discarded, the
step begins anew. If some have, it is lost: what they took back is summed up with what the others can't send again.
All see the same numbers: all know, and raise in ``step``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from minidp.backend import item
from minidp.comm import CommError, Communicator
from minidp.comm.work import Work
from minidp.nn import Parameter
from minidp.nn.layout import Segment
from minidp.parallel.blocks import divided, first_not_finite
from minidp.parallel.shares import Rows
from minidp.parallel.slabs import Flat

BACKWARD, VOID_BACKWARD, VOID_STEP = -1, -2, -3


class StepLost(RuntimeError):
    """Some ranks have discarded gradients that had left, so that nobody can make this step. Raised on all."""

    def __init__(self, ranks: list[int]) -> None:
        who = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        super().__init__(
            f"this step is lost: {who} discarded gradients, perhaps after a failure, when some had left, and they "
            "are summed up with those of the other ranks. Nothing has changed: call strategy.discard() on every "
            "rank and go on with the next batch. With stage=1 gradients leave in step(), and a rank that discards "
            "loses its own only"
        )
        self.ranks = ranks

    def __reduce__(self) -> tuple[type[StepLost], tuple[list[int]]]:
        return type(self), (self.ranks,)


class Departures:
    """Of one rank's gradients. All methods but ``discard`` and ``forget`` are collective.

    Args:
        comm: where ranks tell each other what they do; buckets travel elsewhere.
        rows: what buckets travel in.
        segments: for each bucket those of its parameters.
        sums: for each bucket where my slice of the sum is to be.
        note: whether to remember in ``brought`` what of this rank's gradients is not finite.

    Attributes:
        brought: (element, value) of the first element that was not finite when it left, in the step of the last
            ``meet``.
    """

    def __init__(
        self, comm: Communicator, rows: Rows, segments: list[list[Segment]], sums: list[Flat], note: bool
    ) -> None:
        self._comm, self._rows, self._segments, self._sums, self._note = comm, rows, segments, sums, note
        self._home = {s.parameter: k for k, of_bucket in enumerate(segments) for s in of_bucket}
        self._missing: list[set[Parameter]] = []  # of each bucket, whose gradients this backward still owes
        self.forget()

    def forget(self) -> None:
        """Nothing has left in this step: it begins, or all ranks forget what had."""
        self.brought: tuple[int, float] | None = None
        self._found: tuple[int, float] | None = None  # what is to become ``brought``
        self._work: Work | None = None  # of the bucket before ``_sent``, if it is on its way
        self._sent = 0  # buckets of this round
        self._open = False  # whether a round has begun, and is not over
        self._left = False  # whether gradients of this rank have left in this step
        self._void = False  # whether they were discarded then, and the others have yet to be told
        self._stored = False  # whether there is a round's sum, to which the next one's is added
        self._lost: list[int] = []  # ranks that have discarded what had left, when others had not

    def discard(self) -> None:
        """This rank forgets its gradients of this step. What has left can't be called back."""
        self._void = self._void or self._left

    # -- in a backward ---------------------------------------------------------------------------------

    @contextmanager
    def round(self) -> Iterator[None]:
        """In the block a backward runs, and gradients leave; those that are left over at its end. If it fails when
        some have left, zeros leave in place of the others, so that no rank waits for them."""
        self._end_round()
        self._missing = [{segment.parameter for segment in of_bucket} for of_bucket in self._segments]
        removers = [parameter.register_post_accumulate_grad_hook(self._arrived) for parameter in self._home]
        try:
            yield
        except Exception as error:
            if not isinstance(error, CommError):
                for parameter in self._home:
                    parameter.grad = None
                self._end_round()
            raise
        finally:
            for remove in removers:
                remove()
        if self._missing:  # else the round is over already
            self._send_buckets(all_of_them=True)

    def _arrived(self, parameter: Parameter) -> None:
        """Backward has added the last piece of a gradient: send all buckets whose turn it is."""
        k = self._home[parameter]
        if k < self._sent or not self._missing:
            raise RuntimeError(
                f"a gradient of shape {parameter.shape} came after its bucket had left: an operation runs a "
                "backward of its own, which has reported it before. With stage=1 all gradients leave in step()"
            )
        self._missing[k].discard(parameter)
        self._send_buckets()

    def _end_round(self) -> None:
        """Send what is still to be sent in a round in which this rank was interrupted."""
        if self._open:
            self._send_buckets(all_of_them=True)

    def _send_buckets(self, all_of_them: bool = False) -> None:
        while self._sent < len(self._sums) and (all_of_them or not self._missing[self._sent]):
            if not self._open:
                self._tell(VOID_BACKWARD if self._void else BACKWARD)
                self._open = self._left = True
            self._land()
            self._send()
            for segment in self._segments[self._sent]:
                segment.parameter.grad = None
            self._sent += 1
        if self._open and self._sent == len(self._sums):
            self._land()
            self._missing.clear()
            self._sent, self._open, self._stored = 0, False, True

    # -- in step ---------------------------------------------------------------------------------------

    def meet(self, samples: int) -> int:
        """Σ n_i. Stage 2: rounds with zeros while others are in a backward; StepLost if it is lost."""
        self._end_round()
        while True:
            told = self._tell(VOID_STEP if self._void else samples)
            if all(code >= 0 or code == VOID_STEP for code in told):
                break
            self._open = True
            self._send_buckets(all_of_them=True)
        lost, found = self._lost, self._found
        self.forget()
        self.brought = found
        if lost:
            raise StepLost(lost)
        return sum(code for code in told if code > 0)

    def send_all(self, total: int) -> None:
        """Stage 1: let all buckets leave, and store the sums / total."""
        self._found = None
        for k in range(len(self._sums)):
            self._sent = k
            self._send()
            self._sent += 1
            self._land(total)
        self._sent, self.brought = 0, self._found

    # -- both ------------------------------------------------------------------------------------------

    def _tell(self, code: int) -> list[int]:
        told = self._comm.all_gather_int(code, "step/gradients")
        void = [rank for rank, code in enumerate(told) if code < BACKWARD]
        if len(void) == len(told):
            self.forget()
        elif void:
            self._lost = self._lost or void
        self._void = False
        return told

    def _send(self) -> None:
        """Begin the reduce-scatter of the next bucket: of the gradients that are there, of zeros elsewhere."""
        k, rows = self._sent, self._rows
        if not rows.shares.width(k):
            return
        rows.clear(k)
        for segment in self._segments[k]:
            gradient = segment.parameter.grad
            if gradient is not None:
                rows.fill(k, segment.offset, gradient.data.reshape(-1))
        if self._note:
            self._look(k)
        self._work = rows.reduce(k)

    def _look(self, k: int) -> None:
        """Remember what is not finite now: when its sum is found to be bad it has left. Waits for a device."""
        leaving = self._rows.filled(k)
        with np.errstate(all="ignore"):
            at = first_not_finite(leaving)
        if at >= 0:
            element = self._rows.element(k, at)
            if self._found is None or element < self._found[0]:
                self._found = element, float(item(leaving[at]))

    def _land(self, total: int = 1) -> None:
        """Wait for the bucket that is on its way, and store its sum / total, or add it to what there is."""
        work, self._work = self._work, None
        if work is None:
            return
        with np.errstate(all="ignore"):  # NaN and infinity are looked for, not stumbled over
            work.wait()
            k = self._sent - 1
            part, target = self._rows.summed(k), self._sums[k]
            if self._stored:
                target += part
            else:
                target[...] = divided(part, total, part, target.dtype)
