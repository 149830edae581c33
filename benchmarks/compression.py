"""Lossless compression of what travels in a round: how many bytes it saves, and what it costs in time.

python benchmarks/compression.py [--rounds N] [-- FLAGS of the experiment]

Runs an experiment in this process, cohorts in two halves as two workers would train them, and keeps from some rounds
what would travel: the model as the server sends it, and the sum of the first half. Each is encoded and decoded in
several ways, which must give it back to the bit. The difference of a model is to the one that the worker got before:
`xor` is of the bits, `minus` of the bits as whole numbers. Planes are the first bytes of all entries, then the second,
and so on, so that alike bytes stand together. `used planes` sends those that are not all zero, and does nothing else.

Prints a Markdown table: the bytes that are left; the milliseconds of one core that a million bytes take to encode and
to decode, medians over the messages; and the milliseconds until the million is there, with both, over lines of
10 Mbit/s, 1 Gbit/s, and 20 Gbit/s, which is more than `transports.py` finds on one machine. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
from figures import figure  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from torch import Tensor  # noqa: E402

import utils  # noqa: E402
from perfedavg.engine.executor import LocalExecutor  # noqa: E402
from perfedavg.engine.experiment import ExperimentState, run_experiment  # noqa: E402
from perfedavg.engine.scores import ClientScore  # noqa: E402
from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask  # noqa: E402
from perfedavg.training.client_batching import choose_group_size  # noqa: E402
from perfedavg.training.compute import describe_device, use_reproducible_kernels  # noqa: E402
from perfedavg.training.flat_model import flatten  # noqa: E402

LINES = {"10 Mbit/s": 1e7, "1 Gbit/s": 1e9, "20 Gbit/s": 2e10}
NUM_KEPT = 5
"""Messages of a kind, from rounds that are spread evenly."""
Words = NDArray[np.unsignedinteger[Any]]
DEFAULT_FLAGS = ["--dataset", "synthetic_writers", "--client_num_in_total", "100", "--client_num_per_round", "10"]


@dataclass(frozen=True)
class Sent:
    """words: the bits of what is sent.  before: of what the receiver has from the round before."""

    words: Words
    before: Words


class RecordingExecutor:
    """Trains a cohort in two halves, and keeps what would travel.

    models, sums: in the order of the rounds.
    """

    def __init__(self, executor: LocalExecutor) -> None:
        self._executor = executor
        self.kernels = executor.kernels
        self.models: list[Tensor] = []
        self.sums: list[Tensor] = []

    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        self.models.append(parameters.clone())
        ids = task.client_ids
        first, second = (
            self._executor.train(
                CohortTask(task.phase, task.round_number, half, task.capacity, task.states), parameters
            )
            for half in (ids[::2], ids[1::2])
        )
        self.sums.append(first.sum.total.clone())
        first.sum.merge(second.sum)
        first.reports += second.reports
        return first

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        return self._executor.score(task, parameters)


def to_planes(words: Words) -> bytes:
    return words.view(np.uint8).reshape(-1, words.itemsize).T.tobytes()


def from_planes(content: bytes, like: Words) -> Words:
    planes = np.frombuffer(content, np.uint8).reshape(like.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(like.dtype).reshape(-1)


def folded(words: Words) -> Words:
    """Two's complement to a sign in the lowest bit, so that small numbers of either sign have zeros on top."""
    top = words.dtype.type(words.itemsize * 8 - 1)
    return (words << words.dtype.type(1)) ^ (words.dtype.type(0) - (words >> top))


def unfolded(words: Words) -> Words:
    one = words.dtype.type(1)
    return (words >> one) ^ (words.dtype.type(0) - (words & one))


@dataclass(frozen=True)
class Way:
    """How to encode. change, undo: of the words, given those of the round before."""

    change: Callable[[Words, Words], Words]
    undo: Callable[[Words, Words], Words]
    codec: str | None
    level: int | None = None
    has_planes: bool = True

    def encode(self, sent: Sent) -> tuple[bytes, int]:
        """What is sent, and its size before it was compressed."""
        changed = self.change(sent.words, sent.before)
        content = to_planes(changed) if self.has_planes else changed.tobytes()
        if self.codec == "used planes":
            size = len(sent.words)
            while len(content) > size and not np.frombuffer(content, np.uint8)[-size:].any():
                content = content[:-size]  # the highest bytes come last
            return content, len(content)
        if self.codec is None:
            return content, len(content)
        return self._pyarrow_codec().compress(content, asbytes=True), len(content)

    def decode(self, content: bytes, size: int, sent: Sent) -> Words:
        if self.codec == "used planes":
            content = content.ljust(sent.words.nbytes, b"\0")
        elif self.codec is not None:
            content = self._pyarrow_codec().decompress(content, size, asbytes=True)
        words = from_planes(content, sent.words) if self.has_planes else np.frombuffer(content, sent.words.dtype)
        return self.undo(words, sent.before)

    def _pyarrow_codec(self) -> Any:
        return pa.Codec(self.codec) if self.level is None else pa.Codec(self.codec, compression_level=self.level)


def same(words: Words, before: Words) -> Words:
    return words


def fold(words: Words, before: Words) -> Words:
    return folded(words)


def unfold(words: Words, before: Words) -> Words:
    return unfolded(words)


def minus(words: Words, before: Words) -> Words:
    return folded(words - before)


def plus(words: Words, before: Words) -> Words:
    return unfolded(words) + before


MODEL_WAYS = {
    "as it is": Way(same, same, None, has_planes=False),
    "zstd 1": Way(same, same, "zstd", 1, has_planes=False),
    "planes, zstd 1": Way(same, same, "zstd", 1),
    "xor, planes, lz4": Way(np.bitwise_xor, np.bitwise_xor, "lz4"),
    "xor, planes, zstd 1": Way(np.bitwise_xor, np.bitwise_xor, "zstd", 1),
    "minus, planes, zstd 1": Way(minus, plus, "zstd", 1),
    "minus, planes, zstd 9": Way(minus, plus, "zstd", 9),
}
SUM_WAYS = {
    "as it is": Way(same, same, None, has_planes=False),
    "zstd 1": Way(same, same, "zstd", 1, has_planes=False),
    "used planes": Way(fold, unfold, "used planes"),
    "planes, lz4": Way(fold, unfold, "lz4"),
    "planes, zstd 1": Way(fold, unfold, "zstd", 1),
    "planes, zstd 3": Way(fold, unfold, "zstd", 3),
    "planes, zstd 9": Way(fold, unfold, "zstd", 9),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="of the experiment (default: 20)")
    parser.add_argument("flags", nargs="*", default=DEFAULT_FLAGS, help="behind --, such as --dataset digits")
    args = parser.parse_args()
    torch.set_num_threads(1)
    executor = run(args.rounds, args.flags)
    models = [bits(model, np.uint32) for model in executor.models]
    sums = [bits(total, np.uint64) for total in executor.sums]
    kept = range(1, len(models), max(1, (len(models) - 1) // NUM_KEPT))
    messages = {
        "model": ([Sent(models[number], models[number - 1]) for number in kept], MODEL_WAYS),
        "sum": ([Sent(sums[number], sums[number]) for number in kept], SUM_WAYS),
    }
    print(f"{len(models[0]):,} parameters, {len(models)} rounds\n")
    print(f"| message | encoded | bytes left | encode | decode | {' | '.join(LINES)} |")
    print(f"|---|---|{'---:|' * (3 + len(LINES))}")
    summary = []
    for name, (sent, ways) in messages.items():
        for way_name, way in ways.items():
            measured = [measure(way, one) for one in sent]
            share, encode_s, decode_s = (statistics.median(values) for values in zip(*measured, strict=True))
            there = [encode_s + share * 8e6 / speed + decode_s for speed in LINES.values()]
            cells = [figure(1000 * seconds) for seconds in (encode_s, decode_s, *there)]
            print(f"| {name} | {way_name} | {share:.0%} | {' | '.join(cells)} |", flush=True)
            summary.append(
                {"message": name, "way": way_name, "share": share, "encode_s": encode_s, "decode_s": decode_s}
            )
    print(json.dumps({"benchmark": "compression", "flags": args.flags, "rounds": args.rounds, "rows": summary}))


def run(rounds: int, flags: list[str]) -> RecordingExecutor:
    use_reproducible_kernels()
    own = ["--rounds", str(rounds), "--fine_tune_method", "none", "--eval_every", "1000000", "--device", "cpu"]
    args = utils.get_args("single", [*flags, *own])
    dataset = utils.get_datasets(args.experiment, args.data_root)
    model = utils.get_model(args.experiment, dataset)
    config = choose_group_size(args.experiment, model, dataset, [describe_device(torch.device("cpu"), 1)])
    executor = RecordingExecutor(LocalExecutor(config, model, dataset, torch.device("cpu"), 1))
    run_experiment(config, executor, dataset, ExperimentState.fresh(config, flatten(model)))
    return executor


def bits(tensor: Tensor, kind: type[np.unsignedinteger[Any]]) -> Words:
    words: Words = tensor.numpy().view(kind)
    return words


def measure(way: Way, sent: Sent) -> tuple[float, float, float]:
    """Share of the bytes that is left, and seconds to encode and to decode a million of them."""
    began = time.thread_time()
    content, size = way.encode(sent)
    encoded = time.thread_time()
    words = way.decode(content, size, sent)
    decoded = time.thread_time()
    if not np.array_equal(words, sent.words):
        sys.exit("what was decoded is not what was sent")
    millions = sent.words.nbytes / 1e6
    return len(content) / sent.words.nbytes, (encoded - began) / millions, (decoded - encoded) / millions


if __name__ == "__main__":
    main()
