"""A finished run as objects: what it measured as tables, and its model."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from launch import paths
from launch.flags import parse
from launch.settings import Data
from perfedavg.metrics import BASIC_METRICS
from perfedavg.recording.runs import (
    CLIENTS_FILE,
    KINDS,
    RESULT_FILE,
    RecordedRun,
    read_metrics,
    read_object,
    result_key,
)
from perfedavg.settings import Phase
from perfedavg.terminal.console import quiet

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from perfedavg.contracts import FederatedDataset


def open_run(folder: str | Path, data_root: str | Path | None = None) -> Run:
    """A finished run, from its folder.

    data_root: folder of the data sets, where it is not the usual one; only `Run.model` may need it.
    Raises ValueError where the folder holds no run, or one that has not ended.
    """
    return Run(folder, data_root)


class Run:
    """What came of a run.

    folder: where it is recorded.
    """

    def __init__(self, folder: str | Path, data_root: str | Path | None = None) -> None:
        self.folder = paths.path(str(folder))
        self._data_root = parse(Data, [] if data_root is None else [f"--data_root={data_root}"]).data_root
        self._recorded = RecordedRun.read(self.folder)
        self._recorded.check_ended()

    def __repr__(self) -> str:
        return f"perfedavg.open({str(self.folder)!r})"

    @property
    def settings(self) -> dict[str, Any]:
        """The experiment, as config.json has it."""
        return self._recorded.experiment(ignore_unknown=True).to_dict()

    @cached_property
    def result(self) -> dict[str, Any]:
        """The content of result.json: means over the clients of each population after each phase, times, the digest."""
        return read_object(self.folder / RESULT_FILE)

    @property
    def model_sha256(self) -> str:
        """The digest of the final model. Equal settings and data give equal ones."""
        return str(self.result["model_sha256"])

    @cached_property
    def clients(self) -> pd.DataFrame:
        """A row a scored client and phase.

        phase: after which the scores were taken, `fedavg` or `fine_tune`.
        population: `unseen`, or `trained` for clients that took part.
        client_id, client_name (where the data name any), num_train_examples, num_test_examples.
        initial_METRIC, personalized_METRIC: of each metric, such as `initial_accuracy`, in 0..1: with the model that
            the client starts from, and after adapting it.
        """
        import pandas as pd

        table = pd.read_csv(self.folder / CLIENTS_FILE)
        prefixes = {phase: f"{result_key(phase)}_" for phase in Phase}
        common = [column for column in table.columns if not column.startswith(tuple(prefixes.values()))]
        parts = []
        for phase, prefix in prefixes.items():
            columns = {name: name.removeprefix(prefix) for name in table.columns if name.startswith(prefix)}
            if columns:
                part = table[[*common, *columns]].rename(columns=columns)
                part.insert(0, "phase", phase.field)
                parts.append(part)
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """A row a round: phase, round_number, train_loss, update_norm, seconds, and the curve's points where there are.

        initial_METRIC, personalized_METRIC: means over the clients of the curve, unseen ones or in a run without any
            those that trained; NaN in rounds without a point.
        """
        import pandas as pd

        metrics = self.result.get("higher_is_better", BASIC_METRICS)
        rows = []
        for _, values in read_metrics(self.folder):
            row = {name: value for name, value in values.items() if not isinstance(value, (dict, list))}
            row.pop("evaluation", None)
            evaluation: Mapping[str, Any] = values.get("evaluation") or {}
            for kind in KINDS:
                scores = evaluation.get(kind, {})
                row |= {f"{kind}_{metric}": scores[metric] for metric in metrics if metric in scores}
            rows.append(row)
        return pd.DataFrame(rows)

    @cached_property
    def model(self) -> nn.Module:
        """The final global model, in evaluation mode. Reads the data set, for whose inputs and classes it is built."""
        from perfedavg.client_of_run import load_final_model

        model, _ = self._model_and_data()
        load_final_model(self._recorded, model)
        return model.eval()

    def client_model(self, client: int | str) -> nn.Module:
        """The model that a client adapts to its own data, in evaluation mode: the one that the run scored.

        client: number or name.  Raises ValueError where there is none, or the data are not the run's.
        """
        from perfedavg.client_of_run import adapt_client, check_data, find_client
        from perfedavg.training.compute import reproducible_kernels

        with quiet(), reproducible_kernels():
            model, dataset = self._model_and_data()
            check_data(self._recorded, dataset)
            adapt_client(self._recorded, model, dataset, find_client(dataset, str(client)))
        return model.eval()

    def _model_and_data(self) -> tuple[nn.Module, FederatedDataset]:
        """The model with its initial weights."""
        config = self._recorded.experiment()
        dataset = utils.get_datasets(config, self._data_root)
        return utils.get_model(config, dataset), dataset
