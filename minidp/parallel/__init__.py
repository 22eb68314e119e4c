"""The strategies: the only room where learning meets communication."""

from minidp.parallel.balance import measure_speeds
from minidp.parallel.checkpoint import Checkpoint
from minidp.parallel.checkpoint_files import DamagedCheckpoint
from minidp.parallel.conjugate import copy_to_ranks, join_ranks, sum_over_ranks
from minidp.parallel.data_parallel import DataParallel
from minidp.parallel.delay import DelayCompensation
from minidp.parallel.departures import StepLost
from minidp.parallel.errors import CorruptGradient, NonFiniteGradient
from minidp.parallel.hogwild import Hogwild
from minidp.parallel.hybrid import HybridParallel
from minidp.parallel.local_sgd import LocalSGD
from minidp.parallel.mesh import Mesh
from minidp.parallel.naive import NaiveDataParallel
from minidp.parallel.parallel_attention import ParallelAttention
from minidp.parallel.parallel_embedding import VocabParallelEmbedding
from minidp.parallel.parallelize import cut_layers
from minidp.parallel.parameter_server import ParameterServer
from minidp.parallel.serve import serve
from minidp.parallel.sharded import ShardedDataParallel
from minidp.parallel.stages import Unit, chain
from minidp.parallel.strategy import Strategy
from minidp.parallel.sync_batch_norm import SyncBatchNorm
from minidp.parallel.tensor_parallel import ColumnParallelLinear, ParallelMLP, RowParallelLinear

__all__ = [
    "Checkpoint",
    "ColumnParallelLinear",
    "CorruptGradient",
    "DamagedCheckpoint",
    "DataParallel",
    "DelayCompensation",
    "Hogwild",
    "HybridParallel",
    "LocalSGD",
    "Mesh",
    "NaiveDataParallel",
    "NonFiniteGradient",
    "ParallelAttention",
    "ParallelMLP",
    "ParameterServer",
    "RowParallelLinear",
    "ShardedDataParallel",
    "StepLost",
    "Strategy",
    "SyncBatchNorm",
    "Unit",
    "VocabParallelEmbedding",
    "chain",
    "copy_to_ranks",
    "cut_layers",
    "join_ranks",
    "measure_speeds",
    "serve",
    "sum_over_ranks",
]
