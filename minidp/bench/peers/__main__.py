"""``python -m minidp.bench.peers NAME SOCKET WORLD_SIZE [RANK]``: a contestant's process, started by the bench."""

from __future__ import annotations

import sys
from importlib import import_module

if __name__ == "__main__":
    name, socket, world_size, *rank = sys.argv[1:]
    import_module(f"minidp.bench.peers.{name}").main(socket, int(world_size), *map(int, rank))
