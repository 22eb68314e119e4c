"""``python -m minidp.bench.peers NAME[:WAY] SOCKET WORLD_SIZE [RANK]``: a process that the bench has started."""

from __future__ import annotations

import sys
from importlib import import_module

if __name__ == "__main__":
    name, socket, world_size, *rank = sys.argv[1:]
    module, _, way = name.partition(":")
    ways = {"way": way} if way else {}
    import_module(f"minidp.bench.peers.{module}").main(socket, int(world_size), *map(int, rank), **ways)
