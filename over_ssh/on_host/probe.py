"""What a process of this project finds on a machine: what it computes with, what room there is, which data it reads.

`main` prints it as a line of JSON. It is run on each host of a check, and on this machine; argv: of single_process.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import utils
from launch.settings import SingleProcess
from perfedavg.machine.cores import usable_cores
from perfedavg.terminal.console import reason_of

GIGABYTE = 10**9


def main() -> None:
    with redirect_stdout(sys.stderr):
        found = probe(utils.get_args("single", sys.argv[1:]))
    print(json.dumps(found))


def probe(args: SingleProcess) -> dict[str, Any]:
    """By name; a text that begins with `error: ` stands for what cannot be had."""
    import psutil
    import torch

    from perfedavg.training.compute import describe_kernels, resolve_device

    found: dict[str, Any] = {
        "cores": usable_cores(),
        "memory_gb": psutil.virtual_memory().available / GIGABYTE,
        "disk_gb": _free_gb(args.data_root),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }
    for name, find in (
        ("device", lambda: str(resolve_device(args.device))),
        ("kernels", lambda: describe_kernels(resolve_device(args.device))),
        ("data", lambda: utils.get_datasets(args.experiment, args.data_root).fingerprint),
    ):
        try:
            found[name] = find()
        except (ValueError, OSError) as error:
            found[name] = f"error: {reason_of(error)}"
    return found


def _free_gb(folder: Path) -> float:
    """Where the folder is, or would be made."""
    return shutil.disk_usage(next(one for one in (folder, *folder.parents) if one.exists())).free / GIGABYTE
