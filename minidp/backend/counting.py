"""The meter: what was computed, and what was moved between host and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class Meter:
    """Counts what was computed: `operations`, `flops` (floating-point operations) and `nbytes` (memory traffic).

    An operation is an application of a Function, each way, or an update. Traffic is bytes of arrays read and
    written; it and FLOPs are estimated from shapes. The virtual world turns the three into time.

    `to_device` and `to_host` are bytes that were moved between the two, and `moves` how often: each time one waits
    for the other. Nothing crosses unless it is asked to, by `to_numpy`, `asarray`, ``Tensor.item`` and the like.
    """

    __slots__ = ("flops", "moves", "nbytes", "operations", "outer", "to_device", "to_host")

    def __init__(self, outer: Meter | None = None) -> None:
        self.operations: int = 0
        self.flops: float = 0.0
        self.nbytes: float = 0.0
        self.moves: int = 0
        self.to_device: int = 0
        self.to_host: int = 0
        self.outer = outer

    def count(self, flops: float = 0.0, nbytes: float = 0.0) -> None:
        """Add one operation: `flops`, and `nbytes` bytes read and written; here and on each enclosing meter."""
        m: Meter | None = self
        while m is not None:
            m.operations += 1
            m.flops += flops
            m.nbytes += nbytes
            m = m.outer

    def count_move(self, to_device: int = 0, to_host: int = 0) -> None:
        """Add one move of that many bytes; here and on each enclosing meter."""
        m: Meter | None = self
        while m is not None:
            m.moves += 1
            m.to_device += to_device
            m.to_host += to_host
            m = m.outer

    def __repr__(self) -> str:
        moved = f", to_device={self.to_device}, to_host={self.to_host}" if self.moves else ""
        return f"Meter(operations={self.operations}, flops={self.flops:g}, nbytes={self.nbytes:g}{moved})"


_meter: ContextVar[Meter | None] = ContextVar("minidp_meter", default=None)
current_meter = _meter.get  # None when nobody measures: then the meter costs this one call


@contextmanager
def meter() -> Iterator[Meter]:
    """Measure the block: ``with meter() as m: ...`` leaves the counts in `m`. Meters may be nested."""
    m = Meter(outer=_meter.get())
    token = _meter.set(m)
    try:
        yield m
    finally:
        _meter.reset(token)


def count(flops: float = 0.0, nbytes: float = 0.0) -> None:
    """Tell the current meter, if there is one, of one operation: `flops`, and `nbytes` bytes read and written."""
    m = _meter.get()
    if m is not None:
        m.count(flops, nbytes)


def count_move(to_device: int = 0, to_host: int = 0) -> None:
    """Tell the current meter, if there is one, of one move between host and device, in bytes."""
    m = _meter.get()
    if m is not None:
        m.count_move(to_device, to_host)
