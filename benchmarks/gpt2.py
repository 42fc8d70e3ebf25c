"""GPT-2 (Radford et al. 2019) with the parameters of `cases.GPT2`, in their order and shapes. Used by `distributed.py`.

The head is the embedding of the tokens, so that its gradient is complete last though it begins first. Weights lie as (inputs, outputs).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["GPT2Model"]

STANDARD_DEVIATION = 0.02  # of initial weights, as in the paper's code


class _Linear(nn.Module):
    """`x @ weight + bias`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs).normal_(std=STANDARD_DEVIATION))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(
        self,
        x: Tensor,  # (batch, sequence, inputs)
    ) -> Tensor:  # (batch, sequence, outputs)
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).unflatten(0, x.shape[:2])


class _Block(nn.Module):
    """Causal attention, then a feed-forward layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.attention = _Linear(width, 3 * width)
        self.attention_output = _Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = _Linear(width, 4 * width)
        self.feed_forward_output = _Linear(4 * width, width)

    def forward(
        self,
        x: Tensor,  # (batch, sequence, width)
    ) -> Tensor:  # as x
        of_heads = self.attention(self.attention_norm(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*of_heads.unbind(), is_causal=True)
        x = x + self.attention_output(attended.transpose(1, 2).flatten(2))
        hidden = functional.gelu(self.feed_forward(self.feed_forward_norm(x)), approximate="tanh")
        return x + self.feed_forward_output(hidden)


class GPT2Model(nn.Module):
    """148 tensors and 124.4M parameters with the default sizes; without dropout."""

    def __init__(self, *, layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024, heads: int = 12) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.layers = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=STANDARD_DEVIATION)

    def forward(
        self,
        tokens: Tensor,  # int64 (batch, sequence)
    ) -> Tensor:  # (batch, sequence, vocabulary)
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for layer in self.layers:
            x = layer(x)
        return functional.linear(self.norm(x), self.tokens.weight)
