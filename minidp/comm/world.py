"""Making the process world: the parent reserves it, each worker joins it."""

from __future__ import annotations

import os

from minidp.comm.arena import REGION, Arena, available_bytes, not_enough
from minidp.comm.board import Board
from minidp.comm.process import ProcessCommunicator
from minidp.comm.rendezvous import Rendezvous, control_bytes
from minidp.comm.traffic import Traffic
from minidp.comm.vigil import Watch


def reserve_world(world_size: int) -> Arena:
    """The arena of a new run, with its board and every rank's block of the world group: the parent's part.

    MemoryError, in bytes, if there is too little; nothing is taken then.
    """
    needed, free = world_size * control_bytes(world_size) + Board.nbytes(world_size), available_bytes()
    if needed > free:
        raise MemoryError(not_enough(needed, free))
    arena = Arena.create(world_size + 1)
    Board.reserve(arena, world_size)
    for rank in range(world_size):
        Rendezvous.reserve(arena, rank, world_size)
    return arena


def join_world(
    arena: Arena, rank: int, world_size: int, timeout_s: float, servers_from: int | None = None
) -> ProcessCommunicator:
    """The communicator of all ranks of the run, servers included, in the process that is ``rank``."""
    board = Board(arena, world_size, servers_from)
    # The parent has taken the world's blocks, each at the start of its region; this process takes after it.
    offsets = [region * REGION for region in range(world_size)]
    if rank not in arena.taken:
        Rendezvous.reserve(arena, rank, world_size)
    watch = Watch(board, arena, rank, timeout_s)
    world = Rendezvous(watch, arena, offsets, list(range(world_size)), rank, "world")
    board.running(rank, os.getpid())
    return ProcessCommunicator(world, Traffic())


def comm_self(timeout_s: float = 60.0) -> ProcessCommunicator:
    """A communicator of this process alone (MPI's COMM_SELF): world size 1 without ``spawn``."""
    return join_world(reserve_world(1), 0, 1, timeout_s)
