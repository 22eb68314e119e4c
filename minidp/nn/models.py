"""Whole models, small ones: those that the demo trains and the bench measures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minidp.autograd import Tensor, no_grad
from minidp.backend import generator
from minidp.nn.convolution import Conv2d, MaxPool2d
from minidp.nn.layers import Embedding, Flatten, LayerNorm, Linear, ReLU, Sequential
from minidp.nn.module import Module
from minidp.nn.transformer import TransformerBlock


def cnn(
    image: tuple[int, int, int] = (1, 28, 28),
    channels: tuple[int, ...] = (16, 32),
    classes: int = 10,
    seed: int = 0,
) -> Sequential:
    """(n, *image) → (n, classes): for each of `channels` a 3×3 convolution, ReLU, 2×2 maxima; a linear layer.

    `image` is (channels, height, width). ValueError if it is halved to nothing.
    """
    inputs, height, width = image
    layers: list[Module] = []
    for outputs in channels:
        layers += [Conv2d(inputs, outputs, 3, padding=1), ReLU(), MaxPool2d(2)]
        inputs, height, width = outputs, height // 2, width // 2
    if height * width == 0:
        raise ValueError(f"cnn: images of {image[1]}×{image[2]} can't be halved {len(channels)} times")
    return Sequential(*layers, Flatten(), Linear(inputs * height * width, classes), seed=seed)


class GPT(Module):
    """A language model (Radford et al. 2018): tokens (b, t) → logits (b, t, vocab_size) of what follows each.

    Embeddings of tokens and of places are added, go through `num_layers` causal blocks and a last normalisation.

    Args:
        vocab_size: tokens are 0 … vocab_size − 1.
        context: the longest sequence; t may be less.
        embed_dim, num_heads, num_layers, dropout: of the blocks.
        seed: of all initial values.
    """

    def __init__(
        self,
        vocab_size: int,
        context: int = 64,
        embed_dim: int = 128,
        num_heads: int = 4,
        num_layers: int = 2,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.vocab_size, self.context = vocab_size, context
        self.token_embedding = Embedding(vocab_size, embed_dim, std=0.02)
        self.position_embedding = Embedding(context, embed_dim, std=0.02)
        blocks = [
            TransformerBlock(embed_dim, num_heads, dropout=dropout, activation="gelu_tanh")
            for _ in range(num_layers)
        ]
        self.blocks = Sequential(*blocks)
        self.norm = LayerNorm(embed_dim)
        self.head = Linear(embed_dim, vocab_size)
        self.initialize(seed)

    def forward(self, tokens: Any) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))  # type: ignore[no-any-return]

    def embed(self, tokens: Any) -> Tensor:
        """What goes into the blocks: tokens (b, t) → (b, t, embed_dim)."""
        if not hasattr(tokens, "shape"):
            tokens = np.asarray(tokens)
        if len(tokens.shape) != 2 or tokens.shape[1] > self.context:
            raise ValueError(f"GPT: tokens must have shape (batch, at most {self.context}), not {tokens.shape}")
        return self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]  # type: ignore[no-any-return]

    def generate(self, tokens: Any, count: int, temperature: float = 1.0, seed: int = 0) -> np.ndarray:
        """`tokens` (t,), at least one, and `count` more of the model's own: int64 (t + count,), on the host.

        Each is drawn from softmax(logits / temperature), the same by the same seed; temperature 0 takes the
        likeliest. The model looks at no more than the last `context` tokens, and evaluates (no dropout).
        """
        written = np.asarray(tokens)
        if written.ndim != 1 or written.dtype.kind not in "iu":
            raise ValueError("generate: give one sequence of integer tokens (t,) to go on from, with one at least")
        if not (0 <= temperature < math.inf) or count < 0:
            raise ValueError(f"generate: temperature={temperature}, count={count}: give 0 or more")
        rng, modes = generator(seed, "generate"), {module: module.training for module in self.modules()}
        self.eval()
        try:
            with no_grad():
                for _ in range(count):
                    logits = self(written[None, -self.context :]).numpy()[0, -1].astype(np.float64)
                    if not np.isfinite(logits).all():
                        raise FloatingPointError(
                            "generate: the model's logits are not finite: has its training diverged?"
                        )
                    # argmax of logits + T · Gumbel noise is a draw from softmax(logits / T), for T = 0 too.
                    noise = temperature * rng.gumbel(size=self.vocab_size)
                    written = np.append(written, (logits + noise).argmax())
        finally:
            for module, mode in modes.items():
                module.training = mode
        return written.astype(np.int64)
