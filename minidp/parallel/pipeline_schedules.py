"""Pipeline schedules as data: which stage computes what of which micro-batch, in which order.

A model is cut into p stages, a batch into m micro-batches. A schedule is a pure function
``(stages, micro_batches) -> PipelineSchedule``; the same list of entries is run by `pipeline`, timed by
`timetable` and by ``minidp.plan``, drawn in notebooks, and checked entry by entry in the tests.

    GPipe, p = 3, m = 4                          1F1B
    stage 0  F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3     F0 F1 F2 .  .  B0 F3 B1 .  B2 .  B3
    stage 1  .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .      .  F0 F1 .  B0 F2 B1 F3 B2 .  B3 .
    stage 2  .  .  F0 F1 F2 F3 B0 B1 B2 B3 .  .      .  .  F0 B0 F1 B1 F2 B2 F3 B3 .  .

Both take as long: p − 1 of m + p − 1 parts of the time each stage is idle, if all stages take equally long. What
differs is how many micro-batches' activations a stage must keep at a time: m, or at most p.

Every stage adds up the gradients of micro-batches in the order 0 … m − 1, in both schedules: the same bits.

Sources: Huang et al., "GPipe", NeurIPS 2019, section 2.3; Narayanan et al., "Efficient large-scale language model
training on GPU clusters using Megatron-LM", SC 2021, section 2.2 (there called PipeDream-Flush).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["forward", "backward"]


class Action(NamedTuple):
    """One micro-batch through one stage, forward or backward.

    ``step`` is the slot in which it runs if each forward and each backward takes one slot and messages take none;
    what counts when it is run is the order in which a stage's actions follow each other.
    """

    step: int
    stage: int
    micro_batch: int
    kind: Kind


class PipelineSchedule(NamedTuple):
    """The actions of all stages, by step, then by stage."""

    name: str
    stages: int
    micro_batches: int
    actions: tuple[Action, ...]

    def of_stage(self, stage: int) -> list[Action]:
        """What one stage does, in its order."""
        return [action for action in self.actions if action.stage == stage]

    def most_in_flight(self) -> list[int]:
        """How many micro-batches, at most, have gone forward through each stage and not yet back."""
        most, now = [0] * self.stages, [0] * self.stages
        for _, stage, _, kind in self.actions:
            now[stage] += 1 if kind == "forward" else -1
            most[stage] = max(most[stage], now[stage])
        return most


Order = list[tuple[Kind, int]]


@lru_cache(maxsize=64)
def gpipe(stages: int, micro_batches: int) -> PipelineSchedule:
    """All forwards, then all backwards. A stage keeps m activations."""
    _check(stages, micro_batches)
    forwards: Order = [("forward", i) for i in range(micro_batches)]
    backwards: Order = [("backward", i) for i in range(micro_batches)]
    return _scheduled("gpipe", micro_batches, [forwards + backwards] * stages)


@lru_cache(maxsize=64)
def one_f_one_b(stages: int, micro_batches: int) -> PipelineSchedule:
    """As few forwards as fill the pipe, then one backward for each forward. Stage s keeps at most p − s
    activations.

    Stage s begins with p − s − 1 forwards, so that those after it have work; then forwards and backwards take
    turns.
    """
    _check(stages, micro_batches)
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, micro_batches)
        order: Order = [("forward", i) for i in range(ahead)]
        for i in range(ahead, micro_batches):
            order += [("forward", i), ("backward", i - ahead)]
        order += [("backward", i) for i in range(micro_batches - ahead, micro_batches)]
        orders.append(order)
    return _scheduled("1f1b", micro_batches, orders)


SCHEDULES: dict[str, Callable[[int, int], PipelineSchedule]] = {"1f1b": one_f_one_b, "gpipe": gpipe}


def get(name: str, stages: int, micro_batches: int) -> PipelineSchedule:
    """The schedule of that name; ValueError lists those that there are."""
    if name not in SCHEDULES:
        raise ValueError(f"schedule={name!r}: there are {', '.join(map(repr, SCHEDULES))}")
    return SCHEDULES[name](stages, micro_batches)


class Span(NamedTuple):
    """When an action runs, in seconds."""

    action: Action
    start: float
    end: float


def timetable(
    schedule: PipelineSchedule,
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    transfer_s: float | Callable[[int, int], float] = 0.0,
) -> list[Span]:
    """When each action runs, in the order of ``schedule.actions``.

    An action begins when its stage has ended the one before it and its input is there: of a forward the
    activations of the stage before, of a backward the gradients from the stage after. ``forward_s[s]``,
    ``backward_s[s]``: of one micro-batch in stage s; ``transfer_s``: of a message, which nothing else waits for,
    or a function of the stages that it goes from and to.
    """
    free = [0.0] * schedule.stages
    done: dict[tuple[Kind, int, int], float] = {}
    spans = []
    for action in schedule.actions:
        _, stage, micro_batch, kind = action
        ready = 0.0
        source = stage - 1 if kind == "forward" else stage + 1
        if 0 <= source < schedule.stages:
            message_s = transfer_s(source, stage) if callable(transfer_s) else transfer_s
            ready = done[kind, source, micro_batch] + message_s
        start = max(free[stage], ready)
        free[stage] = end = start + (forward_s if kind == "forward" else backward_s)[stage]
        done[kind, stage, micro_batch] = end
        spans.append(Span(action, start, end))
    return spans


def idle_share(spans: Sequence[Span]) -> float:
    """The part of all stages' time, from the first start to the last end, in which they do nothing."""
    stages = {span.action.stage for span in spans}
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    return 1 - sum(span.end - span.start for span in spans) / (whole * len(stages)) if whole else 0.0


def _check(stages: int, micro_batches: int) -> None:
    if stages < 1 or micro_batches < 1:
        raise ValueError(
            f"a pipeline of {stages} stages and {micro_batches} micro-batches: give at least 1 of each"
        )


def _scheduled(name: str, micro_batches: int, orders: Sequence[Order]) -> PipelineSchedule:
    """Each stage's order put into the earliest slots: an action follows the one that its input comes from."""
    slots: dict[tuple[Kind, int, int], int] = {}
    actions: list[Action] = []
    left = [list(reversed(order)) for order in orders]
    step = 0
    while any(left):
        ready: list[Action] = []
        for stage, order in enumerate(left):
            if not order:
                continue
            kind, micro_batch = order[-1]
            source = stage - 1 if kind == "forward" else stage + 1
            if not 0 <= source < len(orders) or slots.get((kind, source, micro_batch), step) < step:
                ready.append(Action(step, stage, micro_batch, kind))
        for action in ready:
            left[action.stage].pop()
            slots[action.kind, action.stage, action.micro_batch] = step
        actions += ready
        step += 1
    return PipelineSchedule(name, len(orders), micro_batches, tuple(actions))
