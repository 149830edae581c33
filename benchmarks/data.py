"""What data cost: time to open them, and private memory of a process that has read clients.

python benchmarks/data.py

Writes EMNIST-size random images (814,255 of 28x28, as the IDX files of EMNIST byclass) into a temporary folder, opens
them from the files in a fresh process, and reads 100 clients; then opens 1,000,000 synthetic writers. The last line is
JSON.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import psutil  # noqa: E402

TRAIN_SIZE, TEST_SIZE, NUM_CLASSES = 697_932, 116_323, 62
CLIENTS_READ = 100


def main() -> None:
    if len(sys.argv) == 3:  # the fresh process
        print(json.dumps(measure(Path(sys.argv[1]), sys.argv[2])))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_emnist(Path(folder) / "EMNIST" / "raw")
        for name in ("emnist", "synthetic_writers"):
            command = [sys.executable, "-W", "ignore", __file__, folder, name]
            answer = subprocess.run(command, capture_output=True, text=True)
            if answer.returncode:
                sys.exit(answer.stderr)
            results[name] = json.loads(answer.stdout.splitlines()[-1])
            row = results[name]
            print(
                f"{name}, {row['clients']} clients: {row['open_s']:.2f} s to open, {row['fingerprint_s']:.2f} s for "
                f"the fingerprint, {row['ms_a_client']:.1f} ms a client read, {row['private_mb']:.0f} MB private memory"
            )
    print(json.dumps({"benchmark": "data", **results}))


def measure(data_root: Path, name: str) -> dict[str, float]:
    """Open, fingerprint and read some clients, and account for it. Imports are not counted."""
    import datasets.clients.split  # noqa: F401, loads the libraries before memory is measured
    import utils

    clients = 3400 if name == "emnist" else 1_000_000
    flags = ["--dataset", name, "--client_num_in_total", str(clients)]
    config = utils.get_args("single", flags).experiment
    process = psutil.Process()
    before = process.memory_full_info().uss
    started = time.perf_counter()
    dataset = utils.get_datasets(config, data_root)
    opened = time.perf_counter()
    assert dataset.fingerprint
    fingerprinted = time.perf_counter()
    for client_id in np.linspace(0, clients - 1, CLIENTS_READ).astype(int).tolist():
        dataset.client_data(client_id)
    read = time.perf_counter()
    mapped = sum(part.rss for part in process.memory_maps() if part.path.startswith(str(data_root)))
    return {
        "clients": clients,
        "open_s": opened - started,
        "fingerprint_s": fingerprinted - opened,
        "ms_a_client": 1000 * (read - fingerprinted) / CLIENTS_READ,
        "private_mb": (process.memory_full_info().uss - mapped - before) / 1e6,
    }


def write_emnist(raw: Path) -> None:
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for split, size in (("train", TRAIN_SIZE), ("test", TEST_SIZE)):
        with open(raw / f"emnist-byclass-{split}-images-idx3-ubyte", "wb") as images:
            images.write(struct.pack(">BBBB3I", 0, 0, 8, 3, size, 28, 28))
            for start in range(0, size, 10_000):
                count = min(10_000, size - start)
                images.write(generator.integers(0, 256, (count, 28, 28), dtype=np.uint8).tobytes())
        labels = generator.integers(0, NUM_CLASSES, size, dtype=np.uint8)
        header = struct.pack(">BBBBI", 0, 0, 8, 1, size)
        (raw / f"emnist-byclass-{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


if __name__ == "__main__":
    main()
