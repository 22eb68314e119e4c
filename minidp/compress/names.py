"""Compressors by name: ``get("topk:0.01+ef")``."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from minidp.compress.casts import BFloat16, Float16, Identity
from minidp.compress.compressor import Compressor
from minidp.compress.error_feedback import ErrorFeedback
from minidp.compress.low_rank import PowerSGD
from minidp.compress.quantize import QSGD, Int8, TernGrad
from minidp.compress.sign import Sign
from minidp.compress.sparsify import RandomK, TopK

Make = Callable[..., Compressor]


def _numbered(make: Make, number: Callable[[str], Any], what: str, needed: bool = True) -> Make:
    """``make`` with the number after the colon."""

    def made(*arguments: str, **who: int) -> Compressor:
        if not arguments and not needed:
            return make(**who)
        if len(arguments) != 1:
            raise ValueError(f"give it {what}")
        try:
            value = number(arguments[0])
        except ValueError:
            raise ValueError(f"{arguments[0]!r} is no {what.removeprefix('a ')}: give it {what}") from None
        return make(value, **who)

    return made


def _plain(make: Make) -> Make:
    """``make``, of which nothing can be chosen."""

    def made(*arguments: str, **who: int) -> Compressor:
        if arguments:
            raise ValueError("nothing may follow its name")
        return make(**who)

    return made


def _flagged(make: Make, flag: str) -> Make:
    """``make``, with True for the word after the colon."""

    def made(*arguments: str, **who: int) -> Compressor:
        if arguments not in ((), (flag,)):
            raise ValueError(f"only {flag!r} may follow the colon")
        return make(bool(arguments), **who)

    return made


def _topk(*arguments: str, **who: int) -> Compressor:
    density, *rest = arguments or ("",)
    if rest not in ([], ["owners"]):
        raise ValueError("after the density only 'owners' may follow")
    made: Compressor = _numbered(TopK, float, "a density")(density, **who)
    return TopK(made.density, bool(rest), **who) if isinstance(made, TopK) else made


_MAKERS: dict[str, tuple[str, Make]] = {
    "none": ("none", _plain(Identity)),
    "fp16": ("fp16", _plain(Float16)),
    "bf16": ("bf16, bf16:truncate", _flagged(BFloat16, "truncate")),
    "int8": ("int8, int8:stochastic", _flagged(Int8, "stochastic")),
    "qsgd": ("qsgd:LEVELS", _numbered(QSGD, int, "a number of levels")),
    "sign": ("sign", _plain(Sign)),
    "terngrad": ("terngrad, terngrad:CLIP", _numbered(TernGrad, float, "a number", needed=False)),
    "topk": ("topk:DENSITY, topk:DENSITY:owners", _topk),
    "randomk": ("randomk:DENSITY", _numbered(RandomK, float, "a density")),
    "powersgd": ("powersgd:RANK", _numbered(PowerSGD, int, "a number of columns")),
}
EXAMPLES = (
    "none",
    "fp16",
    "bf16",
    "int8",
    "int8+ef",
    "qsgd:4",
    "terngrad",
    "sign",
    "sign+ef",
    "topk:0.01+ef",
    "randomk:0.01+ef",
    "powersgd:4+ef",
)
"""One of each kind, where it needs error feedback with that."""


def get(spec: str, seed: int = 0, rank: int = 0) -> Compressor:
    """The compressor of that name, such as ``"int8"``, ``"qsgd:4"`` or ``"topk:0.01+ef"``.

    Args:
        spec: a name, its number after a colon; a trailing ``+ef`` adds error feedback.
        seed: of everything random; the same on all ranks.
        rank: whose it is.

    Raises ValueError, with the names that there are, for one that is not; and for numbers that do not fit.
    """
    if not isinstance(spec, str):
        raise TypeError(f"compress={spec!r}: give a Compressor, or a name: {_names()}")
    plain, plus, feedback = spec.partition("+")
    name, *arguments = plain.split(":")
    if name not in _MAKERS or (plus and feedback != "ef"):
        raise ValueError(f'compress={spec!r} is unknown. There are: {_names()}; with "+ef" after any of them')
    try:
        made = _MAKERS[name][1](*arguments, seed=seed, rank=rank)
    except (TypeError, ValueError) as error:
        raise ValueError(f"compress={spec!r}: {error}") from None
    return ErrorFeedback(made) if feedback else made


def resolved(compress: Compressor | str, seed: int = 0, rank: int = 0) -> Compressor:
    """What was given as ``compress=``, for this rank: of a compressor a copy, with its seed and masks but without
    its memory, so that one may be given to several strategies, and to all ranks."""
    if not isinstance(compress, Compressor):
        return get(compress, seed, rank)
    own = deepcopy(compress)
    kept = {k: v for k, v in own.state_dict().items() if k.startswith(("seed", "mask/", "shape/"))}
    own.load_state_dict(kept)
    own.belong_to(rank)
    return own


def _names() -> str:
    return ", ".join(text for text, _ in _MAKERS.values())
