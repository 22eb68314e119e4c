"""How ranks talk: communicators, schedules, queues, and what can go wrong. Arrays in, arrays out."""

from minidp.comm.communicator import ANY, Communicator
from minidp.comm.errors import CollectiveMismatch, CollectiveTimeout, CommError, RankFailed, RankLost
from minidp.comm.process import ProcessCommunicator
from minidp.comm.reduction import AVG, MAX, MIN, SUM, ReduceOp
from minidp.comm.traffic import Traffic
from minidp.comm.work import Work
from minidp.comm.world import comm_self

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
    "RankLost",
    "ReduceOp",
    "Traffic",
    "Work",
    "comm_self",
]
