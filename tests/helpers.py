"""What several tests need: real processes, data files in their real format, clients with a closed-form loss."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, TypeVar

import numpy as np
import torch
from fork_source import ADDRESS_VARIABLE, Forked, ForkSource, Started
from torch import Tensor, nn

from datasets.clients.partition import Partition
from datasets.clients.partitioned import PartitionedClients
from datasets.clients.split import SplitDataset
from datasets.sources.digits import load_digits_images
from perfedavg.machine.processes import hold_free_port
from perfedavg.methods import FedAvg, Method
from perfedavg.methods.reptile import Reptile
from perfedavg.settings import ExperimentConfig, OptimizerConfig, Phase, PhaseConfig
from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
from perfedavg.training.local_training import LocalTraining

ROOT = Path(__file__).resolve().parent.parent
ENDS_WITHIN_SECONDS = 240
"""For a process that should end by itself; far above what it needs on a busy machine."""

TINY = ["--dataset", "digits", "--model", "mlp", "--client_num_in_total", "20", "--client_num_per_round", "5"]
TINY += ["--rounds", "3", "--local_epochs", "2", "--fine_tune_rounds", "2", "--fine_tune_local_epochs", "1"]
TINY += [
    "--personalization_epochs",
    "1",
    "--eval_every",
    "2",
    "--unseen_fraction",
    "0.2",
    "--local_test_fraction",
    "0.2",
]
"""Flags of an experiment that takes a second."""


def one_phase(flags: list[str]) -> list[str]:
    """The same experiment without fine-tuning, whose flags would have no effect."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    kept = [word for pair in pairs if not pair[0].startswith("--fine_tune") for word in pair]
    return [*kept, "--fine_tune_method", "none"]


Process = Started | Forked
"""What a test started: they have the same methods."""


def network_flags(transport: str, keys: Path) -> list[str]:
    """Of a server and its workers. transport: what carries tensors, as --backend takes it, or `keys`."""
    return ["--keys", str(keys)] if transport == "keys" else ["--backend", transport]


_held = contextlib.ExitStack()
"""The sockets that keep `free_port`'s for the one who asked, until the process that runs tests ends."""
atexit.register(_held.close)


def free_port() -> int:
    """A TCP port of the loopback interface for a server to listen on. Nobody else is given it while the tests run.

    So tests side by side do not get in each other's way.
    """
    held, port = hold_free_port()
    _held.enter_context(held)
    return port


@functools.cache
def fork_source() -> ForkSource:
    """The one source, which all processes that run tests share."""
    source = ForkSource(os.environ[ADDRESS_VARIABLE])
    atexit.register(source.close)
    return source


def launch_fork(name: str, script: Path, argv: list[str], output: IO[bytes]) -> Forked:
    """Starts the processes of benchmarks/faults.py, which forks them itself where it has loaded everything itself."""
    streams = (output.fileno(), output.fileno())
    return fork_source().start([str(script), *argv], os.environ, ROOT, streams)


class Launched:
    """Processes of the project that a test started. Whatever still runs when the block is left is killed."""

    def __init__(self) -> None:
        self.processes: list[Process] = []

    def __enter__(self) -> Launched:
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_all()

    def start(
        self,
        *command: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        fresh: bool = False,
        network_namespace: str | None = None,
        draws_plots: bool = False,
        output: IO[bytes] | None = None,
    ) -> Process:
        """Start a Python entry point of the project (a name ending in .py, or -m and a module) or another command.

        An entry point starts in a fork of a process that has loaded torch and the project, unless it is to be `fresh`
        or its environment has variables that are read when something is loaded (`ForkSource.can_start`).
        draws_plots: a run in a fork draws none otherwise.  output: where it prints, instead of into pipes.
        """
        words = [str(word) for word in command]
        environment = dict(os.environ if env is None else env)
        is_entry_point = words[0].endswith(".py") or words[0] == "-m"
        if words[0].endswith(".py"):
            words[0] = str(ROOT / words[0])
        if is_entry_point and not fresh and fork_source().can_start(environment):
            streams = None if output is None else (output.fileno(), output.fileno())
            process: Process = fork_source().start(words, environment, cwd, streams, network_namespace, draws_plots)
        else:
            before = ["ip", "netns", "exec", network_namespace] if network_namespace else []
            before += [sys.executable] if is_entry_point else []
            stream = subprocess.PIPE if output is None else output
            process = Started([*before, *words], stdout=stream, stderr=stream, env=environment, cwd=cwd)
        self.processes.append(process)
        return process

    def start_server(
        self, run_dir: Path, world_size: int, *flags: str | Path, fresh: bool = False
    ) -> tuple[Process, int]:
        """A server on a free port of the loopback interface. Returns it and the port."""
        port = free_port()
        words = ("--port", str(port), "--world_size", str(world_size), "--run_dir", run_dir)
        return self.start("server.py", *words, *flags, fresh=fresh), port

    def start_worker(self, port: int, world_size: int, rank: int, *flags: str | Path, fresh: bool = False) -> Process:
        """It tries to reach its server for as long as that may need to start from nothing."""
        words = ("--port", str(port), "--world_size", str(world_size), "--rank", str(rank))
        words += ("--join_timeout_seconds", str(ENDS_WITHIN_SECONDS))
        return self.start("client_worker.py", *words, "--device", "cpu", *flags, fresh=fresh)

    def start_struck(
        self, phase: str, round_number: int, signal_name: str, run_dir: Path, *flags: str | Path
    ) -> Process:
        """A single process that gets a signal from itself, just before it takes the step of a round."""
        note = run_dir.parent / f"{run_dir.name} was struck in {phase} {round_number}"
        fault = ("server stepping", phase, str(round_number), signal_name, note)
        return self.start("benchmarks/planted_fault.py", *fault, "single_process.py", *flags)

    def kill_all(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()


def finish(process: Process) -> tuple[int, str, str]:
    """Wait for a process. Returns exit status, standard output and standard error."""
    output, errors = process.communicate(timeout=ENDS_WITHIN_SECONDS)
    return process.returncode, output or "", errors or ""


def assert_one_clear_line(process: Process, *parts: str) -> None:
    """The process ended with status 2, and the last line of its standard error is an error with these parts."""
    status, _, errors = finish(process)
    assert status == 2, errors
    assert "Traceback" not in errors, errors
    last = errors.strip().splitlines()[-1]
    assert "error: " in last, errors
    for part in parts:
        assert part in last, errors


def wait_for_line(process: Process, *texts: str) -> None:
    """Read a process's standard error until each text has been in a line, in whatever order they come."""
    assert process.stderr is not None
    seen, missing = [], set(texts)
    for line in process.stderr:
        seen.append(line)
        missing = {text for text in missing if text not in line}
        if not missing:
            return
    raise AssertionError(f"{missing} never came; the process said: {''.join(seen)}")


def stop_in_round(number: int, folder: Path) -> list[str]:
    """What to put before an entry point whose server is to stop itself (SIGSTOP) in this round of the first phase.

    So what a test does then happens in the middle of the run, however fast that is. folder: takes a file.
    """
    note = str(folder / f"stopped in round {number}")
    return ["benchmarks/planted_fault.py", "server stepping", "fedavg", str(number), "SIGSTOP", note]


Reached = TypeVar("Reached")


def wait_until(condition: Callable[[], Reached], what: str = "it", process: Process | None = None) -> Reached:
    """Wait for what another thread or process is about to do. Returns what the condition then gives.

    what: for the error.  process: the one that does it; where it ends before, the error comes at once.
    """
    deadline = time.monotonic() + ENDS_WITHIN_SECONDS
    while not (reached := condition()):
        assert process is None or process.poll() is None, f"{what} never came: {finish(process)}"
        assert time.monotonic() < deadline, f"{what} never came"
        time.sleep(0.01)
    return reached


def wait_until_stopped(process: Process, child: str = "") -> int:
    """Until a process, or its child of this name, has stopped itself. Returns its process id."""

    def stopped() -> list[int]:
        pids = [pid for pid in (children_of(process.pid) if child else [process.pid]) if _state(pid) == "T"]
        return [pid for pid in pids if not child or Path(f"/proc/{pid}/comm").read_text().strip() == child]

    return wait_until(stopped, "its stop", process)[0]


def assert_ended(pid: int) -> None:
    """A process that is not this one's child is gone, or goes within some time."""
    wait_until(lambda: _state(pid) is None, f"the end of process {pid}")


def _state(pid: int) -> str | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[0]


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def digest_in_one_process(flags: Sequence[str], run_dir: Path) -> str:
    """Of the model that single_process.py gives."""
    with Launched() as launched:
        status, _, errors = finish(launched.start("single_process.py", *flags, "--run_dir", run_dir))
    assert status == 0, errors
    return str(read_result(run_dir)["model_sha256"])


def read_result(run_dir: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((run_dir / "result.json").read_text())
    return result


def spoken_text(run_dir: Path) -> list[bytes]:
    """Words of the control messages, and pieces of the final model, which the workers were given to score with."""
    content = (run_dir / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    weights = content[8 + size :]
    places = range(0, len(weights) - 64, len(weights) // 20)
    return [b"personalized-fedavg", b'"message"', b'"control"', *(weights[place : place + 64] for place in places)]


def write_idx(path: Path, array: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    """An IDX file of unsigned bytes: two zero bytes, the type (8), the number of dimensions, each size, the data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def write_image_files(raw: Path, prefixes: tuple[str, str], sizes: tuple[int, int], num_classes: int) -> None:
    """Random images and labels of every class as four IDX files, under the names of a data set's two splits."""
    generator = np.random.default_rng(0)
    for prefix, size in zip(prefixes, sizes, strict=True):
        labels = (np.arange(size) % num_classes).astype(np.uint8)
        images = generator.integers(0, 256, size=(size, 28, 28), dtype=np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images)
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels)


MNIST_PREFIXES = ("train", "t10k")
EMNIST_PREFIXES = ("emnist-byclass-train", "emnist-byclass-test")


def import_torchvision() -> None:
    """Import torchvision, an independent reference, also where it was built for another torch.

    Such a build lacks the two operators that it describes to torch. Its data sets are plain Python and need none.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)
        import torchvision  # noqa: F401


_LIBRARIES: list[torch.library.Library] = []
"""Operators live as long as these."""

PLAY = "to be or not to be that is the question whether tis nobler in the mind to suffer the slings and arrows; "
WINDOW, WINDOWS = 80, 410


def write_plays(folder: Path) -> None:
    """Two roles in LEAF's form: a window of 80 characters of their text, and the character behind it."""
    texts = {"A": PLAY * 5, "B": PLAY[::-1] * 5}
    data = {
        role: {
            "x": [text[first : first + WINDOW] for first in range(WINDOWS)],
            "y": [text[first + WINDOW] for first in range(WINDOWS)],
        }
        for role, text in texts.items()
    }
    content = {"users": list(data), "num_samples": [WINDOWS] * len(data), "user_data": data}
    (folder / "shakespeare").mkdir()
    (folder / "shakespeare" / "all_data_0.json").write_text(json.dumps(content))


@dataclass(frozen=True)
class Examples:
    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class QuadraticClients:
    """Clients whose loss is the mean over their examples of 0.5 * ||w - x||^2, in float64.

    All examples of a client are its centre c, so a step of SGD at rate a is w <- w - a (w - c), whatever the batch.
    """

    fingerprint = "quadratic"

    def __init__(self, centres: Sequence[Sequence[float]], sizes: Sequence[int], num_unseen: int) -> None:
        self.centres = torch.tensor(centres, dtype=torch.float64)
        self._sizes = sizes
        num_train = len(sizes) - num_unseen
        self.train_client_ids = range(num_train)
        self.unseen_client_ids = range(num_train, len(sizes))

    def num_train_examples(self, client_id: int) -> int:
        return self._sizes[client_id]

    def client_data(self, client_id: int) -> Examples:
        inputs = self.centres[client_id].expand(self._sizes[client_id], -1)
        labels = torch.zeros(self._sizes[client_id], dtype=torch.int64)
        return Examples(inputs, labels, inputs[:1], labels[:1])


class Difference(nn.Module):
    """(batch, d) inputs to w - inputs; with `half_squared_norm` as the loss it is the quadratic above."""

    def __init__(self, start: Sequence[float]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.w - inputs


def half_squared_norm(outputs: Tensor, labels: Tensor) -> Tensor:
    del labels
    return 0.5 * outputs.square().sum(dim=1).mean()


Update = Callable[[Method, ClientModels, Tensor, Sequence[Client], LocalTraining], tuple[Tensor, list[float]]]


def count_rounds(update: Update) -> Update:
    """A method's `update` whose clients count their rounds, and in the n-th send an n-th of what they would send."""

    def counting(
        method: Method, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        updates, losses = update(method, models, start, clients, training)
        for client, row in zip(clients, updates, strict=True):
            client.state["rounds"] = client.state.get("rounds", torch.zeros(1, dtype=torch.int64)) + 1
            row /= client.state["rounds"]
        return updates, losses

    return counting


Personalize = Callable[[Method, ClientModels, Tensor, Sequence[Client], LocalTraining, AfterEpochs], None]


def from_counted_rounds(personalize: Personalize) -> Personalize:
    """A method's `personalize` whose clients start from the global model times 1 and the rounds that they counted."""

    def counted(
        method: Method,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        rounds = [client.state.get("rounds", torch.zeros(1, dtype=torch.int64)) for client in clients]
        own = start * (1 + torch.stack(rounds)).to(start)
        personalize(method, models, own, clients, training, after_epochs)

    return counted


@dataclass(frozen=True)
class CountingFedAvg(FedAvg):
    name: ClassVar[str] = "counting_fedavg"
    keeps_state: ClassVar[bool] = True
    update = count_rounds(FedAvg.update)  # type: ignore[arg-type]
    personalize = from_counted_rounds(FedAvg.personalize)


def digits_dataset(num_clients: int, seed: int = 0, partition: Partition | None = None) -> SplitDataset:
    """The real digits, by default in label-sorted shards, a fifth of the clients unseen."""
    clients = PartitionedClients(
        load_digits_images(), partition or Partition("shards", 2), num_clients * 4 // 5, num_clients // 5, seed
    )
    return SplitDataset("digits", clients, num_clients * 4 // 5, num_clients // 5, seed)


def basic(loss: float, accuracy: float) -> dict[str, float]:
    """A client's values of the metrics that every run has."""
    return {"loss": loss, "accuracy": accuracy}


def make_config(**changes: Any) -> ExperimentConfig:
    """A small valid experiment, with the given fields changed."""
    sgd = OptimizerConfig("sgd", 0.1)
    fields: dict[str, Any] = {
        "dataset": "digits",
        "architecture": "mlp",
        "seed": 0,
        "initial_model": None,
        "num_clients": 20,
        "unseen_fraction": "0.2",
        "partition": "shards:2",
        "local_split": "shuffled",
        "joint": False,
        "validation": False,
        "cohort_size": 4,
        "batch_size": 10,
        "fedavg": PhaseConfig(2, 2, sgd, OptimizerConfig("momentum", 1.0)),
        "fine_tune": PhaseConfig(2, 1, sgd, OptimizerConfig("sgd", 0.5), method=Reptile()),
        "num_personalization_epochs": 1,
        "num_curve_epochs": 0,
        "eval_every": 1,
        "eval_clients": 2,
        "precision": "float32",
        "client_batching": 1,
        "portable_kernels": "false",
    }
    return ExperimentConfig(**{**fields, **changes})


def with_method(config: ExperimentConfig, phase: Phase, method: Method) -> ExperimentConfig:
    """The experiment with another method in a phase."""
    changed: Any = {phase.field: dataclasses.replace(config.phases[phase], method=method)}
    return dataclasses.replace(config, **changed)
