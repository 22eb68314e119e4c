"""``nn.GPT`` in PyTorch, as fast as it is written there by hand: its parameters have our names."""

from __future__ import annotations

from typing import Any

from minidp.bench.jobs import Transformer
from minidp.bench.peers.eager import torch

F: Any = torch.nn.functional


class Attention(torch.nn.Module):  # type: ignore[misc]
    """One product for queries, keys and values, and PyTorch's fused kernel."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = torch.nn.Parameter(torch.empty(3 * embed_dim))
        self.out_proj = torch.nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Any) -> Any:
        b, t, e = x.shape
        packed = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = packed.view(b, t, 3, self.num_heads, e // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(mixed.transpose(1, 2).reshape(b, t, e))


class Block(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(embed_dim, num_heads)
        self.linear1 = torch.nn.Linear(embed_dim, 4 * embed_dim)
        self.linear2 = torch.nn.Linear(4 * embed_dim, embed_dim)
        self.norm1, self.norm2 = torch.nn.LayerNorm(embed_dim), torch.nn.LayerNorm(embed_dim)

    def forward(self, x: Any) -> Any:
        x = x + self.self_attn(self.norm1(x))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x)), approximate="tanh"))


class GPT(torch.nn.Module):  # type: ignore[misc]
    def __init__(self, job: Transformer) -> None:
        super().__init__()
        self.token_embedding = torch.nn.Embedding(job.vocab_size, job.embed_dim)
        self.position_embedding = torch.nn.Embedding(job.context, job.embed_dim)
        self.blocks = torch.nn.Sequential(*(Block(job.embed_dim, job.num_heads) for _ in range(job.num_layers)))
        self.norm = torch.nn.LayerNorm(job.embed_dim)
        self.head = torch.nn.Linear(job.embed_dim, job.vocab_size)

    def forward(self, tokens: Any) -> Any:
        x = self.token_embedding(tokens) + self.position_embedding.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))
