"""Figures that others published, from published.toml, beside those of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perfedavg.plain_values import parse_toml
from perfedavg.recording.runs import KINDS
from perfedavg.settings import Phase, Population
from reporting.figures import ACCURACY, Measure
from reporting.rows import Row, flat_settings
from reporting.tables import Lines, Table, accuracy_in_brackets, makes_table, rounds_text

_BEST_ROUND = (
    "Our best round is a point of the curve, which may be drawn over fewer clients than the figures of the last round. "
    "It is chosen by the scores that it is shown with, and so looks better than it is."
)


def published_tables(dataset: str, rows: Sequence[Row]) -> list[tuple[str, Table, list[str]]]:
    """Figures that others published beside those of rows: heading, table, caveats of each.

    They stand beside those data sets and rows alone of which published.toml says that they may.
    """
    sources = parse_toml((Path(__file__).parent / "published.toml").read_text(encoding="utf-8"))["tables"]
    found = [(source, _published_table(source, dataset, rows)) for source in sources if dataset in source["datasets"]]
    of_curve = {"method": [_BEST_ROUND]}
    return [
        (
            source["heading"],
            table,
            [*source["caveats"], *source.get("caveats_of", {}).get(dataset, []), *of_curve.get(source["by"], [])],
        )
        for source, table in found
        if table.rows
    ]


@makes_table("row")
def _published_table(source: Mapping[str, Any], dataset: str, rows: Sequence[Row]) -> Lines:
    phase, loss = Phase.of_field(source["phase"]), Measure("loss", "loss")
    published = source["figures_of"][dataset] if "figures_of" in source else source["figures"]
    fitting = [row for row in rows if _published_as(source, row) in published and phase in row.results]
    if source["by"] == "method":
        fitting = _one_a_method(fitting)
    has_trained = source["by"] == "method" and any(len(row.populations) > 1 for row in fitting)
    for row in fitting:
        results, result = row.results[phase], row.runs[0].result
        line = {"row": row.label, "seeds": str(len(row.runs))}
        line["clients"] = str(result.train_clients + result.unseen_clients)
        num_rounds = [str(row.settings[each.field]["num_rounds"]) for each in Phase if each <= phase]
        line["rounds + fine-tuning" if len(num_rounds) > 1 else "rounds"] = " + ".join(num_rounds)
        ours = {}
        for kind in KINDS:
            ours[f"{kind} loss, accuracy"] = f"{loss.mean(results, kind)}, {ACCURACY.mean(results, kind)}"
            ours[f"{kind} accuracy"] = accuracy_in_brackets(row, phase, kind)
            ours[f"{kind}, %"] = ACCURACY.mean(results, kind)
            ours[f"rounds to 0.8, {kind}"] = rounds_text(row, kind, 0.8)
        for column, figure in zip(source["columns"], published[_published_as(source, row)], strict=True):
            line |= {f"{column}: {source['whose']}": figure, f"{column}: ours": ours[column]}
        if source["by"] == "method":
            for kind in KINDS:
                best = [point for run in row.runs if (point := run.best_point(kind, phase=phase)) is not None]
                line[f"{kind}, %: ours, best round"] = ACCURACY.mean(best, kind)
        if has_trained:
            trained = row.results_of(Population.TRAINED).get(phase, [])
            line |= {f"{kind}, %: ours, clients that trained": ACCURACY.mean(trained, kind) for kind in KINDS}
        yield line


def _one_a_method(rows: Sequence[Row]) -> list[Row]:
    """Without rows whose phase 1 repeats another's, or is shorter for the sake of fine-tuning, where a row has none."""
    last = {str(row.settings["fedavg"]["method"]) for row in rows if row.settings["fine_tune"] is None}
    found: dict[str, Row] = {}
    for row in rows:
        if row.settings["fine_tune"] is None or str(row.settings["fedavg"]["method"]) not in last:
            flat = flat_settings(row.settings)
            alike = {name: value for name, value in flat.items() if not name.startswith(Phase.FINE_TUNE.field)}
            found.setdefault(str(alike), row)
    return list(found.values())


def _published_as(source: Mapping[str, Any], row: Row) -> str:
    """What a table of published figures calls a row: by clients a round and E, or by its method.

    Empty where a setting is none of those that the table is for, and of FedSGD, of which none has a figure.
    """
    settings = flat_settings(row.settings)
    for name, expected in source["settings"].items():
        fitting = expected if isinstance(expected, list) else [expected]
        if name in settings and settings[name] not in fitting:
            return ""
    if row.is_fedsgd:
        return ""
    if source["by"] == "method":
        return str(row.settings["fedavg"]["method"]["name"]) if settings["fedavg"] else "local"
    cohort_size, epochs = row.cohort_and_epochs
    return f"E{epochs}-C{cohort_size}" if row.has_cohort_and_epochs else ""
