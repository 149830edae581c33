"""The flat vector and the model must be one, and nothing may pass from one client to the next through the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from perfedavg.training.flat_model import FlatModel, SeededDropout, flatten


def test_writing_to_the_vector_changes_the_model() -> None:
    model = FlatModel(nn.Linear(3, 2))
    model.load(torch.arange(8.0))
    outputs = model.module(torch.tensor([[1.0, 10.0, 100.0]]))
    assert outputs.tolist() == [[0 + 10 + 200 + 6, 3 + 40 + 500 + 7]]
    assert torch.equal(flatten(model.module), torch.arange(8.0))


def test_training_a_copy_leaves_the_original_alone() -> None:
    original = nn.Linear(3, 2)
    before = flatten(original).clone()
    FlatModel(original).load(torch.zeros(8))
    assert torch.equal(flatten(original), before)


def test_every_dropout_is_seeded() -> None:
    model = FlatModel(nn.Sequential(nn.Sequential(nn.Linear(1000, 1000), nn.Dropout(0.5)), nn.Dropout(0.25)))
    inputs, masks = torch.ones(4, 1000), []
    for _ in range(2):
        model.dropout_generator.manual_seed(7)
        masks.append(model.module(inputs))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], model.module(inputs))


def test_dropout_keeps_the_expectation_and_rests_in_evaluation() -> None:
    """Kept with probability 0.4 and divided by it: mean 1, standard error sqrt(0.6 / 0.4 / 1e6) = 0.0012."""
    dropout = SeededDropout(0.6, torch.Generator().manual_seed(0))
    outputs = dropout(torch.ones(1_000_000))
    assert sorted(set(outputs.tolist())) == [0.0, pytest.approx(2.5)]
    assert outputs.mean().item() == pytest.approx(1.0, abs=0.006)
    dropout.eval()
    assert torch.equal(dropout(torch.ones(5)), torch.ones(5))
    assert torch.equal(SeededDropout(1.0, torch.Generator())(torch.ones(5)), torch.zeros(5))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Sequential(nn.Dropout2d(0.5)), "Dropout2d"),
        (nn.LSTM(3, 3, num_layers=2, dropout=0.1), "LSTM"),
    ],
)
def test_models_that_would_leak_or_cannot_be_seeded_are_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FlatModel(model)
