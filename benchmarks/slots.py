"""Two cores in one process: two clients side by side on one kernel thread each, or one at a time on two threads?

python benchmarks/slots.py

Trains the same clients on random images in each way, in turn, several times. Prints the time against one client at a
time on one thread, and whether the exact sum of the updates is the same to the bit. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import utils  # noqa: E402
from datasets.clients.partition import Partition  # noqa: E402
from datasets.clients.partitioned import ImageSplits, PartitionedClients  # noqa: E402
from datasets.clients.split import SplitDataset  # noqa: E402
from perfedavg.engine.executor import LocalExecutor  # noqa: E402
from perfedavg.engine.tasks import CohortTask  # noqa: E402
from perfedavg.machine.cores import usable_cores  # noqa: E402
from perfedavg.settings import ExperimentConfig, Phase  # noqa: E402
from perfedavg.training.compute import use_reproducible_kernels  # noqa: E402
from perfedavg.training.flat_model import flatten  # noqa: E402

NUM_CLIENTS, EXAMPLES_A_CLIENT = 10, 125
WAYS = {"1 slot, 1 thread": (1, 1), "2 slots, 1 thread each": (2, 1), "1 slot, 2 threads": (1, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="how often each way is timed (default: 5)")
    repeats = parser.parse_args().repeats
    use_reproducible_kernels()
    results = {name: compare(name, repeats) for name in ("mnist", "emnist")}
    print(json.dumps({"benchmark": "slots", "cores": usable_cores(), **results}))


def compare(name: str, repeats: int) -> dict[str, dict[str, float | bool]]:
    config = utils.get_args(
        "single", ["--dataset", name, "--client_num_in_total", str(NUM_CLIENTS), "--local_epochs", "1"]
    ).experiment
    dataset = random_images(62 if name == "emnist" else 10)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    sums: dict[str, Tensor] = {}
    for repeat in range(repeats + 1):
        for way, (slots, threads) in WAYS.items():
            took, sums[way] = train_once(config, dataset, slots, threads)
            if repeat:  # the first round warms up
                seconds[way].append(took)
    baseline = "1 slot, 1 thread"
    result: dict[str, dict[str, float | bool]] = {}
    for way in WAYS:
        ratio = statistics.median(a / b for a, b in zip(seconds[way], seconds[baseline], strict=True))
        same = torch.equal(sums[way], sums[baseline])
        result[way] = {"ratio": round(ratio, 3), "same_bits": same}
        print(f"{name} network, {way}: {ratio:.2f} of the time, {'the same' if same else 'other'} bits")
    return result


def train_once(config: ExperimentConfig, dataset: SplitDataset, slots: int, threads: int) -> tuple[float, Tensor]:
    torch.set_num_threads(threads)
    model = utils.get_model(config, dataset)
    executor = LocalExecutor(config, model, dataset, num_slots=slots)
    clients = tuple(dataset.train_client_ids)
    task = CohortTask(Phase.FEDAVG, 1, clients, sum(map(dataset.num_train_examples, clients)))
    started = time.perf_counter()
    update = executor.train(task, flatten(model))
    return time.perf_counter() - started, update.sum.total


def random_images(num_classes: int) -> SplitDataset:
    generator = np.random.default_rng(0)
    sizes = (NUM_CLIENTS * 4 // 5 * EXAMPLES_A_CLIENT, NUM_CLIENTS // 5 * EXAMPLES_A_CLIENT)
    images = [generator.integers(0, 256, (size, 28, 28), dtype=np.uint8) for size in sizes]
    labels = [generator.integers(0, num_classes, size) for size in sizes]
    splits = ImageSplits(images[0], labels[0], images[1], labels[1], num_classes)
    num_train, num_unseen = NUM_CLIENTS * 4 // 5, NUM_CLIENTS // 5
    clients = PartitionedClients(splits, Partition.parse("iid"), num_train, num_unseen, seed=0)
    return SplitDataset("random", clients, num_train, num_unseen, seed=0)


if __name__ == "__main__":
    main()
