"""g' = compress(g): what every compressor is, and the three ways in which N ranks add up payloads.

    sum         payloads are of one kind on all ranks, and are added as they are        2(N−1)/N · c bytes a rank
    gather      everybody gets everybody's payload, and adds up what it means           (N−1) · c
    owners      rank j gets part j of everybody's, adds it up, and everybody gets       2(N−1)/N · c
                the sum, which is compressed once more

with c the bytes of a payload (a sum of short arrays, and in processes any, is sent to all at once: (N−1) c, in
fewer messages). Which way a compressor goes is its `route`. This room knows arrays, no ranks: what moves is the
`Reducer`'s affair, that of ``minidp.parallel`` or of a test.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from minidp import backend
from minidp.backend import Array, array_module

Route = Literal["sum", "gather", "owners"]
State = dict[str, np.ndarray]
ALIGN = 64  # elements: parts that owners sum begin at multiples, so that most arrays are cut evenly


@dataclass(frozen=True)
class Payload:
    """What travels instead of an array.

    Attributes:
        arrays: flat arrays of this compressor's wire format, packed to real bits: these are what is sent.
        shape, dtype: of the array that it stands for, which receivers know.
        key: of which parameter, or which part of one.
    """

    arrays: tuple[Array, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    key: str

    @property
    def nbytes(self) -> int:
        """Bytes on the wire: of all arrays, with scales, indices and headers."""
        return sum(int(array.nbytes) for array in self.arrays)

    @property
    def size(self) -> int:
        """Elements of the array that it stands for."""
        return math.prod(self.shape)


class Reducer(Protocol):
    """The ranks that add up, seen from one of them. Each operation is one of all ranks."""

    rank: int
    world_size: int

    def sum(self, array: Array) -> Array:
        """Σ over ranks, of the same shape and dtype, the same bits on all."""

    def gather(self, payload: Payload) -> list[Payload]:
        """Everybody's payload, in rank order. Their shapes may differ."""

    def scatter(self, payloads: Sequence[Payload]) -> list[Payload]:
        """``payloads[j]`` goes to rank j: what all ranks have sent to this one, in rank order."""


class Compressor(ABC):
    """Makes arrays smaller, one key at a time.

    Args:
        seed: of everything random, with key, call and rank: no global generator is read or written.
        rank: whose compressor it is; ranks round differently.

    Guarantees: ``decompress(compress(x))`` has the shape and dtype of x, and is 0 where x is all 0. The same
    seed, rank and calls give the same bits. Works on NumPy, CuPy and, where it needs rational numbers only, on
    object arrays of Fractions. Cost of a call: `bytes_per_element` of memory traffic, one operation.
    """

    route: ClassVar[Route] = "gather"
    steady: ClassVar[bool] = True
    """Whether all payloads of arrays of one shape have the same sizes."""
    votes: bool = False
    """Whether payloads are signs, and together what most of them say."""
    looks: bool = True
    """Whether NaN and infinity are looked for before encoding; else ``_encode`` finds them on its way."""
    bytes_per_element: float = 16.0
    """Of ``compress``, for float32: what the meter is told, so that encoding takes time on the virtual clock: on a
    node that reads and writes 20 GB/s as long as on one core, measured by ``python -m minidp.bench compress``."""

    def __init__(self, *, seed: int = 0, rank: int = 0) -> None:
        self.seed, self.rank = int(seed) % 2**63, rank
        self._calls: Counter[str] = Counter()

    def needs_shape(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape is more to it than its numbers in a row."""
        return False

    @property
    def summable(self) -> bool:
        """Whether payloads of several ranks may be added as they are."""
        return self.route == "sum"

    # -- for one -----------------------------------------------------------------------------------------

    def compress(self, array: Array, key: str) -> Payload:
        """The payload of ``array`` (any shape, real floating point): a copy, what ``array`` becomes later changes
        nothing.

        Raises: TypeError for integers, booleans and complex numbers; ValueError for NaN or infinity; both name
            the key.
        """
        flat = checked(array, key, self.looks)
        arrays = self._encode(flat, key, self._calls[key])
        self._calls[key] += 1
        backend.count(2.0 * flat.size, self.bytes_per_element * flat.size * flat.itemsize / 4)
        return Payload(arrays, array.shape, np.dtype(array.dtype), key)

    def decompress(self, payload: Payload) -> Array:
        """The array that ``payload`` stands for. Depends on nothing but this compressor's parameters and it."""
        flat = self._decode(payload)
        backend.count(float(payload.size), payload.nbytes + payload.size * payload.dtype.itemsize)
        return flat.reshape(payload.shape)

    @abstractmethod
    def _encode(self, flat: Array, key: str, call: int) -> tuple[Array, ...]:
        """The payload's arrays of a flat, contiguous, finite array."""

    @abstractmethod
    def _decode(self, payload: Payload) -> Array:
        """A new flat array of the payload's size and dtype."""

    def _random(self, key: str, call: int) -> np.random.BitGenerator:
        """The fastest of NumPy's: SFC64 makes 64 bits in 1.7 ns, PCG64 in 2.2."""
        return np.random.SFC64(backend.seed_sequence(self.seed, "compress", key, call, self.rank))

    # -- for all -----------------------------------------------------------------------------------------

    def exchange(self, array: Array, key: str, reducer: Reducer) -> Array:
        """Σ over ranks of their arrays, as far as compression lets through: the same bits on all ranks."""
        return self.exchanged(array, key, reducer)[0]

    def exchanged(self, array: Array, key: str, reducer: Reducer) -> tuple[Array, Payload | None]:
        """The sum, and this rank's part of it; None where parts are compressed one by one (owners)."""
        if self.route == "owners" and reducer.world_size > 1:
            return self._by_owners(array, key, reducer), None
        payload = self.compress(array, key)
        if self.summable:
            summed, *rest = payload.arrays
            total = replace(payload, arrays=(reducer.sum(summed.copy()), *rest))
            return self.decompress(total), payload
        return self.combine(reducer.gather(payload)), payload

    def combine(self, payloads: Sequence[Payload]) -> Array:
        """What the payloads of all ranks amount to: Σ of what they stand for, in rank order."""
        total = self.decompress(payloads[0])
        for payload in payloads[1:]:
            total = self.add(total, payload)
        return total

    def add(self, total: Array, payload: Payload) -> Array:
        """total + what ``payload`` stands for; ``total`` may be overwritten."""
        total += self.decompress(payload)
        return total

    def subtract(self, array: Array, payload: Payload) -> Array:
        """array − what ``payload`` stands for; ``array`` may be overwritten."""
        array -= self.decompress(payload)
        return array

    def _by_owners(self, array: Array, key: str, reducer: Reducer) -> Array:
        """Part j is summed by rank j, which compresses the sum: the bytes do not grow with N, the error is made
        twice. With error feedback both errors are remembered, each by who has made it."""
        xp, flat = array_module(array), array.reshape(-1)
        parts = cuts(flat.size, reducer.world_size)
        sent = [self.compress(flat[lo:hi], f"{key}[{j}]") for j, (lo, hi) in enumerate(parts)]
        mine = self.combine(reducer.scatter(sent))
        sums = reducer.gather(self.compress(mine, f"{key}.sum"))
        whole = [self.decompress(each) for each in sums if each.size]
        return (xp.concatenate(whole) if whole else flat.copy()).reshape(array.shape)

    # -- what it remembers -------------------------------------------------------------------------------

    def state_dict(self) -> State:
        """All that later calls depend on, as host arrays by name: ``seed``, ``calls/<key>``, what subclasses
        add."""
        calls = {f"calls/{key}": np.array(calls, np.int64) for key, calls in self._calls.items()}
        return {"seed": np.array(self.seed, np.int64)} | calls

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from there. ValueError for what this compressor knows nothing of."""
        found = chosen(state, "calls")
        if unknown := set(state) - set(found) - {"seed"}:
            raise ValueError(
                f"{self!r} has no {', '.join(sorted(unknown))}: load it by the compressor that saved it"
            )
        self.seed = int(state.get("seed", self.seed))
        self._calls = Counter({name.removeprefix("calls/"): int(calls) for name, calls in found.items()})

    def belong_to(self, rank: int) -> None:
        """From now on it is this rank's."""
        self.rank = rank

    def for_error_feedback(self) -> Compressor:
        """The variant whose error shrinks what it is given, as error feedback needs: ‖x − C(x)‖ < ‖x‖."""
        return self

    @property
    @abstractmethod
    def spec(self) -> str:
        """What `get` makes such a one of, but for what names can't tell, such as a block's length."""

    def describe(self) -> tuple[Any, ...]:
        """What must be equal on all ranks."""
        mine = {k: v for k, v in sorted(vars(self).items()) if k[0] != "_" and k not in ("rank", "masks")}
        return type(self).__name__, *(
            (k, v.describe() if isinstance(v, Compressor) else v) for k, v in mine.items()
        )

    def __repr__(self) -> str:
        return f"compress={self.spec!r}"


def checked(array: Array, key: str, look: bool = True) -> Array:
    """Flat and contiguous; TypeError unless it holds real numbers, ValueError unless these are finite."""
    xp = array_module(array)
    kind = np.dtype(array.dtype).kind
    if kind not in "fO":
        raise TypeError(f"{key} is {array.dtype}: gradients that are compressed are float16, float32 or float64")
    flat = xp.ascontiguousarray(array).reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        looks_finite = (
            kind != "f" or not look or math.isfinite(xp.dot(flat, flat))
        )  # the cheapest look; it may overflow itself
    if not looks_finite:
        bad = ~xp.isfinite(flat)
        if bool(bad.any()):
            element = int(bad.argmax())
            raise ValueError(
                f"{key} is {float(flat[element])} at element {element}: NaN and infinity can't be compressed"
            )
    return flat


def narrowed(flat: Array, dtype: np.dtype[Any]) -> Array:
    """As ``dtype``: what is beyond the range of a narrower one becomes its largest number."""
    if flat.dtype == dtype:
        return flat
    xp = array_module(flat)
    if dtype.kind == "f" and dtype.itemsize < flat.dtype.itemsize:
        most = float(np.finfo(dtype).max)
        flat = xp.clip(flat, -most, most)
    return flat.astype(dtype)


def in_words(number: float) -> str:
    """As short as it can be without being another one: 0.01, 1, 2.5."""
    return repr(float(number)).removesuffix(".0")


def cuts(size: int, parts: int) -> list[tuple[int, int]]:
    """Contiguous parts, about equal, that begin at multiples of 64 elements; the last ones may be empty."""
    lines = -(-size // ALIGN)
    edges = [min(size, ALIGN * (lines * j // parts)) for j in range(parts + 1)]
    return list(pairwise(edges))


def chosen(state: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The items ``prefix/…``."""
    return {name: value for name, value in state.items() if name.startswith(f"{prefix}/")}
