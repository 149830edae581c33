"""Whether a machine can compute in the precision that an experiment asks for, and whether that pays."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor, nn

from perfedavg.contracts import FederatedDataset
from perfedavg.settings import flag
from perfedavg.training.flat_model import FlatModel
from perfedavg.training.local_training import Loss

PROBED_EXAMPLES = 2
PRODUCT_SIZES = {"cpu": 256, "cuda": 2048}
MEASURED_SECONDS = 0.15
MAX_PRODUCTS = 10
CLEARLY_SLOWER = 1.25
"""Times float32's time, of the fastest of several products each: more than what other processes make of equal speed."""


def check_precision(
    precision: str, model: nn.Module, dataset: FederatedDataset, device: torch.device, loss_function: Loss
) -> list[str]:
    """Try the precision on the device, for less than a second. Returns what the user should know, a line each.

    Raises ValueError where the model can be trained here in float32 but not in the precision.
    """
    if precision == "float32":
        return []
    data = dataset.client_data(dataset.train_client_ids[0])
    inputs = data.train_inputs[:PROBED_EXAMPLES].to(device)
    labels = data.train_labels[:PROBED_EXAMPLES].to(device)
    error = _error_of_a_step(precision, model, inputs, labels, loss_function)
    if error is not None and _error_of_a_step("float32", model, inputs, labels, loss_function) is None:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{flag('precision')} {precision}: this machine cannot train the model so on {device} ({reason}); "
            f"use {flag('precision')} float32"
        )
    times = slowdown(device)
    if times < CLEARLY_SLOWER:
        return []
    return [
        f"{flag('precision')} {precision} is slower than float32 on this machine: a product of matrices takes about "
        f"{times:.1f} times as long on {device}; use {flag('precision')} float32"
    ]


def slowdown(device: torch.device) -> float:
    """How many times longer a square product takes in bfloat16 than in float32."""
    size = PRODUCT_SIZES.get(device.type, PRODUCT_SIZES["cpu"])
    exact = torch.rand(size, size, device=device)
    rounded = exact.bfloat16()
    best = {"exact": math.inf, "rounded": math.inf}
    deadline = time.perf_counter() + MEASURED_SECONDS
    for repeat in range(MAX_PRODUCTS):
        if repeat > 1 and time.perf_counter() > deadline:
            break
        for name, factor in (("exact", exact), ("rounded", rounded)):
            best[name] = min(best[name], _seconds_of_product(factor))
    return best["rounded"] / best["exact"]


def _seconds_of_product(factor: Tensor) -> float:
    started = time.perf_counter()
    factor @ factor
    if factor.is_cuda:
        torch.cuda.synchronize(factor.device)
    return time.perf_counter() - started


def _error_of_a_step(
    precision: str, model: nn.Module, inputs: Tensor, labels: Tensor, loss_function: Loss
) -> RuntimeError | None:
    """What torch raises in a step of local training, or None."""
    probed = FlatModel(model, inputs.device, precision)
    probed.module.train()
    try:
        probed.descend(loss_function(probed(inputs), labels), 0.0)
    except RuntimeError as error:
        return error
    return None
