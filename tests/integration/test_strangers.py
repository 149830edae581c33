"""What reaches the server's port and is no worker of the run: it learns nothing, and the run goes on undisturbed."""

from __future__ import annotations

import contextlib
import json
import random
import select
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import psutil
import pytest
import torch
from helpers import (
    ENDS_WITHIN_SECONDS,
    TINY,
    Launched,
    Process,
    assert_one_clear_line,
    digest_in_one_process,
    finish,
    network_flags,
    read_result,
    wait_for_line,
    wait_until,
    wait_until_stopped,
)
from torch import nn

import utils
from multi_process.messages import Message, PartialSum
from multi_process.transport.control import PROTOCOL_VERSION, ControlConnection
from multi_process.transport.handshake import (
    HANDSHAKE_SECONDS,
    AttachRequest,
    Hello,
    JoinAccepted,
    JoinRequest,
    receive_hello,
)
from multi_process.transport.peer import RunEndedError
from multi_process.transport.server_network import MAX_PENDING_HANDSHAKES
from multi_process.transport.settings import NetworkSettings
from multi_process.transport.wire import Wire
from multi_process.transport.worker_network import WorkerNetwork
from multi_process.worker import WorkerManager
from perfedavg.contracts import FederatedDataset
from perfedavg.settings import ExperimentConfig

TOKEN, OTHER_TOKEN = "a secret of 16 or more", "another secret of 16 or more"
FLAGS = [*TINY, "--rounds", "5"]
NUM_SCANS = 100
NUM_LEFT_OPEN = MAX_PENDING_HANDSHAKES + 16


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    return write_token(tmp_path / "token", TOKEN)


def write_token(path: Path, token: str) -> Path:
    path.write_text(token + "\n")
    return path


@pytest.fixture(scope="module")
def digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the model that the experiment gives in one process."""
    return digest_in_one_process(FLAGS, tmp_path_factory.mktemp("single") / "run")


class Faulty(WorkerManager):
    """A worker whose sums are impossible, as if a bit had flipped in each."""

    def _send(self, message: Message) -> None:
        if isinstance(message, PartialSum):
            message = replace(message, total=message.total + 2**62)
        super()._send(message)


def test_a_member_with_an_impossible_sum_is_sent_away_and_changes_nothing(
    launched: Launched, digest: str, tmp_path: Path
) -> None:
    """Over real links: the server checks what has come, and drops it with its sender."""
    server, port = launched.start_server(tmp_path / "run", 3, *FLAGS)
    worker = launched.start_worker(port, 3, 1)

    def build_workload(config: ExperimentConfig) -> tuple[nn.Module, FederatedDataset]:
        dataset = utils.get_datasets(config, tmp_path)
        return utils.get_model(config, dataset), dataset

    cpu = torch.device("cpu")
    network = WorkerNetwork(NetworkSettings(("127.0.0.1", port), 3, None, "auto", cpu, None), 2, 60.0, 5.0)
    with pytest.raises(RunEndedError, match="an entry of its sum is beyond what weight"):
        Faulty(network, build_workload, cpu, 1).run()
    for process in (server, worker):
        status, _, errors = finish(process)
        assert status == 0, errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest
    log = (tmp_path / "run" / "log.txt").read_text()
    (line,) = [line for line in log.splitlines() if "lost worker" in line]
    assert "lost worker 2 (an entry of its sum is beyond what weight" in line


class Strangers:
    """Clients of the server's port. Each has a loopback address of its own, by which the server's log tells it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._open: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.heard: dict[str, list[bytes]] = {}

    def come(self, host: str, *content: bytes, times: int = 1, pause_seconds: float = 0.0, waits: bool = True) -> None:
        """Connect, send the pieces with a pause after each, and listen until the server ends it, or leave at once."""

        def visit() -> None:
            for _ in range(times):
                with self._connect(host) as connection, contextlib.suppress(ConnectionError):
                    for piece in content:
                        connection.sendall(piece)
                        if self._is_ended(host, connection, pause_seconds):
                            break
                    while waits and not self._is_ended(host, connection, 60):
                        pass

        thread = threading.Thread(target=visit, daemon=True)
        self._threads.append(thread)
        thread.start()

    def leave_open(self, host: str, times: int) -> None:
        """Connect so many times, and do nothing."""
        self._open += [self._connect(host) for _ in range(times)]

    def wait(self) -> None:
        """Until the server has ended every connection of those that came."""
        for thread in self._threads:
            thread.join(ENDS_WITHIN_SECONDS)
            assert not thread.is_alive(), "a stranger was never dropped"

    def close(self) -> None:
        for connection in self._open:
            connection.close()

    def _connect(self, host: str) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=60, source_address=(host, 0))

    def _is_ended(self, host: str, connection: socket.socket, timeout_seconds: float) -> bool:
        """Take in what the server says within a time. True where it ended the connection instead."""
        if not select.select([connection], [], [], timeout_seconds)[0]:
            return False
        received = connection.recv(65536)
        self.heard.setdefault(host, []).append(received)
        return not received


def line(fields: dict[str, object]) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def application(**changes: object) -> bytes:
    """The line that a worker without a proof would send."""
    return line({**asdict(JoinRequest(PROTOCOL_VERSION, "0" * 64, 2, "", "0" * 64)), **changes})


SILENT = "no sign of life for 10 s"
STRANGERS = {
    "127.0.0.11": ((random.Random(0).randbytes(2**20),), "is not a line of JSON"),
    "127.0.0.12": ((b"A" * 2**20,), "bytes without the end of a line"),
    "127.0.0.13": ((b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",), "is not a line of JSON"),
    "127.0.0.14": ((b'{"hello": "world"}\n',), "is no JoinRequest of this protocol"),
    "127.0.0.15": ((b"[" * 60_000 + b"\n",), "is not a line of JSON"),
    "127.0.0.16": ((application(),), "does not know the server's token"),
    "127.0.0.17": ((application(proof="\u00e4\ud800"),), "does not know the server's token"),
    "127.0.0.18": ((application(rank="1"),), 'rank is "1", must be a whole number'),
    "127.0.0.19": ((), SILENT),
    "127.0.0.20": ((b"{",) * 100, SILENT),
    "127.0.0.21": ((b"\n",) * 100, "is not a line of JSON"),
    "127.0.0.22": ((line(asdict(AttachRequest(PROTOCOL_VERSION, "0" * 64, "0" * 64, ""))),), "know the server's token"),
}
"""Their addresses, what they send, and why the server drops them where it has no keys."""
TLS_ALERT_BYTES = 7
SCANNER, IDLERS = "127.0.0.31", "127.0.0.32"


@pytest.mark.parametrize(
    "transport",
    ["auto", pytest.param("tcp", marks=pytest.mark.slow), pytest.param("keys", marks=pytest.mark.slow)],
)
def test_strangers_neither_disturb_a_run_nor_learn_of_it(
    launched: Launched, token_file: Path, digest: str, keys: Path, tmp_path: Path, transport: str
) -> None:
    """In the middle of a round, which cannot end meanwhile because one of its workers is stopped."""
    run = tmp_path / "run"
    idler = f"dropped a connection from {IDLERS} (number 1): {MAX_PENDING_HANDSHAKES} others came during its handshake"
    with standing_still(launched, run, token_file, network_flags(transport, keys)) as (_, port):
        strangers = Strangers(port)
        strangers.come(SCANNER, times=NUM_SCANS, waits=False)
        for host, (content, _) in STRANGERS.items():
            strangers.come(host, *content, pause_seconds=0.3 if len(content) > 1 else 0.0)
        strangers.wait()
        strangers.leave_open(IDLERS, NUM_LEFT_OPEN)
        wait_until(lambda: idler in (run / "log.txt").read_text(), "the end of an idler")
    strangers.close()
    log = log_of_undisturbed(run, digest)
    for host, (content, reason) in STRANGERS.items():
        (dropped,) = [said for said in log.splitlines() if f"dropped a connection from {host} " in said]
        assert ("is not TLS of this run" if transport == "keys" and content else reason) in dropped
    assert log.count(f"dropped a connection from {SCANNER}") == NUM_SCANS.bit_length(), "the 1st, 2nd, 4th, 8th .."
    for host in STRANGERS:
        heard = b"".join(strangers.heard.get(host, []))
        if transport == "keys":
            assert len(heard) <= TLS_ALERT_BYTES
        else:
            assert_only_the_hello(heard)


def tls_greeting() -> bytes:
    """What a TLS client that has no key of the run says first."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    said = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), said).do_handshake()
    return said.read()


NUM_OF_A_CROWD = 2500
CROWDS: dict[str, tuple[tuple[bytes, ...], bool]] = {
    "127.0.0.41": ((), False),
    "127.0.0.42": ((tls_greeting(),), False),
    "127.0.0.43": ((b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n",), True),
    "127.0.0.44": ((application(),), True),
}
"""Their addresses, what each of them sends, and whether it waits for an answer."""


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("transport", ["gloo", "tcp", "keys"])
def test_ten_thousand_strangers_leave_no_thread_and_no_descriptor_behind(
    launched: Launched, token_file: Path, digest: str, keys: Path, tmp_path: Path, transport: str
) -> None:
    """One of the workers stands still meanwhile, so that the run has as many of both before them as after."""
    with standing_still(launched, tmp_path / "run", token_file, network_flags(transport, keys)) as (pid, port):
        before = settled(pid)
        strangers = Strangers(port)
        for host, (content, waits) in CROWDS.items():
            strangers.come(host, *content, times=NUM_OF_A_CROWD, waits=waits)
        strangers.wait()
        assert settled(pid) == before
    log = log_of_undisturbed(tmp_path / "run", digest)
    for host in CROWDS:
        assert log.count(f"dropped a connection from {host} ") == NUM_OF_A_CROWD.bit_length()


@contextlib.contextmanager
def standing_still(
    launched: Launched, run: Path, token_file: Path, network: Sequence[str | Path]
) -> Iterator[tuple[int, int]]:
    """A run that stands in the middle of a round, as one of its two workers is stopped, and then goes on to its end.

    Yields the server's process id, and its port.
    """
    known = ("--token_file", token_file, *network)
    server, port = launched.start_server(run, 3, *FLAGS, *known, "--worker_timeout_seconds", "3600")
    address = ("--port", str(port), "--device", "cpu")
    fault = ("worker training", "fedavg", "2", "SIGSTOP", run.with_name("the worker stands still"))
    stopped = launched.start(
        *("benchmarks/planted_fault.py", *fault, "client_worker.py", *address, "--rank", "1", *known)
    )
    worker = launched.start_worker(port, 3, 2, *known)
    wait_until_stopped(stopped)
    yield server.pid, port
    stopped.send_signal(signal.SIGCONT)
    for process in (server, stopped, worker):
        status, _, errors = finish(process)
        assert status == 0, errors
        assert "Traceback" not in errors, errors


def log_of_undisturbed(run: Path, digest: str) -> str:
    """The log of a run that ended with this model, and lost nobody."""
    assert read_result(run)["model_sha256"] == digest
    log = (run / "log.txt").read_text()
    assert "lost worker" not in log
    return log


def settled(pid: int) -> tuple[int, int]:
    """Threads and descriptors of a process, once it has had the same for longer than a handshake may take."""
    process = psutil.Process(pid)
    counted, since = (0, 0), time.monotonic()
    while time.monotonic() - since < HANDSHAKE_SECONDS + 1:
        now = process.num_threads(), process.num_fds()
        if now != counted:
            counted, since = now, time.monotonic()
        time.sleep(0.05)
    return counted


def assert_only_the_hello(heard: bytes) -> None:
    """Nothing of the configuration or the model, only what a worker needs to prove itself, and why it was refused."""
    hello, *others = heard.splitlines() or [b""]
    if hello:  # a connection that is ended while there is more to read may lose it
        assert set(json.loads(hello)) == {field.name for field in fields(Hello)}
    assert all(set(json.loads(line)) == {"refused"} for line in others)


def test_workers_that_may_not_join_are_told_why(
    launched: Launched, token_file: Path, digest: str, tmp_path: Path
) -> None:
    """They come while the server waits for its second worker, which then comes too."""
    known = ("--token_file", token_file)
    server, port = launched.start_server(tmp_path / "run", 3, *FLAGS, *known)
    workers = [launched.start_worker(port, 3, 1, *known)]
    wait_for_line(server, "worker 1 joined")
    without = launched.start_worker(port, 3, 2)
    mistaken = launched.start_worker(port, 3, 2, "--token_file", write_token(tmp_path / "other", OTHER_TOKEN))
    second = launched.start_worker(port, 3, 1, *known)
    assert other_version(port) == {
        "refused": f"its protocol version {PROTOCOL_VERSION + 1} differs from the server's {PROTOCOL_VERSION}"
    }
    assert_one_clear_line(without, "refuses worker 2", "asks for a token", "--token_file", "PERFEDAVG_TOKEN")
    assert_one_clear_line(mistaken, "refuses worker 2", "does not know the server's token")
    assert_one_clear_line(second, "refuses worker 1", "--rank 1 is taken by another worker")
    wait_for_line(server, "dropped a connection from 127.0.0.1 (number 4)")
    workers.append(launched.start_worker(port, 3, 2, *known))
    status, _, errors = finish(server)
    assert status == 0, errors
    for worker in workers:
        status, _, worker_errors = finish(worker)
        assert status == 0, worker_errors
    assert read_result(tmp_path / "run")["model_sha256"] == digest


def other_version(port: int) -> dict[str, object]:
    """What the server answers to a worker of the next version."""
    control = ControlConnection(Wire(socket.create_connection(("127.0.0.1", port))))
    try:
        receive_hello(control)
        control.send(**{**json.loads(application()), "protocol": PROTOCOL_VERSION + 1, "a new field": 1})
        return control.receive(60)
    finally:
        control.close()


def test_a_worker_with_a_token_refuses_a_server_without_one(
    launched: Launched, token_file: Path, tmp_path: Path
) -> None:
    """The server names the code that a worker imports, so a worker must know whose server it is."""
    server, port = launched.start_server(tmp_path / "run", 2, *TINY)
    refusing = launched.start_worker(port, 2, 1, "--token_file", token_file)
    assert_one_clear_line(refusing, "the server does not know this worker's token")
    wait_for_line(server, "worker 1 could not join")
    worker = launched.start_worker(port, 2, 1)
    for process in (worker, server):
        status, _, errors = finish(process)
        assert status == 0, errors


@contextlib.contextmanager
def impostor(answer: Callable[[ControlConnection], None]) -> Iterator[int]:
    """A server of somebody else's for one worker. Yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            accepted, _ = listener.accept()
            control = ControlConnection(Wire(accepted))
            with accepted, contextlib.suppress(ConnectionError):
                answer(control)
                control.receive(60)  # until the worker leaves

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listener.getsockname()[1])
        thread.join(60)
        assert not thread.is_alive(), "the worker left"


def hello_with(**changes: object) -> dict[str, object]:
    spoken = Hello("0" * 64, True, 2, "gloo", 1.0, 30.0)
    return {**asdict(spoken), **changes}


def guess_the_proof(control: ControlConnection) -> None:
    control.send(**hello_with())
    proof = control.receive(60)["proof"]
    control.send(**asdict(JoinAccepted(1, "0" * 64, str(proof))))  # the worker's own, which is all that it has seen


def speak_another_version(control: ControlConnection) -> None:
    control.send(**hello_with(protocol=PROTOCOL_VERSION + 1))


def test_a_worker_leaves_a_server_that_cannot_prove_itself(launched: Launched, token_file: Path) -> None:
    for answer, reason in (
        (guess_the_proof, "the server does not know this worker's token"),
        (
            speak_another_version,
            f"protocol version {PROTOCOL_VERSION} differs from the server's {PROTOCOL_VERSION + 1}",
        ),
    ):
        with impostor(answer) as port:
            worker = launched.start_worker(port, 2, 1, "--token_file", token_file)
            assert_one_clear_line(worker, f"the server at 127.0.0.1:{port} refuses worker 1: ", reason)


def test_a_token_that_is_missing_or_too_short(launched: Launched, tmp_path: Path) -> None:
    """Neither side may start as if it needed no token."""

    def start(token_file: Path) -> list[Process]:
        server, port = launched.start_server(tmp_path / "run", 2, *TINY, "--token_file", token_file)
        return [server, launched.start_worker(port, 2, 1, "--token_file", token_file)]

    nowhere, short = tmp_path / "nowhere", write_token(tmp_path / "short", "123456789")
    missing, too_short = start(nowhere), start(short)
    for process in missing:
        assert_one_clear_line(process, f"--token_file {nowhere} cannot be read", "No such file")
    for process in too_short:
        assert_one_clear_line(process, f"--token_file {short} has 9 characters, fewer than 16", "secrets.token_hex")
    assert not (tmp_path / "run").exists()
