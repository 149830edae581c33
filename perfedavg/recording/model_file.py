"""model.safetensors: a model's parameters and buffers, and what is needed to build the model and name its classes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from perfedavg.contracts import input_shape
from perfedavg.plain_values import from_plain, parse_json
from perfedavg.recording.files import read_tensors
from perfedavg.settings import ExperimentConfig, brings_model
from perfedavg.training.layout import entries_of

OWN_PARTS = ("build_model", "loss_function")
"""What a data set may bring itself, in place of this project's models and of the cross entropy."""


@dataclass(frozen=True)
class ModelFacts:
    """What is said of a model in its file.

    dataset, architecture: as in ExperimentConfig.
    input_shape: of one example, or None in files of earlier versions.
    num_classes: number of outputs, or None where the data set does not say.
    class_names: label i stands for the i-th, or None where the data set does not say.
    own_parts: those of OWN_PARTS that came from the data set; with `build_model`, `architecture` means nothing.
    """

    dataset: str
    architecture: str
    num_classes: int | None
    class_names: tuple[str, ...] | None
    own_parts: tuple[str, ...]
    input_shape: tuple[int, ...] | None = None

    @classmethod
    def of(cls, config: ExperimentConfig, dataset: Any) -> ModelFacts:
        """Of a model that was trained on the data set, which need not have any of what is looked for."""
        names = getattr(dataset, "class_names", None)
        has_own = {"build_model": brings_model(config, dataset), "loss_function": hasattr(dataset, "loss_function")}
        return cls(
            config.dataset,
            config.architecture,
            getattr(dataset, "num_classes", None),
            None if names is None else tuple(names),
            tuple(part for part in OWN_PARTS if has_own[part]),
            input_shape(dataset) if hasattr(dataset, "client_data") else None,
        )

    def to_metadata(self) -> dict[str, str]:
        """As safetensors keeps it: texts, and JSON for what is none. What is not known is left out."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}
        return {"format": "pt", **texts}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelFacts:
        """The inverse of `to_metadata`. Raises ValueError where it is none."""
        texts = {name: metadata[name] for name in ("dataset", "architecture") if name in metadata}
        others = {
            name: parse_json(metadata.get(name, "null"))
            for name in ("num_classes", "class_names", "own_parts", "input_shape")
        }
        facts = from_plain(cls, {**texts, **others})
        if facts.num_classes is not None and facts.num_classes < 1:
            raise ValueError(f"num_classes is {facts.num_classes}, must be 1 or more")
        return facts


def model_file(model: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """The content of a file that holds the model's parameters; one that has several names (tied weights) once.

    `tied` in the metadata then says which names it also has.
    """
    state, tied = _untied(model)
    return safetensors.torch.save(state, {**metadata, **({"tied": json.dumps(tied)} if tied else {})})


def read_model_file(path: Path) -> tuple[dict[str, Tensor], ModelFacts]:
    """The parameters by name, and what is said of the model. Raises ValueError where the file cannot be had."""
    try:
        state, metadata = read_tensors(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    try:
        tied = from_plain(dict[str, str], parse_json(metadata.get("tied", "{}")), "tied")
        state |= {name: state[first] for name, first in tied.items()}
        facts = ModelFacts.from_metadata(metadata)
        if facts.num_classes is not None and facts.num_classes > sum(tensor.numel() for tensor in state.values()):
            raise ValueError(f"num_classes is {facts.num_classes}, more than there are parameters")
        return state, facts
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} does not say what its model is, as an earlier version of this project left it ({error}); repeat "
            "the run"
        ) from error


def load_state(model: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Give a model what `read_model_file` found in a file. Raises ValueError where it is another model's."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0].rstrip(":")
        raise ValueError(f"{path} holds another model ({reason}); repeat the run") from error


def check_can_be_saved(model: nn.Module) -> None:
    """Write the model to memory and read it back. Raises ValueError where that does not give the same parameters.

    For before the first round: what a user's own model makes of `state_dict` would else show when the run ends.
    """
    fix = "let its parameters be dense tensors on the CPU, and leave state_dict and load_state_dict as torch has them"
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters():
        first = first_names.setdefault(parameter.data_ptr(), name) if parameter.data_ptr() else name
        if first != name:
            raise ValueError(
                f"the model's parameters {first} and {name} share memory, and would part when they are trained; to tie "
                "them, let both names be one nn.Parameter"
            )
    try:
        copied = copy.deepcopy(model)
        with torch.no_grad():
            for entry in entries_of(copied).values():
                entry.zero_()
        state = safetensors.torch.load(model_file(model, {}))
        copied.load_state_dict(state | {name: state[first] for name, first in _untied(model)[1].items()})
    except Exception as error:  # whatever a user's model raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"the model cannot be saved and read back ({reason}); {fix}") from error
    for (name, saved), read in zip(entries_of(model).items(), entries_of(copied).values(), strict=True):
        if not torch.equal(saved, read):
            raise ValueError(f"the model's parameter {name} does not come back from its state_dict; {fix}")


def _untied(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The model's state with each tensor once, and for each further name of one the name under which it stands."""
    state: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first_names: dict[tuple[object, ...], str] = {}
    for name, tensor in model.state_dict().items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.data_ptr() else (name,)
        first = first_names.setdefault(memory, name)
        if first == name:
            state[name] = tensor.contiguous()
        else:
            tied[name] = first
    return state, tied
