"""Bytes counted where they move, never where somebody thinks that they should have moved."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Traffic:
    """What this rank has sent and received, in bytes of payload (headers are not counted).

    ``bytes_sent`` counts each byte once a reader: an array that lies in shared memory and is read by
    p - 1 peers counts (p - 1) times, as it would on a network without multicast. ``messages_sent`` counts
    arrays, not the slots that a long one is cut into. A duplicate of a communicator counts for itself and
    for the communicator that it was made from.
    """

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0
    parent: Traffic | None = field(default=None, repr=False)

    def add(self, sent: int, received: int = 0, messages: int = 1) -> None:
        """Count ``sent`` and ``received`` bytes here and in every communicator that this one came from."""
        self.bytes_sent += sent
        self.bytes_received += received
        self.messages_sent += messages
        if self.parent is not None:
            self.parent.add(sent, received, messages)
