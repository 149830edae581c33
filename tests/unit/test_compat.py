"""torchvision must import beside a torch it was not built for, and be left alone beside one it was built for."""

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


def test_torchvision_and_fedlab_import_and_print_nothing() -> None:
    imports = "import compat; compat.import_torchvision(); import torchvision.datasets\n"
    imports += "compat.import_fedlab('fedlab.core'); import logging\n"
    assert run_python(imports + "logging.getLogger('x').info('quiet')") == ""


def test_a_matching_torchvision_gets_nothing_registered(tmp_path: Path) -> None:
    """A package that imports without complaint stands for the matching build."""
    (tmp_path / "torchvision.py").write_text("")
    code = "import compat; compat.import_torchvision(); print(compat._registered)"
    assert run_python(code, tmp_path) == "[]"


def test_another_failure_of_torchvision_is_not_hidden(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('another failure')")
    code = "import compat\ntry: compat.import_torchvision()\nexcept RuntimeError as error: print(error)"
    assert run_python(code, tmp_path) == "another failure"


def test_what_a_process_needs_is_all_that_it_loads() -> None:
    """The others would cost each process 180 MB and two seconds."""
    imports = "import sys, multi_process.server, multi_process.worker, datasets, perfedavg.run\n"
    heavy = "{'torchvision', 'sklearn', 'pandas', 'scipy', 'pyarrow', 'torch._dynamo', 'matplotlib'}"
    assert run_python(imports + f"print({heavy} & set(sys.modules))") == "set()"


def test_a_run_does_not_load_torchs_compiler() -> None:
    """Reproducible kernels and the server's optimizers would: a second and 70 MB more in each process."""
    run = """
import sys
import utils
from perfedavg.compute import use_reproducible_kernels
from perfedavg.config import OptimizerConfig
from perfedavg.executor import LocalExecutor
from perfedavg.experiment import ExperimentState, run_experiment
from perfedavg.flat_model import flatten
from pathlib import Path
use_reproducible_kernels()
flags = "--dataset digits --struct mlp --client_num_in_total 10 --client_num_per_round 1 --epochs 1 --inner_loops 1"
flags += " --fine_tune_outer_loops 1 --fine_tune_inner_loops 1 --pers_round 1 --fine_tune_client_optimizer adagrad"
config = utils.config_from_args(utils.get_args("single", [*flags.split(), "--client_batching", "1"]))
dataset = utils.get_datasets(config, Path())
model = utils.get_model(config, dataset)
state = ExperimentState.fresh(config, flatten(model))
run_experiment(config, LocalExecutor(config, model, dataset), dataset, state, [])
print({"torch._dynamo", "torch._inductor", "sympy"} & set(sys.modules))
import torch
print(torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
"""
    assert run_python(run) == "set()\nTrue False"


def test_what_fedlab_did_not_load_can_be_had_afterwards() -> None:
    """By fedlab's own functions too, and by a user's code that takes a data set from fedlab."""
    imports = "import compat; compat.import_torchvision(); compat.import_fedlab('fedlab.utils.dataset.functional')\n"
    imports += "compat.import_fedlab('fedlab.core')\n"
    use = "from fedlab.contrib.dataset import PathologicalMNIST, FedDataset\n"
    use += "from fedlab.core.client import trainer; from fedlab.utils.dataset import functional; import pandas\n"
    use += "print(trainer.FedDataset is FedDataset, functional.pd.DataFrame is pandas.DataFrame)"
    assert run_python(imports + use) == "True True"
