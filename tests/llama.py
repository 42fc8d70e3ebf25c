"""Llama 3 (Grattafiori et al. 2024) as a plain module, for tests of plans: grouped-query attention, rotary positions, SwiGLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Llama", "llama_8b"]

ROTARY_BASE = 500_000.0


class _Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.head_dim = width // heads
        self.attention_norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.RMSNorm(width)
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, sequence, width)
        normed = self.attention_norm(x)
        query, key, value = (each(normed).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for each in (self.query, self.key, self.value))
        attended = functional.scaled_dot_product_attention(_rotated(query), _rotated(key), value, is_causal=True, enable_gqa=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        normed = self.feed_forward_norm(x)
        return x + self.down(functional.silu(self.gate(normed)) * self.up(normed))


def _rotated(x: Tensor) -> Tensor:  # (batch, heads, sequence, head_dim), computed in fp32
    length, width = x.shape[-2:]
    frequencies = ROTARY_BASE ** -(torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.outer(torch.arange(length, device=x.device), frequencies)
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = (first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos())
    return torch.stack(rotated, -1).flatten(-2).type_as(x)


class Llama(nn.Module):
    """A small one by default."""

    def __init__(
        self, *, width: int = 64, inner: int = 88, layers: int = 3, heads: int = 4, kv_heads: int = 2, vocabulary: int = 97
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(_Block(width, inner, heads, kv_heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, sequence) -> (batch, sequence, vocabulary)
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def llama_8b() -> Llama:
    return Llama(width=4096, inner=14336, layers=32, heads=32, kv_heads=8, vocabulary=128256)
