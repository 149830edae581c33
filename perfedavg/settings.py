"""What an experiment is (`ExperimentConfig`): every setting that changes its result, checked once, and nothing else.

How it is run (addresses, devices, threads, folders) is kept out of it, so that two runs with equal configurations
end with equal models; what a process computes with is `Compute`. This module imports no torch, so that reading flags
stays fast.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import MISSING, dataclass
from enum import Enum, IntEnum
from fractions import Fraction
from typing import Any

from perfedavg.fields import NO_FLAG, NONE, check, choice, label, part, setting, to_plain
from perfedavg.machine.kernels import PORTABLE_KERNELS
from perfedavg.methods import METHODS
from perfedavg.methods.base import Method
from perfedavg.methods.fedavg import FedAvg
from perfedavg.metrics import BASIC_METRICS, METRICS, name_in_results, problem_with
from perfedavg.own_files import OwnFiles, dataset_name, is_own_code
from perfedavg.plain_values import from_plain, shown

OPTIMIZERS = ("sgd", "momentum", "adam", "yogi", "adagrad")
SCHEDULES = ("constant", "linear")
LOCAL_SPLITS = ("shuffled", "tail")
PRECISIONS = ("float32", "bf16")
BUFFERS = ("global", "local")
"""`local` is FedBN's way with statistics (Li et al. 2021, arXiv 2102.07623)."""
BETAS = {"adam": (0.9, 0.999), "yogi": (0.9, 0.99)}
"""Adam's are its authors', Yogi's those that Reddi et al. 2020 give a server."""
STEP = 1.0
"""The server's learning rate with sgd and momentum: the average of the clients, and Reptile's step."""
GRADIENT_STEP = 0.1
"""The same where clients send gradients."""
ADAPTIVE_STEP = 0.001
"""The server's learning rate with adam, yogi and adagrad."""
HIGHEST_RATE = 1e30
"""Of learning rates: above it, optimizers compute step sizes that float32 does not hold."""
AUTO_MODEL = "auto"
"""The model that a data set brings, or else one that takes its inputs."""
UNREAD = "unread"
"""An initial model of which only the path is known yet."""
_FITTING_RATES = f"{STEP:g}; {GRADIENT_STEP:g} for gradients; with adam, yogi and adagrad {ADAPTIVE_STEP:g}"
_FEDAVG_SERVER = {"name": "momentum", "learning_rate": STEP, "epsilon": 0.001}
_DIGEST = re.compile("[0-9a-f]{64}")
_LONGEST_FRACTION = 20
_PHASE_3 = "phase 3, personalization of the clients that are scored"


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


class Population(Enum):
    """Whose scores they are, always told apart. The value is its name in files."""

    UNSEEN = "unseen"
    """Clients that never train."""
    TRAINED = "trained"
    """Clients that took part in training."""

    @classmethod
    def main(cls, num_unseen_clients: int) -> Population:
        """Whom a run's curve and the figures at its head are of: unseen clients or, where there are none, those that
        trained."""
        return cls.UNSEEN if num_unseen_clients else cls.TRAINED


def refuse_share(text: str) -> str | None:
    """What is wrong with a share of something, such as `0.2` or `9/34`."""
    try:
        # `1e-999999999` would take all memory as an exact fraction.
        is_short = len(text) <= _LONGEST_FRACTION and "e" not in text.lower()
        if is_short and 0 < Fraction(text) < 1:
            return None
    except (ValueError, ZeroDivisionError):
        pass
    return "must be above 0 and below 1, such as 0.2 or 9/34"


def _refuse_unseen_share(text: str) -> str | None:
    """As `refuse_share`, of a share that may be nothing."""
    if re.fullmatch(r"0+(\.0*)?", text) or refuse_share(text) is None:
        return None
    return "must be 0, or above 0 and below 1, such as 0.2 or 9/34"


def _listed(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(",") if name.strip())


def _refuse_metrics(names: str) -> str | None:
    return problem_with(_listed(names))


def _refuse_decay_rates(rates: tuple[float, float]) -> str | None:
    return None if all(0 <= rate < 1 for rate in rates) else "must each be 0 or more and below 1"


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer of a client or of the server.

    learning_rate: as the server's, None becomes what fits the phase; 1.0 with sgd is plain averaging.
    betas: decay rates of adam's and yogi's first and second moment; None for those of BETAS.
    """

    name: str = setting("sgd", "optimizer of {of}; momentum is sgd with momentum", flag="optimizer", choices=OPTIMIZERS)
    learning_rate: float = setting(
        None, "learning rate of {of}", flag="lr", above=0, at_most=HIGHEST_RATE, absent=_FITTING_RATES
    )
    momentum: float = setting(
        0.9, "of {of}, where the optimizer is momentum", at_least=0, below=1, only_with={"name": ("momentum",)}
    )
    epsilon: float = setting(
        1e-8,
        "of {of}'s adam, yogi or adagrad; the larger, the less adaptive",
        above=0,
        only_with={"name": ("adam", "yogi", "adagrad")},
    )
    betas: tuple[float, float] | None = setting(None, "", flag=NO_FLAG, refuse=_refuse_decay_rates)

    @property
    def decay_rates(self) -> tuple[float, float]:
        """Of the first and the second moment."""
        return self.betas or BETAS[self.name]


@dataclass(frozen=True)
class PhaseConfig:
    """One training phase: how often the server aggregates, and what a client does in between.

    num_rounds: 0 in phase 1 leaves it out: phase 2 starts from the initial weights, or these are scored as they are.
    client_optimizer: Adam and Yogi have no first moment, as in Reptile's paper (Nichol et al. 2018, section 6).
    method: what a client's update is.
    """

    num_rounds: int = setting(500, "communication rounds", flag="rounds", aliases=("epochs",), at_least=0)
    num_local_epochs: int = setting(
        5,
        "local epochs a client a round",
        flag="local_epochs",
        aliases=("inner_loops",),
        at_least=1,
        only_with={"num_local_steps": (None,)},
    )
    client_optimizer: OptimizerConfig = part(
        OptimizerConfig,
        prefix="client_",
        flags={"lr": "local_lr", "momentum": None, "epsilon": None},
        defaults={"learning_rate": 0.02, "betas": (0.0, 0.999)},
        searches={"learning_rate": "0.1x..10x:log"},
        of="the clients",
    )
    server_optimizer: OptimizerConfig = part(OptimizerConfig, prefix="server_", of="the server")
    num_local_steps: int | None = setting(
        None,
        "local steps a client a round, in place of epochs; 1 is FedSGD",
        flag="local_steps",
        aliases=("inner_steps",),
        at_least=1,
    )
    server_schedule: str = setting("constant", "the server's rate over the rounds; linear ends at 0", choices=SCHEDULES)
    method: Method = choice(
        METHODS,
        "fedavg",
        "what clients do in a round (docs/methods.md): {choices}, or package.module:Class for your own",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        if self.server_optimizer.learning_rate is None:
            fitting = dataclasses.replace(self.server_optimizer, learning_rate=self._fitting_server_rate())
            object.__setattr__(self, "server_optimizer", fitting)

    def _fitting_server_rate(self) -> float:
        """Where the numbers come from: docs/decisions.md."""
        if self.server_optimizer.name in ("sgd", "momentum"):
            return GRADIENT_STEP if self.method.sends_gradients else STEP
        return ADAPTIVE_STEP

    def server_rate_factor(self, round_number: int) -> float:
        """What the server's learning rate is multiplied with in a round, counted from 1."""
        if self.server_schedule == "linear":
            return 1.0 - (round_number - 1) / self.num_rounds
        return 1.0


@dataclass(frozen=True, kw_only=True)
class ClientsConfig:
    """Who the clients are and what data each has."""

    heading = "clients"
    dataset: str = setting(
        MISSING,
        "{of}; of your own: a folder of images or a .csv, .parquet or .npz file by its path, or package.module:factory",
        metavar="NAME",
        parse=dataset_name,
    )
    num_clients: int | None = setting(
        3400, "clients, training and unseen together", flag="client_num_in_total", at_least=1, absent="all clients"
    )
    unseen_fraction: str = setting(
        "0.2",
        "share of the clients that never train, such as 0.2 or 9/34; with 0 those that train are scored, on their own "
        "test parts, and a data set's training and test split are dealt out as one",
        metavar="X",
        refuse=_refuse_unseen_share,
    )
    partition: str | None = setting(
        "shards:2",
        "how examples without natural owners are dealt out: shards:N (label-sorted shards a client), iid, "
        "dirichlet:ALPHA (over labels), quantity:SIGMA (log-normal sizes), labels:N (labels a client), groups:N "
        "(groups of clients, each with N labels of its own) or noise:SIGMA",
        metavar="NAME[:X]",
    )
    local_split: str = setting(
        "shuffled",
        "order of a client's examples before the cut into its training and test parts: tail sorts them by label, "
        "as the code behind the published figures does",
        choices=LOCAL_SPLITS,
        reported="always",
    )
    local_test_fraction: str = setting(
        "0.2",
        "share of a client's own examples that are its test part, such as 0.2 or 1/4",
        metavar="X",
        refuse=refuse_share,
    )
    own_files: OwnFiles = part(OwnFiles, title="your own files")
    seed: int = setting(
        0, "everything random follows from it; same seed, same model", at_least=0, at_most=2**63 - 1, reported="never"
    )


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig(ClientsConfig):
    """A whole experiment. Equal configurations on equal data give equal models, once they are settled.

    architecture: a model that `models.build_model` knows, or `package.module:factory`.
    initial_model: digest of the parameters that the first phase starts from (`experiment.parameters_sha256`), UNREAD
        until they have been read, or None for random weights from the seed. Where they come from does not matter.
    fine_tune: None leaves phase 2 out.
    client_batching: None until it is settled (see `client_batching.choose_group_size`). It changes how sums are
        rounded.
    """

    heading = "experiment"
    architecture: str = setting(
        "emnist_cnn",
        "cnn (of the data set's paper), two_conv_cnn, mlp, resnet8 (BatchNorm), resnet8_gn (GroupNorm), vit_tiny, lstm "
        "(for text, on plays also char_conv and char_transformer), or package.module:factory for your own",
        flag="model",
        aliases=("struct",),
        metavar="NAME",
    )
    initial_model: str | None = None
    cohort_size: int = setting(5, "training clients drawn for each round", flag="client_num_per_round", at_least=1)
    batch_size: int = setting(20, "examples a local step; the last batch of an epoch may be smaller", at_least=1)
    joint: bool = setting(False, "pool the training clients' data in one client, the centralized baseline")
    validation: bool = setting(
        False,
        "to choose settings: score some held-out training clients, so that the unseen ones stay untouched",
        reported="always",
    )
    eval_every: int = setting(50, "communication rounds between two points of the accuracy curve", at_least=1)
    eval_clients: int = setting(
        100,
        "unseen clients (without any: clients that train) that are scored for a point of the curve; results take all",
        at_least=1,
    )
    num_trained_scored: int | None = setting(
        None,
        "clients that took part in training, at most, that are scored after each phase too, each with what it kept; 0 "
        "for none",
        flag="trained_clients_scored",
        at_least=0,
        absent="as many as unseen ones, without any all; with joint none",
        reported="never",
    )
    metrics: str | None = setting(
        None,
        f"what else to score clients by: {', '.join(METRICS)}, or package.module:name for your own",
        metavar="NAME[,NAME]",
        refuse=_refuse_metrics,
        absent="loss and accuracy alone",
        reported="never",
    )
    buffers: str = setting(
        "global",
        "a model's buffers, such as BatchNorm's statistics: global averages them like parameters; with local (FedBN) a "
        "client goes on from those that it kept, and who has none, as an unseen client, begins with their mean",
        choices=BUFFERS,
    )
    precision: str = setting("float32", "of the clients' training; scoring is always float32", choices=PRECISIONS)
    client_batching: int | None = setting(
        None,
        "clients trained at once, as one computation; auto: 1 on a CPU unless the model is tiny, on GPUs an equal "
        "share of a round's clients for each, as far as it fits the memory",
        at_least=1,
        unset="auto",
        metavar="auto|N",
        reported="never",
    )
    portable_kernels: str = setting(
        "false",
        "compute with what all processors with AVX2 have, of one vendor (true) or of any (any_vendor, slower), so that "
        "unlike ones give the same model; not for GPUs nor ARM",
        choices=PORTABLE_KERNELS,
        implied="true",
    )
    fedavg: PhaseConfig = part(
        PhaseConfig,
        title="phase 1, FedAvg",
        flags={"server_schedule": None},
        defaults={f"server_optimizer.{name}": value for name, value in _FEDAVG_SERVER.items()},
    )
    fine_tune: PhaseConfig | None = part(
        PhaseConfig,
        title="phase 2, fine-tuning",
        is_optional=True,
        prefix="fine_tune_",
        flags={"epochs": "fine_tune_outer_loops"},
        defaults={"num_rounds": 100, "num_local_epochs": 10, "server_schedule": "linear", "method": "reptile"},
    )
    num_personalization_epochs: int = setting(
        5,
        "local epochs by which a client adapts before it is scored, as in phase 1",
        flag="personalization_epochs",
        aliases=("pers_round",),
        title=_PHASE_3,
        at_least=1,
    )
    num_curve_epochs: int = setting(
        0,
        "also score after each epoch up to this",
        flag="personalization_curve",
        aliases=("pers_curve",),
        title=_PHASE_3,
        at_least=0,
        reported="never",
    )

    def keeps_state(self, phase: Phase) -> bool:
        """Whether clients keep anything from one round of a phase to the next."""
        return self.phases[phase].method.keeps_state or self.buffers == "local"

    @property
    def phases(self) -> dict[Phase, PhaseConfig]:
        """The training phases in the order in which they run. Never none; a phase without rounds stands alone."""
        phases = {Phase.FEDAVG: self.fedavg}
        if self.fine_tune is not None:
            phases[Phase.FINE_TUNE] = self.fine_tune
            if self.fedavg.num_rounds == 0:
                del phases[Phase.FEDAVG]
        return phases

    @property
    def metric_names(self) -> tuple[str, ...]:
        """What clients are scored by, in the order of results."""
        return (*BASIC_METRICS, *map(name_in_results, self.own_metrics))

    @property
    def own_metrics(self) -> tuple[str, ...]:
        """Those that clients are scored by besides loss and accuracy, as they were given."""
        return _listed(self.metrics or "")

    def phase_label(self, phase: Phase) -> str:
        """What a person calls a phase of this experiment: phase 1 is called by its method."""
        is_fedavg = phase is not Phase.FEDAVG or self.fedavg.method.name == FedAvg.name
        return phase.label if is_fedavg else self.fedavg.method.name

    def __post_init__(self) -> None:
        """Refuse, with the flag, its value and the fix, whatever cannot be run."""
        check(self)
        if self.initial_model not in (None, UNREAD) and not _DIGEST.fullmatch(self.initial_model or ""):
            raise ValueError(f"initial_model is {shown(self.initial_model)}, must be null or 64 hexadecimal digits")
        if self.num_clients is not None and not is_own_code(self.dataset):  # which says itself who is unseen
            self._check_num_clients(self.num_clients)
            num_unseen = num_unseen_clients(self.num_clients, self.unseen_fraction)
            self.check_cohort_size(1 if self.joint else self.num_clients - num_unseen)
        if self.joint and self.num_trained_scored:
            raise ValueError(
                f"{flag('num_trained_scored')} {self.num_trained_scored} does not go with "
                f"{flag('joint')}, which has one training client without a test part; leave one of them out"
            )
        if self.fine_tune is not None and self.fine_tune.num_rounds == 0:
            raise ValueError(f"{flag('fine_tune.num_rounds')} 0 must be 1 or more; leave the phase out instead")
        if self.fine_tune is not None and self.fedavg.num_rounds > 0 and not self.fedavg.method.goes_on:
            raise ValueError(
                f"{flag('fine_tune.method')} {self.fine_tune.method.name} cannot go on from "
                f"{flag('fedavg.method')} {self.fedavg.method.name}, whose result is not the global model but "
                f"what it makes of each client's; use {NONE}"
            )
        for name, phase in (("fedavg", self.fedavg), ("fine_tune", self.fine_tune)):
            if phase is not None:
                self._check_phase(name, phase)

    def _check_phase(self, name: str, phase: PhaseConfig) -> None:
        client = phase.client_optimizer.name
        if phase.client_optimizer.learning_rate is None:
            raise ValueError(f"{flag(f'{name}.client_optimizer.learning_rate')} must be given")
        problem = phase.method.problem_with(phase.client_optimizer)
        if problem is not None:
            raise ValueError(
                f"{flag(f'{name}.method')} {phase.method.name} does not go with "
                f"{flag(f'{name}.client_optimizer.name')} {client}: {problem}"
            )
        if phase.method.needs_float32 and self.precision != "float32":
            raise ValueError(
                f"{flag('precision')} {self.precision} is too coarse for {flag(f'{name}.method')} "
                f"{phase.method.name} with its settings; use float32"
            )
        for whose, optimizer in (("client_optimizer", client), ("server_optimizer", phase.server_optimizer.name)):
            if self.portable_kernels == "any_vendor" and optimizer not in ("sgd", "momentum"):
                raise ValueError(
                    f"{flag('portable_kernels')} any_vendor does not go with "
                    f"{flag(f'{name}.{whose}.name')} {optimizer}, whose square roots MKL takes from an "
                    "approximation that each vendor's processors make otherwise; use sgd or momentum"
                )

    def check_cohort_size(self, num_train_clients: int) -> None:
        """Raises ValueError where a round asks for more clients than there are to train."""
        if self.cohort_size > num_train_clients:
            raise ValueError(
                f"{flag('cohort_size')} {self.cohort_size} exceeds the {num_train_clients} training clients; "
                f"lower it to {num_train_clients} or less"
            )

    def check_num_workers(self, num_workers: int) -> None:
        """Raises ValueError where a round has too few groups of clients to give each worker one.

        With client_batching open, the number of groups depends on model and devices; see
        `client_batching.choose_group_size`, which shares the clients out, and `say_idle_slots`.
        """
        group_size = self.client_batching or 1
        num_groups = -(-self.cohort_size // group_size)
        if num_groups >= num_workers:
            return
        clients = f"{flag('cohort_size')} {self.cohort_size}"
        batching = flag("client_batching")
        enough = (num_workers - 1) * group_size + 1
        groups = (
            f" makes {num_groups} group(s) of {batching} {group_size}, fewer than"
            if group_size > 1
            else " is fewer than"
        )
        lower = f", lower {batching}" if group_size > 1 else ""
        raise ValueError(
            f"{clients}{groups} the {num_workers} workers, some of which would never work; raise it to {enough} or "
            f"more{lower}, or start fewer workers"
        )

    def _check_num_clients(self, num_clients: int) -> None:
        step = Fraction(self.unseen_fraction).denominator
        if num_clients % step:
            below, above = num_clients // step * step, (num_clients // step + 1) * step
            raise ValueError(
                f"{flag('num_clients')} {num_clients} does not divide into whole training and unseen clients at "
                f"{flag('unseen_fraction')} {self.unseen_fraction}; use a multiple of {step}, such as "
                f"{f'{below} or ' if below else ''}{above}"
            )

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left open that decides the result."""
        return self.client_batching is not None and self.initial_model != UNREAD

    def settled_as(self, settled: ExperimentConfig) -> ExperimentConfig:
        """This experiment, with what it leaves open as another one has settled it."""
        left_open: dict[str, Any] = {}
        if self.client_batching is None:
            left_open["client_batching"] = settled.client_batching
        if self.initial_model == UNREAD and settled.initial_model is not None:
            left_open["initial_model"] = settled.initial_model
        return dataclasses.replace(self, **left_open)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, fit for JSON; `from_dict` is its inverse."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Any) -> ExperimentConfig:
        """Raises ValueError, naming the field, where one is missing, unknown, of another type or out of range."""
        return from_plain(cls, values)


@dataclass(frozen=True, kw_only=True)
class Compute:
    """What a process computes with; no part of an experiment."""

    heading = "compute"
    device: str = setting("auto", "auto (a GPU where there is one), cpu, cuda or cuda:i")
    threads: int | None = setting(
        None,
        "clients that this process trains side by side, on one core each; does not change the result",
        at_least=1,
        at_most=1024,
        absent="the machine's cores, shared out among the workers on it",
    )


def brings_model(config: ExperimentConfig, dataset: object) -> bool:
    """Whether the experiment's model is the data set's own: it has one, and no other is named."""
    return config.architecture == AUTO_MODEL and hasattr(dataset, "build_model")


def flag(field: str) -> str:
    """What a message calls a setting of an experiment, by its field."""
    return label(ExperimentConfig, field)


def num_unseen_clients(num_clients: int, unseen_fraction: str) -> int:
    """How many of so many clients never train: the share, such as `0.2` or `9/34`, rounded, but at least one; none of
    a share of 0."""
    share = Fraction(unseen_fraction)
    return max(1, round(num_clients * share)) if share else 0
