"""What a process of this project finds on a machine: what it computes with, what room there is, which data it reads.

`main` prints it as a line of JSON. It is run on each host of a check, and on this machine; its argument is a line of
JSON with the arguments of `probe`.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import utils
from launch.settings import Worker
from perfedavg.contracts import MissingDataError
from perfedavg.fields import flags_by_name
from perfedavg.machine.cores import usable_cores
from perfedavg.machine.kernels import pin_kernels
from perfedavg.metrics import find_metrics
from perfedavg.own_files import is_own_code
from perfedavg.own_module import import_own, sources
from perfedavg.settings import ExperimentConfig, flag
from perfedavg.terminal.console import reason_of
from perfedavg.terminal.entry_point import run_entry_point

GIGABYTE = 10**9


def main() -> None:
    run_entry_point(look)


def look() -> None:
    with redirect_stdout(sys.stderr):
        found = probe(**json.loads(sys.argv[1]))
    print(json.dumps(found))


def probe(experiment: Any, data_root: str, devices: list[str], initial_model: str | None = None) -> dict[str, Any]:
    """By name; a text that begins with `error: ` stands for what cannot be had.

    experiment: as workers are told it.  devices: one or more, as --device takes them.
    initial_model: whose weights the global model is to have, where this machine holds it.
    data: their fingerprint, where the model can be built for them and the metrics be had; a text that begins with
        `missing: ` where a run would download them.  sources: see `own_module.sources`.
    kernels: of processes that train here, one of each kind.  server_kernels: of one that only steps and adds.
    """
    pinning = _tried(lambda: pin_kernels(experiment["portable_kernels"]))  # before a user's own code may load torch
    config = ExperimentConfig.from_dict(experiment)
    folder: Path = flags_by_name(Worker)["data_root"].parse(data_root)

    import psutil
    import torch

    from perfedavg.training.compute import check_portable, describe_kernels, resolve_device, use_reproducible_kernels

    use_reproducible_kernels()  # by which an operation of a user's own model may be refused

    def kernels() -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for device in map(resolve_device, devices):
            check_portable(config, device)
            if (described := describe_kernels(device)) not in found:
                found.append(described)
        return found

    def fingerprint() -> str:
        find_metrics(config.own_metrics)
        if is_own_code(config.architecture):  # also where there are no data yet to build it for
            import_own(flag("architecture"), config.architecture, "factory")
        dataset = utils.get_datasets(config, folder, may_download=False)
        model = utils.get_model(config, dataset)
        if initial_model is not None:
            utils.read_initial_model(Path(initial_model), config, model)
        return dataset.fingerprint

    return {
        "cores": usable_cores(),
        "memory_gb": psutil.virtual_memory().available / GIGABYTE,
        "disk_gb": _free_gb(folder),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "device": _tried(lambda: ", ".join(str(resolve_device(device)) for device in devices)),
        "kernels": pinning or _tried(kernels),
        "server_kernels": describe_kernels(None),
        "data": _tried(fingerprint),
        "sources": sources(),
    }


def _tried(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except MissingDataError as error:
        return f"missing: {error}"
    except (ValueError, OSError) as error:
        return f"error: {reason_of(error)}"


def _free_gb(folder: Path) -> float:
    """Where the folder is, or would be made."""
    return shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free / GIGABYTE
