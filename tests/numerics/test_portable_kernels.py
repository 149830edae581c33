"""With portable kernels, unlike processors end with the same models: those whose digests are in a file beside this."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from perfedavg.machine.kernels import check_processor, processor_vendor

HERE = Path(__file__).resolve().parent
DIGESTS = json.loads((HERE / "portable_digests.json").read_text())


@pytest.mark.parametrize(
    ("portable", "names"),
    [
        ("true", set(DIGESTS["true"]) - {"mnist_cnn"}),
        pytest.param("true", {"mnist_cnn"}, marks=pytest.mark.slow),  # as long as the others together
        pytest.param("any_vendor", set(DIGESTS["any_vendor"]), marks=pytest.mark.slow),
    ],
    ids=["true", "true, mnist_cnn", "any_vendor"],
)
def test_every_model_ends_as_it_did_elsewhere(portable: str, names: set[str]) -> None:
    """The digests were made on an AMD EPYC with AVX-512; that of mnist_cnn was first seen on one without."""
    try:
        check_processor(portable)
    except ValueError as error:
        pytest.skip(str(error))
    if portable == "true" and processor_vendor() != "AuthenticAMD":
        pytest.skip(f"the digests are those of AMD's processors, this one is of {processor_vendor()}")
    # Of a suite that is pinned otherwise, nothing may be left.
    limits = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR")
    environment = {name: value for name, value in os.environ.items() if name not in limits}
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "portable_runs.py", portable, *names],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        check=True,
    )
    assert json.loads(answer.stdout) == {name: DIGESTS[portable][name] for name in names}
