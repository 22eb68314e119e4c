"""How ranks talk: communicators, schedules, queues, and what can go wrong. Arrays in, arrays out."""

from minidp.comm.communicator import ANY, AVG, MAX, MIN, SUM, Communicator, ReduceOp, Work
from minidp.comm.errors import CollectiveMismatch, CollectiveTimeout, CommError, RankFailed
from minidp.comm.process import ProcessCommunicator, comm_self
from minidp.comm.traffic import Traffic

__all__ = [
    "ANY",
    "AVG",
    "MAX",
    "MIN",
    "SUM",
    "CollectiveMismatch",
    "CollectiveTimeout",
    "CommError",
    "Communicator",
    "ProcessCommunicator",
    "RankFailed",
    "ReduceOp",
    "Traffic",
    "Work",
    "comm_self",
]
