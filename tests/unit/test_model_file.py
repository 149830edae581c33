"""model.safetensors: whatever a model is made of comes back from it, or is refused before there is anything to lose."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers import make_config
from torch import Tensor, nn

import utils
from perfedavg.engine.experiment import parameters_sha256
from perfedavg.personal_model import export
from perfedavg.recording.model_file import ModelFacts, check_can_be_saved, model_file, read_model_file
from perfedavg.settings import UNREAD
from perfedavg.training.flat_model import flatten

FACTS = ModelFacts("my:Data", "mlp", 4, ("a", "b", "c", "d"), ("build_model",))


class Tied(nn.Module):
    """The weight of the last layer is that of the first, as in a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.last(torch.relu(self.first(inputs)))
        return outputs


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path: Path) -> None:
    """A run's last second is too late to hear that its model cannot be saved."""
    model, other = Tied(), Tied()
    (tmp_path / "model.safetensors").write_bytes(model_file(model, FACTS.to_metadata()))
    assert len(safetensors.torch.load_file(tmp_path / "model.safetensors")) == 3, "four names, three tensors"
    state, facts = read_model_file(tmp_path / "model.safetensors")
    assert facts == FACTS
    other.load_state_dict(state)
    assert other.last.weight is other.first.weight
    assert parameters_sha256(flatten(other)) == parameters_sha256(flatten(model))
    # what needs none of this project reads it too
    plain = Tied()
    safetensors.torch.load_model(plain, str(tmp_path / "model.safetensors"))
    assert torch.equal(flatten(plain), flatten(model))


def test_a_run_starts_from_another_ones_tied_weights(tmp_path: Path) -> None:
    given, model = Tied(), Tied()
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_file(given, FACTS.to_metadata()))
    args = utils.get_args("single", ["--dataset", "digits", "--initial_model", str(path)])
    config = utils.load_initial_model(args, make_config(initial_model=UNREAD), model, has_checkpoint=False)
    assert torch.equal(flatten(model), flatten(given))
    assert config.initial_model == parameters_sha256(flatten(given))


def test_tied_weights_are_exported() -> None:
    model = Tied()
    inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    program = torch.export.load(io.BytesIO(export(model, inputs, "abcd"))).module()
    assert torch.equal(program(inputs), model(inputs))


@pytest.mark.parametrize(
    "build",
    [
        Tied,
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        lambda: nn.Linear(4, 2).double(),
        lambda: nn.ParameterList([nn.Parameter(torch.zeros(0)), nn.Parameter(torch.ones(3))]),
    ],
)
def test_unusual_models_that_can_be_saved(build: Callable[[], nn.Module]) -> None:
    """Tied, not contiguous, of another type, with a parameter without entries."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    check_can_be_saved(model)
    assert flatten(model).ndim == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "left as it was"


class Renamed(nn.Linear):
    """Its state has a name that it does not take back."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {f"my_{name}": tensor for name, tensor in super().state_dict(*args, **kwargs).items()}


class Forgetful(nn.Linear):
    def load_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class WithNotes(nn.Linear):
    """Not all of its state are tensors."""

    def get_extra_state(self) -> str:
        return "notes"

    def set_extra_state(self, state: str) -> None:
        pass


def memory_shared() -> nn.Module:
    model = Tied()
    model.last.weight = nn.Parameter(model.first.weight.data)
    return model


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: Renamed(4, 2), "cannot be saved and read back .*my_weight"),
        (lambda: Forgetful(4, 2), "parameter weight does not come back"),
        (lambda: WithNotes(4, 2), "cannot be saved and read back"),
        (memory_shared, "first.weight and last.weight share memory"),
        (lambda: nn.Linear(4, 2, device="meta"), "cannot be saved and read back|does not come back"),
    ],
)
def test_what_cannot_be_saved_is_refused_in_one_line(build: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        check_can_be_saved(build())
    assert "\n" not in str(refusal.value)
