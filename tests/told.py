"""What an error says, for tests that compare what several ranks were told."""

from __future__ import annotations

from typing import Any


def told(call: Any) -> str:
    """``ValueError: …`` if the call raises that, else ``nothing``."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
