"""The digests of one short run of each model, as JSON, with the kernels that --portable_kernels names.

python tests/numerics/portable_runs.py true [NAME ..]        (or any_vendor; default: all names)

`portable_digests.json` holds what they came to; wherever these kernels are to be had, they must come to the same.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import utils  # noqa: E402
from perfedavg.machine.kernels import pin_kernels  # noqa: E402

SHORT = "--rounds 2 --fine_tune_rounds 2 --personalization_epochs 1 --eval_every 1"
SHORTEST = "--rounds 1 --local_epochs 1 --fine_tune_rounds 1 --fine_tune_local_epochs 1 --personalization_epochs 1 "
SHORTEST += "--eval_every 1"
SGD = "--fine_tune_server_optimizer sgd"
CUT = "--unseen_fraction 0.2 --local_test_fraction 0.2"
DIGITS = f"--dataset digits --client_num_in_total 10 --client_num_per_round 2 {CUT} {SHORT}"
RUNS = {
    "mnist_cnn": DIGITS,
    "mlp": f"{DIGITS} --model mlp {SGD}",
    "mnist_cnn, sgd": f"{DIGITS} {SGD}",
    "emnist_cnn": f"--dataset synthetic_writers --client_num_in_total 10 --client_num_per_round 2 {SHORTEST}",
    "sine_mlp": "--dataset sine --client_num_in_total 102 --client_num_per_round 5 --rounds 0 --fine_tune_method maml "
    "--fine_tune_rounds 3 --fine_tune_local_steps 3 --eval_every 3",
}
"""By a name that begins with the model's, the flags of `single_process.py`."""
ONLY_FOR = {"mnist_cnn": "true", "mnist_cnn, sgd": "any_vendor"}
"""Adam, with which the first fine-tunes, is none of any vendor's; the second stands for it there."""
TEXT = "to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows; "


def digest(flags: str) -> str:
    """The model_sha256 that `single_process.py` ends with."""
    from perfedavg.engine.executor import LocalExecutor
    from perfedavg.engine.experiment import ExperimentState, run_experiment
    from perfedavg.training.client_batching import choose_group_size
    from perfedavg.training.compute import ComputeDevice
    from perfedavg.training.flat_model import flatten

    args = utils.get_args("single", [*flags.split(), "--portable_kernels", sys.argv[1]])
    config = args.experiment
    dataset = utils.get_datasets(config, Path())
    model = utils.get_model(config, dataset)
    config = choose_group_size(config, model, dataset, [ComputeDevice("cpu", 0)])
    executor = LocalExecutor(config, model, dataset)
    return run_experiment(config, executor, dataset, ExperimentState.fresh(config, flatten(model))).model_sha256


def lstm_digest() -> str:
    """That of the LSTM after three steps by itself, because a client of its data set has no less than 400 examples."""
    import numpy as np
    import torch

    from models import build_model
    from perfedavg.engine.experiment import parameters_sha256
    from perfedavg.settings import OptimizerConfig
    from perfedavg.training.client_models import Client
    from perfedavg.training.flat_model import FlatModel
    from perfedavg.training.local_training import LocalTraining

    torch.manual_seed(0)
    model = FlatModel(build_model("lstm", (80,), 128))
    characters = torch.tensor([ord(character) for character in TEXT])
    inputs, labels = characters.unfold(0, 80, 1)[:-1], characters[80:]
    training = LocalTraining(OptimizerConfig("sgd", 0.5), 1, 10)
    model.train(model.vector, [Client(inputs, labels, np.random.SeedSequence(0))], training)
    return parameters_sha256(model.vector)


def main() -> None:
    pin_kernels(sys.argv[1])

    from perfedavg.training.compute import use_reproducible_kernels

    use_reproducible_kernels()
    runs: dict[str, Callable[[], str]] = {
        name: partial(digest, flags) for name, flags in RUNS.items() if ONLY_FOR.get(name, sys.argv[1]) == sys.argv[1]
    }
    runs["lstm"] = lstm_digest
    print(json.dumps({name: run() for name, run in runs.items() if name in sys.argv[2:] or not sys.argv[2:]}, indent=4))


if __name__ == "__main__":
    main()
