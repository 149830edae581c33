"""The server's network: lets workers in, and puts what they say into one queue.

It listens on --ip's address only. Each connection has a thread of its own, in which it becomes a worker's or is
dropped; neither disturbs the run.
"""

from __future__ import annotations

import contextlib
import hmac
import queue
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from multi_process.boundary import clean_text
from multi_process.fedlab_adapter import Network
from multi_process.messages import KeptStates, Message, with_own_tensors
from multi_process.transport import handshake
from multi_process.transport.control import ControlConnection
from multi_process.transport.handshake import (
    HANDSHAKE_SECONDS,
    MAX_SILENCE_SECONDS,
    AttachRequest,
    Hello,
    JoinRequest,
    refuse,
)
from multi_process.transport.keys import read_token, tls_context
from multi_process.transport.peer import PEER_DESCRIPTORS, Peer
from multi_process.transport.settings import POLL_SECONDS, NetworkSettings, listen_on
from multi_process.transport.stream import tensor_connection
from multi_process.transport.tensors import SERVER
from multi_process.transport.wire import Wire
from perfedavg.machine.descriptors import num_spare
from perfedavg.terminal.console import LOGGER, say

MAX_RANK = 2**31 - 1
MAX_PENDING_HANDSHAKES = 64
"""Connections that may be in their handshake and have proven nothing yet; for a further one, the oldest has to go."""
MAX_COUNTED_HOSTS = 1000
"""Hosts whose dropped connections are counted and logged one by one; those of all others are counted together."""
MAX_WAITING_STATES = 16
"""Events behind which a message with states of clients waits in its own thread, so that they do not fill the memory."""
MAX_EVENTS = 10_000
"""That wait for the experiment's thread, before the workers that say more have to wait."""
CLOSING_SECONDS = 1.0
"""For those in their handshake to hear that the run is over."""
BEATS = 4
"""Signs of life within the silence that counts as death, so that a lost one does not matter."""
MAX_BEAT_SECONDS = 1.0


@dataclass(frozen=True, eq=False)
class ConnectedWorker:
    """A worker as the server's network knows it. generation: no two of a server's have the same."""

    peer: Peer
    rank: int
    generation: int
    ticket: str
    gpu: str


class ServerNetwork(Network):
    """The server's network: lets workers in, and puts what they say into one queue.

    silence_seconds: of silence after which a worker is declared dead.
    portable_kernels: see `ExperimentConfig`; workers must do the same.

    events: what the workers say, as it comes. Of each worker the first is a `Join`; an exception is the last.
    """

    world_size: int

    def __init__(self, settings: NetworkSettings, silence_seconds: float, portable_kernels: str = "false") -> None:
        super().__init__(settings.address, settings.world_size, 0, settings.ethernet, settings.chosen_backend)
        if not 0 < silence_seconds <= MAX_SILENCE_SECONDS:
            raise ValueError(
                f"--worker_timeout_seconds {silence_seconds:g} must be above 0, and {MAX_SILENCE_SECONDS:g} at most"
            )
        self._settings = settings
        self._nccl_device, self._gpu = settings.nccl_device, settings.gpu
        self._token = read_token(settings.token_file)
        self._tls = None if settings.keys is None else tls_context(settings.keys, is_server=True)
        self._silence_seconds = float(silence_seconds)
        self._beat_seconds = min(MAX_BEAT_SECONDS, silence_seconds / BEATS)
        self._portable_kernels = portable_kernels
        self.events: queue.SimpleQueue[tuple[ConnectedWorker, Message | Exception]] = queue.SimpleQueue()
        self.num_refused_for_room = 0
        self._listener: socket.socket | None = None
        self._handshakes: dict[ControlConnection, str] = {}  # with the hosts that they come from; may be pushed out
        self._proven: set[ControlConnection] = set()  # in their handshake too, and may not
        self._admission_lock = threading.Lock()
        self._connected: dict[int, ConnectedWorker] = {}  # by rank; those that are not lost
        self._over: tuple[str, str] | None = None  # how and why, as `Peer.close` takes it
        self._num_admitted = 0
        self._counting = threading.Lock()
        self._num_dropped: Counter[str] = Counter()

    def listen(self) -> None:
        """Open the port and let workers in. Raises ValueError where the address is not this machine's or is in use."""
        self._listener = listen_on(self.address)
        threading.Thread(target=self._accept, args=(self._listener,), name="accept", daemon=True).start()
        say(f"server: listening on {self.address[0]}:{self.address[1]} for {self.world_size - 1} worker(s)")

    def init_network_connection(self) -> None:
        """Nothing: each worker's connections are made when it comes."""

    def close_network_connection(self) -> None:
        """Tell whoever is there, or is about to come, that the run is over."""
        self._end("finished", "the run is over")
        deadline = time.monotonic() + CLOSING_SECONDS
        while (self._handshakes or self._proven) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # closing alone would not wake the thread that accepts
            listener.close()
        for control in [*self._handshakes, *self._proven]:
            control.end()
        LOGGER.info("sent %d bytes, received %d bytes", self.send_volume_intotal, self.recv_volume_intotal)

    def dismiss(self, reason: str) -> None:
        """Send every worker away for good, with the reason; also those that come from now on."""
        self._end("ended", reason)

    @property
    def is_over(self) -> bool:
        """Whether the workers have been sent away."""
        return self._over is not None

    @property
    def present(self) -> list[ConnectedWorker]:
        """Workers that were admitted and are not lost."""
        return [worker for worker in list(self._connected.values()) if worker.peer.lost_reason is None]

    def _end(self, farewell: str, reason: str) -> None:
        with self._admission_lock:
            self._over = self._over or (farewell, reason)
            connected = list(self._connected.values())
        for worker in connected:
            worker.peer.close(reason, farewell=farewell)
        self._forget(connected)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                accepted, (host, _) = listener.accept()
            except OSError as error:
                if self._listener is not listener:
                    return  # closed
                self._log_dropped("an unknown host", f"not accepted ({error.strerror})")  # it left, or files are scarce
                time.sleep(POLL_SECONDS)
                continue
            self._limit_handshakes()
            try:
                control = ControlConnection(Wire(accepted, self._tls, is_server=True))
            except OSError as error:
                self._log_dropped(host, f"it left at once ({error.strerror})")
                continue
            self._handshakes[control] = host
            try:
                threading.Thread(target=self._serve, args=(control, host), name=f"serve {host}", daemon=True).start()
            except RuntimeError as error:  # there are no threads left
                self._drop(control, host, str(error))

    def _limit_handshakes(self) -> None:
        """Where too many are in their handshake, let the first of them go: a worker's takes next to no time."""
        most = max(1, min(MAX_PENDING_HANDSHAKES, num_spare() + len(self._handshakes)))
        while len(pending := list(self._handshakes.items())) >= most:
            control, host = pending[0]
            if self._handshakes.pop(control, None) is not None:  # or its own thread has just seen to it
                self._log_dropped(host, f"{most} others came during its handshake")
                control.end()

    def _spare(self, control: ControlConnection) -> None:
        """It has proven who it is, so that no stranger pushes it out. Raises ConnectionError where one just has."""
        if control not in self._proven:
            if self._handshakes.pop(control, None) is None:
                raise ConnectionError("others came during its handshake")
            self._proven.add(control)

    def _drop(self, control: ControlConnection, host: str, reason: str) -> None:
        if control in self._proven or self._handshakes.pop(control, None) is not None:
            self._log_dropped(host, reason)
        control.close()

    def _serve(self, control: ControlConnection, host: str) -> None:
        """Make a worker of a connection, or drop it; then pass on what comes from the worker."""
        try:
            worker = self._handshake(control)
        except Exception as error:  # whatever it is: a stranger ends nothing
            self._drop(control, host, str(error))
            return
        finally:
            self._proven.discard(control)
        if worker is None:
            return  # it carries the tensors of a worker that has a thread already
        try:
            worker.peer.connect()
            while True:
                event = with_own_tensors(worker.peer.receive())  # another may follow before this one has been taken
                most = MAX_WAITING_STATES if isinstance(event, KeptStates) else MAX_EVENTS
                while self.events.qsize() >= most and worker.peer.lost_reason is None:
                    time.sleep(POLL_SECONDS)
                self.events.put((worker, event))
        except Exception as error:  # whatever it is, the experiment's thread must hear of it
            self.events.put((worker, error))
        finally:
            self._forget([worker])

    def _handshake(self, control: ControlConnection) -> ConnectedWorker | None:
        """The worker that has joined, None where it is the second connection of one that had joined before.

        Raises RefusedError, ProtocolError or ConnectionError where it is not let in.
        """
        control.begin(HANDSHAKE_SECONDS)
        if self._tls is not None:
            self._spare(control)
        hello = Hello(
            secrets.token_hex(32),
            self._token is not None,
            self.world_size,
            self.dist_backend,
            self._beat_seconds,
            self._silence_seconds,
            self._portable_kernels,
        )
        request = handshake.receive_request(control, self._token, hello)
        if isinstance(request, AttachRequest):
            self._attach(control, request.ticket)
            return None
        if not 1 <= request.rank <= MAX_RANK:
            refuse(control, f"--rank {request.rank} is not a worker's; use 1 or more")
        self._spare(control)
        while True:
            self._wait_for_rank(control, request.rank)
            with self._admission_lock:
                if request.rank not in self._connected:
                    return self._admit(control, hello, request)

    def _admit(self, control: ControlConnection, hello: Hello, request: JoinRequest) -> ConnectedWorker:
        """Take the worker in, whose rank is free."""
        if self._over is not None:
            refuse(control, self._over[1], is_finished=self._over[0] == "finished")
        self._check_descriptors(control)
        self._check_gpu(control, request)
        self._num_admitted += 1
        accepted = handshake.accept(control, self._token, hello, request, self._num_admitted)
        name = f"worker {request.rank}"
        tensors = tensor_connection(self._settings, self.dist_backend, control, SERVER, name)
        peer = Peer(control, tensors, SERVER, name, self._beat_seconds, self._silence_seconds)
        worker = ConnectedWorker(peer, request.rank, accepted.generation, accepted.ticket, request.gpu)
        self._connected[request.rank] = worker
        return worker

    def _attach(self, control: ControlConnection, ticket: str) -> None:
        """Let the connection carry the tensors of the worker with this ticket."""
        shown = ticket.encode(errors="replace")
        with self._admission_lock:  # a worker that was accepted is among them when it is free
            owners = [one for one in self._connected.values() if hmac.compare_digest(one.ticket.encode(), shown)]
        if not owners:
            refuse(control, "no worker that has joined has this ticket")
        self._spare(control)
        owners[0].peer.attach(handshake.accept_for_tensors(control))

    def _forget(self, lost: Sequence[ConnectedWorker]) -> None:
        """Forget these workers, but not how much was sent and received."""
        with self._admission_lock:
            for worker in lost:
                if self._connected.get(worker.rank) is worker:
                    del self._connected[worker.rank]
                    self.send_volume_intotal += worker.peer.bytes_sent
                    self.recv_volume_intotal += worker.peer.bytes_received

    def _wait_for_rank(self, control: ControlConnection, rank: int) -> None:
        """Refuse a rank that is in use. Where its worker gives no sign of life, wait until one comes, or it is lost.

        What comes within a beat counts for nothing: the worker may have sent it before it left and asked anew.
        """
        asked = time.monotonic()
        while (present := self._connected.get(rank)) is not None:
            if present.peer.lost_reason is not None:
                self._forget([present])
            elif present.peer.last_heard > asked + self._beat_seconds:
                refuse(control, f"--rank {rank} is taken by another worker; give each worker a rank of its own")
            else:
                time.sleep(POLL_SECONDS)

    def _check_descriptors(self, control: ControlConnection) -> None:
        """Refuse a worker for which there are too few file descriptors: gloo ends a process that runs out of them."""
        num_connecting = sum(not worker.peer.is_connected for worker in self.present)
        if num_spare() < PEER_DESCRIPTORS * (num_connecting + 1):
            self.num_refused_for_room += 1
            say(f"server: no room for more than {len(self.present)} worker(s): file descriptors run short (ulimit -n)")
            refuse(
                control, "the server has no file descriptors left for another worker; raise its limit with ulimit -n"
            )

    def _check_gpu(self, control: ControlConnection, request: JoinRequest) -> None:
        """Refuse a GPU that another process of the run sends from; nccl cannot share one."""
        users = {self._gpu: "the server"} | {worker.gpu: worker.peer.name for worker in self.present}
        if self._nccl_device is not None and request.gpu in users:
            refuse(
                control,
                f"it computes on the GPU of {users[request.gpu]} ({request.gpu}), and nccl needs a GPU for "
                "each process; give it another with --device cuda:i, or use --backend gloo on all",
            )

    def _log_dropped(self, host: str, reason: str) -> None:
        """Say that a connection was dropped: the 1st, 2nd, 4th, 8th ... of a host, so that nobody can fill the log."""
        with self._counting:
            if host not in self._num_dropped and len(self._num_dropped) >= MAX_COUNTED_HOSTS:
                host = "further hosts"
            self._num_dropped[host] += 1
            times = self._num_dropped[host]
        if times & (times - 1) == 0:
            say(f"server: dropped a connection from {host} (number {times}): {clean_text(reason)}")
