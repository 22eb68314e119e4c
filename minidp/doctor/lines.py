"""What a probe says, a line of JSON at a time, at once: what it has said is known, whatever becomes of it."""

from __future__ import annotations

import json
import sys
from typing import Any


def now(what: str) -> None:
    """Say what will be done now, after "it": ``imports CuPy``."""
    _say({"now": what})


def found(**facts: Any) -> None:
    _say({"found": facts})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def understand(text: str) -> tuple[dict[str, Any], str]:
    """(all that was found, what was done last), of what a probe has written. What is no message is passed over:
    libraries write, too, and the last line may be cut off."""
    facts: dict[str, Any] = {}
    last = "starts"
    for line in text.splitlines():
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if isinstance(message, dict):
            facts |= message.get("found", {})
            last = message.get("now", last)
    return facts, last
