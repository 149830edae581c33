"""Methods whose clients keep layers of their own: each against a federation in plain torch, and its special cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from helpers import Examples, digits_dataset, make_config
from torch import Tensor, nn

from perfedavg.contracts import FederatedDataset
from perfedavg.engine.client_states import StatesInMemory
from perfedavg.engine.cohorts import draw_cohort
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import CohortTask, ScoringTask
from perfedavg.methods import METHODS
from perfedavg.methods.base import Method
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.flat_model import flatten
from perfedavg.training.layout import Layout, count_buffer_entries

RATE, ROUNDS, EPOCHS, ADAPTING = 0.2, 3, 2, 2
SIZES = (8, 5, 3, 6, 7, 4)
"""Five clients that train, two a round, and one unseen."""
TRAINING, UNSEEN = (0, 1, 2, 3, 4), 5
BODY, NORM, HEAD = ("0.weight", "0.bias"), ("1.weight", "1.bias"), ("3.weight", "3.bias")
STATISTICS = ("1.running_mean", "1.running_var")
Values = dict[str, Tensor]


def network(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Module:
    """In float64, the same one in every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        normalization = norm(6) if norm is nn.BatchNorm1d else nn.GroupNorm(2, 6)
        model = nn.Sequential(nn.Linear(4, 6), normalization, nn.Tanh(), nn.Linear(6, 3))
        for parameter in model[1].parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
        return model.double()


class Clients:
    """Clients with random examples around points of their own."""

    fingerprint = "personal layers"
    train_client_ids = TRAINING
    unseen_client_ids = (UNSEEN,)

    def num_train_examples(self, client_id: int) -> int:
        return SIZES[client_id]

    def client_data(self, client_id: int) -> Examples:
        generator = torch.Generator().manual_seed(client_id)
        size = SIZES[client_id] + 7
        inputs = torch.randn(4, generator=generator, dtype=torch.float64) + torch.randn(
            size, 4, generator=generator, dtype=torch.float64
        )
        labels = torch.randint(0, 3, (size,), generator=generator)
        return Examples(inputs[:-7], labels[:-7], inputs[-7:], labels[-7:])


def config_of(method: Method, client_batching: int = 1) -> ExperimentConfig:
    """Full batches, so that a step does not depend on the order of examples."""
    sgd = OptimizerConfig("sgd", RATE)
    return make_config(
        num_clients=None,
        cohort_size=2,
        batch_size=1000,
        fedavg=PhaseConfig(ROUNDS, EPOCHS, sgd, OptimizerConfig("sgd", 1.0), method=method),
        fine_tune=None,
        num_personalization_epochs=ADAPTING,
        client_batching=client_batching,
    )


def values_of(model: nn.Module) -> Values:
    return {name: value.clone() for name, value in model.state_dict().items() if value.is_floating_point()}


def descend(model: nn.Module, client_id: int, trained: Sequence[str], steps: int) -> None:
    model.train()
    data = Clients().client_data(client_id)
    parameters = [parameter for name, parameter in model.named_parameters() if name in trained]
    for _ in range(steps):
        loss = F.cross_entropy(model(data.train_inputs), data.train_labels)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data -= RATE * gradient


@dataclasses.dataclass
class Federation:
    """What a method does, in plain torch.

    kept: the values that a client keeps.  shared: those of which the server takes the mean.
    passes: what a client trains in a round, one after the other, and in how many steps.  adapts: what personalizes.
    """

    kept: Sequence[str]
    shared: Sequence[str]
    passes: Sequence[tuple[Sequence[str], int]]
    adapts: Sequence[str]
    norm: type[nn.Module] = nn.BatchNorm1d

    def run(self, config: ExperimentConfig) -> None:
        self.server = values_of(network(self.norm))
        self.own: dict[int, Values] = {}
        for round_number in range(1, ROUNDS + 1):
            cohort = draw_cohort(config, TRAINING, Phase.FEDAVG, round_number)
            trained = {}
            for client_id in cohort:
                model = self.model_of(client_id)
                for names, steps in self.passes:
                    descend(model, client_id, names, steps)
                trained[client_id] = values_of(model)
                self.own[client_id] = {name: trained[client_id][name] for name in self.kept}
            num_examples = sum(SIZES[client_id] for client_id in cohort)
            for name in self.shared:
                weighted = [SIZES[client_id] / num_examples * trained[client_id][name] for client_id in cohort]
                self.server[name] = torch.stack(weighted).sum(0)

    def model_of(self, client_id: int) -> nn.Module:
        model = network(self.norm)
        model.load_state_dict({**self.server, **self.own.get(client_id, {})}, strict=False)
        return model

    def losses(self, client_id: int) -> tuple[float, float]:
        """On the client's test part, before and after personalization."""
        model, data, found = self.model_of(client_id), Clients().client_data(client_id), []
        for steps in (0, ADAPTING):
            descend(model, client_id, self.adapts, steps)
            model.eval()
            found.append(F.cross_entropy(model(data.test_inputs), data.test_labels).item())
        return found[0], found[1]


def run(
    config: ExperimentConfig,
    model: nn.Module,
    clients: FederatedDataset,
    client_ids: Sequence[int],
    num_slots: int = 1,
) -> tuple[Tensor, StatesInMemory, dict[int, ClientScore]]:
    """The global model, what clients keep, and the scores of some clients with that."""
    executor = LocalExecutor(config, model, clients, num_slots=num_slots)
    state = ExperimentState.fresh(config, flatten(model), count_buffer_entries(model))
    outcome = run_experiment(config, executor, clients, state)
    assert isinstance(state.client_states, StatesInMemory)
    task = ScoringTask(Phase.FEDAVG, config.fedavg.num_rounds, tuple(client_ids), states=state.client_states)
    scores = {score.client_id: score for score in executor.score(task, outcome.parameters)}
    return outcome.parameters, state.client_states, scores


ALL = (*BODY, *NORM, *HEAD)
REPRESENTATION = (*BODY, *NORM)
WITH_STATISTICS = (*REPRESENTATION, *STATISTICS)
CASES: dict[str, tuple[Method, Federation]] = {
    "fedper": (METHODS["fedper"](), Federation(HEAD, WITH_STATISTICS, [(ALL, EPOCHS)], ALL)),
    "fedper, first layer": (
        METHODS["fedper"](personal_layers="0.*"),
        Federation(BODY, (*NORM, *STATISTICS, *HEAD), [(ALL, EPOCHS)], ALL),
    ),
    "lg_fedavg": (METHODS["lg_fedavg"](), Federation(WITH_STATISTICS, HEAD, [(ALL, EPOCHS)], ALL)),
    "fedrep": (
        METHODS["fedrep"](head_epochs=4),
        Federation(HEAD, WITH_STATISTICS, [(HEAD, 4), (REPRESENTATION, EPOCHS)], HEAD),
    ),
    "fedbabu": (METHODS["fedbabu"](), Federation((), WITH_STATISTICS, [(REPRESENTATION, EPOCHS)], ALL)),
    "fedbabu, head": (
        METHODS["fedbabu"](personalization_trains="head"),
        Federation((), WITH_STATISTICS, [(REPRESENTATION, EPOCHS)], HEAD),
    ),
    "fedbabu, body": (
        METHODS["fedbabu"](personalization_trains="body"),
        Federation((), WITH_STATISTICS, [(REPRESENTATION, EPOCHS)], REPRESENTATION),
    ),
    "fedbn": (
        METHODS["fedbn"](),
        Federation((*NORM, *STATISTICS), (*ALL, *STATISTICS), [(ALL, EPOCHS)], ALL),
    ),
}


@pytest.mark.parametrize("client_batching", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_federation_in_plain_torch(name: str, client_batching: int) -> None:
    """The global model, and the losses of every client, trained or unseen, before and after personalization.

    In groups with GroupNorm, alone with BatchNorm, whose statistics are personal or shared as its layer is.
    """
    method, federation = CASES[name]
    norm = nn.BatchNorm1d if client_batching == 1 else nn.GroupNorm
    present = values_of(network(norm))
    kept, shared = ([one for one in names if one in present] for names in (federation.kept, federation.shared))
    federation = dataclasses.replace(federation, kept=kept, shared=shared, norm=norm)
    config, everybody = config_of(method, client_batching), (*TRAINING, UNSEEN)
    federation.run(config)
    parameters, states, scores = run(config, network(norm), Clients(), everybody)
    expected = torch.cat([federation.server[one].flatten() for one in Layout.of(network(norm)).places])
    torch.testing.assert_close(parameters, expected, rtol=1e-10, atol=1e-12)
    assert set(states.current) == set(federation.own if kept else ()), "only who trained keeps anything"
    for client_id in everybody:
        found = scores[client_id].initial["loss"], scores[client_id].personalized["loss"]
        assert found == pytest.approx(federation.losses(client_id), rel=1e-9)
    assert set(TRAINING) - set(federation.own), "one that never trained has none"


def build_with_dropout() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 10))


DIGITS = digits_dataset(20)


def on_digits(method: Method) -> tuple[Tensor, dict[int, ClientScore]]:
    """With dropout, small batches and a server with momentum."""
    phase = PhaseConfig(2, 1, OptimizerConfig("sgd", 0.1), OptimizerConfig("momentum", 1.0), method=method)
    config = make_config(fedavg=phase, fine_tune=None, client_batching=3)
    everybody = (*DIGITS.train_client_ids, *DIGITS.unseen_client_ids)
    parameters, _, scores = run(config, build_with_dropout(), DIGITS, everybody)
    return parameters, scores


NONE_OF_THEIR_OWN = {
    "fedper": {"personal_layers": "none"},
    "fedrep": {"personal_layers": "none"},
    "fedbabu": {"personal_layers": "none"},
    "lg_fedavg": {"personal_layers": "none"},
    "fedbn": {},
}
"""Of a model without normalization layers."""


@pytest.mark.parametrize("name", NONE_OF_THEIR_OWN)
def test_without_layers_of_their_own_it_is_fedavg_to_the_bit(name: str) -> None:
    """The model, and every client's scores."""
    parameters, scores = on_digits(METHODS[name](**NONE_OF_THEIR_OWN[name]))
    expected, expected_scores = on_digits(METHODS["fedavg"]())
    assert torch.equal(parameters, expected)
    assert scores == expected_scores


def test_lg_fedavg_is_fedper_with_the_other_layers_personal() -> None:
    parameters, scores = on_digits(METHODS["lg_fedavg"]())
    mirrored, mirrored_scores = on_digits(METHODS["fedper"](personal_layers="1.*"))
    assert torch.equal(parameters, mirrored)
    assert scores == mirrored_scores
    assert not torch.equal(parameters, on_digits(METHODS["fedper"]())[0])


@pytest.mark.parametrize(
    ("name", "kept"), [("fedper", "4.*"), ("fedrep", "4.*"), ("fedbabu", "4.*"), ("lg_fedavg", "1.*")]
)
def test_what_is_not_sent_stays_initial_in_the_global_model_to_the_bit(name: str, kept: str) -> None:
    """Whatever the server's momentum; so it never left the client."""
    parameters, _ = on_digits(METHODS[name]())
    layout, initial = Layout.of(build_with_dropout()), flatten(build_with_dropout())
    columns = layout.columns(layout.names(kept))
    others = layout.columns(layout.others(layout.names(kept)))
    assert torch.equal(columns.take(parameters[None]), columns.take(initial[None]))
    assert not torch.equal(others.take(parameters[None]), others.take(initial[None]))


def test_the_head_and_the_body_see_their_examples_in_other_orders() -> None:
    """FedRep's two passes are not over the same batches again; with one epoch each, only the seeds tell them apart."""
    seen: list[list[int]] = []

    def record(outputs: Tensor, labels: Tensor) -> Tensor:
        if outputs.requires_grad:
            seen.append(labels.tolist())
        return F.cross_entropy(outputs, labels)

    phase = PhaseConfig(
        1, 1, OptimizerConfig("sgd", RATE), OptimizerConfig("sgd", 1.0), method=METHODS["fedrep"](head_epochs=1)
    )
    config = make_config(num_clients=None, cohort_size=1, batch_size=1, fedavg=phase, fine_tune=None)
    executor = LocalExecutor(config, network(nn.GroupNorm), Clients(), loss_function=record)
    seen.clear()
    executor.train(CohortTask(Phase.FEDAVG, 1, (0,), SIZES[0]), flatten(network(nn.GroupNorm)))
    head, body = seen[: SIZES[0]], seen[SIZES[0] :]
    assert len(head) == len(body)
    assert sorted(map(tuple, head)) == sorted(map(tuple, body))
    assert head != body
