"""What carries tensors, compared: how fast a model reaches a worker, what of a core that takes, and how soon the
worker's death is noticed.

python benchmarks/transports.py [--repeats N]

A server's network in this process and a worker's in another one, over the loopback interface, with gloo, over the
server's one port in plain text (`tcp`), and over the same with keys. The server sends models of 50 MB, each when the
worker has said that the last one is there; then the worker is killed. Every transport has its turn in every repeat.

Prints a Markdown table of medians: the rate, also as a share of gloo's, and milliseconds of a core, of both processes
together, for a million bytes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from multi_process.messages import GroupTrained, StartTraining  # noqa: E402
from multi_process.transport.keys import make_keys  # noqa: E402
from multi_process.transport.server_network import ServerNetwork  # noqa: E402
from multi_process.transport.settings import NetworkSettings  # noqa: E402
from multi_process.transport.worker_network import WorkerNetwork  # noqa: E402
from perfedavg.machine.processes import hold_free_port  # noqa: E402

NUM_PARAMETERS = 12_500_000
NUM_MODELS = 9
"""In a repeat, after one that is not counted."""
JOIN_SECONDS, SILENCE_SECONDS = 60.0, 30.0


def measure(transport: str, keys: Path) -> tuple[float, float, float]:
    """Bytes a second, seconds of a core a byte, and seconds until the worker's death is noticed."""
    held, port = hold_free_port()
    backend, used = ("tcp", keys) if transport == "keys" else (transport, None)
    settings = NetworkSettings(("127.0.0.1", port), 2, None, backend, torch.device("cpu"), None, used)
    server = ServerNetwork(settings, SILENCE_SECONDS)
    server.listen()
    # Not forked: this process has OpenMP's threads from the repeat before, which a fork would wait for in vain.
    process = multiprocessing.get_context("spawn").Process(target=work, args=(settings,), daemon=True)
    process.start()
    worker, _ = server.events.get(timeout=JOIN_SECONDS)
    model = StartTraining(1, 1, 1, torch.zeros(NUM_PARAMETERS))
    seconds = []
    for number in range(NUM_MODELS + 1):
        if number == 1:
            busy_before = busy_seconds(process.pid)
        began = time.perf_counter()
        worker.peer.send(model)
        answer(server)
        seconds.append(time.perf_counter() - began)
    busy = busy_seconds(process.pid) - busy_before
    process.kill()
    killed = time.perf_counter()
    with contextlib.suppress(ConnectionError):
        answer(server)
    noticed = time.perf_counter() - killed
    process.join()
    server.close_network_connection()
    held.close()
    num_bytes = model.parameters.nbytes
    return num_bytes / statistics.median(seconds[1:]), busy / (NUM_MODELS * num_bytes), noticed


def busy_seconds(pid: int | None) -> float:
    """Of cores, that this process and another one have had so far."""
    times = psutil.Process(pid).cpu_times()
    return float(time.process_time() + times.user + times.system)


def answer(server: ServerNetwork) -> None:
    """Wait for what the worker says next. Raises ConnectionError where it has died."""
    _, event = server.events.get(timeout=2 * SILENCE_SECONDS)
    if isinstance(event, Exception):
        raise event


def work(settings: NetworkSettings) -> None:
    """The worker's process: join, and say of each model that it is there."""
    network = WorkerNetwork(settings, 1, JOIN_SECONDS, 0.0)
    network.init_network_connection()
    network.peer.num_parameters = NUM_PARAMETERS
    while True:
        network.peer.send(GroupTrained(0))  # the first one to say that it has joined
        network.peer.receive()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of each transport (default: 3)")
    args = parser.parse_args()
    measured: dict[str, list[tuple[float, float, float]]] = {"gloo": [], "tcp": [], "keys": []}
    with tempfile.TemporaryDirectory() as name:
        make_keys(Path(name))
        for _ in range(args.repeats):
            for transport, rows in measured.items():
                rows.append(measure(transport, Path(name)))
    summary = {}
    print("| transport | MB/s | of gloo's | of a core | death noticed after |\n|---|---|---|---|---|")
    for transport, rows in measured.items():
        rate, busy, noticed = map(statistics.median, zip(*rows, strict=True))
        summary[transport] = {"bytes_per_s": rate, "core_s_per_byte": busy, "noticed_s": noticed}
        share = rate / summary["gloo"]["bytes_per_s"]
        print(f"| {transport} | {rate / 1e6:.0f} | {share:.0%} | {1e9 * busy:.1f} ms a MB | {1000 * noticed:.0f} ms |")
    print(json.dumps({"benchmark": "transports", **summary}))


if __name__ == "__main__":
    main()
