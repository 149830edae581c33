"""A worker's network: finds the server, and finds it again."""

from __future__ import annotations

import socket
import time
from dataclasses import replace
from functools import partial

from multi_process.boundary import clean_text
from multi_process.fedlab_adapter import Network
from multi_process.transport import handshake
from multi_process.transport.control import ControlConnection, ProtocolError
from multi_process.transport.handshake import HANDSHAKE_SECONDS, Hello, RefusedError
from multi_process.transport.keys import read_token, tls_context
from multi_process.transport.peer import PEER_DESCRIPTORS, Peer, RunEndedError
from multi_process.transport.settings import BACKENDS, POLL_SECONDS, REMINDER_SECONDS, NetworkSettings, resolve
from multi_process.transport.stream import tensor_connection
from multi_process.transport.tensors import WORKER
from multi_process.transport.wire import UnknownKeyError, Wire
from perfedavg.machine.descriptors import num_spare
from perfedavg.machine.kernels import PORTABLE_KERNELS, UnpinnedKernelsError, kernels_are_pinned
from perfedavg.terminal.console import say

CONNECT_SECONDS = 5.0
"""For one attempt to connect, at most."""


class WorkerNetwork(Network):
    """A worker's network: finds the server, and finds it again.

    rank: this worker's own, 1 or more.
    join_seconds: how long the server is tried for at first.
    server_wait_seconds: how long after it was lost.
    """

    def __init__(self, settings: NetworkSettings, rank: int, join_seconds: float, server_wait_seconds: float) -> None:
        super().__init__(settings.address, settings.world_size, rank, settings.ethernet, settings.backend)
        if rank < 1:
            raise ValueError(f"--rank {rank} is not a worker's; use 1 or more (0 is the server)")
        self._settings = settings
        self._token = read_token(settings.token_file)
        self._tls = None if settings.keys is None else tls_context(settings.keys, is_server=False)
        self._join_seconds = join_seconds
        self._server_wait_seconds = server_wait_seconds
        self._peer: Peer | None = None
        self.ticket = ""

    @property
    def peer(self) -> Peer:
        """The server, as it was joined last."""
        assert self._peer is not None, "the network is connected before it is used"
        return self._peer

    def init_network_connection(self) -> None:
        """Join the server, trying for as long as is due.

        Raises ValueError where it does not want this worker, FinishedError where the run is over, ConnectionError
        where it cannot be reached, UnpinnedKernelsError where this process must start again with portable kernels.
        """
        if self._peer is None:
            seconds, flag = self._join_seconds, "--join_timeout_seconds"
        else:
            seconds, flag = self._server_wait_seconds, "--server_wait_seconds"
            self._peer.close("this worker joins anew")
        where = f"{self.address[0]}:{self.address[1]}"
        deadline = time.monotonic() + seconds
        next_reminder = time.monotonic()
        while True:
            try:
                self._peer = self._join(min(CONNECT_SECONDS, max(POLL_SECONDS, deadline - time.monotonic())))
                return
            except RefusedError as error:
                raise ValueError(f"the server at {where} refuses worker {self.rank}: {error}") from error
            except (ConnectionError, ProtocolError) as error:
                reason = str(error)
            now = time.monotonic()
            if now >= deadline:
                raise ConnectionError(
                    f"no server at {where} within {seconds:g} s ({reason}); start server.py there first, or check "
                    f"--ip, --port, {flag} and the firewall"
                )
            if now >= next_reminder:
                say(f"worker {self.rank}: no server at {where} yet ({reason}); trying for {deadline - now:.0f} s more")
                next_reminder = now + REMINDER_SECONDS
            time.sleep(POLL_SECONDS)

    def close_network_connection(self) -> None:
        if self._peer is not None:
            self.send_volume_intotal, self.recv_volume_intotal = self._peer.bytes_sent, self._peer.bytes_received
            self._peer.close("the run is over")

    def _join(self, connect_seconds: float) -> Peer:
        """One attempt.

        Raises FinishedError, RefusedError, ProtocolError or ConnectionError, and ValueError as `resolve` does or where
        there are not enough file descriptors.
        """
        if num_spare() < PEER_DESCRIPTORS:
            raise ValueError(f"worker {self.rank} has too few file descriptors left; raise its limit with ulimit -n")
        control, hello = self._connect(connect_seconds)
        try:
            settings = self._settings_for(hello)
            accepted = handshake.request_to_join(control, self._token, hello, self.rank, settings.gpu)
            dial = partial(self._connect_for_tensors, accepted.ticket)
            tensors = tensor_connection(settings, hello.backend, control, WORKER, "the server", dial)
            peer = Peer(control, tensors, WORKER, "the server", hello.beat_seconds, hello.silence_seconds)
        except Exception:
            control.close()
            raise
        try:
            peer.connect()
        except RunEndedError as error:
            raise RefusedError(str(error)) from error
        except ConnectionError as error:
            peer.close(str(error))
            raise
        self.ticket = accepted.ticket
        return peer

    def _connect(self, connect_seconds: float) -> tuple[ControlConnection, Hello]:
        """A connection to the server, and what it says first. Raises as `_join` does."""
        try:
            address = resolve(self.address)
        except ValueError as error:
            if self._peer is None:
                raise
            raise ConnectionError(str(error)) from error  # it was known before, so names are out of order for a while
        try:
            control = ControlConnection(Wire(socket.create_connection(address, timeout=connect_seconds), self._tls))
        except OSError as error:
            raise ConnectionError(error.strerror or "no answer") from error
        try:
            return control, self._receive_hello(control)
        except Exception:
            control.close()
            raise

    def _connect_for_tensors(self, ticket: str) -> Wire:
        control, hello = self._connect(CONNECT_SECONDS)
        try:
            return handshake.request_to_attach(control, self._token, hello, ticket)
        except Exception:
            control.close()
            raise

    def _receive_hello(self, control: ControlConnection) -> Hello:
        """Raises ProtocolError where it is no server's, RefusedError where it has other keys or another version."""
        try:
            control.begin(HANDSHAKE_SECONDS)
            return handshake.receive_hello(control)
        except UnknownKeyError as error:
            raise RefusedError(f"{error}; give both the keys that make_keys.py made together, by --keys") from error
        except (ConnectionError, ProtocolError) as error:
            hint = (
                " (or it has --keys, and this worker has none)"
                if self._tls is None and isinstance(error, ConnectionError)
                else ""
            )
            raise ProtocolError(f"what answers there is not a server of this project: {error}{hint}") from error

    def _settings_for(self, hello: Hello) -> NetworkSettings:
        """This worker's, with the server's backend.

        Raises ProtocolError where there are no such terms, RefusedError or UnpinnedKernelsError where they differ.
        """
        for name, own, other in (
            ("--world_size", self.world_size, hello.world_size),
            ("--backend", None if self._settings.backend == "auto" else self._settings.backend, hello.backend),
        ):
            if own is not None and own != other:
                raise RefusedError(f"its {name} is {clean_text(other)}, this worker's {own}; make them equal")
        if hello.backend not in BACKENDS:
            raise ProtocolError("what answers there asks for a backend that there is not")
        if hello.portable_kernels not in PORTABLE_KERNELS:
            raise ProtocolError("what answers there asks for kernels that there are not")
        if not kernels_are_pinned(hello.portable_kernels):
            raise UnpinnedKernelsError(hello.portable_kernels)
        try:
            return replace(self._settings, backend=hello.backend)
        except ValueError as error:
            raise RefusedError(f"it asks for --backend {hello.backend}, but {error}") from error
