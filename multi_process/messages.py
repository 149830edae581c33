"""What server and workers say to each other: dataclasses, and their one translation to FedLab packages and back.

A FedLab package holds tensors of one type, so a message travels as bytes: a JSON header with the message's kind and
its plain fields, then each tensor's own bytes, none of them converted. Nothing else touches tensors by position.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fedlab.core.communicator import Package
from fedlab.utils import MessageCode
from torch import Tensor

PROTOCOL_VERSION = 1
"""Raised with every change of a message or of the way workers join."""

_ALIGNMENT = 8  # bytes: a tensor's bytes can be viewed as its type only at a multiple of the type's size


@dataclass(frozen=True)
class Message:
    """A message. Fields are tensors, or values that JSON holds."""

    code: ClassVar[MessageCode]


@dataclass(frozen=True)
class Join(Message):
    """Worker to server, first of all.

    machine: the same for all processes of one machine.  num_cores: cores that the worker may use.
    threads: what its user asked for with --threads, or None.
    """

    code = MessageCode.SetUp
    machine: str
    num_cores: int
    threads: int | None


@dataclass(frozen=True)
class Configure(Message):
    """Server to worker, the answer to Join: the experiment (`ExperimentConfig.to_dict`), and clients side by side."""

    code = MessageCode.SetUp
    experiment: dict[str, Any]
    num_lanes: int


@dataclass(frozen=True)
class Ready(Message):
    """Worker to server: data and model are set up. fingerprint: that of the data set that it read."""

    code = MessageCode.SetUp
    fingerprint: str
    device: str


@dataclass(frozen=True)
class TrainClients(Message):
    """Server to worker: this worker's part of a round. The fields are those of `executor.CohortTask`.

    client_ids: (num_clients,) int64.  parameters: (num_parameters,) float32, the global model.
    """

    code = MessageCode.Activation
    phase: int
    round_number: int
    capacity: int
    client_ids: Tensor
    parameters: Tensor


@dataclass(frozen=True)
class ClientsTrained(Message):
    """Worker to server: the exact weighted sum over its clients, and a report for each of them.

    client_ids, num_examples: (num_clients,) int64.  losses: (num_clients,) float64.
    total: (num_parameters,) int64 and weight: see `exact_sum.ExactSum`.
    """

    code = MessageCode.GradientUpdate
    weight: int
    capacity: int
    client_ids: Tensor
    num_examples: Tensor
    losses: Tensor
    total: Tensor


@dataclass(frozen=True)
class ScoreClients(Message):
    """Server to worker: unseen clients to personalize and score. The fields are those of `executor.ScoringTask`."""

    code = MessageCode.EvaluateParams
    phase: int
    round_number: int
    client_ids: Tensor
    parameters: Tensor


@dataclass(frozen=True)
class ClientsScored(Message):
    """Worker to server. Whole numbers and measures of each `scores.ClientScore`, in the order of its fields.

    counts: (num_clients, 3) int64: client id, training examples, test examples.
    measures: (num_clients, 4) float64: initial loss and accuracy, personalized loss and accuracy.
    """

    code = MessageCode.EvaluateParams
    counts: Tensor
    measures: Tensor


@dataclass(frozen=True)
class Failed(Message):
    """Worker to server: it cannot go on, and why, in one line."""

    code = MessageCode.Exit
    reason: str


@dataclass(frozen=True)
class Finish(Message):
    """Server to worker: the experiment is over."""

    code = MessageCode.Exit


_KINDS: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (Join, Configure, Ready, TrainClients, ClientsTrained, ScoreClients, ClientsScored, Failed, Finish)
}


def to_package(message: Message) -> Package:
    """The FedLab package that carries a message. `from_package` is its inverse, bit for bit."""
    values = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    header = {
        "kind": type(message).__name__,
        "values": {name: value for name, value in values.items() if name not in tensors},
        "tensors": {name: [_type_name(tensor), list(tensor.shape)] for name, tensor in tensors.items()},
    }
    header_bytes = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.int8)
    package = Package(message_code=message.code)
    for part in (header_bytes, *(tensor.view(-1).view(torch.int8) for tensor in tensors.values())):
        if package.content is not None:
            padding = -package.content.numel() % _ALIGNMENT
            package.append_tensor(torch.zeros(padding, dtype=torch.int8))
        package.append_tensor(part)
    return package


def from_package(code: MessageCode, content: list[Tensor] | None) -> Message:
    """The message that a package carries. Raises ValueError where it is not one of this protocol's."""
    if not content:
        raise ValueError(f"a package with code {code.name} has no content")
    try:
        header_bytes, *parts = content[::2]  # what lies between them is padding
        header = json.loads(header_bytes.numpy().tobytes())
        kind, values = _KINDS[header["kind"]], header["values"]
        for (name, (type_name, shape)), part in zip(header["tensors"].items(), parts, strict=True):
            values[name] = part.view(getattr(torch, type_name)).view(shape)
        message = kind(**values)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"a package with code {code.name} is not a message of protocol {PROTOCOL_VERSION}") from error
    if message.code is not code:
        raise ValueError(f"a {header['kind']} message came with code {code.name}")
    return message


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
