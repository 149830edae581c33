"""model.safetensors: a model's parameters, and what a reader needs to build the model and to name its classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from perfedavg.config import ExperimentConfig

OWN_PARTS = ("build_model", "loss_function")
"""What a data set may bring itself, in place of this project's models and of the cross entropy."""


@dataclass(frozen=True)
class ModelFacts:
    """What is said of a model in its file.

    dataset, architecture: as in ExperimentConfig.
    num_classes: of its outputs, or None where the data set does not say.
    class_names: label i stands for the i-th, or None where the data set does not say.
    own_parts: those of OWN_PARTS that the data set brought; with `build_model`, `architecture` means nothing.
    """

    dataset: str
    architecture: str
    num_classes: int | None
    class_names: tuple[str, ...] | None
    own_parts: tuple[str, ...]

    @classmethod
    def of(cls, config: ExperimentConfig, dataset: object) -> ModelFacts:
        """Of a model that was trained on the data set, which need not have any of what is looked for."""
        names = getattr(dataset, "class_names", None)
        return cls(
            config.dataset,
            config.architecture,
            getattr(dataset, "num_classes", None),
            None if names is None else tuple(names),
            tuple(part for part in OWN_PARTS if hasattr(dataset, part)),
        )

    def to_metadata(self) -> dict[str, str]:
        """As safetensors keeps it: texts only. What is not known is left out."""
        metadata = {"format": "pt", "dataset": self.dataset, "architecture": self.architecture}
        metadata["own_parts"] = json.dumps(self.own_parts)
        if self.num_classes is not None:
            metadata["num_classes"] = str(self.num_classes)
        if self.class_names is not None:
            metadata["class_names"] = json.dumps(self.class_names)
        return metadata

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> ModelFacts:
        """The inverse of `to_metadata`. Raises ValueError, KeyError or TypeError where it is none."""
        names, own_parts = json.loads(metadata.get("class_names", "null")), json.loads(metadata["own_parts"])
        return cls(
            metadata["dataset"],
            metadata["architecture"],
            int(metadata["num_classes"]) if "num_classes" in metadata else None,
            None if names is None else tuple(names),
            tuple(own_parts),
        )


def model_file(model: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """The content of a file that holds the model's parameters."""
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    return safetensors.torch.save(state, dict(metadata))


def read_model_file(path: Path) -> tuple[dict[str, Tensor], ModelFacts]:
    """The parameters by name, and what is said of the model. Raises ValueError where the file cannot be had."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from error
    try:
        return state, ModelFacts.from_metadata(metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not say what its model is, as an earlier version of this project left it; repeat the run"
        ) from error
