"""Modules, layers, losses and a few whole models."""

from minidp.nn import (  # noqa: F401
    functional,
    fused,
    fused_batch_norm,
    fused_dropout,
    fused_embedding,
    fused_images,
    fused_linear,
    fused_rows,
)
from minidp.nn.batch_norm import BatchNorm1d, BatchNorm2d
from minidp.nn.convolution import AvgPool2d, Conv2d, MaxPool2d
from minidp.nn.dropout import Dropout, DropoutScope, dropout_scope
from minidp.nn.files import load_file, read_file, remove_unfinished, save_file
from minidp.nn.layers import GELU, Embedding, Flatten, Identity, LayerNorm, Linear, ReLU, Sequential, Tanh
from minidp.nn.layout import Layout, Segment
from minidp.nn.models import GPT, cnn
from minidp.nn.module import Module
from minidp.nn.parameter import Parameter
from minidp.nn.transformer import MultiHeadAttention, TransformerBlock

__all__ = [
    "GELU",
    "GPT",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv2d",
    "Dropout",
    "DropoutScope",
    "Embedding",
    "Flatten",
    "Identity",
    "LayerNorm",
    "Layout",
    "Linear",
    "MaxPool2d",
    "Module",
    "MultiHeadAttention",
    "Parameter",
    "ReLU",
    "Segment",
    "Sequential",
    "Tanh",
    "TransformerBlock",
    "cnn",
    "dropout_scope",
    "functional",
    "load_file",
    "read_file",
    "remove_unfinished",
    "save_file",
]
