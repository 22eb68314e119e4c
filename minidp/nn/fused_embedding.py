"""Embeddings on a GPU: gradients summed by sorting, without atomic additions, whose order changes; see `fused`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minidp.backend import Array, Kernels
from minidp.nn.activations import Embedding, check_tokens
from minidp.nn.fused import Fused, contiguous
from minidp.nn.fused_rows import threads

KERNELS = Kernels(Path(__file__).with_suffix(".cu"), "embedding", "embedding_backward")


class FusedEmbedding(Fused, Embedding):
    library = KERNELS

    def suits(self, weight: Array, tokens: Array) -> Any:
        return weight.dtype if weight.size else None

    def launch(self, weight: Array, tokens: Array) -> Array:
        assert self.kernels is not None
        xp, (count, size) = self.xp, weight.shape
        tokens = contiguous(check_tokens(weight.shape, tokens, xp), "int64", xp)
        kept = xp.empty(tokens.size, dtype="int64")
        out = xp.empty((*tokens.shape, size), dtype=weight.dtype)
        weight = contiguous(weight, weight.dtype, xp)
        self.kernels.blocks("embedding", tokens.size, threads(size), size, weight, count, tokens, kept, out)
        self.saved = kept, weight.shape
        return out

    def launch_backward(self, grad: Array) -> Any:
        """The order of places sorted by token is the only thing that is made; how many tokens there are, nobody
        needs to know."""
        assert self.kernels is not None
        kept, (_, size) = self.saved
        out = self.room(0, grad.dtype)
        out[...] = 0
        if len(kept):
            order = kept.argsort(kind="stable")
            grad = contiguous(grad, out.dtype, self.xp)
            self.kernels.blocks(
                "embedding_backward", len(kept), threads(size), size, len(kept), kept[order], order, grad, out
            )
        return out, None


Embedding.fused = FusedEmbedding
