"""A client of a finished run's own data: adapted and scored as it was there, with its model to be had again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from torch import Tensor, nn

from perfedavg.contracts import FederatedDataset, client_label, client_name
from perfedavg.engine.client_states import StatesInMemory
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import parameters_sha256
from perfedavg.engine.scores import ClientScore
from perfedavg.engine.tasks import ScoringTask, cut_into_groups
from perfedavg.metrics import find_metrics
from perfedavg.personal_model import export, write_personalized
from perfedavg.plain_values import from_plain
from perfedavg.recording.model_file import ModelFacts, load_state, read_model_file
from perfedavg.recording.runs import MODEL_FILE, RESULT_FILE, FinishedRun, RecordedRun, read_object, result_key
from perfedavg.settings import Population
from perfedavg.training.flat_model import FlatModel, copy_into, flatten
from perfedavg.training.local_training import loss_of


@dataclass(frozen=True)
class AdaptedClient:
    """A client of a run's own data, adapted and scored as it was after the run's last phase.

    population: to which it belongs.  num_epochs: by which it adapted.
    recorded: its figures in the run's clients.csv, `initial` and `personalized`; None where it was not scored there.
    run_sha256: digest of the run's model.
    """

    client_id: int
    population: Population
    num_epochs: int
    score: ClientScore
    recorded: dict[str, dict[str, float]] | None
    run_sha256: str

    @property
    def differing(self) -> str:
        """The recorded figures that are not the same to the digit; empty where all are."""
        present = {"initial": self.score.initial, "personalized": self.score.personalized}
        return ", ".join(
            f"{kind} {metric} {value!r}"
            for kind, values in (self.recorded or {}).items()
            for metric, value in values.items()
            if value != present[kind][metric] and not (math.isnan(value) and math.isnan(present[kind][metric]))
        )


def adapt_client(run: RecordedRun, model: nn.Module, dataset: FederatedDataset, client_id: int) -> AdaptedClient:
    """Let a client do again what it did after the last phase; `model` becomes its personalized model.

    It adapts together with the clients that it adapted with, because what is computed together rounds by what it is
    computed with. Raises ValueError where the run's model or what the client keeps cannot be had.
    """
    config = run.experiment()
    load_final_model(run, model)
    start = flatten(model)
    if not len(dataset.client_data(client_id).test_labels):
        raise ValueError(
            f"client {client_label(dataset, client_id)} has no test part to be scored on; name another one"
        )
    unseen = client_id in dataset.unseen_client_ids
    population = Population.UNSEEN if unseen else Population.TRAINED
    phase, settings = list(config.phases.items())[-1]
    columns = (FinishedRun.read(run.folder).clients or {}).get(population, {})
    scored = [int(each) for each in columns.get("client_id", ())]
    together = scored if client_id in scored else [client_id]
    groups = cut_into_groups(together, dataset.num_train_examples, config.client_batching or 1)
    (group,) = [group for group in groups if client_id in group]
    states = StatesInMemory({each: run.client_state(each) for each in group})
    task = ScoringTask(phase, settings.num_rounds, group, config.num_curve_epochs, states)
    personalized: dict[int, Tensor] = {}
    executor = LocalExecutor(config, model, dataset)
    scores = executor.begin_scoring(task, start).score(group, personalized.__setitem__)
    (score,) = [score for score in scores if score.client_id == client_id]
    copy_into(model, personalized[client_id])
    recorded = None
    if client_id in scored:
        place = scored.index(client_id)
        recorded = {
            kind: {metric: float(columns[f"{result_key(phase)}_{kind}_{metric}"][place]) for metric in values}
            for kind, values in (("initial", score.initial), ("personalized", score.personalized))
        }
    epochs = config.num_personalization_epochs
    return AdaptedClient(client_id, population, epochs, score, recorded, parameters_sha256(start))


def load_final_model(run: RecordedRun, model: nn.Module) -> None:
    """Give a model the final parameters of a run. Raises ValueError where they are another model's."""
    state, _ = run.model()
    load_state(model, state, run.folder / MODEL_FILE)


def find_client(dataset: FederatedDataset, text: str) -> int:
    """The client of that name, or else of that number. Raises ValueError, with the names that are most like it."""
    client_ids = [*dataset.train_client_ids, *dataset.unseen_client_ids]
    names = {name: each for each in client_ids if (name := client_name(dataset, each)) is not None}
    if text in names:
        return names[text]
    if text.isdecimal() and int(text) in client_ids:
        return int(text)
    near = [name for name in names if name.lower() in get_close_matches(text.lower(), map(str.lower, names), 3)]
    numbers = f"a number from {min(client_ids)} to {max(client_ids)}"
    raise ValueError(
        f"--client {text} is no client of this run; use "
        + (f"{', '.join(near)}, or {numbers}" if near else f"{numbers}, as clients.csv has them")
    )


def check_data(run: RecordedRun, dataset: FederatedDataset) -> None:
    """Raises ValueError where the run was made with other data."""
    recorded = read_object(run.folder / RESULT_FILE).get("data_fingerprint")
    if recorded not in (None, dataset.fingerprint):
        raise ValueError(
            f"{run.folder} was made with other data (fingerprint {recorded}, not {dataset.fingerprint}); name the "
            "folder with the same files in --data_root"
        )


def write_client(
    folder: Path, adapted: AdaptedClient, model: nn.Module, dataset: FederatedDataset, run: RecordedRun
) -> None:
    """Write the personalized model and what is known of it, as `write_personalized` does."""
    facts, score = ModelFacts.of(run.experiment(), dataset), adapted.score
    program = export(model, dataset.client_data(adapted.client_id).test_inputs, facts.class_names or ())
    result = {
        "run": str(run.folder.absolute()),
        "run_model_sha256": adapted.run_sha256,
        "dataset": facts.dataset,
        "client_id": adapted.client_id,
        "client_name": client_name(dataset, adapted.client_id),
        "population": adapted.population.value,
        "epochs": adapted.num_epochs,
        "adapted_to": score.num_train_examples,
        "held_out": score.num_test_examples,
        "before": score.initial,
        "after": score.personalized,
        "model_sha256": parameters_sha256(flatten(model)),
    }
    write_personalized(folder, model, program, {**facts.to_metadata(), "personalized_from": adapted.run_sha256}, result)


Figures = dict[str, float | None]
"""By metric; None for what is no number."""


def score_again(
    run: RecordedRun, folder: Path, model: nn.Module, dataset: FederatedDataset, client_id: int
) -> tuple[Figures, Figures]:
    """The figures of a personalized model when it was saved, and now, on the client's own test part.

    `model` becomes that model. Raises ValueError where the folder holds none.
    """
    if not (folder / RESULT_FILE).exists():
        raise ValueError(f"{folder} holds no personalized model; give the command without --again first")
    then = from_plain(Figures, read_object(folder / RESULT_FILE).get("after"), "after")
    state, _ = read_model_file(folder / MODEL_FILE)
    load_state(model, state, folder / MODEL_FILE)
    data = dataset.client_data(client_id)
    metrics = find_metrics(run.experiment().own_metrics)
    (now,) = FlatModel(model, loss_function=loss_of(dataset)).score([(data.test_inputs, data.test_labels)], metrics)
    return then, {metric: now.get(metric) for metric in then}
