"""A finished run's model, adapted to one person's examples: what all the training was for."""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perfedavg.contracts import ClientData
from perfedavg.methods.base import Method
from perfedavg.recording.files import replace_file
from perfedavg.recording.model_file import ModelFacts, load_state, model_file
from perfedavg.recording.results import to_json
from perfedavg.recording.runs import MODEL_FILE, RESULT_FILE, RecordedRun
from perfedavg.seeding import Purpose, seed_sequence
from perfedavg.settings import ExperimentConfig
from perfedavg.training.client_models import SCORING_BATCH_SIZE, Client
from perfedavg.training.flat_model import FlatModel, copy_into
from perfedavg.training.local_training import LocalTraining, Loss

CLASS_NAMES_FILE = "class_names.json"
"""What an exported program carries beside itself: a JSON list, label i its i-th text."""


@dataclass(frozen=True)
class RunModel:
    """The model of a run that has come to its end, and the experiment that it came of.

    class_names: label i stands for the i-th; where the data set did not say, classes are called by their numbers.
    state: the model's parameters by name.
    """

    path: Path
    config: ExperimentConfig
    facts: ModelFacts
    class_names: tuple[str, ...]
    state: dict[str, Tensor]

    @classmethod
    def read(cls, path: Path) -> RunModel:
        """Raises ValueError where the folder holds no run, one that has not ended, or one that cannot be read."""
        run = RecordedRun.read(path)
        run.check_ended()
        config = run.experiment()
        state, facts = run.model()
        if facts.num_classes is None:
            raise ValueError(f"{path / MODEL_FILE} does not say how many classes there are; repeat the run")
        class_names = facts.class_names or tuple(map(str, range(facts.num_classes)))
        return cls(path, config, facts, class_names, state)

    def load_into(self, model: nn.Module) -> None:
        """Raises ValueError where the parameters are another model's."""
        load_state(model, self.state, self.path / MODEL_FILE)


@dataclass(frozen=True)
class Score:
    """Of a model on held-out examples.

    loss: mean over the examples.
    num_right: examples whose class it named.
    """

    loss: float
    num_right: int
    num_examples: int

    @property
    def accuracy(self) -> float:
        """0..1."""
        return self.num_right / self.num_examples

    def to_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "accuracy": self.accuracy, "right": self.num_right}


def personalize(
    model: nn.Module,
    data: ClientData,
    method: Method,
    training: LocalTraining,
    precision: str,
    seed: int,
    loss_function: Loss,
) -> tuple[Score, Score]:
    """Adapt the model in place to the training part, as an unseen client of a run does; score it before and after.

    method: of the run's last phase.  precision: see `FlatModel`.
    seed: the batch order and the dropout masks follow from it.
    Raises ValueError where the steps were so large that the model is not finite any more.
    """
    flat = FlatModel(model, precision=precision, loss_function=loss_function)
    client = Client(data.train_inputs, data.train_labels, seed_sequence(seed, Purpose.PERSONALIZATION))
    scores: dict[int, Score] = {}

    def measure(epochs: dict[int, int]) -> None:
        if epochs[0] in (0, training.num_epochs):
            scores[epochs[0]] = _score(flat, data)
            copy_into(model, flat.vector)  # no views of the flat vector: torch.export is for tensors of their own

    method.personalize(flat, flat.vector.clone(), [client], training, measure)
    before, after = scores[0], scores[training.num_epochs]
    if not math.isfinite(before.loss):
        raise ValueError("the run's model gives no finite loss on these images; the run itself must have diverged")
    if not (math.isfinite(after.loss) and bool(flat.vector.isfinite().all())):
        raise ValueError(f"--local_lr {training.optimizer.learning_rate} is too high, the model diverged; lower it")
    return before, after


def export(model: nn.Module, inputs: Tensor, class_names: Sequence[str]) -> bytes:
    """The content of a .pt2 file: the model as a program that runs without its code, for any number of examples.

    inputs: (num_examples, ...) examples of what it takes; on them the program gives the model's very outputs, which is
    checked on what the file holds. Raises ValueError where the model cannot be exported for any number of examples.
    """
    model.eval()
    batch = torch.export.Dim("batch", min=1)
    example = inputs[:1].repeat(2, *[1] * (inputs.ndim - 1))  # of one, torch would take the 1 for part of the program
    try:
        with warnings.catch_warnings():  # of what an LSTM assigns while it is exported; the outputs are compared below
            warnings.simplefilter("ignore")
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(":")
        raise ValueError(f"torch.export cannot export the run's model for any number of examples ({reason})") from error
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={CLASS_NAMES_FILE: json.dumps(list(class_names))})
    _check_exported(content.getvalue(), model, inputs)
    return content.getvalue()


def write_personalized(
    folder: Path, model: nn.Module, program: bytes, metadata: Mapping[str, str], result: Mapping[str, Any]
) -> None:
    """Write model.safetensors, model.pt2 and, last, result.json, in place of those that are there.

    A folder with result.json so holds files that belong together. Raises OSError, one line with the fix.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULT_FILE).unlink(missing_ok=True)
        replace_file(folder / MODEL_FILE, model_file(model, metadata))
        replace_file(folder / "model.pt2", program)
        replace_file(folder / RESULT_FILE, to_json(result, indent=2))
    except OSError as error:
        raise OSError(
            f"--output {folder} cannot be written ({error.strerror}); make room there, or name another folder"
        ) from error


def _score(model: FlatModel, data: ClientData) -> Score:
    (values,) = model.score([(data.test_inputs, data.test_labels)])
    num_examples = len(data.test_labels)
    return Score(values["loss"], round(values["accuracy"] * num_examples), num_examples)


def _check_exported(content: bytes, model: nn.Module, inputs: Tensor) -> None:
    program = torch.export.load(io.BytesIO(content)).module()
    with torch.no_grad():
        for some in (inputs[:1], *inputs.split(SCORING_BATCH_SIZE)):
            if not torch.equal(program(some), model(some)):
                raise ValueError(
                    "the program exported from the run's model gives other outputs than the model, which must not "
                    "depend on anything but its inputs"
                )
