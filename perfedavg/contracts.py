"""Protocols, each defined once: what the algorithm asks of a data set, of those who do its work, and of observers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.engine.client_states import ClientState
    from perfedavg.engine.experiment import ExperimentState, RoundRecord
    from perfedavg.engine.scores import ClientScore, RunScores
    from perfedavg.engine.tasks import CohortTask, CohortUpdate, ScoringTask
    from perfedavg.machine.kernels import KernelLog
    from perfedavg.settings import Phase, Population


class MissingDataError(ValueError):
    """Data are not there, and may not be downloaded."""


@dataclass(frozen=True)
class ClientData:
    """One client's examples, cut into the part it trains or adapts on and the part it is scored on.

    Inputs (num_examples, ...): floating-point numbers, such as images (.., 1, 28, 28) in 0..1; or int64 tokens.
    Labels: int64 classes, (num_examples,), or (num_examples, num_places), a class at each place; or floating-point
        targets (num_examples, ...) of a regression.
    """

    train_inputs: Tensor
    train_labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


class ClientDirectory(Protocol):
    """Who the clients are and how much each has, which is all that a server needs to know.

    train_client_ids, unseen_client_ids: disjoint; whole numbers, 0 or more. There may be no unseen clients.
    fingerprint: digest of all examples and of their distribution over clients; equal data, equal digest.
    """

    @property
    def train_client_ids(self) -> Sequence[int]: ...
    @property
    def unseen_client_ids(self) -> Sequence[int]: ...
    @property
    def fingerprint(self) -> str: ...
    def num_train_examples(self, client_id: int) -> int:
        """Size of a client's training part, 1 or more, without reading it."""
        ...


class FederatedDataset(ClientDirectory, Protocol):
    """Clients and their data. Safe to read from several threads.

    num_classes: labels that are classes are below it; outputs of a model for one example, or for each of its places.

    It may also have:
    name: of the data set.  note: what has to be said with every result.
    class_names: what label i stands for.  num_left_out: clients too small to take part.
    client_name(client_id): what a client is called, a text or None (see `client_name`).
    build_model(): its own model.  loss_function(outputs, labels): its own loss, the mean over a batch.
    has_test_part(client_id): whether a training client has a test part, where some may have none.
    """

    @property
    def num_classes(self) -> int: ...
    def client_data(self, client_id: int) -> ClientData:
        """A client's examples, on the CPU."""
        ...


REQUIRED = tuple(
    name for protocol in (ClientDirectory, FederatedDataset) for name in vars(protocol) if not name.startswith("_")
)
"""What any data set has, a user's own among them."""


class Executor(Protocol):
    """Who does the clients' work: this process, or workers. The bits are the same whoever it is.

    kernels: how the processes compute that do the work.
    `parameters` is the global model, (num_parameters,) on the CPU.
    """

    @property
    def kernels(self) -> KernelLog: ...
    def train(self, task: CohortTask, parameters: Tensor) -> CohortUpdate:
        """The exact weighted sum of the updates of the task's clients, and their reports."""
        ...

    def score(self, task: ScoringTask, parameters: Tensor) -> list[ClientScore]:
        """The scores of the task's clients, in any order."""
        ...


class RoundStates(Protocol):
    """What the clients of a round or of a scoring keep, for those who do their work. May be used by several threads."""

    def get(self, client_id: int) -> ClientState:
        """What the client kept from earlier rounds, which the caller may change; empty where it keeps nothing.

        Raises ValueError, one line, where that has been lost.
        """
        ...

    def read_ahead(self, client_ids: Sequence[int]) -> None:
        """These clients will be asked for, in this order."""

    def put(self, client_id: int, state: ClientState) -> None:
        """What the client keeps from this round on, where its result is delivered too; the store's own from now on.

        Raises OSError, one line, where an earlier one cannot be written.
        """


class ClientStateStore(RoundStates, Protocol):
    """What a method lets clients keep between rounds.

    What is put in a round is what `get` returns from its end on (`commit`); a client whose result was not delivered has
    what it had.
    """

    def begin_round(self, phase: Phase, round_number: int) -> None:
        """Forget what was put and not committed; what is put from now on is of this round."""

    def commit(self, client_ids: Iterable[int]) -> None:
        """The round is over. client_ids: of those for which something was put, the ones that take it over."""

    def reset(self) -> None:
        """No client keeps anything."""

    def versions(self) -> dict[int, int]:
        """The round of the present phase in which each client last kept something, by its id.

        From then on that outlives a power cut. Raises OSError or ValueError, one line, where it cannot.
        """
        ...


class Observer(Protocol):
    """Is told of progress as it happens: writes files, shows a display. Must not change the result.

    In a run that goes on from a saved state, it hears again of what was not recorded there, and of the present phase.
    """

    def phase_started(self, phase: Phase, num_rounds: int, num_recorded: int) -> None:
        """num_recorded: rounds of the phase that ended before, in a run that goes on from a saved state."""

    def round_ended(self, record: RoundRecord) -> None: ...

    def checkpoint_due(self, state: ExperimentState) -> None:
        """A round has been recorded, and nothing is under way: the time to save the state."""

    def scoring_started(self, phase: Phase, population: Population, num_clients: int) -> None: ...

    def phase_ended(self, phase: Phase, scores: RunScores) -> None:
        """scores: after this phase and those before it."""


def input_shape(dataset: FederatedDataset) -> tuple[int, ...]:
    """The shape of the inputs of one example."""
    return tuple(example_data(dataset).train_inputs.shape[1:])


def example_data(dataset: FederatedDataset) -> ClientData:
    """The data of a client by which all are told: the first unseen one or, without any, the first that trains."""
    unseen = dataset.unseen_client_ids
    return dataset.client_data(unseen[0] if len(unseen) else dataset.train_client_ids[0])


MAX_NAME_CHARS = 100


def client_name(clients: object, client_id: int) -> str | None:
    """What a data set calls a client, such as its folder or writer, by which a person finds its data again.

    None where the data set does not say. Names come from the data, so what cannot be printed in one line is replaced
    by `?`, and long ones are cut.
    """
    name_of = getattr(clients, "client_name", None)
    name = None if name_of is None else name_of(client_id)
    if name is None:
        return None
    shown = "".join(char if char.isprintable() else "?" for char in name)
    return shown if len(shown) <= MAX_NAME_CHARS else f"{shown[: MAX_NAME_CHARS - 3]}..."


def client_label(clients: object, client_id: int) -> str:
    """How a client is called in lines for people: `12 (anna)`, or its number alone."""
    name = client_name(clients, client_id)
    return str(client_id) if name is None else f"{client_id} ({name})"
