"""The character model has the paper's shape, and its weights are the flat vector that clients exchange."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.lstm import CharLSTM
from perfedavg.settings import OptimizerConfig
from perfedavg.training.client_models import Client
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining

TRAINING = LocalTraining(OptimizerConfig("sgd", 0.5), num_epochs=1, batch_size=3)


@pytest.fixture
def model() -> FlatModel:
    torch.manual_seed(0)
    return FlatModel(CharLSTM((80,), 80))


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 80, (6, 80), generator=torch.Generator().manual_seed(1))


def test_one_row_of_logits_an_example(model: FlatModel, tokens: Tensor) -> None:
    assert model.module(tokens).shape == (6, 80)
    assert CharLSTM((80,), 10)(tokens[:2] % 10).shape == (2, 10)


def test_number_of_parameters() -> None:
    """Embedding, four gates in two layers (inputs, state, torch's two biases), dense."""
    first, second = 4 * 256 * (8 + 256 + 2), 4 * 256 * (256 + 256 + 2)
    assert len(flatten(CharLSTM((80,), 80))) == 80 * 8 + first + second + (256 + 1) * 80 == 819_920


def test_the_last_step_decides_and_has_seen_the_first(model: FlatModel, tokens: Tensor) -> None:
    """The logits are those of LSTM's output after the last token, and depend on every token before it."""
    module = model.module
    states, _ = module.lstm(module.embedding(tokens))
    assert torch.equal(module(tokens), module.output(states[:, -1]))
    assert not torch.equal(module(tokens), module.output(states[:, 0]))
    changed = tokens.clone()
    changed[:, 70] = (changed[:, 70] + 1) % 80
    assert not torch.equal(module(tokens), module(changed))


def test_examples_do_not_touch_each_other(model: FlatModel, tokens: Tensor) -> None:
    """Were batch and time swapped, an example would read those before it in the batch."""
    torch.testing.assert_close(model.module(tokens)[3:], model.module(tokens[3:]))


def test_loading_the_flat_vector_changes_every_layer(model: FlatModel, tokens: Tensor) -> None:
    """An LSTM keeps its weights a second time, packed for its kernels; a stale copy would train the wrong model."""
    torch.manual_seed(1)
    other = CharLSTM((80,), 80)
    before = model.module(tokens)
    model.load(flatten(other))
    assert torch.equal(model.module(tokens), other(tokens))
    assert not torch.equal(model.module(tokens), before)
    first = 0
    for name, parameter in model.module.named_parameters():
        outputs = model.module(tokens)
        model.vector[first : first + parameter.numel()] += 0.01 * torch.randn(parameter.numel())
        assert not torch.equal(model.module(tokens), outputs), f"{name} is not read from the vector"
        first += parameter.numel()
    assert first == len(model.vector)


def test_training_writes_the_flat_vector(model: FlatModel, tokens: Tensor) -> None:
    """A step on one batch against autograd's gradient, and each part of the vector moves."""
    labels = torch.arange(6) * 13
    reference = CharLSTM((80,), 80)
    FlatModel(reference)
    torch.nn.utils.vector_to_parameters(model.vector.clone(), reference.parameters())
    F.cross_entropy(reference(tokens), labels).backward()
    gradient = torch.cat([parameter.grad.ravel() for parameter in reference.parameters() if parameter.grad is not None])
    before = model.vector.clone()
    whole = LocalTraining(TRAINING.optimizer, num_epochs=1, batch_size=6)
    model.train(before, [Client(tokens, labels, np.random.SeedSequence(0))], whole)
    torch.testing.assert_close(model.vector, before - 0.5 * gradient, rtol=1e-4, atol=1e-6)
    assert torch.equal(flatten(model.module), model.vector)


def test_training_learns_and_repeats_bit_for_bit(model: FlatModel, tokens: Tensor) -> None:
    labels = torch.tensor([0, 79, 0, 79, 0, 79])
    start, results = model.vector.clone(), []
    for _ in range(2):
        model.load(start)
        (before,) = model.score([(tokens, labels)])
        for epoch in range(3):
            model.train(model.vector, [Client(tokens, labels, np.random.SeedSequence(epoch))], TRAINING)
        (after,) = model.score([(tokens, labels)])
        assert after["loss"] < before["loss"]
        results.append(model.vector.clone())
    assert torch.equal(results[0], results[1])
