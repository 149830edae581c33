"""FedLab's classes, fitted to this project. No other module imports FedLab.

What does not fit in FedLab 1.3.0: its trainer and its handler copy the model that they are given; its managers map each
client to one worker for good; a package holds tensors of one type, and its slices travel as int32.
"""

# ruff: noqa: E402

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, cast

from compat import import_fedlab

import_fedlab("fedlab.core")

import torch
from fedlab.core.client.manager import PassiveClientManager
from fedlab.core.client.trainer import SerialClientTrainer
from fedlab.core.communicator import (
    HEADER_DATA_TYPE_IDX,
    HEADER_RECEIVER_RANK_IDX,
    HEADER_SIZE,
    HEADER_SLICE_SIZE_IDX,
    Package,
    dtype_flab2torch,
    dtype_torch2flab,
    supported_torch_dtypes,
)
from fedlab.core.network import DistNetwork
from fedlab.core.network_manager import NetworkManager
from fedlab.core.server.handler import ServerHandler
from fedlab.core.server.manager import ServerManager
from fedlab.utils import MessageCode
from torch import Tensor, nn

from perfedavg.aggregation.exact_mean import ExactMean
from perfedavg.engine.tasks import CohortTask, CohortUpdate

if TYPE_CHECKING:
    from multi_process.messages import PartialSum

__all__ = ["HEADER_SIZE", "MessageCode"]


class Network(DistNetwork):
    """The network of a server or a worker; subclasses connect each pair of them by itself.

    address: (host, port) of the server.  world_size: the server and its workers.  rank: 0 is the server.
    """

    address: tuple[str, int]
    rank: int
    ethernet: str | None
    dist_backend: str
    send_volume_intotal: int
    recv_volume_intotal: int


class BytePackage(Package):
    """A package of two int8 tensors, each filled up to a multiple of 8 bytes: a header, and the bytes of any tensors.

    The receiver can view the bytes as tensors of their own types again, without a copy.
    """

    def __init__(self, code: MessageCode, header: bytes, tensors: Sequence[Tensor]) -> None:
        super().__init__(message_code=code)
        filled = header + b" " * (-len(header) % 8)
        parts = [torch.frombuffer(bytearray(filled), dtype=torch.int8)]
        for tensor in tensors:
            content = tensor.detach().cpu().contiguous().view(-1).view(torch.int8)
            parts += [content, torch.zeros(-content.numel() % 8, dtype=torch.int8)]
        self.content = torch.cat(parts)
        self.dtype = torch.int8
        sizes = [len(filled), self.content.numel() - len(filled)]
        self.slices = [number for size in sizes for number in (size, 1, size)]
        self.header[HEADER_SLICE_SIZE_IDX] = len(self.slices)

    def parts(self, receiver: int) -> tuple[Tensor, Tensor, Tensor]:
        """Header, slices and content, as they travel one after the other. receiver: rank within the process group."""
        self.header[HEADER_RECEIVER_RANK_IDX] = receiver
        self.header[HEADER_DATA_TYPE_IDX] = dtype_torch2flab(self.dtype)
        return self.header, torch.tensor(self.slices, dtype=torch.int64), self.content


def read_header(header: Tensor) -> tuple[MessageCode, int, torch.dtype]:
    """Message code, number of slices and content's type. Raises ValueError where it is no header of FedLab's."""
    _, _, num_slices, code, type_number = Package.parse_header(header)
    if not 0 <= type_number < len(supported_torch_dtypes):
        raise ValueError(f"a package's data type {type_number} is none of FedLab's")
    return code, num_slices, cast(torch.dtype, dtype_flab2torch(type_number))


def sizes_of(slices: list[int]) -> list[int]:
    """The number of elements of each tensor, from FedLab's layout: size, number of dimensions, the dimensions.

    Raises ValueError where the numbers are none of that layout.
    """
    sizes = []
    position = 0
    while position < len(slices):
        size, num_dimensions = [*slices[position : position + 2], 0][:2]
        shape = slices[position + 2 : position + 2 + max(0, num_dimensions)]
        if len(shape) != num_dimensions or min(shape, default=0) < 0 or math.prod(shape) != size:
            raise ValueError(f"a package's slices {slices[position : position + 8]} describe no tensor")
        position += 2 + num_dimensions
        sizes.append(size)
    return sizes


def split_content(slices: list[int], content: Tensor) -> list[Tensor]:
    return cast(list[Tensor], Package.parse_content(slices, content))


class CohortHandler(ServerHandler):
    """The parameter server of a round: hands out the global model, and merges the workers' parts of the sum.

    The round loop and the server's step are the experiment's, the same with and without a network.
    """

    def __init__(self, num_clients: int) -> None:
        super().__init__(nn.Module(), cuda=False)
        self.num_clients = num_clients
        self._parameters = torch.empty(0)
        self._num_missing = 0
        self._update: CohortUpdate | None = None

    def begin(self, task: CohortTask, parameters: Tensor) -> None:
        """Start a round: forget the last one, take over its model."""
        self._parameters = parameters
        self._num_missing = len(task.client_ids)
        self._update = CohortUpdate(ExactMean.zeros(parameters.numel(), task.capacity), [], 0.0)

    @property
    def downlink_package(self) -> list[Tensor]:
        return [self._parameters]

    @property
    def if_stop(self) -> bool:
        """Whether every client of the round has reported."""
        return self._num_missing == 0

    def load(self, payload: PartialSum, keeping: Collection[int] = ()) -> bool:
        """Merge a worker's part, which has been checked. True when the round is complete.

        keeping: those of its clients that keep something from now on.
        """
        self.cohort_update.sum.merge(payload.part)
        self.cohort_update.reports += payload.reports
        self.cohort_update.keeping.update(keeping)
        self._num_missing -= len(payload.reports)
        return self.if_stop

    @property
    def cohort_update(self) -> CohortUpdate:
        assert self._update is not None, "a round has begun"
        return self._update


class PoolManager(ServerManager):
    """The server's manager as a `with` block: sets up the connections before it, and shuts them down after it."""

    def __init__(self, network: Network, handler: CohortHandler) -> None:
        super().__init__(network, handler, mode="GLOBAL")
        self._handler: CohortHandler = handler

    def __enter__(self) -> Any:
        self.setup()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.shutdown()
        else:
            self.abandon(error)

    def setup(self) -> None:
        NetworkManager.setup(self)  # ServerManager's own would map each client to a worker once and for all

    def abandon(self, cause: BaseException) -> None:
        """The block ended with an error."""


class SerialTrainer(SerialClientTrainer):
    """Simulates many clients in one process, one model for all of them."""

    def __init__(self, model: nn.Module, num_clients: int) -> None:
        super().__init__(nn.Module(), num_clients, cuda=False)
        self._model = model


class ClientManager(PassiveClientManager):
    """A worker's manager: joins, answers the server, leaves."""

    def __init__(self, network: Network) -> None:
        super().__init__(network, trainer=None)

    def setup(self) -> None:
        NetworkManager.setup(self)  # ClientManager's own would report a number of clients before it is known
