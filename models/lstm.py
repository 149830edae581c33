"""The character model of the Shakespeare experiments (McMahan et al. 2017, arXiv 1602.05629), also LEAF's."""

from __future__ import annotations

from torch import Tensor, nn

from models.shapes import Shape, length_of


class CharLSTM(nn.Module):
    """Embedding of 8, two LSTM layers of 256, dense num_classes on the last time step.

    Tokens (batch, length), int64, each below num_classes, to (batch, num_classes) logits of the token that follows.
    820 thousand parameters with 80 classes, of which torch's second bias a gate, absent from the paper's, is 2,048.
    """

    head = "output.*"

    def __init__(self, input_shape: Shape, num_classes: int) -> None:
        length_of(input_shape, "tokens")
        super().__init__()
        self.embedding = nn.Embedding(num_classes, 8)
        self.lstm = nn.LSTM(8, 256, num_layers=2, batch_first=True)
        self.output = nn.Linear(256, num_classes)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.output(hidden[:, -1])
        return logits


class CharLSTMEachStep(CharLSTM):
    """The same layers with the dense one at every time step (Reddi et al. 2021, arXiv 2003.00295).

    (batch, length) to (batch, num_classes, length) logits: at every place, of the token that follows.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(tokens))
        logits: Tensor = self.output(hidden)
        return logits.transpose(1, 2)
