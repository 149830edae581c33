"""What an experiment is: every setting that changes its result, checked once, and nothing that does not.

How it is run (addresses, devices, threads, folders) is kept out, so that two runs with equal configurations
end with equal models. This module imports no torch, so that reading flags stays fast.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from typing import Any

from perfedavg.machine.kernels import PORTABLE_KERNELS
from perfedavg.plain_values import differences, from_plain, shown

OPTIMIZERS = ("sgd", "adam", "yogi", "adagrad")
SCHEDULES = ("constant", "linear")
METHODS = ("reptile", "fomaml", "maml")
LOCAL_SPLITS = ("shuffled", "tail")
PRECISIONS = ("float32", "bf16")
MOST = 2**31 - 1
"""Of whatever is counted: torch takes no larger batch size, and no run lives to see more rounds."""
HIGHEST_RATE = 1e30
"""Of learning rates: above it, optimizers compute step sizes that float32 does not hold."""
UNREAD = "unread"
"""An initial model of which only the path is known yet."""
_DIGEST = re.compile("[0-9a-f]{64}")
_LONGEST_FRACTION = 20
"""Characters. `1e-999999999` would take all memory as an exact fraction."""


class Phase(IntEnum):
    """A training phase. The value enters the seeds, so it must never be reused for another phase."""

    FEDAVG = 1
    FINE_TUNE = 2

    @property
    def label(self) -> str:
        return {Phase.FEDAVG: "FedAvg", Phase.FINE_TUNE: "fine-tuning"}[self]

    @property
    def field(self) -> str:
        """Its name in files, which is that of its settings in ExperimentConfig."""
        return {Phase.FEDAVG: "fedavg", Phase.FINE_TUNE: "fine_tune"}[self]

    @classmethod
    def of_field(cls, name: str) -> Phase:
        """The inverse of `field`. Raises KeyError where no phase has that name."""
        return {phase.field: phase for phase in cls}[name]


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of a client or of the server.

    name: one of OPTIMIZERS.
    learning_rate: step size, above 0. For the server, 1.0 with sgd and no momentum is plain averaging.
    momentum: 0 or more and below 1; sgd only.
    betas: decay rates of the first and second moment, each 0 or more and below 1; adam and yogi only.
    epsilon: what is added to the root of the second moment, above 0; not for sgd. The larger, the less adaptive.
    """

    name: str
    learning_rate: float
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: float = 1e-8

    def check(self, learning_rate_flag: str) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.name!r}; use one of {', '.join(OPTIMIZERS)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"{learning_rate_flag} {self.learning_rate} must be a finite number above 0")
        if self.learning_rate > HIGHEST_RATE:
            raise ValueError(f"{learning_rate_flag} {self.learning_rate} must be {HIGHEST_RATE:g} or less")
        if not all(0 <= decay < 1 for decay in (self.momentum, *self.betas)):
            raise ValueError(f"momentum {self.momentum} and betas {self.betas} must each be in [0, 1)")
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"epsilon {self.epsilon} must be a finite number above 0")


@dataclass(frozen=True)
class PhaseConfig:
    """One training phase: how often the server aggregates, and what a client does in between.

    num_rounds: communication rounds, 1 or more. 0 in phase 1 leaves it out, so that phase 2 starts from the initial
        weights, or, where there is no phase 2 either, these are scored as they are.
    num_local_epochs: passes over its own training part that each client of a round makes, 1 or more.
    client_optimizer, server_optimizer: who takes which step.
    num_local_steps: local steps of each client of a round, whatever its size, 1 or more; in place of epochs.
    server_schedule: of SCHEDULES; `linear` lets the server's rate fall from its full value in the first round towards 0
        after the last, as Nichol et al. 2018 (arXiv 1803.02999) do.
    method: of METHODS, what a client's update is. `reptile`, which is FedAvg's too: how far it got, theta_K - theta.
        `fomaml`: minus the gradient on its query part at theta_K, after K steps on its support part. `maml`: minus the
        gradient of the same loss with respect to theta, through these steps (Finn et al. 2017, arXiv 1703.03400).
    support_fraction: for fomaml and maml, the share of a client's training part that is its support part, above 0; the
        rest is its query part. 1 makes all of it both.
    """

    num_rounds: int
    num_local_epochs: int
    client_optimizer: OptimizerConfig
    server_optimizer: OptimizerConfig
    num_local_steps: int | None = None
    server_schedule: str = "constant"
    method: str = "reptile"
    support_fraction: float = 0.5

    def server_rate_factor(self, round_number: int) -> float:
        """What the server's learning rate is multiplied with in a round, counted from 1."""
        if self.server_schedule == "linear":
            return 1.0 - (round_number - 1) / self.num_rounds
        return 1.0

    def check(self, prefix: str, epochs_flag: str, steps_flag: str) -> None:
        """Raise ValueError where a setting cannot be run. prefix: of the flags of this phase's optimizers."""
        _at_least_one(epochs_flag, self.num_local_epochs)
        if self.num_local_steps is not None:
            _at_least_one(steps_flag, self.num_local_steps)
        self.client_optimizer.check(f"--{prefix}local_lr")
        self.server_optimizer.check(f"--{prefix}server_lr")
        _one_of(f"--{prefix}server_schedule", self.server_schedule, SCHEDULES)
        _one_of("--fine_tune_method", self.method, METHODS)
        if not 0 < self.support_fraction <= 1:
            raise ValueError(f"--fine_tune_support_fraction {self.support_fraction} must be above 0 and at most 1")
        if self.method == "maml" and (self.client_optimizer.name, self.client_optimizer.momentum) != ("sgd", 0.0):
            raise ValueError(
                "--fine_tune_method maml differentiates through the clients' steps, which must be plain ones; use "
                "--fine_tune_client_optimizer sgd, or --fine_tune_method fomaml"
            )


@dataclass(frozen=True)
class ExperimentConfig:
    """A whole experiment. Equal configurations on equal data give equal models, once they are settled.

    dataset, architecture: names that `utils.get_datasets` and `utils.get_model` know.
    seed: 0 or more; everything random follows from it and from identities (see `seeding`).
    initial_model: digest of the parameters that the first phase starts from (`experiment.parameters_sha256`), UNREAD
        until they have been read, or None for random weights from the seed. Where they come from does not matter.
    num_clients: training and unseen clients together, or None for all that a data set with natural clients has.
    unseen_fraction: share of the clients that never train, such as `0.2` or `9/34`, above 0 and below 1.
    partition: how examples without natural owners are dealt out (see `datasets.clients.partition`), or None where
        clients are natural.
    cohort_size: training clients drawn, without repeats, for each round.
    batch_size: examples a local step; the last batch of an epoch may be smaller.
    local_split: of LOCAL_SPLITS, how a client's examples are cut into its own training and test parts: `shuffled`, or
        `tail`, sorted by label, so that the test part has the last labels only (see `datasets.clients.split`).
    joint: whether the training parts of all training clients are pooled in one client, the centralized baseline.
    validation: whether some of the training clients are held out and scored in place of the unseen ones.
    fedavg: phase 1.  fine_tune: phase 2, or None to leave it out.
    num_personalization_epochs: passes over its own training part by which an unseen client adapts.
    num_curve_epochs: the results after a phase are also measured after each of 0 .. so many of these passes; 0 for not.
    eval_every: rounds between two points of the accuracy curve.
    eval_clients: unseen clients (a fixed draw from the seed) behind a point of the curve; the results after a
        phase always take all of them.
    precision: of PRECISIONS, in which clients train (see `flat_model.FlatModel`); they are scored in float32.
    client_batching: clients that are trained at once, as one computation, 1 or more, or None until it is settled (see
        `client_batching.settle_client_batching`). It changes how sums are rounded.
    portable_kernels: of kernels.PORTABLE_KERNELS, whether all processes compute with kernels that unlike processors
        have in common, so that these end with the same model. Runs recorded before there was a choice had none.
    """

    dataset: str
    architecture: str
    seed: int
    initial_model: str | None
    num_clients: int | None
    unseen_fraction: str
    partition: str | None
    local_split: str
    joint: bool
    validation: bool
    cohort_size: int
    batch_size: int
    fedavg: PhaseConfig
    fine_tune: PhaseConfig | None
    num_personalization_epochs: int
    num_curve_epochs: int
    eval_every: int
    eval_clients: int
    precision: str
    client_batching: int | None
    portable_kernels: str = "false"

    @property
    def phases(self) -> dict[Phase, PhaseConfig]:
        """The training phases in the order in which they run. Never none; a phase without rounds stands alone."""
        phases = {Phase.FEDAVG: self.fedavg}
        if self.fine_tune is not None:
            phases[Phase.FINE_TUNE] = self.fine_tune
            if self.fedavg.num_rounds == 0:
                del phases[Phase.FEDAVG]
        return phases

    def __post_init__(self) -> None:
        """Refuse, with the flag, its value and the fix, whatever cannot be run."""
        if self.initial_model not in (None, UNREAD) and not _DIGEST.fullmatch(self.initial_model or ""):
            raise ValueError(f"initial_model is {shown(self.initial_model)}, must be null or 64 hexadecimal digits")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} must be a whole number from 0 to 2^63 - 1")
        self._check_unseen_fraction()
        _at_least_one("--client_num_per_round", self.cohort_size)
        _one_of("--local_split", self.local_split, LOCAL_SPLITS)
        if self.num_clients is not None:
            self._check_num_clients(self.num_clients)
            num_unseen = num_unseen_clients(self.num_clients, self.unseen_fraction)
            self.check_cohort_size(1 if self.joint else self.num_clients - num_unseen)
        _at_least_one("--batch_size", self.batch_size)
        _at_least_one("--pers_round", self.num_personalization_epochs)
        _at_least_one("--eval_every", self.eval_every)
        _at_least_one("--eval_clients", self.eval_clients)
        _one_of("--precision", self.precision, PRECISIONS)
        _one_of("--portable_kernels", self.portable_kernels, PORTABLE_KERNELS)
        if self.portable_kernels == "any_vendor":
            self._check_optimizers_of_any_vendor()
        if self.num_curve_epochs < 0:
            raise ValueError(f"--pers_curve {self.num_curve_epochs} must be 0 or more")
        _at_most("--pers_curve", self.num_curve_epochs)
        if self.client_batching is not None:
            _at_least_one("--client_batching", self.client_batching)
        if self.fedavg.num_rounds < 0:
            raise ValueError(f"--epochs {self.fedavg.num_rounds} must be 0 or more")
        _at_most("--epochs", self.fedavg.num_rounds)
        self.fedavg.check("", "--inner_loops", "--inner_steps")
        if self.fine_tune is not None:
            _at_least_one("--fine_tune_outer_loops", self.fine_tune.num_rounds)
            self.fine_tune.check("fine_tune_", "--fine_tune_inner_loops", "--fine_tune_inner_steps")

    def check_cohort_size(self, num_train_clients: int) -> None:
        """Raises ValueError where a round asks for more clients than there are to train."""
        if self.cohort_size > num_train_clients:
            raise ValueError(
                f"--client_num_per_round {self.cohort_size} exceeds the {num_train_clients} training clients; "
                f"lower it to {num_train_clients} or less"
            )

    def _check_optimizers_of_any_vendor(self) -> None:
        used = {
            optimizer.name
            for phase in (self.fedavg, self.fine_tune)
            if phase is not None
            for optimizer in (phase.client_optimizer, phase.server_optimizer)
        }
        for name in sorted(used - {"sgd"}):
            raise ValueError(
                f"--portable_kernels any_vendor does not go with the optimizer {name}, whose square roots MKL takes "
                "from an approximation that each vendor's processors make otherwise; use sgd or momentum "
                "(--server_optimizer, --client_optimizer, --fine_tune_server_optimizer, --fine_tune_client_optimizer)"
            )

    def _check_unseen_fraction(self) -> None:
        try:
            valid = len(self.unseen_fraction) <= _LONGEST_FRACTION and "e" not in self.unseen_fraction.lower()
            valid = valid and 0 < Fraction(self.unseen_fraction) < 1
        except (ValueError, ZeroDivisionError):
            valid = False
        if not valid:
            raise ValueError(
                f"--unseen_fraction {self.unseen_fraction} must be above 0 and below 1, such as 0.2 or 9/34"
            )

    def _check_num_clients(self, num_clients: int) -> None:
        _at_least_one("--client_num_in_total", num_clients)
        share = Fraction(self.unseen_fraction)
        step = share.denominator
        if num_clients % step:
            below, above = num_clients // step * step, (num_clients // step + 1) * step
            raise ValueError(
                f"--client_num_in_total {num_clients} does not divide into whole training and unseen clients at "
                f"--unseen_fraction {self.unseen_fraction}; use a multiple of {step}, such as "
                f"{f'{below} or ' if below else ''}{above}"
            )

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left open that decides the result."""
        return self.client_batching is not None and self.initial_model != UNREAD

    def differences_from(self, settled: ExperimentConfig) -> list[str]:
        """What keeps `settled` from being this experiment: `name is X, was Y` for each setting that differs.

        What is not settled here yet may have any value there.
        """
        left_open: dict[str, Any] = {}
        if self.client_batching is None:
            left_open["client_batching"] = settled.client_batching
        if self.initial_model == UNREAD and settled.initial_model is not None:
            left_open["initial_model"] = settled.initial_model
        return differences(dataclasses.replace(self, **left_open).to_dict(), settled.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON; `from_dict` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ExperimentConfig:
        """Raises ValueError, naming the field, where one is missing, unknown, of another type or out of range."""
        return from_plain(cls, values)


def num_unseen_clients(num_clients: int, unseen_fraction: str) -> int:
    """How many of so many clients never train: the share, such as `0.2` or `9/34`, rounded, but at least one."""
    return max(1, round(num_clients * Fraction(unseen_fraction)))


def _one_of(flag: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"unknown {flag} {value!r}; use one of {', '.join(known)}")


def _at_least_one(flag: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{flag} {value} must be 1 or more")
    _at_most(flag, value)


def _at_most(flag: str, value: int) -> None:
    if value > MOST:
        raise ValueError(f"{flag} {value} must be {MOST} or less")
