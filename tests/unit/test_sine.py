"""The sine task: the same tasks for everyone, on the sine that they claim to be, and a table that adds up.

If these failed, processes would train on different tasks, or the errors would not be those of the published task.
"""

from __future__ import annotations

import dataclasses
import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_config

from datasets import DatasetRequest, load_federated_dataset
from datasets.describe import describe, plot
from datasets.sources.sine import NUM_GIVEN, NUM_POINTS, POINTS, SineTasks
from experiments import sine_table
from models import build_model
from perfedavg.contracts import ClientData
from reporting import sine_errors

PARTS = ("train_inputs", "train_labels", "test_inputs", "test_labels")


def same(one: ClientData, other: ClientData) -> bool:
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in PARTS)


def request(**changes: Any) -> DatasetRequest:
    fields: dict[str, Any] = {"name": "sine", "num_clients": 51, "num_unseen": lambda n: n // 51, "partition": None}
    return DatasetRequest(**{**fields, "seed": 0, **changes})


def test_tasks_fill_the_published_ranges() -> None:
    """Or the task would be easier, or harder, than the one that is cited: U[0.1, 5] and U[0, 2 pi]."""
    tasks = [SineTasks(2000, 1, seed=0).task(client) for client in range(2000)]
    drawn = {(0.1, 5.0): [t.amplitude for t in tasks], (0.0, 2 * math.pi): [t.phase for t in tasks]}
    for (low, high), values in drawn.items():
        assert low <= min(values) < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < max(values) <= high
        middle, deviation = (low + high) / 2, (high - low) / math.sqrt(12)
        assert np.mean(values) == pytest.approx(middle, abs=4 * deviation / math.sqrt(len(values)))
    assert abs(np.corrcoef(list(drawn.values()))[0, 1]) < 4 / math.sqrt(len(tasks)), "they are independent"


def test_points_lie_on_the_sine_and_evenly_on_the_line() -> None:
    tasks = SineTasks(40, 10, seed=1)
    np.testing.assert_allclose(POINTS, -5 + 10 * np.arange(50) / 49, atol=1e-6)
    for client in (0, 39, 40, 49):
        task, data = tasks.task(client), tasks.client_data(client)
        for part in ("train", "test"):
            x, y = (getattr(data, f"{part}_{name}") for name in ("inputs", "labels"))
            assert x.shape == y.shape == (len(x), 1)
            assert x.dtype == y.dtype == torch.float32
            expected = task.amplitude * torch.sin(x.double() + task.phase)
            torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)


def test_who_gets_which_points() -> None:
    """A training client has all points; an unseen one adapts on ten of them and is scored on all."""
    tasks = SineTasks(30, 100, seed=2)
    assert (len(tasks.train_client_ids), list(tasks.unseen_client_ids)) == (30, list(range(30, 130)))
    given = set()
    for client in range(130):
        data = tasks.client_data(client)
        assert len(data.train_labels) == tasks.num_train_examples(client) == (NUM_POINTS if client < 30 else NUM_GIVEN)
        assert torch.equal(data.test_inputs, torch.from_numpy(POINTS.copy())[:, None])
        if client >= 30:
            places = np.searchsorted(POINTS, data.train_inputs[:, 0].numpy())
            assert len(set(places.tolist())) == NUM_GIVEN
            assert torch.equal(data.train_inputs, data.test_inputs[places])
            assert torch.equal(data.train_labels, data.test_labels[places])
            given |= set(places.tolist())
    assert given == set(range(NUM_POINTS)), "any point may be given"


def test_a_task_is_the_same_in_any_order_for_any_role_and_from_any_thread() -> None:
    """Or a worker's share of the clients would change what they hold."""
    few, many = SineTasks(10, 2, seed=3), SineTasks(1000, 30, seed=3)
    forwards = [few.client_data(client) for client in range(10)]
    backwards = [many.client_data(client) for client in reversed(range(10))][::-1]
    assert all(map(same, forwards, backwards))
    assert few.task(11).amplitude == many.task(11).amplitude
    with ThreadPoolExecutor(4) as threads:
        assert all(map(same, forwards, threads.map(few.client_data, range(10))))


def test_tasks_and_seeds_differ() -> None:
    """Or meta-training would see one task, or three seeds would be one."""
    found = {(task.amplitude, task.phase) for seed in (0, 1) for task in map(SineTasks(90, 10, seed).task, range(100))}
    assert len(found) == 200


def test_a_task_cannot_be_changed_by_its_reader() -> None:
    """Points are shared; a model's step written into them would change every other task."""
    tasks = SineTasks(2, 1, seed=0)
    data = tasks.client_data(2)
    before = data.train_inputs.clone()
    data.test_inputs.zero_()
    data.test_labels.zero_()
    assert torch.equal(tasks.client_data(2).train_inputs, before)
    assert same(tasks.client_data(1), SineTasks(2, 1, seed=0).client_data(1))


def test_the_fingerprint_tells_data_apart() -> None:
    """Server and workers compare it, and --resume does."""
    assert SineTasks(40, 10, 0).fingerprint == SineTasks(40, 10, 0).fingerprint
    others = [SineTasks(40, 10, 1), SineTasks(41, 10, 0), SineTasks(40, 11, 0), SineTasks(39, 11, 0)]
    assert len({tasks.fingerprint for tasks in [SineTasks(40, 10, 0), *others]}) == 5


def test_a_million_tasks_cost_nothing_until_they_are_read() -> None:
    tasks = SineTasks(10**9, 10**6, seed=0)
    assert tasks.client_data(10**9 + 10**6 - 1).train_labels.shape == (NUM_GIVEN, 1)
    assert len(tasks.fingerprint) == 32
    with pytest.raises(IndexError, match=r"is not in 0\.\."):
        tasks.client_data(10**9 + 10**6)


def test_it_is_found_by_its_name_with_a_model_and_the_loss_of_regression() -> None:
    dataset = load_federated_dataset(request(num_clients=102), Path("nowhere"))
    assert (len(dataset.train_client_ids), len(dataset.unseen_client_ids)) == (100, 2)
    model = build_model("sine_mlp", (1,), dataset.num_classes)
    assert [tuple(p.shape) for p in model.parameters()] == [(64, 1), (64,), (64, 64), (64,), (1, 64), (1,)]
    data = dataset.client_data(0)
    outputs = model(data.train_inputs)
    loss = SineTasks.loss_function(outputs, data.train_labels)
    assert loss.item() == pytest.approx((outputs - data.train_labels).square().sum().item() / 50)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": "iid"}, "--partition iid has no meaning for sine"),
        ({"num_clients": None}, "--client_num_in_total is needed for sine"),
        ({"num_unseen": lambda n: n}, "0 training and 51 unseen tasks of sine are too few"),
    ],
)
def test_what_cannot_be_dealt_out_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_federated_dataset(request(**changes), Path("nowhere"))


def test_it_is_described_without_classes() -> None:
    """Its labels are numbers: a wave's values, whose mean over a task differs from task to task."""
    description = describe("sine", load_federated_dataset(request(), Path("nowhere")))
    assert "are unseen; labels are numbers" in description.text()
    assert "a client's mean label, min, median, max: " in description.text()
    (axes,) = plot(description).axes
    assert axes.get_ylabel() == "label"


Errors = list[tuple[float | None, float | None]]
"""Mean and deviation over the tasks after 0, 1, 2 .. steps."""


def write_run(folder: Path, errors: Errors, num_tasks: int = 600, joint: bool = False, **settings: Any) -> None:
    """What a finished run leaves that the report reads; joint: with a phase 1 only."""
    config = make_config(**{"dataset": "sine", "seed": int(folder.name.removeprefix("seed")), **settings})
    experiment = dataclasses.replace(config, fine_tune=None if joint else config.fine_tune).to_dict()
    experiment["fedavg"]["num_rounds"] = int(joint)
    experiment |= {"joint": True, "cohort_size": 1} if joint else {}
    key = "after_fedavg" if joint else "after_fine_tune"
    names = ("loss", "accuracy", "accuracy_std", "accuracy_p10", "accuracy_p50", "accuracy_p90")
    scores: dict[str, Any] = {kind: dict.fromkeys(names) for kind in ("initial", "personalized")}
    scores |= {"clients": num_tasks, "fraction_hurt": 0.0}
    scores["by_epoch"] = [
        {"epochs": steps, "loss": loss, "loss_std": std, "accuracy": None, "accuracy_std": None}
        for steps, (loss, std) in enumerate(errors)
    ]
    result = {"train_clients": 100, "unseen_clients": num_tasks, "seconds": 1.0, "model_sha256": "0" * 64, key: scores}
    columns = [f"{key}_{kind}_{measure}" for kind in ("initial", "personalized") for measure in ("loss", "accuracy")]
    rows = [",".join(["client_id", "num_train_examples", *columns])]
    rows += [f"{client_id},10,1.0,,0.5," for client_id in range(num_tasks)]
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"experiment": experiment}))
    (folder / "clients.csv").write_text("\n".join(rows))
    (folder / "result.json").write_text(json.dumps(result))


def falling(start: float, std: float) -> Errors:
    """start, start / 2, start / 3 .. after 0, 1, 2 .. steps."""
    return [(start / (1 + n), std) for n in range(33)]


def test_the_interval_of_one_run(tmp_path: Path) -> None:
    """1.96 * 2 / sqrt(600) = 0.16003."""
    write_run(tmp_path / "maml" / "seed0", falling(3.3, 2.0))
    (row,) = sine_errors.read_rows(tmp_path)
    means, half_widths = sine_errors.pool(row.runs)
    assert means[10] == pytest.approx(0.3)
    assert half_widths[10] == pytest.approx(0.16003, abs=1e-5)


def test_runs_are_pooled_as_one_sample(tmp_path: Path) -> None:
    """Two runs with means 1 and 4 over 300 and 600 tasks, deviations 1 and 2: the mean is 3, and the variance
    (300 (1 + 4) + 600 (4 + 1)) / 900 = 5; so half the interval is 1.96 sqrt(5 / 900) = 0.14609.
    Unequal sizes and values: a plain mean over runs would give 2.5.
    """
    write_run(tmp_path / "maml" / "seed0", falling(1.0, 1.0), num_tasks=300)
    write_run(tmp_path / "maml" / "seed1", falling(4.0, 2.0), num_tasks=600)
    (row,) = sine_errors.read_rows(tmp_path)
    means, half_widths = sine_errors.pool(row.runs)
    assert (row.label, means[0]) == ("Reptile", pytest.approx(3.0))
    assert half_widths[0] == pytest.approx(0.14609, abs=1e-5)


def test_the_table(tmp_path: Path) -> None:
    """Methods in their order, errors after 0, 1, 5, 10 and 32 steps, none of another data set's runs."""
    write_run(tmp_path / "sine" / "reptile" / "seed0", falling(6.6, 1.0), batch_size=20)
    write_run(tmp_path / "sine" / "joint" / "seed0", [(3.0, 2.0)] * 33, joint=True)
    write_run(tmp_path / "sine" / "another" / "seed0", [(None, None)] * 33, cohort_size=5)
    write_run(tmp_path / "sine" / "maml" / "seed0", falling(1.1, 0.1))
    write_run(tmp_path / "mnist" / "E5-C20" / "seed0", [], dataset="mnist")
    lines = sine_errors.to_markdown(sine_errors.read_rows(tmp_path, ["maml", "reptile", "joint"])).splitlines()
    assert lines[0] == "| method | seeds | 0 steps | 1 step | 5 steps | 10 steps | 32 steps |"
    assert [line.split(" | ")[0] for line in lines[2:6]] == ["| maml", "| reptile", "| Joint training", "| another"]
    assert lines[3] == "| reptile | 1 | 6.6 ± 0.08 | 3.3 ± 0.08 | 1.1 ± 0.08 | 0.6 ± 0.08 | 0.2 ± 0.08 |"
    assert lines[4] == f"| Joint training | 1 {'| 3 ± 0.16 ' * 5}|"
    assert "nan" in lines[5], "a run that diverged is shown as such"
    assert lines[-3] == "- reptile: 0.2 (seed 0)"


def test_the_errors_are_drawn_without_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Results are kept where models are not; the plot that needs these is left out, and it is said."""
    write_run(tmp_path / "maml" / "seed0", falling(1.1, 0.1))
    monkeypatch.setattr(
        "sys.argv", ["sine_table.py", str(tmp_path), "--output", str(tmp_path / "out"), "--models", "gone"]
    )
    sine_table.main()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mse.png"]
    assert (tmp_path / "out" / "mse.png").read_bytes().startswith(b"\x89PNG")
    assert "gone has no" in capsys.readouterr().err


def test_runs_that_the_table_cannot_show_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["sine_table.py", str(tmp_path)])
    with pytest.raises(ValueError, match="holds no finished run of the sine task"):
        sine_table.main()
    write_run(tmp_path / "a" / "short" / "seed0", falling(1.0, 1.0)[:11])
    with pytest.raises(ValueError, match=r"short/seed0 has no errors up to 32 steps; .*--personalization_curve 32"):
        sine_errors.read_rows(tmp_path / "a")
    write_run(tmp_path / "b" / "small_batches" / "seed0", falling(1.0, 1.0), batch_size=5)
    with pytest.raises(ValueError, match=r"small_batches/seed0: .*run it with --batch_size 10"):
        sine_errors.read_rows(tmp_path / "b")
    for parent in ("old", "new"):
        write_run(tmp_path / "c" / parent / "maml" / "seed0", falling(1.0, 1.0))
    with pytest.raises(ValueError, match=r"is the same experiment with the same seed as .*; name a"):
        sine_errors.read_rows(tmp_path / "c")
