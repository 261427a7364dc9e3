"""GPT-2 as people write it by hand, for the published speeds that were measured on such code.

Source: Karpathy's build-nanogpt and nanoGPT (model.py), Raschka's LLMs-from-scratch. They differ only in their attention,
their GELU, their dropout and whether the head is tied to the embedding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class PlainGptConfig:
    """The shape of a hand-written GPT-2; the defaults are build-nanogpt's 124 M model before any of its speed-ups."""

    vocabulary: int = 50257
    positions: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 12
    dropout: float = 0.0
    tied: bool = True
    """Whether the head shares the embedding's weight."""
    fused_attention: bool = False
    """Whether attention is `scaled_dot_product_attention`; else products, mask and softmax are separate operations."""
    fused_gelu: bool = True
    """Whether GELU is one operation; else it is its tanh formula in Python."""


class _Attention(nn.Module):
    def __init__(self, shape: PlainGptConfig) -> None:
        super().__init__()
        self.shape = shape
        self.c_attn = nn.Linear(shape.width, 3 * shape.width)
        self.c_proj = nn.Linear(shape.width, shape.width)
        ones = torch.ones(shape.positions, shape.positions)
        self.mask: torch.Tensor
        self.register_buffer("mask", torch.tril(ones)[None, None] == 0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return causal self-attention over `x`, both (B, T, d)."""
        batch, length, width = x.shape
        query, key, value = (
            part.view(batch, length, self.shape.heads, -1).transpose(1, 2)
            for part in self.c_attn(x).split(width, dim=2)
        )
        dropout = self.shape.dropout
        if self.shape.fused_attention:
            y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        else:
            scores = query @ key.transpose(-2, -1) * (1.0 / math.sqrt(key.size(-1)))
            scores = scores.masked_fill(self.mask[:, :, :length, :length], float("-inf"))
            y = F.dropout(F.softmax(scores, dim=-1), dropout) @ value
        y = y.transpose(1, 2).contiguous().view(batch, length, width)
        return F.dropout(self.c_proj(y), dropout)


class _Mlp(nn.Module):
    def __init__(self, shape: PlainGptConfig) -> None:
        super().__init__()
        self.shape = shape
        self.c_fc = nn.Linear(shape.width, 4 * shape.width)
        self.c_proj = nn.Linear(4 * shape.width, shape.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` after the four times wider layer, both (B, T, d)."""
        x = self.c_fc(x)
        x = F.gelu(x, approximate="tanh") if self.shape.fused_gelu else _gelu(x)
        return F.dropout(self.c_proj(x), self.shape.dropout)


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


class _Block(nn.Module):
    def __init__(self, shape: PlainGptConfig) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.attn, self.mlp = _Attention(shape), _Mlp(shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` after one block, both (B, T, d)."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class PlainGpt(nn.Module):
    """The model; `forward` returns the mean loss over all positions, from the full logits (B, T, V)."""

    def __init__(self, shape: PlainGptConfig) -> None:
        super().__init__()
        self.dropout = shape.dropout
        self.wte, self.wpe = nn.Embedding(shape.vocabulary, shape.width), nn.Embedding(shape.positions, shape.width)
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.wte.weight = self.head.weight

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy () of labels (B, T) that are already shifted."""
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.size(1)))
        x = F.dropout(x, self.dropout)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
