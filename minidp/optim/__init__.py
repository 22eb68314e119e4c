"""Update rules and learning rates. An optimizer knows parameters, but nothing of ranks.

`optimizer` is groups and hyperparameters, `rules` the updates themselves, `schedules` the learning rates.
"""

from minidp.optim.optimizer import Optimizer
from minidp.optim.rules import SGD, Adam, AdamW
from minidp.optim.schedules import constant, cosine, linear_scaling

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "constant", "cosine", "linear_scaling"]
