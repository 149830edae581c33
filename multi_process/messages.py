"""What server and workers say to each other: dataclasses, and their one translation to what travels.

Most travel as FedLab packages: a JSON header with the message's kind and its fields, then the bytes of its tensors,
none of them converted; sums are packed where a line is slow. A tensor may stand anywhere in a field; in the header, its
type and shape stand for it. What is said of single clients, often and in a few words, goes as a line over the control
connection.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from multi_process import boundary
from multi_process.boundary import ClientId, Count, Line, NumSlots, Parameters, PhaseNumber, Ticket, between, length
from multi_process.fedlab_adapter import BytePackage, MessageCode
from multi_process.packing import pack, unpack
from multi_process.transport.control import PROTOCOL_VERSION
from perfedavg.aggregation.exact_mean import MAX_CAPACITY, ExactMean
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ClientReport
from perfedavg.plain_values import from_plain

_DTYPES = {"int64": torch.int64, "float32": torch.float32, "float64": torch.float64}
_TENSOR, _PACKED = "$tensor", "$packed"


@dataclass(frozen=True)
class Message:
    """A message. Its fields' types, with their rules, are checked when it arrives."""

    code: ClassVar[MessageCode]
    """FedLab's code of the package that carries it."""


@dataclass(frozen=True)
class ControlMessage(Message):
    """A message without tensors that is short enough for a line of the control connection."""


@dataclass(frozen=True)
class Join(Message):
    """Worker to server, first of all.

    ticket: of `handshake.JoinAccepted`.
    machine: the same for all processes of one machine.
    num_cores: cores that the worker may use.
    threads: what its user asked for with --threads, or None.
    device_kind, device_memory_bytes: see `compute.ComputeDevice`.
    kernels: see `compute.describe_kernels`.
    """

    code = MessageCode.SetUp
    ticket: Ticket
    machine: Annotated[str, length(0, 1000)]
    num_cores: NumSlots
    threads: NumSlots | None
    device_kind: Annotated[str, boundary.one_of("cpu", "cuda")]
    device_memory_bytes: Annotated[int, between(0, 2**60)]
    kernels: boundary.NamedLines


@dataclass(frozen=True)
class Configure(Message):
    """Server to worker, the answer to Join.

    ticket: the same as in Join, by which the worker knows the server.
    experiment: `ExperimentConfig.to_dict`.
    num_slots: clients to train side by side.
    sources: see `own_module.sources`; the worker's must be the same.
    """

    code = MessageCode.SetUp
    ticket: Ticket
    experiment: dict[str, Any]
    num_slots: NumSlots
    sources: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ready(Message):
    """Worker to server: data and model are set up.

    fingerprint: of the data set that it read.
    warnings: what its user should know before the first round, a line each.
    """

    code = MessageCode.SetUp
    fingerprint: Annotated[str, length(0, 10_000)]
    device: Line
    warnings: boundary.Lines


@dataclass(frozen=True)
class StartTraining(Message):
    """Server to worker: a round begins, whatever the last one came to. The fields are those of `tasks.CohortTask`.

    parameters: (num_parameters,) float32, the global model.
    """

    code = MessageCode.ParameterUpdate
    phase: PhaseNumber
    round_number: Annotated[int, between(1, 2**40)]
    capacity: Annotated[int, between(1, MAX_CAPACITY)]
    parameters: Parameters


@dataclass(frozen=True)
class KeptStates(Message):
    """Server to worker: what clients that it is given next keep from earlier rounds; of others, they keep nothing.

    Worker to server: what clients that it has trained keep from now on, before the sum that has their updates.
    """

    code = MessageCode.ParameterUpdate
    states: dict[int, dict[str, Tensor]]


@dataclass(frozen=True)
class StartScoring(Message):
    """Server to worker: clients are to be scored next. The fields are those of `tasks.ScoringTask`."""

    code = MessageCode.ParameterUpdate
    phase: PhaseNumber
    round_number: Count
    num_curve_epochs: Count
    parameters: Parameters


@dataclass(frozen=True)
class AssignGroups(ControlMessage):
    """Server to worker: train or score these groups of clients too, whichever was started last."""

    groups: Annotated[list[boundary.Group], length(1)]


@dataclass(frozen=True)
class GroupTrained(ControlMessage):
    """Worker to server: the updates of a group are in its running sum, or were refused; it has room for another.

    first: the first client of the group, by which it is known.
    """

    first: ClientId


@dataclass(frozen=True)
class GroupScored(ControlMessage):
    """Worker to server: the scores of each client of a group."""

    scores: Annotated[list[ClientScore], length(1)]


@dataclass(frozen=True)
class RequestPartialSum(ControlMessage):
    """Server to worker: send the running sum, and begin a new one."""


@dataclass(frozen=True)
class PartialSum(Message):
    """Worker to server: the exact sum over the clients it trained since the last one, see `exact_mean.ExactMean`.

    reports: of each client, also of those whose update was refused.
    total: (num_parameters,) int64.
    states: what clients keep now that was not sent before, of those whose update was not refused.
    """

    code = MessageCode.GradientUpdate
    weight: Annotated[int, between(0, MAX_CAPACITY)]
    capacity: Annotated[int, between(1, MAX_CAPACITY)]
    reports: Annotated[list[ClientReport], length(1)]
    total: Annotated[Tensor, boundary.vector(torch.int64)]
    states: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def part(self) -> ExactMean:
        return ExactMean(self.total, self.weight, self.capacity)


@dataclass(frozen=True)
class Failed(Message):
    """Worker to server: it cannot go on, and why, in one line. client_id: the client it was working on, if any."""

    code = MessageCode.Exit
    reason: Line
    client_id: ClientId | None


@dataclass(frozen=True)
class Finish(Message):
    """Server to worker: the experiment is over."""

    code = MessageCode.Exit


def with_own_tensors(message: Message) -> Message:
    """The message with copies of its tensors, which the next one that is received does not overwrite."""

    def copied(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: copied(entry) for key, entry in value.items()}
        return value.clone() if isinstance(value, Tensor) else value

    return replace(message, **{name: copied(value) for name, value in vars(message).items()})


_CONTROL_MESSAGES = {kind.__name__: kind for kind in ControlMessage.__subclasses__()}
_PACKAGED = {kind.__name__: kind for kind in Message.__subclasses__() if kind is not ControlMessage}


def to_package(message: Message, packs_sums: bool = False) -> BytePackage:
    """The FedLab package that carries a message. `from_package` is its inverse, bit for bit.

    packs_sums: whether vectors of whole numbers are packed, which are sums.
    """
    tensors: list[Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            if packs_sums and value.dtype is torch.int64 and value.dim() == 1 and len(value):
                tensors.append(pack(value))
                return {_PACKED: [len(value), len(tensors[-1])]}
            tensors.append(value)
            return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape)]}
        return vars(value)  # a dataclass

    header = json.dumps({"kind": type(message).__name__, "values": vars(message)}, default=plain)
    return BytePackage(message.code, header.encode(), tensors)


class _Body:
    """What travels behind a header: each tensor's bytes in their order, filled up to a multiple of 8.

    most_bytes: that all of it that is packed may come to.
    """

    def __init__(self, content: Tensor, most_bytes: int) -> None:
        self._content = content
        self._most_bytes = most_bytes
        self._place = 0

    @property
    def is_taken(self) -> bool:
        """Whether nothing is left."""
        return self._place == self._content.numel()

    def with_tensor(self, value: dict[str, Any]) -> Any:
        """An object of the header; or the next tensor, where it stands for one. Raises ValueError, among others."""
        if set(value) == {_PACKED}:
            return self._unpacked(*value[_PACKED])
        return self._plain(value[_TENSOR]) if set(value) == {_TENSOR} else value

    def _plain(self, described: Any) -> Tensor:
        type_name, shape = described
        dtype = _DTYPES[type_name]
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError("a tensor has no such shape")
        return self._take(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)

    def _unpacked(self, num_entries: int, num_bytes: int) -> Tensor:
        are_whole = type(num_entries) is type(num_bytes) is int
        if not (are_whole and 0 <= 8 * num_entries <= self._most_bytes and num_bytes > 0):
            raise ValueError("what is packed has no such size")
        self._most_bytes -= 8 * num_entries
        return unpack(self._take(num_bytes), num_entries)

    def _take(self, num_bytes: int) -> Tensor:
        taken = self._content[self._place : self._place + num_bytes]
        self._place += num_bytes + -num_bytes % 8
        return taken


def from_package(code: MessageCode, content: list[Tensor] | None, most_bytes: int = 2**62) -> Message:
    """The message that a package carries. Raises ValueError where it is not one of this protocol's.

    most_bytes: that all of it that is packed may come to.
    """
    try:
        header, tensors = content or []
        body = _Body(tensors, most_bytes)
        fields = json.loads(header.numpy().tobytes(), object_hook=body.with_tensor)
        if not body.is_taken:
            raise ValueError("it has other tensors than it says")
        kind = _PACKAGED[fields["kind"]]
        message = from_plain(kind, fields["values"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:  # also RecursionError
        raise _not_ours(f"a package with code {code.name} is not a message", error) from error
    if message.code is not code:
        raise ValueError(f"a {kind.__name__} message came with code {code.name}")
    return message


def to_line(message: ControlMessage) -> dict[str, Any]:
    """The fields of the line that carries a control message. `from_line` is its inverse."""
    return {"control": type(message).__name__, "values": json.loads(json.dumps(vars(message), default=vars))}


def from_line(fields: dict[str, Any]) -> ControlMessage:
    """The control message that a line carries. Raises ValueError where it is not one of this protocol's."""
    try:
        if set(fields) != {"control", "values"}:
            raise ValueError("it has other fields than control, values")
        return from_plain(_CONTROL_MESSAGES[fields["control"]], fields["values"])
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours("a line is not a control message", error) from error


def _not_ours(what: str, error: Exception) -> ValueError:
    """What a rule found wrong is said; what Python did, in trying to read something else, says nothing."""
    reason = f": {boundary.clean_text(error)}" if type(error) is ValueError else ""
    return ValueError(f"{what} of protocol {PROTOCOL_VERSION}{reason}")
