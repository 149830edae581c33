"""Tensors over a second connection to the server's port, so that one port is all that a worker has to reach.

They do not share the control connection, on which signs of life would have to wait behind them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor

from multi_process.boundary import clean_text
from multi_process.fedlab_adapter import BytePackage, MessageCode
from multi_process.transport.control import ControlConnection, ProtocolError
from multi_process.transport.process_group import GroupConnection
from multi_process.transport.settings import NetworkSettings
from multi_process.transport.tensors import (
    FORMATION_SECONDS,
    SERVER,
    ConnectionInParts,
    TensorConnection,
    TransferError,
    sending_seconds,
)
from multi_process.transport.wire import Wire
from perfedavg.terminal.console import say

GROUP_SECONDS = 5.0
"""For gloo to meet the other side, where there is another way."""


class StreamConnection(ConnectionInParts):
    """Tensors over a connection that the worker makes, and that the server is given when it comes.

    dial: makes it, and raises ConnectionError or ValueError where it cannot; None on the server's side.
    """

    def __init__(self, side: int, dial: Callable[[], Wire] | None) -> None:
        super().__init__(side)
        self._dial = dial
        self._wire: Wire | None = None
        self._is_interrupted = False
        self._changed = threading.Condition()

    def form(self) -> None:
        if self._dial is not None:
            self.attach(self._dial())
        with self._changed:
            self._changed.wait_for(lambda: self._wire is not None or self._is_interrupted, FORMATION_SECONDS)
            if self._wire is None:
                raise ConnectionError("it has not connected a second time")

    def attach(self, wire: Wire) -> None:
        with self._changed:
            if self._wire is not None or self._is_interrupted:
                wire.close()
                raise ProtocolError("its connection for tensors is there already, or no longer wanted")
            self._wire = wire
            self._changed.notify_all()

    def interrupt(self) -> None:
        with self._changed:
            self._is_interrupted = True
            self._changed.notify_all()
            if self._wire is not None:
                self._wire.end()

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
        super().close()

    def _send(self, part: Tensor, is_content: bool = False) -> None:
        deadline = time.monotonic() + sending_seconds(part.nbytes)
        self._transfer(lambda wire: wire.send(_bytes_of(part), deadline))

    def _receive(self, part: Tensor, deadline: float, is_content: bool = False) -> None:
        self._transfer(lambda wire: wire.receive_into(_bytes_of(part), deadline))

    def _transfer(self, transfer: Callable[[Wire], None]) -> None:
        if self._wire is None:
            raise TransferError("the tensors' connection was closed")
        try:
            transfer(self._wire)
        except TimeoutError:
            raise TransferError("the time is over") from None
        except ConnectionError as error:
            raise TransferError(str(error)) from error


class EitherConnection(TensorConnection):
    """gloo's process group where the two sides reach each other by one, and otherwise the server's port.

    Both try gloo, tell each other whether they succeeded, and so come to the same choice.

    name: of the other side, for the line that the server says where it is the port.
    """

    def __init__(self, side: int, group: GroupConnection, stream: StreamConnection, name: str) -> None:
        self._side = side
        self._group = group
        self._stream = stream
        self._name = name
        self._chosen: TensorConnection = group

    def form(self) -> None:
        failure = self._group.failure_to_meet(GROUP_SECONDS)
        store = self._group.store
        store.set(f"failure/{self._side}", failure)
        others_failure = store.get(f"failure/{1 - self._side}").decode()
        store.close()
        if not failure and not others_failure:
            return
        self._group.interrupt()
        self._group.close()
        self._chosen = self._stream
        self._stream.form()
        if self._side == SERVER:
            reason = clean_text(failure or others_failure)
            say(f"server: {self._name}'s tensors go over --port, because gloo does not connect ({reason})")

    def watch(self) -> None:
        self._group.watch()

    def set_by_peer(self, key: Any, value: Any) -> None:
        self._group.set_by_peer(key, value)

    def attach(self, wire: Wire) -> None:
        self._stream.attach(wire)

    def send(self, package: BytePackage) -> None:
        self._chosen.send(package)

    def receive(self, num_bytes: int, timeout_seconds: float) -> tuple[MessageCode, list[Tensor]]:
        return self._chosen.receive(num_bytes, timeout_seconds)

    def is_at_end(self) -> bool:
        return self._chosen.is_at_end()

    def interrupt(self) -> None:
        self._group.interrupt()
        self._stream.interrupt()

    def close(self) -> None:
        self._group.close()
        self._stream.close()


def tensor_connection(
    settings: NetworkSettings,
    backend: str,
    control: ControlConnection,
    side: int,
    name: str,
    dial: Callable[[], Wire] | None = None,
) -> TensorConnection:
    """Of a peer with a control connection.

    backend: of `settings.BACKENDS`.
    name: of the peer.
    dial: see `StreamConnection`.
    """
    if backend == "tcp":
        return StreamConnection(side, dial)
    group = GroupConnection(control, side, settings.ethernet, settings.nccl_device)
    return EitherConnection(side, group, StreamConnection(side, dial), name) if backend == "auto" else group


def _bytes_of(part: Tensor) -> memoryview:
    """The memory of a tensor on the CPU, which is not copied."""
    return memoryview(cast(Any, part.numpy())).cast("B")
