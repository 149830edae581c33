"""Per-FedAvg: local steps of MAML, without second derivatives or with differences of gradients in their place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers import make_config
from second_models import (
    CENTRES,
    RATE,
    SGD,
    SIZES,
    START,
    batches_of,
    clients_at_centres,
    dense_with_dropout,
    digits,
    gradient_at,
    image_clients,
    loss_at,
    models_of,
    network,
    quadratic_models,
)
from torch import Tensor, nn

from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.methods import FOMAML, Method, PerFedAvg
from perfedavg.settings import OptimizerConfig, PhaseConfig
from perfedavg.training.flat_model import flatten
from perfedavg.training.local_training import LocalTraining

BETA, NUM_STEPS = 0.3, 4


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("variant", "times"), [("fo", 1), ("hf", 2)])
def test_clients_with_a_quadratic_loss_have_a_closed_form(variant: str, times: int, group: int) -> None:
    """The gradient at the adapted model is (1 - alpha) (w - c), and the Hessian 1, for differences of any distance.

    So each step shrinks w - c by 1 - beta (1 - alpha), or (1 - alpha)^2 with the second derivatives.
    """
    method = PerFedAvg(per_fedavg_beta=BETA, per_fedavg_variant=variant, per_fedavg_delta=0.5)
    training = LocalTraining(SGD, 1, 10, num_steps=NUM_STEPS)
    clients = clients_at_centres()[:group]
    updates, _ = method.update(quadratic_models(group), START, clients, training)
    shrinkage = (1 - BETA * (1 - RATE) ** times) ** NUM_STEPS
    expected = CENTRES[:group] + shrinkage * (START - CENTRES[:group])
    torch.testing.assert_close(START + updates, expected, rtol=1e-12, atol=1e-12)


def final_model(method: Method, model: nn.Module, server_rate: float) -> Tensor:
    """After three rounds of one local step each, whose batch holds all of a client's examples."""
    server = OptimizerConfig("sgd", server_rate)
    phase = PhaseConfig(3, 1, SGD, server, num_local_steps=1, method=method)
    config = make_config(fedavg=phase, fine_tune=None, batch_size=1000)
    executor = LocalExecutor(config, model, digits())
    return run_experiment(config, executor, digits(), ExperimentState.fresh(config, flatten(model))).parameters


def test_one_first_order_step_is_fomaml_of_one_inner_step() -> None:
    """FOMAML's server goes beta times the mean gradient; here clients do, and the server to their mean.

    Both take the gradients on all of a client's examples, in another order, so they agree up to rounding.
    """
    model = nn.Sequential(*(layer for layer in dense_with_dropout() if not isinstance(layer, nn.Dropout)))
    first_order = final_model(PerFedAvg(per_fedavg_beta=BETA), model, server_rate=1.0)
    fomaml = final_model(FOMAML(support_fraction=1.0), model, server_rate=BETA)
    torch.testing.assert_close(first_order, fomaml, rtol=1e-5, atol=1e-6)
    assert torch.linalg.vector_norm(fomaml - flatten(model)) > 0.1
    with_second = final_model(PerFedAvg(per_fedavg_beta=BETA, per_fedavg_variant="hf"), model, server_rate=1.0)
    assert torch.linalg.vector_norm(with_second - fomaml) > 0.01


@pytest.mark.parametrize("group", [1, 2])
def test_the_difference_of_gradients_is_the_hessians_product(group: int) -> None:
    """Up to the square of delta, against autograd's, on batches that hold all of a client's examples."""
    model, alpha = network(), 0.5
    method = PerFedAvg(per_fedavg_beta=1.0, per_fedavg_variant="hf", per_fedavg_delta=1e-4)
    start, clients = flatten(model), image_clients((12, 9)[:group])
    training = LocalTraining(OptimizerConfig("sgd", alpha), 1, batch_size=20)
    updates, _ = method.update(models_of(model, group), start, clients, training)
    for client, update in zip(clients, updates, strict=True):
        at = start.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_at(model, at, client.inputs, client.labels), at, create_graph=True)
        through = loss_at(model, at - alpha * gradient, client.inputs, client.labels)
        (exact,) = torch.autograd.grad(through, at)
        torch.testing.assert_close(update, -exact, rtol=1e-5, atol=1e-8)
        first_order = -gradient_at(model, start - alpha * gradient.detach(), client.inputs, client.labels)
        assert torch.linalg.vector_norm(update - first_order) > 0.01 * torch.linalg.vector_norm(first_order)


@pytest.mark.parametrize("variant", ["fo", "hf"])
@pytest.mark.parametrize("group", [1, len(SIZES)])
def test_it_is_what_plain_loops_compute(group: int, variant: str) -> None:
    """With three independent batches a step: to adapt, for the gradient there, and for the Hessian."""
    model, method = network(), PerFedAvg(per_fedavg_beta=BETA, per_fedavg_variant=variant)
    training, start = LocalTraining(SGD, 2, 4), flatten(model)
    clients = image_clients(SIZES[:group])
    updates, losses = method.update(models_of(model, group), start, clients, training)
    for client, update, loss in zip(clients, updates, losses, strict=True):
        w, measured = start.clone(), []
        passes = [batches_of(client.in_pass(number), training) for number in range(3)]
        for adapting, query, curvature in zip(*passes, strict=True):
            adapted = w - RATE * gradient_at(model, w, *adapting)
            direction = gradient_at(model, adapted, *query)
            measured.append(len(query[1]) * loss_at(model, adapted, *query).item())
            if variant == "hf":
                sides = [gradient_at(model, w + distance * direction, *curvature) for distance in (1e-3, -1e-3)]
                direction = direction - RATE * (sides[0] - sides[1]) / 2e-3
            w = w - BETA * direction
        torch.testing.assert_close(update, w - start, rtol=1e-7, atol=1e-9)
        assert loss == pytest.approx(sum(measured[len(measured) // 2 :]) / len(client.labels))
        assert client.state == {}


def test_differences_of_gradients_take_float32() -> None:
    phase = PhaseConfig(1, 1, SGD, SGD, method=PerFedAvg(per_fedavg_variant="hf"))
    with pytest.raises(ValueError, match=r"^--precision bf16 is too coarse for --method per_fedavg .*; use float32$"):
        make_config(fedavg=phase, fine_tune=None, precision="bf16")
    make_config(fedavg=dataclasses.replace(phase, method=PerFedAvg()), fine_tune=None, precision="bf16")


def test_it_takes_plain_steps_only() -> None:
    adam = PhaseConfig(1, 1, OptimizerConfig("adam", 0.01), SGD, method=PerFedAvg())
    with pytest.raises(ValueError, match=r"--method per_fedavg .* --client_optimizer adam: .* use sgd"):
        make_config(fedavg=adam)
    make_config(fedavg=dataclasses.replace(adam, client_optimizer=SGD), fine_tune=None)
