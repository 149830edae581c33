"""A finished run as objects: what it measured as tables, and its model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from launch import paths
from perfedavg.recording.runs import CLIENTS_FILE, KINDS, RESULT_FILE, RecordedRun, read_metrics, read_object
from perfedavg.settings import Phase
from perfedavg.terminal.console import quiet

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from perfedavg.contracts import FederatedDataset

_SCORE = re.compile(f"after_(?P<phase>{'|'.join(phase.field for phase in Phase)})_(?P<score>({'|'.join(KINDS)})_.+)")

_SPREAD = re.compile(r"_(std|p\d+)$")


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
        self._data_root = utils.get_args("worker", _data_flags(data_root)).data_root
        self._recorded = RecordedRun.read(self.folder)
        self._recorded.check_ended()

    def __repr__(self) -> str:
        return f"perfedavg.open({str(self.folder)!r})"

    @property
    def settings(self) -> dict[str, Any]:
        """The experiment, as config.json has it."""
        return dict(self._recorded.experiment(ignore_unknown=True).to_dict())

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
        scores: dict[str, dict[str, str]] = {}
        for column in table.columns:
            match = _SCORE.fullmatch(column)
            if match:
                scores.setdefault(match["phase"], {})[column] = match["score"]
        common = [column for column in table.columns if not _SCORE.fullmatch(column)]
        parts = []
        for phase, columns in scores.items():
            part = table[[*common, *columns]].rename(columns=columns)
            part.insert(0, "phase", phase)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    @cached_property
    def rounds(self) -> pd.DataFrame:
        """A row a round: phase, round_number, train_loss, update_norm, seconds, and the curve's points where there are.

        initial_METRIC, personalized_METRIC: means over the unseen clients of the curve; NaN in rounds without a point.
        """
        import pandas as pd

        rows = []
        for _, values in read_metrics(self.folder):
            row = {name: value for name, value in values.items() if not isinstance(value, (dict, list))}
            row.pop("evaluation", None)
            evaluation: Mapping[str, Any] = values.get("evaluation") or {}
            for kind in KINDS:
                means = {name: value for name, value in evaluation.get(kind, {}).items() if not _SPREAD.search(name)}
                row |= {f"{kind}_{metric}": value for metric, value in means.items()}
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


def _data_flags(data_root: str | Path | None) -> list[str]:
    return ["--rank=1", *([] if data_root is None else [f"--data_root={data_root}"])]
