"""What carries tensors, compared: bytes a second between two processes, and how soon the death of one is noticed.

python benchmarks/transports.py [--repeats N]

gloo, the server's port in plain text (tcp) and with keys are this project's own connections. CURVE is pyzmq's
encryption, which was considered in place of TLS; it is measured where pyzmq is installed, as it is with
requirements-dev.txt. One process sends messages of 50 MB, each when the other one asks for it; then it is killed, and
the other one waits for the news. Every transport has its turn in every repeat; the figures are medians. The last line
is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from multi_process.transport.control import ControlConnection  # noqa: E402
from multi_process.transport.keys import make_keys, tls_context  # noqa: E402
from multi_process.transport.process_group import GroupConnection  # noqa: E402
from multi_process.transport.stream import StreamConnection  # noqa: E402
from multi_process.transport.tensors import SERVER, WORKER, TensorConnection, TransferError  # noqa: E402
from multi_process.transport.wire import Wire  # noqa: E402

NUM_BYTES = 50 * 2**20
NUM_MESSAGES = 5
"""In a repeat, after one that is not counted."""
LONG = 600.0

Measured = tuple[float, float]
"""Bytes a second, and seconds until a death is noticed."""


def own(transport: str, keys: Path) -> Measured:
    """Of this project's own connections: gloo, tcp or keys."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        other = _start(_own_sender, listener.getsockname(), transport, keys)
        connection = _form(transport, SERVER, keys, [listener.accept()[0] for _ in range(2)])
    content, ask = torch.zeros(NUM_BYTES, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    seconds = []
    for _ in range(NUM_MESSAGES + 1):
        started = time.perf_counter()
        connection._send(ask)
        connection._receive(content, time.monotonic() + LONG)
        seconds.append(time.perf_counter() - started)
    other.kill()
    killed = time.perf_counter()
    with contextlib.suppress(TransferError):
        connection._receive(ask, time.monotonic() + LONG)
    noticed = time.perf_counter() - killed
    other.join()
    connection.interrupt()
    connection.close()
    return NUM_BYTES / statistics.median(seconds[1:]), noticed


def _own_sender(address: Any, transport: str, keys: Path) -> None:
    connection = _form(transport, WORKER, keys, [socket.create_connection(address) for _ in range(2)])
    content, ask = torch.zeros(NUM_BYTES, dtype=torch.int8), torch.zeros(1, dtype=torch.int8)
    while True:
        connection._receive(ask, time.monotonic() + LONG)
        connection._send(content)


def _form(transport: str, side: int, keys: Path, connected: list[socket.socket]) -> TensorConnection:
    """Over two connections: one for control, one for tensors where they go over the server's port."""
    is_server = side == SERVER
    tls = tls_context(keys, is_server) if transport == "keys" else None
    control, second = ControlConnection(Wire(connected[0])), Wire(connected[1], tls, is_server)
    if transport == "gloo":
        group = GroupConnection(control, side, None, None)
        threading.Thread(target=_take_keys, args=(control, group), daemon=True).start()
        group.form()
        return group
    second.begin(time.monotonic() + LONG)
    stream = StreamConnection(side, None)
    stream.attach(second)
    return stream


def _take_keys(control: ControlConnection, group: GroupConnection) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            fields = control.receive(LONG)
            group.set_by_peer(fields["key"], fields["value"])


def curve(keys: Path) -> Measured:
    """Of pyzmq with CURVE. Its own monitor tells of a death."""
    import zmq
    from zmq.utils.monitor import recv_monitor_message

    del keys  # CURVE's are of another kind
    context = zmq.Context()
    end = context.socket(zmq.PAIR)
    public_key, end.curve_secretkey = zmq.curve_keypair()
    end.curve_server = True
    port = end.bind_to_random_port("tcp://127.0.0.1")
    monitor = end.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    other = _start(_curve_sender, port, public_key)
    seconds = []
    for _ in range(NUM_MESSAGES + 1):
        started = time.perf_counter()
        end.send(b"more")
        assert len(end.recv(copy=False).buffer) == NUM_BYTES
        seconds.append(time.perf_counter() - started)
    other.kill()
    killed = time.perf_counter()
    recv_monitor_message(monitor)
    noticed = time.perf_counter() - killed
    other.join()
    end.disable_monitor()
    context.destroy(0)
    return NUM_BYTES / statistics.median(seconds[1:]), noticed


def _curve_sender(port: int, server_key: bytes) -> None:
    import zmq

    end = zmq.Context().socket(zmq.PAIR)
    end.curve_serverkey = server_key
    end.curve_publickey, end.curve_secretkey = zmq.curve_keypair()
    end.connect(f"tcp://127.0.0.1:{port}")
    content: Any = torch.zeros(NUM_BYTES, dtype=torch.int8).numpy()
    while end.recv():
        end.send(content, copy=False)


def _start(body: Callable[..., None], *arguments: Any) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=body, args=arguments, daemon=True)
    process.start()
    return process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each transport (default: 3)")
    args = parser.parse_args()
    measured: dict[str, list[Measured]] = {}
    with tempfile.TemporaryDirectory() as name:
        keys = Path(name)
        make_keys(keys)
        for _ in range(args.repeats):
            for transport in ("gloo", "tcp", "keys"):
                measured.setdefault(transport, []).append(own(transport, keys))
            if importlib.util.find_spec("zmq") is not None:
                measured.setdefault("CURVE", []).append(curve(keys))
    medians = {
        name: [statistics.median(values) for values in zip(*rows, strict=True)] for name, rows in measured.items()
    }
    print("| transport | MB/s | of gloo's | death noticed after |\n|---|---|---|---|")
    for name, (rate, noticed) in medians.items():
        print(f"| {name} | {rate / 1e6:.0f} | {rate / medians['gloo'][0]:.0%} | {1000 * noticed:.0f} ms |")
    summary = {name: {"bytes_per_s": rate, "noticed_s": noticed} for name, (rate, noticed) in medians.items()}
    print(json.dumps({"benchmark": "transports", **summary}))


if __name__ == "__main__":
    main()
