"""Datasets, sharding and the loader: D → D_1 … D_N. Knows of shards (index, count), never of ranks."""

from minidp.data.dataset import ArrayDataset, Dataset, collate
from minidp.data.digits import load_digits
from minidp.data.fashion_mnist import load_fashion_mnist
from minidp.data.loader import DataLoader
from minidp.data.sharding import block, cut, epoch_order, halve, proportional
from minidp.data.text import TextDataset, load_text

__all__ = [
    "ArrayDataset",
    "DataLoader",
    "Dataset",
    "TextDataset",
    "block",
    "collate",
    "cut",
    "epoch_order",
    "halve",
    "load_digits",
    "load_fashion_mnist",
    "load_text",
    "proportional",
]
