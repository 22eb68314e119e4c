"""Modules, layers and losses."""

from minidp.nn import functional
from minidp.nn.dropout import Dropout, DropoutScope, dropout_scope
from minidp.nn.files import load_file, read_file, remove_unfinished, save_file
from minidp.nn.layers import GELU, Flatten, Identity, Linear, ReLU, Sequential, Tanh
from minidp.nn.layout import Layout, Segment
from minidp.nn.module import Module
from minidp.nn.parameter import Parameter

__all__ = [
    "GELU",
    "Dropout",
    "DropoutScope",
    "Flatten",
    "Identity",
    "Layout",
    "Linear",
    "Module",
    "Parameter",
    "ReLU",
    "Segment",
    "Sequential",
    "Tanh",
    "dropout_scope",
    "functional",
    "load_file",
    "read_file",
    "remove_unfinished",
    "save_file",
]
