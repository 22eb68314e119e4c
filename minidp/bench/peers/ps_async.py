"""minidp's parameter server, asynchronous: every push is an update, and the server remembers what it has given."""

from __future__ import annotations

from typing import ClassVar

from minidp.bench.peers import ps


class Asynchronous(ps.Synchronous):
    staleness: ClassVar[int | None] = None


def main(socket: str, world_size: int) -> None:
    ps.main(socket, world_size, Asynchronous)
