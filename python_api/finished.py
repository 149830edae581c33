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

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

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
        """The final global model, in evaluation mode. Reads the data set, whose inputs and classes it is built for."""
        from perfedavg.personal_model import RunModel

        run = RunModel.read(self.folder)
        model = utils.get_model(run.config, utils.get_datasets(run.config, self._data_root))
        run.load_into(model)
        return model.eval()


def _data_flags(data_root: str | Path | None) -> list[str]:
    return ["--rank=1", *([] if data_root is None else [f"--data_root={data_root}"])]
