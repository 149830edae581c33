"""Examples with a class at each of several places, as the characters of a text: every place counts once, everywhere.

If these failed, runs on text would be scored on something else than the share of characters that are predicted, or a
group of clients would learn something else than each of them alone.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from torch import Tensor, nn

from models.char_conv import CharConv
from models.char_transformer import CharTransformer
from models.lstm import CharLSTM, CharLSTMEachStep
from models.vit_tiny import TransformerBlock
from perfedavg.metrics import METRICS
from perfedavg.settings import OptimizerConfig
from perfedavg.training.client_models import Client, Query
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.stacked_model import StackedModel

LENGTH, CLASSES = 12, 7
SIZES = (9, 5, 2)
TRAINING = LocalTraining(OptimizerConfig("sgd", 0.3), num_epochs=2, batch_size=4)
EACH_STEP: list[Callable[..., nn.Module]] = [CharLSTMEachStep, CharConv, CharTransformer]


def built(kind: Callable[..., nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind((LENGTH,), CLASSES).double()


def texts(client: int, size: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, CLASSES, (size, LENGTH + 1), generator=torch.Generator().manual_seed(client))
    return tokens[:, :-1], tokens[:, 1:]


def clients() -> list[Client]:
    return [
        Client(*texts(client, size), np.random.SeedSequence(5, spawn_key=(client,)))
        for client, size in enumerate(SIZES)
    ]


@pytest.mark.parametrize("kind", EACH_STEP)
def test_a_place_is_predicted_from_those_up_to_it(kind: Callable[..., nn.Module]) -> None:
    model = built(kind).eval()
    tokens, _ = texts(0, 2)
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % CLASSES
    before, after = model(tokens), model(changed)
    assert before.shape == (2, CLASSES, LENGTH)
    assert torch.equal(before[:, :, :5], after[:, :, :5])
    assert all(not torch.equal(before[:, :, place], after[:, :, place]) for place in range(5, LENGTH))


def test_the_last_step_is_that_of_the_model_for_one_character() -> None:
    each, last = built(CharLSTMEachStep), built(CharLSTM)
    torch.testing.assert_close(each(texts(0, 3)[0])[:, :, -1], last(texts(0, 3)[0]))


def test_a_block_attends_to_all_tokens_unless_it_is_causal() -> None:
    """Those of images are as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        block = TransformerBlock().eval()
        tokens = torch.randn(1, 4, 64)
    changed = tokens.clone()
    changed[:, 3] += 1
    assert not torch.equal(block(tokens)[:, 0], block(changed)[:, 0])


@pytest.mark.parametrize("kind", EACH_STEP)
def test_scores_are_means_over_characters(kind: Callable[..., nn.Module]) -> None:
    model = built(kind).eval()
    inputs, labels = texts(1, 600)  # more than are scored at a time
    outputs = model(inputs)
    (score,) = FlatModel(model).score([(inputs, labels)], {"macro_f1": METRICS["macro_f1"]})
    predicted = outputs.argmax(dim=1)
    assert score["accuracy"] == (predicted == labels).sum().item() / (600 * LENGTH)
    expected = F.cross_entropy(outputs.transpose(1, 2).reshape(-1, CLASSES), labels.reshape(-1)).item()
    assert score["loss"] == pytest.approx(expected, rel=1e-12)
    expected_f1 = f1_score(labels.flatten().numpy(), predicted.flatten().numpy(), average="macro")
    assert score["macro_f1"] == pytest.approx(expected_f1, rel=1e-12)


@pytest.mark.parametrize("kind", [CharConv, CharTransformer])
def test_a_group_trains_and_is_scored_as_each_client_alone(kind: Callable[..., nn.Module]) -> None:
    """With dropout's masks, padded batches and clients that end early."""
    model = built(kind)
    start, group = flatten(model), StackedModel(model, len(SIZES))
    losses = group.train(start, clients(), TRAINING)
    scores = group.score([texts(9 + client, size) for client, size in enumerate(SIZES)])
    for client, alone in enumerate(clients()):
        flat = FlatModel(model)
        assert losses[client] == pytest.approx(flat.train(start, [alone], TRAINING)[0], rel=1e-9)
        torch.testing.assert_close(group.parameters[client], flat.vector, rtol=1e-9, atol=1e-11)
        (score,) = flat.score([texts(9 + client, SIZES[client])])
        assert scores[client]["accuracy"] == score["accuracy"]
        assert scores[client]["loss"] == pytest.approx(score["loss"], rel=1e-9)


def test_second_derivatives_go_through_the_transformer() -> None:
    """Against differences of the loss after training, along one direction."""
    model = built(CharTransformer).eval()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    start, (client, *_) = flatten(model), clients()
    one_epoch = LocalTraining(TRAINING.optimizer, num_epochs=1, batch_size=4)
    query = Query(*texts(20, 6), dropout_seed=0)
    group = StackedModel(model, 1)
    gradients, _ = group.gradients_through_training(start, [client], [query], one_epoch)
    direction = torch.randn(len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat, values = FlatModel(model), []
    for step in (-1e-5, 1e-5):
        flat.train(start + step * direction, [client], one_epoch)
        (score,) = flat.score([(query.inputs, query.labels)])
        values.append(score["loss"])
    assert float(gradients[0] @ direction) == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-5)


def test_it_learns_what_follows() -> None:
    """Each character is the one after the one before, modulo their number: after a few steps nearly all are right."""
    first = torch.arange(CLASSES).repeat(4)[:, None]
    tokens = (first + torch.arange(LENGTH + 1)) % CLASSES
    flat = FlatModel(built(CharTransformer))
    training = LocalTraining(OptimizerConfig("adam", 0.003), num_epochs=8, batch_size=7)
    flat.train(flat.vector.clone(), [Client(tokens[:, :-1], tokens[:, 1:], np.random.SeedSequence(0))], training)
    (score,) = flat.score([(tokens[:, :-1], tokens[:, 1:])])
    assert score["accuracy"] > 0.9
