"""A small causal transformer over characters, as in Al-Rfou et al. 2019 (arXiv 1808.04444), with few layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.shapes import Shape, length_of
from models.vit_tiny import DEPTH, WIDTH, TransformerBlock


class CharTransformer(nn.Module):
    """Embedding and position of 64, four blocks of attention to earlier characters, dense num_classes at each of them.

    Tokens (batch, length), int64, each below num_classes, to (batch, num_classes, length) logits: at every place, of
    the token that follows, from the tokens up to there. 149 thousand parameters with 80 classes and 80 tokens. Unlike
    an LSTM it can be trained for many clients at once.
    """

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        length = length_of(input_shape, "tokens")
        super().__init__()
        self.embedding = nn.Embedding(num_classes, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(length, WIDTH))
        self.blocks = nn.Sequential(*(TransformerBlock(is_causal=True) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.blocks(self.embedding(tokens) + self.positions)
        logits: Tensor = self.head(self.norm(hidden))
        return logits.transpose(1, 2)
