"""Methods with a second model or local steps of their own: in groups as alone, with buffers, and what clients keep."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from second_models import SIZES, TRAINING, Scored, image_clients, models_of, network
from torch import Tensor, nn

from perfedavg.methods import APFL, Ditto, FedAvg, Method, PerFedAvg, PFedMe
from perfedavg.settings import OptimizerConfig
from perfedavg.training.client_models import Batch, Client
from perfedavg.training.flat_model import flatten
from perfedavg.training.local_training import LocalTraining

METHODS = {
    "ditto": Ditto(ditto_epochs=1),
    "pfedme": PFedMe(pfedme_steps=2, pfedme_eta=0.02),
    "apfl": APFL(apfl_adaptive=True),
    "first order": PerFedAvg(per_fedavg_beta=0.1),
    "hessian-free": PerFedAvg(per_fedavg_beta=0.1, per_fedavg_variant="hf", per_fedavg_delta=0.01),
}


def kept_by(clients: list[Client]) -> list[dict[str, Tensor]]:
    return [{name: value.clone() for name, value in client.state.items()} for client in clients]


def states_before(method: Method, start: Tensor) -> list[dict[str, Tensor]]:
    """Some clients have trained before."""
    if not method.keeps_state:
        return [{} for _ in SIZES]
    return [{"model": start + 0.01 * client} if client % 2 else {} for client, _ in enumerate(SIZES)]


OPTIMIZERS = (OptimizerConfig("sgd", 0.1), OptimizerConfig("momentum", 0.05), OptimizerConfig("adam", 0.01))


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        (name, config)
        for name, method in METHODS.items()
        for config in OPTIMIZERS
        if method.problem_with(config) is None
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_group_is_its_clients_one_by_one(name: str, optimizer: OptimizerConfig) -> None:
    """With the same dropout masks, though clients end at different steps."""
    method, model, start = METHODS[name], network(0.4), flatten(network())
    training = LocalTraining(optimizer, num_epochs=2, batch_size=4)
    alone, expected = image_clients(states=states_before(method, start)), []
    models = models_of(model, 1)
    for client in alone:
        update, losses = method.update(models, start, [client], training)
        scored = Scored(models)
        client.state = kept_by([client])[0]
        method.personalize(models, start, [client], training, scored)
        expected.append((update[0], losses[0], client.state, scored.after[0]))
    group, together = models_of(model, len(SIZES) + 1), image_clients(states=states_before(method, start))
    group.parameters.fill_(torch.nan)
    updates, losses = method.update(group, start, together, training)
    for client, state in zip(together, kept_by(together), strict=True):
        client.state = state
    scored = Scored(group)
    method.personalize(group, start, together, training, scored)
    actual = list(zip(updates, losses, kept_by(together), scored.after, strict=True))
    torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)
    assert min(update.abs().max() for update in updates) > 1e-3, "every client moves"


@pytest.mark.parametrize("name", METHODS)
def test_a_client_that_diverges_diverges_alone(name: str) -> None:
    method, start = METHODS[name], flatten(network())
    models, well, sick = models_of(network(0.4), len(SIZES)), image_clients(), image_clients()
    updates, _ = method.update(models, start, well, TRAINING)
    kept = kept_by(well)
    sick[0].inputs.mul_(torch.nan)
    sick_updates, _ = method.update(models, start, sick, TRAINING)
    assert not sick_updates[0].isfinite().all()
    assert torch.equal(sick_updates[1:], updates[1:])
    for mine, theirs in zip(kept_by(sick)[1:], kept[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.needs_float32])
@pytest.mark.parametrize("group", [1, 2])
def test_bf16_points_where_float32_does(group: int, name: str) -> None:
    model = network().float()
    rows = {}
    for precision in ("float32", "bf16"):
        clients = image_clients((12, 9)[:group])
        for client in clients:
            client.inputs = client.inputs.float()
        updates, _ = METHODS[name].update(
            models_of(model, group, precision=precision), flatten(model), clients, TRAINING
        )
        kept = [client.state["model"] - flatten(model) for client in clients if client.state]
        rows[precision] = torch.cat([*updates, *kept]).clone()
    exact, rounded = rows["float32"], rows["bf16"]
    assert not torch.equal(rounded, exact)
    assert torch.linalg.vector_norm(rounded - exact) < 0.1 * torch.linalg.vector_norm(exact)


@pytest.mark.parametrize("name", METHODS)
def test_a_round_costs_what_the_time_to_go_takes_it_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In passes through a model, forward and backward, of which a local step of FedAvg is one."""
    method = replace(METHODS[name], **({"ditto_epochs": None} if name == "ditto" else {}))
    models, num_passes = models_of(network(), 1), 0
    training_loss = models._training_loss

    def counting(batch: Batch) -> Tensor:
        nonlocal num_passes
        num_passes += 1
        return training_loss(batch)

    monkeypatch.setattr(models, "_training_loss", counting)
    method.update(models, flatten(network()), image_clients((14,)), TRAINING)
    assert num_passes == method.round_cost(TRAINING.count_steps, 14)


@pytest.mark.parametrize("name", METHODS)
def test_clients_keep_one_model_or_nothing(name: str) -> None:
    """Of the model's own type; the share of an adaptive mixture is one number more."""
    model = network().float()
    start, (client,) = flatten(model), image_clients((12,))
    client.inputs = client.inputs.float()
    METHODS[name].update(models_of(model, 1), start, [client], TRAINING)
    assert bool(client.state) == METHODS[name].keeps_state
    if client.state:
        assert client.state["model"].shape == start.shape
        assert {value.dtype for value in client.state.values()} == {torch.float32}
        assert sum(value.numel() for value in client.state.values()) <= len(start) + 1


@pytest.mark.parametrize("method", [Ditto(ditto_lambda=25.0), PFedMe(pfedme_lambda=25.0)], ids=["ditto", "pfedme"])
def test_a_pull_that_must_diverge_is_refused(method: Method) -> None:
    """A step leads from w to 1 - rate * lambda times the distance, and the loss adds to that."""
    assert "a pull of 25 throws models ever further; use one below 20" in str(
        method.problem_with(OptimizerConfig("sgd", 0.1))
    )
    assert method.problem_with(OptimizerConfig("sgd", 0.07)) is None
    assert method.problem_with(OptimizerConfig("adam", 0.08)) is None


NUM_STATISTICS = 2 * 64


def normed() -> nn.Module:
    """Its running statistics are of the inputs, so they follow from the batches and not from the weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 3)).double()


WHOLE = LocalTraining(OptimizerConfig("sgd", 0.1), num_epochs=3, batch_size=20)


def statistics_after(passes: int, start: Tensor) -> Tensor:
    """After so many batches of all examples."""
    (client,) = image_clients((14,))
    model = normed()
    for _ in range(passes):
        model(client.inputs)
    return torch.cat([model[1].running_mean, model[1].running_var])


@pytest.mark.parametrize(("name", "passes"), [("pfedme", 2), ("first order", 2), ("hessian-free", 4)])
def test_statistics_move_with_each_batch_and_with_nothing_else(name: str, passes: int) -> None:
    """No rate, no share and no pull reaches them. passes: through the model, a step."""
    method, start = METHODS[name], flatten(normed())
    (update,), _ = method.update(models_of(normed(), 1), start, image_clients((14,)), WHOLE)
    actual = (start + update)[-NUM_STATISTICS:]
    torch.testing.assert_close(actual, statistics_after(3 * passes, start), rtol=1e-10, atol=1e-12)


def test_mixing_at_the_server_leaves_statistics_alone() -> None:
    start, models = flatten(normed()), models_of(normed(), 1)
    half, whole = (
        PFedMe(pfedme_beta=beta).update(models, start, image_clients((14,)), WHOLE)[0][0] for beta in (0.5, 1.0)
    )
    assert torch.equal(half[-NUM_STATISTICS:], whole[-NUM_STATISTICS:])
    assert torch.equal(half[:-NUM_STATISTICS], 0.5 * whole[:-NUM_STATISTICS])


@pytest.mark.parametrize("name", ["ditto", "apfl"])
def test_a_personal_model_has_statistics_of_its_own(name: str) -> None:
    """Those of the global model are FedAvg's, to the bit, and the next round goes on from the kept ones."""
    method, start, models = METHODS[name], flatten(normed()), models_of(normed(), 1)
    (client,) = image_clients((14,))
    for _ in range(2):
        (update,), _ = method.update(models, start, [client], WHOLE)
        client.state = kept_by([client])[0]
    (expected,), _ = FedAvg().update(models, start, image_clients((14,)), WHOLE)
    assert torch.equal(update, expected)
    if name == "ditto":
        kept = client.state["model"][-NUM_STATISTICS:]
        torch.testing.assert_close(kept, statistics_after(2, start), rtol=1e-10, atol=1e-12)


def test_without_a_share_statistics_are_fedavgs_to_the_bit_and_with_all_the_clients_own() -> None:
    start, models = flatten(normed()), models_of(normed(), 1)
    own = flatten(normed()) + 0.1
    mine, fedavgs, local = Scored(models), Scored(models), Scored(models)
    for alpha, scored in ((0.0, mine), (1.0, local)):
        (client,) = image_clients((14,), states=[{"model": own.clone()}])
        APFL(apfl_alpha=alpha).personalize(models, start, [client], WHOLE, scored)
    FedAvg().personalize(models, start, image_clients((14,)), WHOLE, fedavgs)
    assert all(torch.equal(mine.after[0][epoch], fedavgs.after[0][epoch]) for epoch in range(4))
    expected = Scored(models)
    models.train(own, image_clients((14,)), WHOLE, after_epochs=expected)
    for epoch in (1, 2, 3):
        torch.testing.assert_close(local.after[0][epoch], expected.after[0][epoch], rtol=1e-10, atol=1e-12)
