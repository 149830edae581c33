"""Models with buffers: running statistics are trained, averaged and saved exactly, and no optimizer touches them."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import digits_dataset, make_config, with_method
from torch import Tensor, nn

import utils
from datasets.clients.split import SplitDataset
from perfedavg.engine.client_states import BUFFERS
from perfedavg.engine.cohorts import draw_cohort
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.engine.tasks import CohortTask, ScoringTask
from perfedavg.methods import FOMAML, Ditto
from perfedavg.recording.checkpoint import Checkpoints, RunIdentity
from perfedavg.recording.client_states import StateFiles
from perfedavg.seeding import Purpose, seed_sequence, torch_seeds
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.client_models import Client, Query
from perfedavg.training.flat_model import FlatModel, flatten, unflatten_into
from perfedavg.training.layout import count_buffer_entries, entries_of
from perfedavg.training.local_training import LocalTraining
from perfedavg.training.stacked_model import StackedModel

SGD = OptimizerConfig("sgd", 0.1)
CONFIG = make_config(fedavg=PhaseConfig(1, 2, SGD, OptimizerConfig("sgd", 1.0)), fine_tune=None, batch_size=8)
NUM_BUFFER_ENTRIES = 2 * (4 + 16)
"""Mean and variance of the channels of two layers of BatchNorm."""


@cache
def dataset() -> SplitDataset:
    return digits_dataset(20)


@cache
def normed() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 4, 5, stride=4),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(144, 16, bias=False),
            nn.BatchNorm1d(16, momentum=0.3),
            nn.ReLU(),
            nn.Linear(16, 10),
        )


def fresh(config: ExperimentConfig) -> ExperimentState:
    return ExperimentState.fresh(config, flatten(normed()), count_buffer_entries(normed()))


def run(config: ExperimentConfig, slots: int = 1, state: ExperimentState | None = None) -> Tensor:
    executor = LocalExecutor(config, normed(), dataset(), num_slots=slots)
    return run_experiment(config, executor, dataset(), state or fresh(config)).parameters


def trained_alone(client_id: int, config: ExperimentConfig, round_number: int, start: Tensor) -> Tensor:
    """The model of a client after plain torch's training, with the batches that follow from its seed."""
    model = copy.deepcopy(normed())
    unflatten_into(model, start.clone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = dataset().client_data(client_id)
    seeds = seed_sequence(
        config.seed, Purpose.LOCAL_TRAINING, phase=Phase.FEDAVG, round_number=round_number, client_id=client_id
    )
    order = torch.Generator().manual_seed(torch_seeds(seeds, 2)[0])
    for _ in range(config.fedavg.num_local_epochs):
        for batch in torch.randperm(len(data.train_labels), generator=order).split(config.batch_size):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_inputs[batch]), data.train_labels[batch]).backward()
            optimizer.step()
    return flatten(model)


def test_a_round_is_plain_training_of_each_client_and_their_mean() -> None:
    """Parameters and running statistics; else statistics are lost, or those of one client enter another's."""
    cohort = draw_cohort(CONFIG, dataset().train_client_ids, Phase.FEDAVG, 1)
    start = flatten(normed())
    trained = [trained_alone(client_id, CONFIG, 1, start) for client_id in cohort]
    sizes = torch.tensor([dataset().num_train_examples(client_id) for client_id in cohort], dtype=torch.float64)
    mean = (torch.stack(trained).double() * sizes[:, None]).sum(0) / sizes.sum()
    result = run(CONFIG)
    torch.testing.assert_close(result, mean.float(), rtol=1e-4, atol=1e-5)
    assert not torch.equal(result[-NUM_BUFFER_ENTRIES:], start[-NUM_BUFFER_ENTRIES:])


def test_slots_do_not_change_a_bit() -> None:
    config = dataclasses.replace(CONFIG, fedavg=dataclasses.replace(CONFIG.fedavg, num_rounds=3))
    assert torch.equal(run(config, 1), run(config, 3))


SERVERS = [
    OptimizerConfig("sgd", 0.25),
    OptimizerConfig("momentum", 0.5),
    OptimizerConfig("adam", 0.01),
    OptimizerConfig("yogi", 0.01),
    OptimizerConfig("adagrad", 0.01),
]


@pytest.mark.parametrize("server", SERVERS, ids=lambda server: server.name)
def test_no_server_optimizer_touches_statistics(server: OptimizerConfig) -> None:
    """Adam's step would make a variance negative, momentum would let it overshoot."""
    settings = dataclasses.replace(CONFIG.fedavg, server_optimizer=server)
    other = run(dataclasses.replace(CONFIG, fedavg=settings))
    plain = run(CONFIG)
    assert torch.equal(other[-NUM_BUFFER_ENTRIES:], plain[-NUM_BUFFER_ENTRIES:])
    assert not torch.equal(other[:-NUM_BUFFER_ENTRIES], plain[:-NUM_BUFFER_ENTRIES])


CLIENTS = ["momentum", "adam", "yogi", "adagrad"]


@pytest.mark.parametrize("name", CLIENTS)
def test_no_client_optimizer_touches_statistics(name: str) -> None:
    """At a rate at which nothing is learned, statistics are what forward passes alone make of them."""
    client = Client(*_examples(20), seeds=seed_sequence(0, Purpose.LOCAL_TRAINING))
    training = LocalTraining(OptimizerConfig(name, 1e-20), num_epochs=2, batch_size=8)
    models = FlatModel(normed())
    models.train(flatten(normed()), [client], training)
    plain = FlatModel(normed())
    plain.train(flatten(normed()), [client], dataclasses.replace(training, optimizer=OptimizerConfig("sgd", 1e-20)))
    assert torch.equal(models.vector[-NUM_BUFFER_ENTRIES:], plain.vector[-NUM_BUFFER_ENTRIES:])


def test_a_penalty_does_not_pull_on_statistics() -> None:
    """Neither with plain SGD nor with another optimizer, whose step would make a gradient of any size one of 1."""

    def pull(parameters: Tensor) -> Tensor:
        pulls = torch.zeros_like(parameters)
        pulls[:, -NUM_BUFFER_ENTRIES:] = 1.0
        return pulls

    for optimizer in (SGD, OptimizerConfig("adam", 0.01)):
        training = LocalTraining(optimizer, num_epochs=1, batch_size=8)
        client = Client(*_examples(20), seeds=seed_sequence(0, Purpose.LOCAL_TRAINING))
        models, pulled = FlatModel(normed()), FlatModel(normed())
        models.train(flatten(normed()), [client], training)
        pulled.train(flatten(normed()), [client], training, pull)
        assert torch.equal(models.vector, pulled.vector)


def test_a_method_that_sends_gradients_sends_how_far_statistics_moved() -> None:
    """Of its own steps and of the query. The server then adds their mean, at a rate of its own for gradients."""
    fomaml = with_method(CONFIG, Phase.FEDAVG, FOMAML())
    server = OptimizerConfig("adam", 0.001)
    config = dataclasses.replace(fomaml, fedavg=dataclasses.replace(fomaml.fedavg, server_optimizer=server))
    cohort = draw_cohort(config, dataset().train_client_ids, Phase.FEDAVG, 1)
    start, models = flatten(normed()), FlatModel(normed())
    moved = []
    for client_id in cohort:
        data = dataset().client_data(client_id)
        seeds = seed_sequence(config.seed, Purpose.LOCAL_TRAINING, phase=1, round_number=1, client_id=client_id)
        method = config.fedavg.method
        method.update(models, start, [Client(data.train_inputs, data.train_labels, seeds)], LocalTraining(SGD, 2, 8))
        moved.append((models.vector - start)[-NUM_BUFFER_ENTRIES:])
    expected = start[-NUM_BUFFER_ENTRIES:] + torch.stack(moved).double().mean(0).float()
    torch.testing.assert_close(run(config)[-NUM_BUFFER_ENTRIES:], expected)


def test_counters_start_afresh_with_each_client_and_do_not_travel() -> None:
    """With momentum=None, a cumulative mean weighs each batch by the counter, which a client before may have left."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784, momentum=None), nn.Linear(784, 10))
    flat = FlatModel(model)
    client = Client(*_examples(16), seeds=seed_sequence(0, Purpose.LOCAL_TRAINING))
    training = LocalTraining(SGD, num_epochs=1, batch_size=8)
    results = []
    for _ in range(2):
        flat.train(flatten(model), [client], training)
        results.append(flat.vector.clone())
        assert flat.module[1].num_batches_tracked == 2
    assert torch.equal(*results)
    torch.testing.assert_close(flat.module[1].running_mean, client.inputs.flatten(1).mean(0))


def test_scoring_uses_the_statistics_and_leaves_them_alone() -> None:
    start = flatten(normed())
    start[-NUM_BUFFER_ENTRIES:] += torch.rand(NUM_BUFFER_ENTRIES, generator=torch.Generator().manual_seed(0))
    models = FlatModel(normed())
    models.load(start)
    inputs, labels = _examples(30)
    (score,) = models.score([(inputs, labels)])
    reference = copy.deepcopy(normed()).eval()
    unflatten_into(reference, start.clone())
    outputs = reference(inputs)
    assert score["loss"] == pytest.approx(F.cross_entropy(outputs, labels).item(), rel=1e-5)
    assert score["accuracy"] == (outputs.argmax(1) == labels).double().mean().item()
    assert torch.equal(models.vector, start)


LOCAL = dataclasses.replace(
    CONFIG, buffers="local", cohort_size=16, fedavg=dataclasses.replace(CONFIG.fedavg, num_rounds=2)
)
"""All training clients take part in both rounds."""


def test_local_statistics_stay_with_each_client_and_their_mean_is_the_servers() -> None:
    """In round 2, a client goes on from the mean of the parameters and its own statistics."""
    models, training = FlatModel(normed()), LocalTraining(SGD, 2, CONFIG.batch_size)

    def trained_from(client_id: int, round_number: int, start: Tensor) -> Tensor:
        data = dataset().client_data(client_id)
        place = {"phase": Phase.FEDAVG, "round_number": round_number, "client_id": client_id}
        seeds = seed_sequence(LOCAL.seed, Purpose.LOCAL_TRAINING, **place)
        models.train(start, [Client(data.train_inputs, data.train_labels, seeds)], training)
        return models.vector.clone()

    rows = [flatten(normed())] * 16
    clients = sorted(dataset().train_client_ids)
    weights = torch.tensor([dataset().num_train_examples(client_id) for client_id in clients], dtype=torch.float64)
    for round_number in (1, 2):
        mean = ((torch.stack(rows).double() * weights[:, None]).sum(0) / weights.sum()).float()
        starts = [torch.cat([mean[:-NUM_BUFFER_ENTRIES], row[-NUM_BUFFER_ENTRIES:]]) for row in rows]
        rows = [trained_from(client_id, round_number, start) for client_id, start in zip(clients, starts, strict=True)]
    expected = ((torch.stack(rows).double() * weights[:, None]).sum(0) / weights.sum()).float()
    state = fresh(LOCAL)
    result = run(LOCAL, state=state)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=1e-4)
    for client_id, row in zip(clients, rows, strict=True):
        kept = state.client_states.get(client_id)[BUFFERS]
        torch.testing.assert_close(kept, row[-NUM_BUFFER_ENTRIES:], rtol=1e-3, atol=1e-4)


def test_it_matters_whose_statistics_a_client_goes_on_from() -> None:
    """Where all take part in each round it does not for their mean, because each is a mean of what came before."""
    some = dataclasses.replace(LOCAL, cohort_size=8, fedavg=dataclasses.replace(LOCAL.fedavg, num_rounds=3))
    local, shared = run(some), run(dataclasses.replace(some, buffers="global"))
    assert torch.equal(local[:-NUM_BUFFER_ENTRIES], shared[:-NUM_BUFFER_ENTRIES]), "training does not read them"
    assert not torch.allclose(local[-NUM_BUFFER_ENTRIES:], shared[-NUM_BUFFER_ENTRIES:], rtol=1e-3, atol=1e-4)


def test_the_first_round_does_not_depend_on_whose_statistics_are() -> None:
    """Nobody has kept any: all start from the server's, and their mean is the server's again."""
    one = dataclasses.replace(LOCAL, fedavg=dataclasses.replace(CONFIG.fedavg, num_rounds=1))
    torch.testing.assert_close(run(one), run(dataclasses.replace(one, buffers="global")), rtol=1e-6, atol=1e-6)


def test_local_statistics_stand_beside_what_a_method_keeps() -> None:
    """A method does not see them, nor they it."""
    config = with_method(LOCAL, Phase.FEDAVG, Ditto())
    state = fresh(config)
    result = run(config, slots=2, state=state)
    assert set(state.client_states.get(0)) == {BUFFERS, "model"}
    assert torch.equal(result, run(LOCAL)), "the global path of Ditto is FedAvg's"


def test_a_client_is_scored_with_its_own_statistics_and_an_unseen_one_with_the_mean() -> None:
    state = fresh(LOCAL)
    start = run(LOCAL, state=state)
    executor = LocalExecutor(LOCAL, normed(), dataset())
    (seen,) = executor.score(ScoringTask(Phase.FEDAVG, 2, (3,), states=state.client_states), start)
    (unseen,) = executor.score(ScoringTask(Phase.FEDAVG, 2, (3,)), start)
    own = torch.cat([start[:-NUM_BUFFER_ENTRIES], state.client_states.get(3)[BUFFERS]])
    (given,) = executor.score(ScoringTask(Phase.FEDAVG, 2, (3,)), own)
    assert seen == given
    assert seen.initial != unseen.initial


def test_local_statistics_need_a_model_that_has_some() -> None:
    with pytest.raises(ValueError, match="--buffers local has no meaning for --model mlp: that model has no buffers"):
        utils.get_model(make_config(buffers="local"), dataset())
    utils.get_model(make_config(buffers="local", architecture="resnet8"), dataset())


class Scaled(nn.Module):
    """A constant that is saved with the model, of which groups and second derivatives make no trouble."""

    def __init__(self, width: int = 784) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 10)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, width))
        self.register_buffer("unsaved", torch.ones(width), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.linear(inputs.flatten(1) * self.scale * self.unsaved)
        return outputs


def test_constant_buffers_go_in_groups_and_come_from_the_vector() -> None:
    """A worker's own model has not the values of --initial_model, which reach it in the vector."""
    model = Scaled()
    start = flatten(model)
    start[-784:] = torch.linspace(2.0, 1.0, 784)
    clients = [Client(*_examples(size), seeds=seed_sequence(0, Purpose.LOCAL_TRAINING)) for size in (20, 12)]
    training = LocalTraining(OptimizerConfig("adam", 0.01), num_epochs=2, batch_size=8)
    single, group = FlatModel(model), StackedModel(model, 2)
    losses = group.train(start, clients, training)
    for row, client, loss in zip(group.parameters, clients, losses, strict=True):
        (alone,) = single.train(start, [client], training)
        torch.testing.assert_close(row, single.vector, rtol=1e-4, atol=1e-5)
        assert loss == pytest.approx(alone, rel=1e-4)
        assert torch.equal(row[-784:], start[-784:])
    gradients, _ = group.gradients_through_training(
        start, clients, [_query(client) for client in clients], dataclasses.replace(training, optimizer=SGD)
    )
    assert gradients.shape == (2, len(start))
    assert not gradients[:, -784:].any()


def test_a_vector_is_parameters_and_then_the_buffers_that_are_saved() -> None:
    assert list(entries_of(Scaled())) == ["linear.weight", "linear.bias", "scale"]
    assert count_buffer_entries(normed()) == NUM_BUFFER_ENTRIES
    assert list(entries_of(normed()))[-2:] == ["5.running_mean", "5.running_var"]


class Replacing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)
        self.register_buffer("mean", torch.zeros(784))

    def forward(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * inputs.flatten(1).mean(0)
        outputs: Tensor = self.linear(inputs.flatten(1) - self.mean)
        return outputs


def test_a_buffer_that_is_replaced_is_found() -> None:
    """It would pass from client to client, unseen."""
    models = FlatModel(Replacing())
    client = Client(*_examples(8), seeds=seed_sequence(0, Purpose.LOCAL_TRAINING))
    models.train(flatten(Replacing()), [client], LocalTraining(SGD, 1, 8))
    with pytest.raises(ValueError, match=r"Replacing puts a new tensor in the place of its buffer mean.*copy_"):
        models.load(flatten(Replacing()))


def test_a_resumed_run_goes_on_to_the_same_statistics(tmp_path: Path) -> None:
    adam = OptimizerConfig("adam", 0.01)
    config = dataclasses.replace(CONFIG, fedavg=PhaseConfig(4, 1, SGD, adam))
    identity = RunIdentity(config, dataset().fingerprint, {})
    checkpoints = Checkpoints(tmp_path / "checkpoint", identity, StateFiles(tmp_path / "client_states"))

    class StopError(Exception):
        pass

    class StopsAfterTwo:
        def __getattr__(self, name: str) -> Any:
            return lambda *of: None

        def checkpoint_due(self, state: ExperimentState) -> None:
            if state.num_rounds == 2:
                checkpoints.save(state)
                raise StopError

    with pytest.raises(StopError):
        run_experiment(config, LocalExecutor(config, normed(), dataset()), dataset(), fresh(config), [StopsAfterTwo()])
    state = checkpoints.load()
    assert state is not None
    assert state.server.num_buffer_entries == NUM_BUFFER_ENTRIES
    assert torch.equal(run(config, state=state), run(config))


@pytest.mark.parametrize(("value", "reason"), [(1e20, "scale the inputs"), (float("nan"), "training diverged")])
def test_statistics_that_cannot_be_added_are_refused(value: float, reason: str) -> None:
    class Explosive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(784, 10)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, inputs: Tensor) -> Tensor:
            self.seen.add_(value)
            outputs: Tensor = self.linear(inputs.flatten(1))
            return outputs

    executor = LocalExecutor(CONFIG, Explosive(), dataset())
    update = executor.train(CohortTask(Phase.FEDAVG, 1, (0, 1), 10_000), flatten(Explosive()))
    assert update.sum.weight == 0
    for report in update.reports:
        assert report.refused is not None
        assert report.refused.startswith(f"client {report.client_id}: its update is refused, because ")
        assert reason in report.refused


def _examples(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 1, 28, 28, generator=generator), torch.arange(count) % 10


def _query(client: Client) -> Query:
    return Query(client.inputs, client.labels, 0)
