"""A cohort trained one by one against many clients at once, on a GPU: seconds, and how many times faster.

python benchmarks/gpu.py [--device cuda|cpu]

Cohorts of 5 to 500 clients with 100 examples each (on a CPU, smaller cohorts and smaller models), one local epoch, in
turn, several times. Ends with the reason where the device is not there. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from figures import figure, times  # noqa: E402
from torch import nn  # noqa: E402

import utils  # noqa: E402
from models import build_model  # noqa: E402
from perfedavg.contracts import ClientData  # noqa: E402
from perfedavg.engine.executor import LocalExecutor  # noqa: E402
from perfedavg.engine.tasks import CohortTask  # noqa: E402
from perfedavg.settings import ExperimentConfig, Phase  # noqa: E402
from perfedavg.training.client_batching import choose_group_size  # noqa: E402
from perfedavg.training.compute import describe_device, resolve_device, use_reproducible_kernels  # noqa: E402
from perfedavg.training.flat_model import flatten  # noqa: E402

EXAMPLES_A_CLIENT, NUM_CLASSES = 100, 10
IMAGES = (1, 28, 28)
COHORTS = {"cuda": (5, 20, 100, 500), "cpu": (5, 20)}


def softmax_regression() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, NUM_CLASSES))


MODELS: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "cuda": {name: partial(build_model, name, IMAGES, NUM_CLASSES) for name in ("emnist_cnn", "mnist_cnn", "mlp")},
    "cpu": {
        "mnist_cnn": partial(build_model, "mnist_cnn", IMAGES, NUM_CLASSES),
        "mlp": partial(build_model, "mlp", IMAGES, NUM_CLASSES),
        "softmax regression, 7,850 parameters": softmax_regression,
    },
}


@dataclass(frozen=True)
class RandomClients:
    """Clients with random images, made once; as `perfedavg.contracts.FederatedDataset` asks for them."""

    clients: list[ClientData]
    name: str = "random"
    num_classes: int = NUM_CLASSES
    fingerprint: str = ""

    @property
    def train_client_ids(self) -> list[int]:
        return list(range(len(self.clients)))

    @property
    def unseen_client_ids(self) -> list[int]:
        return []

    def num_train_examples(self, client_id: int) -> int:
        return len(self.clients[client_id].train_labels)

    def client_data(self, client_id: int) -> ClientData:
        return self.clients[client_id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="where to train (default: cuda)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each way is timed (default: 3)")
    args = parser.parse_args()
    use_reproducible_kernels()
    try:
        device = resolve_device(args.device)
    except ValueError as error:
        print(f"skipped: {error}")
        print(json.dumps({"benchmark": "gpu", "skipped": str(error)}))
        return
    name = torch.cuda.get_device_name(device) if args.device == "cuda" else "CPU, one thread"
    rows = [
        compare(model_name, build, cohort, device, args.repeats)
        for model_name, build in MODELS[args.device].items()
        for cohort in COHORTS[args.device]
    ]
    print(json.dumps({"benchmark": "gpu", "device": name, "torch": torch.__version__, "rows": rows}))


def compare(
    model_name: str, build: Callable[[], nn.Module], cohort: int, device: torch.device, repeats: int
) -> dict[str, str | int | float]:
    torch.manual_seed(0)
    model, dataset = build(), random_clients(cohort)
    flags = [
        "--dataset",
        "mnist",
        "--client_num_in_total",
        str(5 * cohort),
        "--local_epochs",
        "1",
        "--fine_tune_method",
        "none",
    ]
    config = utils.get_args("single", [*flags, "--client_num_per_round", str(cohort)]).experiment
    fitting = choose_group_size(config, model, dataset, [describe_device(device)]).client_batching or 1
    group_size = fitting if device.type == "cuda" else cohort
    ways = {
        1: executor(config, model, dataset, device, 1),
        group_size: executor(config, model, dataset, device, group_size),
    }
    seconds: dict[int, list[float]] = {size: [] for size in ways}
    for repeat in range(repeats + 1):
        for size, each in ways.items():
            took = train_once(each, model, dataset, device)
            if repeat:  # the first time warms up
                seconds[size].append(took)
    faster = statistics.median(a / b for a, b in zip(seconds[1], seconds[group_size], strict=True))
    alone, together = statistics.median(seconds[1]), statistics.median(seconds[group_size])
    print(
        f"{model_name}, {cohort} clients: {figure(alone)} s one by one, {figure(together)} s in groups of "
        f"{group_size}, as fast: {times(faster)}",
        flush=True,
    )
    return {
        "model": model_name,
        "clients": cohort,
        "group": group_size,
        "one_by_one_s": round(alone, 4),
        "together_s": round(together, 4),
        "times": round(faster, 2),
    }


def executor(
    config: ExperimentConfig, model: nn.Module, dataset: RandomClients, device: torch.device, group_size: int
) -> LocalExecutor:
    return LocalExecutor(replace(config, client_batching=group_size), model, dataset, device)


def train_once(each: LocalExecutor, model: nn.Module, dataset: RandomClients, device: torch.device) -> float:
    clients = tuple(dataset.train_client_ids)
    task = CohortTask(Phase.FEDAVG, 1, clients, EXAMPLES_A_CLIENT * len(clients))
    parameters = flatten(model)
    started = time.perf_counter()
    each.train(task, parameters)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def random_clients(count: int) -> RandomClients:
    images, labels = torch.rand(EXAMPLES_A_CLIENT, 1, 28, 28), torch.randint(0, NUM_CLASSES, (EXAMPLES_A_CLIENT,))
    return RandomClients(
        [ClientData(images.roll(shift, 0), labels.roll(shift, 0), images[:1], labels[:1]) for shift in range(count)]
    )


if __name__ == "__main__":
    main()
