"""A small vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.shapes import Shape, image_of

PATCH = 4
WIDTH, DEPTH, HEADS = 64, 4, 4
DROPOUT = 0.1


class ViTTiny(nn.Module):
    """Patches of 4x4 pixels, four blocks of attention (4 heads) and a perceptron, mean over patches, dense num_classes.

    (batch, channels, height, width) to (batch, num_classes) logits; 139 thousand parameters for 28x28 greys and 10
    classes. Of the paper's, it has no token of the class: the mean over the patches takes its place.
    """

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        channels, height, width = image_of(input_shape, least_side=PATCH)
        super().__init__()
        self.num_rows, self.num_columns = -(-height // PATCH), -(-width // PATCH)
        self.patches = nn.Linear(channels * PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(self.num_rows * self.num_columns, WIDTH))
        self.blocks = nn.Sequential(*(TransformerBlock() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(self._cut(images)) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits

    def _cut(self, images: Tensor) -> Tensor:
        """The pixels of each patch, (batch, patches, channels * 16); black where a patch reaches over the edge."""
        batch, channels, height, width = images.shape
        rows, columns = self.num_rows, self.num_columns
        images = F.pad(images, (0, columns * PATCH - width, 0, rows * PATCH - height))
        cut = images.reshape(batch, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        return cut.reshape(batch, rows * columns, channels * PATCH * PATCH)


class TransformerBlock(nn.Module):
    """Self-attention, then a perceptron on each token, each on normalized tokens and added to them.

    is_causal: a token attends to itself and to earlier ones only.
    """

    def __init__(self, is_causal: bool = False) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.attended = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.dropout(self._attend(self.attention_norm(tokens)))
        transformed: Tensor = tokens + self.dropout(self.perceptron(tokens))
        return transformed

    def _attend(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        parts = self.queries_keys_values(tokens).view(batch, length, 3, HEADS, WIDTH // HEADS)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        # Not torch's own attention, which has neither second derivatives nor, for clients side by side, a rule.
        fits = queries @ keys.transpose(2, 3) * (WIDTH // HEADS) ** -0.5
        if self.is_causal:
            later = torch.ones(length, length, dtype=torch.bool, device=tokens.device).triu(1)
            fits = fits.masked_fill(later, -torch.inf)
        weights = torch.softmax(fits, dim=3)
        attended: Tensor = self.attended((weights @ values).transpose(1, 2).reshape(batch, length, WIDTH))
        return attended
