"""fedlab must import quietly, and bring no library into a process that does not use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from helpers import ROOT


def run_python(code: str, *search_path: Path) -> str:
    program = f"import sys; sys.path[:0] = {[str(path) for path in (*search_path, ROOT)]}\n{code}"
    command = [sys.executable, "-W", "ignore", "-c", program]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


def test_fedlab_prints_nothing_and_what_was_not_loaded_can_be_had_afterwards() -> None:
    """By fedlab's own functions too, and by a user's code that takes a data set from fedlab."""
    code = """
import compat
from helpers import import_torchvision
import_torchvision()
compat.import_fedlab("fedlab.utils.dataset.functional")
compat.import_fedlab("fedlab.core")
import torchvision.datasets
import logging
logging.getLogger("x").info("quiet")
from fedlab.contrib.dataset import PathologicalMNIST, FedDataset
from fedlab.core.client import trainer
from fedlab.utils.dataset import functional
import pandas
print(trainer.FedDataset is FedDataset, functional.pd.DataFrame is pandas.DataFrame)
"""
    assert run_python(code, ROOT / "tests") == "True True"


def test_a_process_loads_only_what_it_needs() -> None:
    """The rest would cost each process 180 MB and two seconds.

    Reproducible kernels and the server's optimizers would load torch's compiler in a run: a second and 70 MB more.
    """
    run = """
import sys, multi_process.server, multi_process.worker, datasets, perfedavg.recorded_run
heavy = "torchvision sklearn pandas scipy pyarrow pooch requests torch._dynamo matplotlib"
print(set(heavy.split()) & set(sys.modules))
import utils
from perfedavg.training.compute import use_reproducible_kernels
from perfedavg.settings import OptimizerConfig
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import ExperimentState, run_experiment
from perfedavg.training.flat_model import flatten
from pathlib import Path
use_reproducible_kernels()
flags = "--dataset digits --model mlp --client_num_in_total 10 --client_num_per_round 1 --rounds 1 --local_epochs 1"
flags += " --fine_tune_rounds 1 --fine_tune_local_epochs 1 --personalization_epochs 1"
flags += " --fine_tune_client_optimizer adagrad"
config = utils.get_args("single", [*flags.split(), "--client_batching", "1"]).experiment
dataset = utils.get_datasets(config, Path())
model = utils.get_model(config, dataset)
state = ExperimentState.fresh(config, flatten(model))
run_experiment(config, LocalExecutor(config, model, dataset), dataset, state, [])
print({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules))
import torch
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
"""
    assert run_python(run) == "set()\nset()\nTrue False"
