"""Arguments that are refused before anything is sent."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_color(color: Any, key: Any) -> None:
    """Refuse what would only fail, or split otherwise than was meant, when the ranks compare it."""
    for name, value in (("color", color), ("key", key)):
        if not isinstance(value, int | np.integer) and not (name == "color" and value is None):
            also = " (or None, to be in no group)" if name == "color" else ""
            raise TypeError(f"split: {name}={value!r} must be a whole number{also}")


def user_tag(tag: int) -> int:
    """``tag``; ValueError for one of the collectives'."""
    if tag < 0:
        raise ValueError(f"tag={tag}: tags are 0 or more; negative ones are the collectives'")
    return tag


def check_dtype(dtype: np.dtype[Any]) -> None:
    """Refuse arrays that can't lie in shared memory."""
    if dtype.hasobject:
        raise TypeError(f"arrays of dtype {dtype} hold Python objects, which can't lie in shared memory")


def check_parts(part: Any, whole: Any, count: int, call: str) -> None:
    """ValueError unless ``count`` arrays like ``part`` make up one like ``whole``."""
    if part.dtype != whole.dtype or part.size * count != whole.size:
        raise ValueError(
            f"{call}: the whole must be {count} times the part, of the same dtype: "
            f"{whole.dtype} {whole.shape} and {part.dtype} {part.shape}"
        )
