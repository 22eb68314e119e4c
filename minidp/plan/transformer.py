"""A transformer in numbers: what of `nn.GPT` one rank holds, computes and keeps, cut tp times.

Per layer, e features, h heads, T = samples · t tokens of a micro-batch, v tokens in the vocabulary, v' = ⌈v/tp⌉ of
them on the fullest rank. Cut as in Shoeybi et al., "Megatron-LM", 2019, section 3: what makes features by columns,
what takes them by rows, the embedding by the vocabulary; LayerNorms, places and biases of rows are on every rank.

                parameters              forward FLOPs                         kept for backward, elements
    embedding   v'e + te                (T + t)e                              Te
    block       (12e² + 7e)/tp + 6e     T[(24e² + 4et + 11e)/tp + 22e]        T[(17e + ht)/tp + 8e + 2] + 2e
    norm        2e                      9Te                                   T(2e + 1) + e
    head        v'(e + 1)               T(2e + 1)v', and of the loss 6Tv      T(2v + e)

For tp = 1 these are what the parameters add up to, what `backend.meter` counts, and what the graph of this engine
holds (`Function.saved`, and the inputs of each), exactly; backward and tp > 1 are in the code below, exact for
`HybridParallel`, too. They are counted on this engine, not taken from papers, whose engines keep other things:
Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022, count those of PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

INDEX = 8  # bytes of a token or label: int64


class Part(NamedTuple):
    """Some layers on one rank: their parameters, and of one micro-batch FLOPs each way and what backward needs."""

    parameters: int
    forward_flops: float
    backward_flops: float
    kept: int
    """Elements of activations."""
    kept_indices: int
    """Bytes of integers and masks besides."""


@dataclass(frozen=True)
class Transformer:
    """A model as `nn.GPT` makes it, trained on whole contexts.

    Args:
        layers, embed, heads: blocks, their features, and heads that these are cut into.
        context: tokens of a sample.
        vocab: different tokens.

    Raises ValueError for what no model can be.
    """

    layers: int
    embed: int
    heads: int
    context: int
    vocab: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: give a whole number of at least 1")
        if self.embed % self.heads:
            fits = in_words(divisors(self.embed))
            raise ValueError(f"embed={self.embed} is not cut evenly by heads={self.heads}: {fits} would do")

    @property
    def parameters(self) -> int:
        """Of the whole model: (v + t)e + layers · (12e² + 13e) + 2e + v(e + 1)."""
        first, block, norm, head = self.embedding(1), self.block(1), self.norm(), self.head(1)
        return first.parameters + self.layers * block.parameters + norm.parameters + head.parameters

    def flops(self, samples: int = 1) -> float:
        """Forward and backward of one micro-batch of that many samples, in one piece."""
        parts = self.embedding(1, samples), self.block(1, samples), self.norm(samples), self.head(1, samples)
        first, block, norm, head = (part.forward_flops + part.backward_flops for part in parts)
        return first + self.layers * block + norm + head

    # -- parts, on the fullest of tp ranks ---------------------------------------------------------------

    def embedding(self, tp: int, samples: int = 1) -> Part:
        """Tokens and places. With tp > 1 others' rows are zeroed, then summed: two arrays and a mask more."""
        e, t = self.embed, self.context
        T, cut = samples * t, tp > 1
        return Part(
            parameters=-(-self.vocab // tp) * e + t * e,
            forward_flops=float((T + t + T * cut) * e),
            backward_flops=float((3 * T + t + T * cut) * e),
            kept=T * e * (3 if cut else 1),
            kept_indices=T * (INDEX + cut),
        )

    def block(self, tp: int, samples: int = 1) -> Part:
        """One block. What it keeps, in units of Te: x 1, normalised twice 2 + 2, queries, keys and values 3,
        mixed values 2 (by heads, and side by side; the same with one head, or one feature each), their projection
        1, x' 1, inside 4, its slope 4, its activation 4, result 1. With tp > 1 results of rows are kept twice, as
        this rank's part and as the sum.
        """
        e, t, T, cut = self.embed, self.context, samples * self.context, tp > 1
        heads, features = self.heads // tp, e // tp  # this rank's
        mixed = 1 if t == 1 or heads in (1, features) else 2
        return Part(
            parameters=(12 * e + 7) * features + 6 * e,
            forward_flops=float(T * ((24 * e + 4 * t + 11) * features + 22 * e)),
            backward_flops=float(T * ((48 * e + 8 * t + 11) * features + (30 if cut else 28) * e)),
            kept=T * ((15 + mixed) * features + heads * t + (12 if cut else 8) * e + 2) + 2 * e,
            kept_indices=0,
        )

    def norm(self, samples: int = 1) -> Part:
        """The last LayerNorm, on every rank: keeps its input, that normalised, and scales."""
        e, T = self.embed, samples * self.context
        return Part(2 * e, 9.0 * T * e, 11.0 * T * e, T * (2 * e + 1) + e, 0)

    def head(self, tp: int, samples: int = 1) -> Part:
        """Logits and the loss. Keeps its input, logits and shares; with tp > 1 its part of the logits, too."""
        e, v, T = self.embed, self.vocab, samples * self.context
        part = -(-v // tp)
        return Part(
            parameters=part * (e + 1),
            forward_flops=float(T * ((2 * e + 1) * part + 6 * v)),
            backward_flops=float(T * ((4 * e + 1) * part + 2 * v)),
            kept=T * (2 * v + (part if tp > 1 else 0) + e),
            kept_indices=2 * T * INDEX,
        )

    @property
    def units(self) -> list[float]:
        """Forward FLOPs of a sample in each unit that `parallel.stages` knows of a GPT; without the loss."""
        head = self.head(1).forward_flops - 6 * self.context * self.vocab
        blocks = [self.block(1).forward_flops] * self.layers
        return [self.embedding(1).forward_flops, *blocks, self.norm().forward_flops, head]


def divisors(n: int) -> list[int]:
    """Ascending."""
    small = [i for i in range(1, int(n**0.5) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def in_words(numbers: list[int], most: int = 12) -> str:
    """``1, 2, 4``; of many the first, and the last."""
    if len(numbers) > most:
        return ", ".join(map(str, numbers[: most - 1])) + f", … {numbers[-1]}"
    return ", ".join(map(str, numbers))
