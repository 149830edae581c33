"""A data set is one entry: what stands in it must be true of the data, and looking it up must cost nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import ROOT

from datasets import DatasetRequest, load_federated_dataset
from datasets.registry import DATA_SETS, USERS_OWN, find
from models import MODELS
from perfedavg.contracts import REQUIRED

NOT_DEFAULT = {"partition": "iid", "local_split": "tail"}


def request(name: str) -> DatasetRequest:
    return DatasetRequest(name, 20, lambda total: total // 5, None, 0)


def test_a_look_at_the_entries_imports_nothing_heavy() -> None:
    """Every entry point's --help looks at them."""
    code = "import datasets.registry, sys; print({'numpy', 'torch', 'fedlab', 'PIL'} & set(sys.modules))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout == "set()\n"


def test_every_model_of_an_entry_can_be_built() -> None:
    assert {model for entry in (*DATA_SETS.values(), USERS_OWN) for model in entry.models.values()} == MODELS.keys()


@pytest.mark.parametrize("name", [*DATA_SETS, "my.module:factory"])
def test_a_setting_without_meaning_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    """Before anything is read."""
    for setting, reason in find(name).meaningless.items():
        if setting in NOT_DEFAULT:
            asked = replace(request(name), **{setting: NOT_DEFAULT[setting]})
            expected = f"--{setting} {NOT_DEFAULT[setting]} has no meaning for {name}: {reason}; leave it out"
            with pytest.raises(ValueError, match=expected):
                load_federated_dataset(asked, tmp_path)


@pytest.mark.parametrize("name", ["digits", "synthetic_writers", "sine"])
def test_a_data_set_has_what_one_of_the_users_own_must_have(name: str, tmp_path: Path) -> None:
    dataset = load_federated_dataset(request(name), tmp_path)
    assert all(hasattr(dataset, part) for part in REQUIRED)
    assert getattr(dataset, "note", "") == find(name).note


def test_what_is_required_of_a_data_set() -> None:
    """It is read off the protocol, which the page on data of one's own describes."""
    page = (ROOT / "docs" / "your-own-data.md").read_text()
    assert len(REQUIRED) == 6
    assert all(part in page for part in REQUIRED)
