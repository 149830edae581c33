"""An experiment as its user meets it: progress on the terminal, a folder of results, a table at the end."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from perfedavg.client_data import ClientDirectory
from perfedavg.config import ExperimentConfig
from perfedavg.display import ProgressDisplay, result_table
from perfedavg.executor import Executor
from perfedavg.experiment import run_experiment
from perfedavg.flat_model import flatten
from perfedavg.run_folder import RunFolder


def run_and_record(
    config: ExperimentConfig,
    executor: Executor,
    clients: ClientDirectory,
    model: nn.Module,
    folder: RunFolder,
    run_settings: dict[str, Any],
) -> None:
    """Run the experiment from the model's weights; show it, record it in the folder, and print the result table.

    run_settings: as `RunFolder.write_config` takes them; `world_size` among them.
    """
    folder.write_config(config, run_settings)
    outcome = run_experiment(config, executor, clients, flatten(model), [folder, ProgressDisplay(config)])
    facts = {
        "train_clients": len(clients.train_client_ids),
        "unseen_clients": len(clients.unseen_client_ids),
        "world_size": run_settings["world_size"],
        "data_fingerprint": clients.fingerprint,
    }
    result = folder.write_result(config, outcome, model, facts)
    print(f"\n{result_table(result)}\nresults in {os.path.relpath(folder.path)}", flush=True)
