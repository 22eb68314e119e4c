"""What the demo can learn: a model and a dataset that fit each other, and how they are best trained."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from minidp import data, nn

FITTING = {"digits": ("mlp", "cnn"), "fashion-mnist": ("mlp", "cnn"), "text": ("transformer",)}
"""Models by dataset; the first is the usual one."""
MODELS = ("mlp", "cnn", "transformer")


class Defaults(NamedTuple):
    """What is taken where the options say nothing."""

    optimizer: str
    lr: float
    global_batch_size: int
    epochs: int


@dataclass(frozen=True)
class Task:
    """A model on a dataset; ``hidden`` are the widths inside an MLP."""

    model: str = "mlp"
    dataset: str = "digits"
    hidden: tuple[int, ...] = (1024, 1024)

    @property
    def defaults(self) -> Defaults:
        if self.model == "transformer":
            return Defaults("adam", 0.003, 32, 6)
        if self.dataset == "fashion-mnist":
            return Defaults("adam", 0.002, 128, 1) if self.model == "cnn" else Defaults("momentum", 0.05, 256, 2)
        return Defaults("adam", 0.002, 256, 10) if self.model == "cnn" else Defaults("momentum", 0.05, 256, 20)

    @property
    def large(self) -> bool:
        """Whether an epoch takes seconds, not a part of one: then there is one round of it."""
        return self.dataset != "digits"

    def load(self) -> tuple[data.ArrayDataset, data.ArrayDataset]:
        """(train, test), with inputs of the shape that the model takes."""
        if self.dataset == "text":
            return data.load_text()
        if self.dataset == "fashion-mnist":
            return data.load_fashion_mnist()
        train, test = data.load_digits()
        if self.model == "mlp":
            return train, test
        return _as_images(train), _as_images(test)

    @property
    def side(self) -> int:
        """Pixels of an image's side."""
        return 8 if self.dataset == "digits" else 28

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the model's layers: widths of an MLP, channels of a CNN."""
        if self.model == "mlp":
            return (self.side * self.side, *self.hidden, 10)
        return (1, 32, 64) if self.dataset == "digits" else (1, 16, 32)

    def build(self) -> nn.Module:
        """The model, the same on every rank."""
        if self.model == "transformer":
            return nn.GPT(self.classes)
        if self.model == "cnn":
            return nn.cnn((1, self.side, self.side), self.sizes[1:])
        layers: list[nn.Module] = [] if self.dataset == "digits" else [nn.Flatten()]
        for inputs, outputs in pairwise(self.sizes):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    @property
    def classes(self) -> int:
        """Among so many the model guesses."""
        return len(data.load_text()[0].vocabulary) if self.dataset == "text" else 10

    def describe(self) -> tuple[str, str]:
        """D and w in words."""
        train, test = self.load()
        size = f"{sum(p.size for p in self.build().parameters()):,} parameters, on every worker"
        if self.dataset == "text":
            context = train.arrays[0].shape[1]
            d = f"a play, {len(train)} passages of {context} characters to learn from; {len(test)} to test"
            return d, f"a transformer, 2 blocks of 4 heads: {size}"
        what = "handwritten digits" if self.dataset == "digits" else "pictures of clothes"
        d = f"{len(train)} {what}, {self.side}×{self.side} pixels, to learn from; {len(test)} to test"
        sizes = "-".join(map(str, self.sizes))
        return d, f"an MLP {sizes}: {size}" if self.model == "mlp" else f"a CNN, 3×3, channels {sizes}: {size}"


def _as_images(dataset: data.ArrayDataset) -> data.ArrayDataset:
    x, y = dataset.arrays
    return data.ArrayDataset(x.reshape(-1, 1, 8, 8), y)
