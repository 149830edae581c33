"""A local step of SGD at batch 20 on one thread: ms, and the share of the machine's own matrix-multiply rate.

python benchmarks/step.py
python benchmarks/step.py --only methods           what the methods cost, against FedAvg
python benchmarks/step.py --portable_kernels       what these cost, against the processor's own kernels

For each convolutional model the step as torch itself takes it (`plain`), and this project's at each precision, in turn,
many times. The rate is that of the fastest of three square products of the same type, measured in between; the
arithmetic of a step is what torch.utils.flop_counter counts in its products and convolutions. A precision that the
processor is clearly slower in is left out.

Then, for each method with its default settings, what one client computes in a round of ten local steps, as often as
FedAvg's, in turn. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from figures import figure, times  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from models import build_model  # noqa: E402
from perfedavg.machine.cores import usable_cores  # noqa: E402
from perfedavg.machine.kernels import ENVIRONMENTS, PORTABLE_KERNELS  # noqa: E402
from perfedavg.methods import METHODS  # noqa: E402
from perfedavg.settings import PRECISIONS, OptimizerConfig  # noqa: E402
from perfedavg.training.client_models import Client  # noqa: E402
from perfedavg.training.compute import use_reproducible_kernels  # noqa: E402
from perfedavg.training.flat_model import FlatModel, flatten  # noqa: E402
from perfedavg.training.local_training import LocalTraining  # noqa: E402
from perfedavg.training.precision import CLEARLY_SLOWER, slowdown  # noqa: E402
from perfedavg.training.stacked_model import StackedModel  # noqa: E402

MODELS = {"emnist_cnn": 62, "mnist_cnn": 10}
BATCH, LEARNING_RATE = 20, 0.02
METHOD_STEPS = 10
"""Local steps of a client's round."""
PRODUCT_SIZES = (512, 1024, 2048)
TURNS = 2
"""Of each kind of kernels, when these are compared."""
STEPS = 10
"""Between two looks at the clock."""
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16}

Step = Callable[[Tensor, Tensor], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30, help="how often each is timed (default: 30)")
    parser.add_argument(
        "--portable_kernels",
        action="store_true",
        help="time steps of new processes in turn, each with other kernels (see single_process.py --help)",
    )
    parser.add_argument("--only", choices=("steps", "methods"), help="leave the other out")
    args = parser.parse_args()
    if args.portable_kernels:
        compare_kernels(args.repeats)
        return
    use_reproducible_kernels()
    results: dict[str, object] = {}
    if args.only != "methods":
        results |= measure_steps(args.repeats)
    if args.only != "steps":
        named = {
            name: measure_methods(name, num_classes, -(-args.repeats // 3)) for name, num_classes in MODELS.items()
        }
        results["methods, times fedavg"] = named
    print(json.dumps({"benchmark": "step", "batch": BATCH, "threads": 1, "cpu": cpu_name(), **results}))


def measure_steps(repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """`measure` for each model, at each precision that the processor is not clearly slower in."""
    times = slowdown(torch.device("cpu"))
    precisions = PRECISIONS if times < CLEARLY_SLOWER else ("float32",)
    if times >= CLEARLY_SLOWER:
        print(f"bf16 is left out: a product in it takes about {times:.1f} times as long as in float32 here")
    return {name: measure(name, num_classes, repeats, precisions) for name, num_classes in MODELS.items()}


def compare_kernels(repeats: int) -> None:
    """Print a float32 step's ms with each kind of kernels, the median over turns, and how often the own one's it is."""
    times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in PORTABLE_KERNELS} for name in MODELS}
    for _ in range(TURNS):
        for kind in PORTABLE_KERNELS:
            command = [sys.executable, __file__, "--only", "steps", "--repeats", str(repeats)]
            environment = {**os.environ, **ENVIRONMENTS[kind]}
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
            measured = json.loads(answer.stdout.splitlines()[-1])
            for name in MODELS:
                times[name][kind].append(measured[name]["float32"]["ms"])
    results = {name: {kind: statistics.median(ms) for kind, ms in kinds.items()} for name, kinds in times.items()}
    for name, kinds in results.items():
        for kind, ms in kinds.items():
            print(f"{name}, --portable_kernels {kind}: {ms:.2f} ms a step, {ms / kinds['false']:.2f} times")
    print(json.dumps({"benchmark": "step, portable kernels", "batch": BATCH, "cpu": cpu_name(), **results}))


def measure(name: str, num_classes: int, repeats: int, precisions: Sequence[str]) -> dict[str, dict[str, float]]:
    """By the way of stepping: ms a step, share of the product rate of its type, times that of the plain step."""
    torch.manual_seed(0)
    model = build_model(name, (1, 28, 28), num_classes)
    images, labels = torch.rand(BATCH, 1, 28, 28), torch.randint(0, num_classes, (BATCH,))
    arithmetic = count_arithmetic(model, images, labels)
    steps: dict[str, Step] = {"plain": plain_step(model)}
    steps |= {precision: own_step(model, precision) for precision in precisions}
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    rates: dict[str, list[float]] = {precision: [] for precision in precisions}
    for repeat in range(repeats + 1):
        for precision in precisions:
            rates[precision].append(product_rate(TYPES[precision]))
        for way, step in steps.items():
            took = seconds_a_step(step, images, labels)
            if repeat:  # the first time warms up
                seconds[way].append(took)
    results = {}
    for way in steps:
        precision = "float32" if way == "plain" else way
        rate = statistics.median(rates[precision])
        took = statistics.median(seconds[way])
        faster = statistics.median(a / b for a, b in zip(seconds["plain"], seconds[way], strict=True))
        than_float32 = statistics.median(a / b for a, b in zip(seconds["float32"], seconds[way], strict=True))
        share = arithmetic / took / rate
        print(
            f"{name}, {way}: {figure(1000 * took)} ms a step, {share:.2f} of {figure(rate / 1e9)} GFLOP/s; "
            f"as fast as plain: {times(faster)}, as float32: {times(than_float32)}"
        )
        results[way] = {
            "ms": round(1000 * took, 3),
            "share": round(share, 3),
            "gflops_of_products": round(rate / 1e9, 1),
            "times_plain": round(faster, 3),
            "times_float32": round(than_float32, 3),
        }
    return results


def measure_methods(name: str, num_classes: int, repeats: int) -> dict[str, float]:
    """By method, a client's time in a round over that in FedAvg."""
    torch.manual_seed(0)
    model = build_model(name, (1, 28, 28), num_classes)
    start, num_examples = flatten(model), BATCH * METHOD_STEPS
    images, labels = torch.rand(num_examples, 1, 28, 28), torch.randint(0, num_classes, (num_examples,))
    training = LocalTraining(OptimizerConfig("sgd", LEARNING_RATE), num_epochs=1, batch_size=BATCH)
    single, group = FlatModel(model), StackedModel(model, 1)
    seconds: dict[str, list[float]] = {method: [] for method in METHODS}
    for repeat in range(repeats + 1):
        for method_name, kind in METHODS.items():
            method, client = kind(), Client(images, labels, np.random.SeedSequence(0))
            started = time.perf_counter()
            method.update(group if method.differentiates_training else single, start, [client], training)
            if repeat:  # the first time warms up
                seconds[method_name].append(time.perf_counter() - started)
    results = {}
    for method_name, took in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(took, seconds["fedavg"], strict=True))
        print(f"{name}, {method_name}: {figure(1000 * statistics.median(took))} ms a round, {ratio:.2f} of fedavg's")
        results[method_name] = round(ratio, 3)
    return results


def plain_step(model: nn.Module) -> Step:
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=LEARNING_RATE)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(own(images), labels).backward()
        optimizer.step()

    return step


def own_step(model: nn.Module, precision: str) -> Step:
    own = FlatModel(model, precision=precision)
    return lambda images, labels: own.descend(F.cross_entropy(own(images), labels), LEARNING_RATE)


def seconds_a_step(step: Step, images: Tensor, labels: Tensor) -> float:
    started = time.perf_counter()
    for _ in range(STEPS):
        step(images, labels)
    return (time.perf_counter() - started) / STEPS


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of the square products."""
    rates = []
    for size in PRODUCT_SIZES:
        left, right = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
        started = time.perf_counter()
        left @ right
        rates.append(2 * size**3 / (time.perf_counter() - started))
    return max(rates)


def count_arithmetic(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """FLOPs of a step's products and convolutions, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(copy.deepcopy(model)(images), labels).backward()
    return int(counter.get_total_flops())


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")}
    return f"{', '.join(sorted(names))}, {usable_cores()} cores"


if __name__ == "__main__":
    main()
