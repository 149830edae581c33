"""Training of some layers alone: the others stay as they are, to the bit, and their gradients are not computed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from perfedavg.settings import OptimizerConfig
from perfedavg.training.client_models import Client, ClientModels, Query
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.optimizers import Optimizer
from perfedavg.training.stacked_model import StackedModel

RATE, STEPS, SIZES = 0.05, 3, (9, 6)
HEAD = ("4.weight", "4.bias")
MIDDLE = ("0.bias", "2.weight")
"""Neither neighbours nor whole layers."""
OPTIMIZERS: dict[str, tuple[OptimizerConfig, Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (OptimizerConfig("sgd", RATE), lambda trained: torch.optim.SGD(trained, RATE)),
    "momentum": (OptimizerConfig("momentum", RATE), lambda trained: torch.optim.SGD(trained, RATE, momentum=0.9)),
    "adam": (OptimizerConfig("adam", RATE), lambda trained: torch.optim.Adam(trained, RATE)),
}
MODELS: dict[str, Callable[[nn.Module, int], ClientModels]] = {
    "flat": lambda model, _: FlatModel(model),
    "stacked": StackedModel,
}


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def clients(sizes: Sequence[int] = SIZES) -> list[Client]:
    found = []
    for number, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(number)
        inputs = torch.randn(size, 5, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, 3, (size,), generator=generator)
        found.append(Client(inputs, labels, np.random.SeedSequence(7, spawn_key=(number,))))
    return found


def by_torch(client: Client, trained: Sequence[str], optimizer: str) -> Tensor:
    """The parameters after full-batch steps of torch's own optimizer over the parameters that are trained."""
    model = network()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    stepper = OPTIMIZERS[optimizer][1]([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(STEPS):
        stepper.zero_grad()
        F.cross_entropy(model(client.inputs), client.labels).backward()
        stepper.step()
    return flatten(model)


@pytest.mark.parametrize("trained", [HEAD, MIDDLE], ids=["head", "middle"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", MODELS)
def test_only_what_is_trained_moves(kind: str, optimizer: str, trained: tuple[str, ...]) -> None:
    group = clients() if kind == "stacked" else clients()[:1]
    models, start = MODELS[kind](network(), len(group)), flatten(network())
    how = LocalTraining(OPTIMIZERS[optimizer][0], STEPS, batch_size=100)
    models.train(start, group, how, trained=trained)
    frozen = models.layout.columns(models.layout.others(trained))
    for client, row in zip(group, models.parameters, strict=True):
        torch.testing.assert_close(row, by_torch(client, trained, optimizer), rtol=1e-11, atol=1e-12)
        assert torch.equal(frozen.take(row[None]), frozen.take(start[None]))
    again = models.parameters.clone()
    models.train(again, group, how)
    assert (models.parameters != again).all(), "afterwards all train"


@pytest.mark.parametrize("kind", MODELS)
def test_frozen_layers_have_gradients_of_zero_and_are_not_pulled(kind: str) -> None:
    """A penalty is of all columns, also of those that must stay."""
    group = clients() if kind == "stacked" else clients()[:1]
    models, start = MODELS[kind](network(), len(group)), flatten(network())
    queries = [Query(client.inputs, client.labels, 0) for client in group]
    models.load(start, len(group))
    whole, _ = models.gradients(queries)
    head, frozen = models.layout.columns(HEAD), models.layout.columns(models.layout.others(HEAD))
    with models.training_only(HEAD):
        part, _ = models.gradients(queries)
    torch.testing.assert_close(head.take(part), head.take(whole), rtol=1e-12, atol=1e-12)
    assert frozen.take(whole).all()
    assert not frozen.take(part).any()
    for optimizer, _ in OPTIMIZERS.values():
        models.train(start, group, LocalTraining(optimizer, 1, 100), penalty=torch.ones_like, trained=HEAD)
        assert torch.equal(frozen.take(models.parameters), frozen.take(start.expand_as(models.parameters)))


def arithmetic(models: ClientModels, trained: Sequence[str] | None) -> int:
    """FLOPs of the products of one step."""
    group = clients((20,) * len(models.parameters))

    def in_place(added: object, left: torch.Size, right: torch.Size, **options: object) -> int:
        return int(mm_flop(left, right))

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        models.train(flatten(network()), group, LocalTraining(OPTIMIZERS["sgd"][0], 1, 20), trained=trained)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_frozen_takes_no_arithmetic(kind: str) -> None:
    """With the body frozen nothing goes backward but the last layer's weight gradient; it has 21 of 117 weights."""
    models = MODELS[kind](network(), 2)
    models.load(flatten(network()), 1 if kind == "flat" else 2)
    forward, head = 2 * 20 * 117 * len(models.parameters), 2 * 20 * 21 * len(models.parameters)
    assert arithmetic(models, HEAD) == forward + head
    assert arithmetic(models, ("0.weight", "0.bias", "2.weight", "2.bias")) == arithmetic(models, None) - head


@pytest.mark.parametrize("kind", MODELS)
def test_each_client_may_start_from_a_row_of_its_own(kind: str) -> None:
    group = clients() if kind == "stacked" else clients()[:1]
    models, how = MODELS[kind](network(), len(group)), LocalTraining(OPTIMIZERS["sgd"][0], 1, 2)
    rows = torch.stack([flatten(network()) + 0.1 * place for place in range(len(group))])
    models.train(rows, group, how)
    for client, start, row in zip(group, rows, models.parameters, strict=True):
        alone = FlatModel(network())
        alone.train(start, [client], how)
        torch.testing.assert_close(row, alone.vector, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", MODELS)
def test_a_loop_over_the_steps_is_the_local_training(kind: str) -> None:
    group = clients() if kind == "stacked" else clients()[:1]
    start, how = flatten(network()), LocalTraining(OPTIMIZERS["adam"][0], 2, 4)
    models, others = (MODELS[kind](network(), len(group)) for _ in range(2))
    losses, told = models.train(start, group, how, after_epochs=lambda ended: None), []
    others.load(start, len(group))
    steps, optimizer = others.steps(group, how, told.append), Optimizer(how.optimizer, others.parameters)
    for batch in steps:
        steps.note(others.take_step(batch, optimizer))
    assert torch.equal(others.parameters, models.parameters)
    assert steps.losses == losses
    assert told[0] == dict.fromkeys(range(len(group)), 0)
    assert max(epoch for ended in told for epoch in ended.values()) == 2


def test_a_further_pass_has_another_order() -> None:
    """And the same one each time."""
    client = clients()[0]
    keys = [
        client.seeds.generate_state(2).tolist(),
        *(client.in_pass(n).seeds.generate_state(2).tolist() for n in (0, 1)),
    ]
    assert len({tuple(key) for key in keys}) == 3
    assert client.in_pass(1).seeds.generate_state(2).tolist() == keys[2]
    assert copy.copy(client).in_pass(0).inputs is client.inputs
