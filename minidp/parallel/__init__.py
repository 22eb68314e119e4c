"""The strategies: the only room where learning meets communication."""

from minidp.parallel.balance import measure_speeds
from minidp.parallel.checkpoint import Checkpoint
from minidp.parallel.checkpoint_files import DamagedCheckpoint
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.delay import DelayCompensation
from minidp.parallel.errors import CorruptGradient, NonFiniteGradient
from minidp.parallel.hogwild import Hogwild
from minidp.parallel.local_sgd import LocalSGD
from minidp.parallel.naive import NaiveDataParallel
from minidp.parallel.parameter_server import ParameterServer
from minidp.parallel.serve import serve
from minidp.parallel.strategy import Strategy
from minidp.parallel.sync_batch_norm import SyncBatchNorm

__all__ = [
    "Checkpoint",
    "CorruptGradient",
    "DamagedCheckpoint",
    "DataParallel",
    "DelayCompensation",
    "Hogwild",
    "LocalSGD",
    "NaiveDataParallel",
    "NonFiniteGradient",
    "ParameterServer",
    "Strategy",
    "SyncBatchNorm",
    "measure_speeds",
    "serve",
]
