"""What server and workers say to each other: dataclasses, and their one translation to what travels.

Most are FedLab packages. A package holds tensors of one type, so a message travels as bytes: a JSON header with the
message's kind and its plain fields, then each tensor's own bytes, none of them converted. Nothing else touches tensors
by position. What is said of single clients, often and in a few words, goes as a line over the control connection.
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

from multi_process.boundary import fields_of
from multi_process.transport.control import PROTOCOL_VERSION
from perfedavg.aggregation.exact_mean import ExactMean
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ClientReport

_ALIGNMENT = 8  # bytes: a tensor's bytes can be viewed as its type only at a multiple of the type's size
_DTYPES = {"int64": torch.int64, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Message:
    """A message. Fields are tensors, or values that JSON holds, or lists of dataclasses of such values.

    What arrives as one has passed `boundary.RULES`.
    """

    code: ClassVar[MessageCode]
    """FedLab's code of the package that carries it."""


@dataclass(frozen=True)
class ControlMessage(Message):
    """A message without tensors that is short enough for a line of the control connection."""


@dataclass(frozen=True)
class Join(Message):
    """Worker to server, first of all.

    ticket: of its admission (`control.JoinAccepted`).  machine: the same for all processes of one machine.
    num_cores: cores that the worker may use.  threads: what its user asked for with --threads, or None.
    device_kind, device_memory_bytes: see `compute.ComputeDevice`.  kernels: see `compute.describe_kernels`.
    """

    code = MessageCode.SetUp
    ticket: str
    machine: str
    num_cores: int
    threads: int | None
    device_kind: str
    device_memory_bytes: int
    kernels: dict[str, str]


@dataclass(frozen=True)
class Configure(Message):
    """Server to worker, the answer to Join: the experiment (`ExperimentConfig.to_dict`), and clients side by side.

    ticket: the same as in Join, by which the worker knows the server.
    """

    code = MessageCode.SetUp
    ticket: str
    experiment: dict[str, Any]
    num_slots: int


@dataclass(frozen=True)
class Ready(Message):
    """Worker to server: data and model are set up.

    fingerprint: of the data set that it read.  warnings: what its user should know before the first round, a line each.
    """

    code = MessageCode.SetUp
    fingerprint: str
    device: str
    warnings: list[str]


@dataclass(frozen=True)
class StartTraining(Message):
    """Server to worker: a round begins, whatever the last one came to. The fields are those of `tasks.CohortTask`.

    parameters: (num_parameters,) float32, the global model.
    """

    code = MessageCode.ParameterUpdate
    phase: int
    round_number: int
    capacity: int
    parameters: Tensor


@dataclass(frozen=True)
class StartScoring(Message):
    """Server to worker: unseen clients are to be scored next. The fields are those of `tasks.ScoringTask`."""

    code = MessageCode.ParameterUpdate
    phase: int
    round_number: int
    num_curve_epochs: int
    parameters: Tensor


@dataclass(frozen=True)
class AssignGroups(ControlMessage):
    """Server to worker: train or score these groups of clients too, whichever was started last."""

    groups: list[list[int]]


@dataclass(frozen=True)
class GroupTrained(ControlMessage):
    """Worker to server: the updates of a group are in its running sum, or were refused; it has room for another.

    first: the first client of the group, by which it is known.
    """

    first: int


@dataclass(frozen=True)
class GroupScored(ControlMessage):
    """Worker to server: the scores of each client of a group."""

    scores: list[ClientScore]


@dataclass(frozen=True)
class RequestPartialSum(ControlMessage):
    """Server to worker: send the running sum up, and begin a new one."""


@dataclass(frozen=True)
class PartialSum(Message):
    """Worker to server: the exact sum over the clients it trained since the last one, see `exact_mean.ExactMean`.

    total: (num_parameters,) int64.  reports: of each client, also of those whose update was refused.
    """

    code = MessageCode.GradientUpdate
    weight: int
    capacity: int
    reports: list[ClientReport]
    total: Tensor

    @property
    def part(self) -> ExactMean:
        return ExactMean(self.total, self.weight, self.capacity)


@dataclass(frozen=True)
class Failed(Message):
    """Worker to server: it cannot go on, and why, in one line. client_id: the client it was working on, if any."""

    code = MessageCode.Exit
    reason: str
    client_id: int | None


@dataclass(frozen=True)
class Finish(Message):
    """Server to worker: the experiment is over."""

    code = MessageCode.Exit


_PACKAGED: dict[str, type[Message]] = {
    kind.__name__: kind for kind in (Join, Configure, Ready, StartTraining, StartScoring, PartialSum, Failed, Finish)
}
_CONTROL_MESSAGES: dict[str, type[ControlMessage]] = {
    kind.__name__: kind for kind in (AssignGroups, GroupTrained, GroupScored, RequestPartialSum)
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
    header_bytes = torch.frombuffer(
        bytearray(json.dumps(header, default=dataclasses.asdict).encode()), dtype=torch.int8
    )
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
        kind, values = _PACKAGED[header["kind"]], header["values"]
        for (name, (type_name, shape)), part in zip(header["tensors"].items(), parts, strict=True):
            values[name] = part.view(_DTYPES[type_name]).view(shape)
        message = kind(**fields_of(kind.__name__, values))
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # also RecursionError
        raise _not_ours(f"a package with code {code.name} is not a message", error) from error
    if message.code is not code:
        raise ValueError(f"a {header['kind']} message came with code {code.name}")
    return message


def to_line(word: ControlMessage) -> dict[str, Any]:
    """The fields of the line that carries a word. `from_line` is its inverse."""
    return {"word": type(word).__name__, "values": dataclasses.asdict(word)}


def from_line(fields: dict[str, Any]) -> ControlMessage:
    """The word that a line carries. Raises ValueError where it is not one of this protocol's."""
    try:
        kind = _CONTROL_MESSAGES[fields["word"]]
        if set(fields) != {"word", "values"}:
            raise ValueError("it has other fields than word, values")
        return kind(**fields_of(kind.__name__, fields["values"]))
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours("a line is not a word", error) from error


def _not_ours(what: str, error: Exception) -> ValueError:
    """What a rule found wrong is said; what Python did, in trying to read something else, says nothing."""
    reason = f": {error}" if type(error) is ValueError else ""
    return ValueError(f"{what} of protocol {PROTOCOL_VERSION}{reason}")


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
