"""The digests of one short run of each model, as JSON, with the kernels that --portable_kernels names.

python tests/numerics/portable_runs.py true        (or any_vendor)

`portable_digests.json` holds what they came to; wherever these kernels are to be had, they must come to the same.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import utils  # noqa: E402
from perfedavg.kernels import pin_kernels  # noqa: E402

SHORT = "--epochs 2 --fine_tune_outer_loops 2 --pers_round 1 --eval_every 1"
SHORTEST = (
    "--epochs 1 --inner_loops 1 --fine_tune_outer_loops 1 --fine_tune_inner_loops 1 --pers_round 1 --eval_every 1"
)
SGD = "--fine_tune_server_optimizer sgd"
DIGITS = f"--dataset digits --client_num_in_total 10 --client_num_per_round 2 {SHORT}"
RUNS = {
    "mnist_cnn": DIGITS,
    "mlp": f"{DIGITS} --struct mlp {SGD}",
    "mnist_cnn, sgd": f"{DIGITS} {SGD}",
    "emnist_cnn": f"--dataset synthetic_writers --client_num_in_total 10 --client_num_per_round 2 {SHORTEST}",
    "lstm": f"--dataset shakespeare --client_num_per_round 1 --unseen_fraction 0.5 {SHORTEST}",
    "sine_mlp": "--dataset sine --client_num_in_total 102 --client_num_per_round 5 --epochs 0 --fine_tune_method maml "
    "--fine_tune_outer_loops 3 --fine_tune_inner_steps 3 --eval_every 3",
}
NOT_FOR_ANY_VENDOR = ("mnist_cnn",)
"""Fine-tunes with Adam."""
"""By a name that begins with the model's, the flags of `single_process.py`."""
TEXT = "to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows; "
WINDOW, WINDOWS = 80, 410


def write_plays(folder: Path) -> None:
    """Two roles in LEAF's form: a window of 80 characters of their text, and the character behind it."""
    texts = {"A": TEXT * 5, "B": TEXT[::-1] * 5}
    data = {
        role: {
            "x": [text[first : first + WINDOW] for first in range(WINDOWS)],
            "y": [text[first + WINDOW] for first in range(WINDOWS)],
        }
        for role, text in texts.items()
    }
    content = {"users": list(data), "num_samples": [WINDOWS] * len(data), "user_data": data}
    (folder / "shakespeare").mkdir()
    (folder / "shakespeare" / "all_data_0.json").write_text(json.dumps(content))


def digest(flags: str, data_root: Path) -> str:
    """The model_sha256 that `single_process.py` ends with."""
    from perfedavg.client_batching import settle_client_batching
    from perfedavg.compute import ComputeDevice
    from perfedavg.executor import LocalExecutor
    from perfedavg.experiment import ExperimentState, run_experiment
    from perfedavg.flat_model import flatten

    args = utils.get_args("single", [*flags.split(), "--portable_kernels", sys.argv[1]])
    config = utils.config_from_args(args)
    dataset = utils.get_datasets(config, data_root)
    model = utils.get_model(config, dataset)
    config = settle_client_batching(config, model, dataset, [ComputeDevice("cpu", 0)])
    executor = LocalExecutor(config, model, dataset)
    return run_experiment(config, executor, dataset, ExperimentState.fresh(config, flatten(model))).model_sha256


def main() -> None:
    pin_kernels(sys.argv[1])

    from perfedavg.compute import use_reproducible_kernels

    use_reproducible_kernels()
    with tempfile.TemporaryDirectory() as folder:
        write_plays(Path(folder))
        runs = {name: flags for name, flags in RUNS.items() if sys.argv[1] == "true" or name not in NOT_FOR_ANY_VENDOR}
        print(json.dumps({name: digest(flags, Path(folder)) for name, flags in runs.items()}, indent=4))


if __name__ == "__main__":
    main()
