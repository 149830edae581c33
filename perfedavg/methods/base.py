"""What a method declares. Every hook but `update` has a default that suits most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from perfedavg.aggregation.base import Aggregation
    from perfedavg.settings import OptimizerConfig
    from perfedavg.training.client_models import AfterEpochs, Client, ClientModels
    from perfedavg.training.layout import Layout
    from perfedavg.training.local_training import LocalTraining


@dataclass(frozen=True)
class Method:
    """What a client does in a round, written once for one client and for a group of them.

    A subclass is a frozen dataclass whose fields are the method's settings, each made by `perfedavg.fields.setting`.

    name: by which flags and config.json know it.
    title: what people call it; empty where that is the class's name.
    sends_gradients: whether updates are negative gradients, whose size is that of a gradient, not of a trained
        difference of parameters. It decides the default learning rate of the server.
    differentiates_training: whether `update` calls `ClientModels.gradients_through_training`, for which even a single
        client needs stacked models.
    keeps_state: whether clients keep something between rounds, in `Client.state`.
    goes_on: whether another phase can go on from its global model. Not where that is no whole model, or where the
        method is what clients keep, which ends with the phase.
    """

    name: ClassVar[str]
    title: ClassVar[str] = ""
    sends_gradients: ClassVar[bool] = False
    differentiates_training: ClassVar[bool] = False
    keeps_state: ClassVar[bool] = False
    goes_on: ClassVar[bool] = True

    @property
    def needs_float32(self) -> bool:
        """Whether what it computes would be lost in the rounding of --precision bf16."""
        return False

    def problem_with(self, client_optimizer: OptimizerConfig) -> str | None:
        """Why the method does not go with the clients' optimizer, and what to use; None where it does."""
        return None

    def problem_with_model(self, layout: Layout) -> str | None:
        """Why the method does not go with a model, and what to use; None where it does."""
        return None

    def weight(self, num_examples: int) -> int:
        """A client's weight in the mean of a round, 1 or more. num_examples: size of its training part."""
        return 1

    def aggregation(self) -> Aggregation:
        """How the updates of a round become one."""
        from perfedavg.aggregation.base import Aggregation

        return Aggregation()

    def update(
        self, models: ClientModels, start: Tensor, clients: Sequence[Client], training: LocalTraining
    ) -> tuple[Tensor, list[float]]:
        """What the clients send, (clients, num_parameters), and their training losses.

        models: with room for the clients.  start: the global model, (num_parameters,).
        clients: the largest first; what is in `Client.state` afterwards is there again in the client's next round.
        training: the local training that is set for the phase.
        """
        raise NotImplementedError

    def personalize(
        self,
        models: ClientModels,
        start: Tensor,
        clients: Sequence[Client],
        training: LocalTraining,
        after_epochs: AfterEpochs,
    ) -> None:
        """Adapt the models to clients, those that trained with their state and unseen ones with an empty one.

        after_epochs: as `ClientModels.steps` takes it. Epoch 0 is the initial model, which may be a client's own.
        """
        models.train(start, clients, training, after_epochs=after_epochs)

    def round_cost(self, count_steps: Callable[[int], float], num_examples: int) -> float:
        """A client's time in a round, in local steps of FedAvg, about; by it the time to go is told.

        count_steps: the phase's local steps, by the number of examples.
        """
        return count_steps(num_examples)

    def bytes_per_client(self, bytes_of_step: Callable[[int], int], training: LocalTraining, num_examples: int) -> int:
        """The most memory that `update` takes for a client. bytes_of_step: of a step, by the size of its batch."""
        return bytes_of_step(training.batch_size)


def problem_with_pull(client_optimizer: OptimizerConfig, strength: float) -> str | None:
    """Why a term strength/2 * ||w - anchor||^2 in the loss does not go with an optimizer; None where it does.

    A plain step of the term alone leaves 1 - rate * strength of the distance, which must be less than all of it.
    """
    rate = client_optimizer.learning_rate
    if client_optimizer.name != "sgd" or rate * strength < 2:
        return None
    return f"at rate {rate:g} a pull of {strength:g} throws models ever further; use one below {2 / rate:g}"
