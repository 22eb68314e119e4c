"""One shared counter with one writer, and how to wait for it: the atom of everything in the process world.

Barriers, queues and mailboxes all wait for the same thing: that a 64-bit counter of another rank reaches a
value. A waiter spins a few hundred times (a peer that computes on another core answers within a microsecond)
and then sleeps on a futex for at most 2 ms, after which it looks whether its peers are alive. The writer wakes
sleepers only if one has said that it sleeps. On 2 cores this costs 0.2 to 0.4 µs for two ranks and is the best
with four ranks as well; pure spinning takes 2.5 times as long there, and a pipe or semaphore 40 µs a hop.

Memory order: x86 keeps stores in order and loads in order, which is all that publish-after-write and
read-after-wait need. Elsewhere a lock that nobody else holds is released and taken again as a fence. The
sleep flag may be missed by a writer (a store may pass a later load, even on x86): then the 2 ms limit heals it.
"""

from __future__ import annotations

import ctypes
import platform
import sys
import threading
import time
from collections.abc import Callable

from minidp.comm.arena import Bytes, address_of

LINE = 64  # bytes; a cache line a counter, so that writers do not disturb each other
SPINS = 200
SLEEP_S = 0.002

_VALUE, _SLEEPERS = 0, 1


class Word:
    """A counter in a 64-byte line of shared memory. It only grows; exactly one rank writes it.

    ``owner`` is the world rank of the writer and ``offset`` the counter's place in the arena: what another
    process needs to see who waits for whom.
    """

    __slots__ = ("address", "cell", "offset", "owner")

    def __init__(self, line: Bytes, offset: int, owner: int) -> None:
        self.cell = line.data.cast("q")
        self.address = address_of(line)
        self.offset = offset
        self.owner = owner

    def publish(self, value: int) -> None:
        """Make ``value`` visible to all, after everything that this rank wrote before."""
        if fence is not None:
            fence()
        self.cell[_VALUE] = value
        if self.cell[_SLEEPERS]:
            self.cell[_SLEEPERS] = 0
            futex_wake(self.address)

    def reached(self, value: int) -> bool:
        """Spin for a few hundred looks; True as soon as the counter is at least ``value``."""
        cell = self.cell
        for _ in range(SPINS):
            if cell[0] >= value:
                if fence is not None:
                    fence()
                return True
        return False

    def sleep(self, value: int) -> bool:
        """Sleep until somebody publishes, 2 ms at most; True if the counter is at least ``value`` now."""
        seen = self.cell[_VALUE]
        if seen < value:
            self.cell[_SLEEPERS] = 1
            futex_wait(self.address, seen & 0xFFFFFFFF, SLEEP_S)
        if self.cell[_VALUE] < value:
            return False
        if fence is not None:
            fence()
        return True


class Bell:
    """A line through which any rank wakes the one that owns it: for waits that anybody may end.

    It says nothing but that something has come; who is woken looks for himself. A ring that is missed, because the
    owner was just lying down, is healed by the 2 ms limit.
    """

    __slots__ = ("address", "cell")

    def __init__(self, line: Bytes) -> None:
        self.cell, self.address = line.data.cast("q"), address_of(line)

    def ring(self) -> None:
        """After publishing. Costs a look, unless the owner sleeps."""
        cell = self.cell
        if cell[_SLEEPERS]:
            cell[_SLEEPERS] = 0
            cell[_VALUE] += 1
            futex_wake(self.address)

    def sleep(self, arrived: Callable[[], bool]) -> None:
        """The owner: sleep until somebody rings, 2 ms at most; not at all if something has arrived."""
        seen = self.cell[_VALUE]
        self.cell[_SLEEPERS] = 1
        if not arrived():
            futex_wait(self.address, seen & 0xFFFFFFFF, SLEEP_S)
        self.cell[_SLEEPERS] = 0


class _TimeSpec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())

if sys.platform == "linux" and _SYS_FUTEX is not None and sys.byteorder == "little":
    _syscall, _FUTEX = ctypes.CDLL(None).syscall, ctypes.c_long(_SYS_FUTEX)
    _WAIT, _WAKE, _ALL = 0, 1, 0x7FFFFFFF

    def futex_wait(address: int, expected: int, timeout_s: float) -> None:
        """Sleep while the low 32 bits at ``address`` are ``expected``, ``timeout_s`` at most."""
        limit = _TimeSpec(int(timeout_s), int(timeout_s % 1 * 1e9))
        _syscall(
            _FUTEX,
            ctypes.c_void_p(address),
            ctypes.c_int(_WAIT),
            ctypes.c_uint32(expected),
            ctypes.byref(limit),
            None,
            ctypes.c_int(0),
        )

    def futex_wake(address: int) -> None:
        """Wake all who sleep on ``address``, in every process."""
        _syscall(
            _FUTEX,
            ctypes.c_void_p(address),
            ctypes.c_int(_WAKE),
            ctypes.c_int(_ALL),
            None,
            None,
            ctypes.c_int(0),
        )

else:  # no futex: look again often enough to be quick, seldom enough to leave the core to others

    def futex_wait(address: int, expected: int, timeout_s: float) -> None:
        time.sleep(min(timeout_s, 5e-5))

    def futex_wake(address: int) -> None:
        pass


def _lock_fence() -> Callable[[], None]:
    lock = threading.Lock()
    lock.acquire()

    def fence() -> None:
        lock.release()
        lock.acquire()

    return fence


def publish_fence() -> None:
    """What was written before is visible before what is written after."""
    if fence is not None:
        fence()


fence: Callable[[], None] | None = None if platform.machine() in ("x86_64", "AMD64") else _lock_fence()
