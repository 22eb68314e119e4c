"""g' = compress(g): quantisation, pruning, low rank. Pure array code: it knows keys, and nothing of ranks.

`compressor` is what all have in common, `names` gets one by its name, `error_feedback` wraps any of them.
"""

from minidp.compress.casts import BFloat16, Float16, Identity
from minidp.compress.compressor import Compressor, Payload, Reducer
from minidp.compress.error_feedback import ErrorFeedback
from minidp.compress.low_rank import PowerSGD
from minidp.compress.names import EXAMPLES, get, resolved
from minidp.compress.pruning import Pruned, magnitude_masks
from minidp.compress.quantize import QSGD, Int8, TernGrad
from minidp.compress.sign import Sign
from minidp.compress.sparsify import RandomK, TopK

__all__ = [
    "EXAMPLES",
    "QSGD",
    "BFloat16",
    "Compressor",
    "ErrorFeedback",
    "Float16",
    "Identity",
    "Int8",
    "Payload",
    "PowerSGD",
    "Pruned",
    "RandomK",
    "Reducer",
    "Sign",
    "TernGrad",
    "TopK",
    "get",
    "magnitude_masks",
    "resolved",
]
