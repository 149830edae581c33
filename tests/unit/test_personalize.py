"""A person gets what an unseen client of the run gets, in files that are of use without this project."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import digits_dataset, make_config
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import personalize
from datasets.clients.person import has_bright_ground, load_person
from datasets.clients.split import SplitDataset
from datasets.own.image_folder import load_image_folder
from datasets.sources.digits import load_digits_images
from models import build_model
from perfedavg import personal_model
from perfedavg.engine.executor import LocalExecutor
from perfedavg.engine.experiment import parameters_sha256
from perfedavg.recorded_run import run_and_record
from perfedavg.recording.run_folder import RunFolder
from perfedavg.settings import OptimizerConfig, PhaseConfig
from perfedavg.training.flat_model import flatten

DIGITS = tuple("0123456789")
FIFTH = Fraction(1, 5)


def make_run(path: Path, data: Any = None, model: nn.Module | None = None, **changes: Any) -> Path:
    """A finished run of an MLP on digits, or on another data set with another model."""
    sgd = OptimizerConfig("sgd", 0.1)
    config = make_config(
        fedavg=PhaseConfig(6, 3, sgd, OptimizerConfig("sgd", 1.0)), fine_tune=None, eval_every=100, **changes
    )
    data = data or digits_dataset(20)
    model = model or build_model(config.architecture, (1, 28, 28), data.num_classes)
    folder = RunFolder(path)
    run_and_record(config, LocalExecutor(config, model, data), data, model, folder, {"world_size": 1})
    folder.close()
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run")


def write_digits(folder: Path, count: int, shift: int = 0) -> Path:
    """Real digits as PNG files; with a shift, an image of d is in the folder of the class d + shift."""
    splits = load_digits_images()
    for number in range(count):
        path = folder / str((splits.test_labels[number] + shift) % 10) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(splits.test_images[number]).save(path)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_digits(tmp_path / "my_digits", 60)


def read(output: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """What result.json holds, the parameters, and the metadata of model.safetensors."""
    with safe_open(output / "model.safetensors", "pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        return json.loads((output / "result.json").read_text()), state, file.metadata()


def test_the_result_is_that_of_the_model_that_is_saved(run: Path, images: Path) -> None:
    """Scored here by plain torch on the held-out images, the saved model must give the printed figures."""
    personalize.main([str(run), str(images), "--epochs", "3"])
    result, state, metadata = read(run / "personalized" / "my_digits")
    held_out = load_person(images, DIGITS, FIFTH, seed=0)
    assert (result["adapted_to"], result["held_out"]) == (48, 12)
    for key, parameters in (("before", read_run_model(run)), ("after", state)):
        model = build_model("mlp", (1, 28, 28), 10)
        model.load_state_dict(parameters)
        outputs = model(held_out.test_inputs)
        assert result[key]["loss"] == pytest.approx(F.cross_entropy(outputs, held_out.test_labels).item(), rel=1e-5)
        assert result[key]["right"] == (outputs.argmax(dim=1) == held_out.test_labels).sum()
        assert result[key]["accuracy"] == result[key]["right"] / 12
    assert parameters_sha256(flatten(model)) == result["model_sha256"] != result["run_model_sha256"]
    assert metadata["personalized_from"] == json.loads((run / "result.json").read_text())["model_sha256"]
    assert json.loads(metadata["class_names"]) == list(DIGITS)


def read_run_model(run: Path) -> dict[str, Tensor]:
    return personal_model.RunModel.read(run).state


def test_a_person_is_cut_as_an_unseen_client_of_the_run_is(tmp_path: Path) -> None:
    """Otherwise what personalize.py shows could not be compared with what the run's table shows."""
    for client in ("anna", "ben", "cleo"):
        write_digits(tmp_path / client, 37)
    clients = SplitDataset("folder", load_image_folder(tmp_path), 2, 1, seed=3)
    assert clients.class_names == DIGITS, "as the folders are called"
    expected, person = clients.client_data(0), load_person(tmp_path / "anna", DIGITS, FIFTH, seed=3)
    for part in ("train_inputs", "train_labels", "test_inputs", "test_labels"):
        assert torch.equal(getattr(person, part), getattr(expected, part)), part


def test_the_model_learns_what_the_folders_say(run: Path, tmp_path: Path) -> None:
    """For a person who calls every digit by the next one's name, all of the accuracy comes from their own images."""
    images = write_digits(tmp_path / "shifted", 200, shift=1)
    personalize.main([str(run), str(images), "--epochs", "40", "--local_lr", "0.1", "--output", str(tmp_path / "out")])
    result, _, _ = read(tmp_path / "out")
    assert result["before"]["accuracy"] < 0.2
    assert result["after"]["accuracy"] > 0.8


def test_settings_come_from_the_run_unless_they_are_given(run: Path, images: Path, tmp_path: Path) -> None:
    personalize.main([str(run), str(images), "--output", str(tmp_path / "run's")])
    as_run, _, _ = read(tmp_path / "run's")
    assert (as_run["epochs"], as_run["batch_size"], as_run["client_optimizer"]["learning_rate"]) == (1, 10, 0.1)
    seen = {as_run["model_sha256"]}
    for flags in (["--epochs", "2"], ["--batch_size", "5"], ["--local_lr", "0.05"], ["--seed", "1"]):
        personalize.main([str(run), str(images), "--output", str(tmp_path / "own"), *flags])
        seen.add(read(tmp_path / "own")[0]["model_sha256"])
    assert len(seen) == 5, "each setting changes the model"
    personalize.main([str(run), str(images), "--output", str(tmp_path / "half"), "--test_fraction", "1/2"])
    assert read(tmp_path / "half")[0]["held_out"] == 30


def test_same_images_and_same_seed_give_the_same_model(run: Path, images: Path, tmp_path: Path) -> None:
    digests = set()
    for name in ("one", "two"):
        personalize.main([str(run), str(images), "--output", str(tmp_path / name)])
        digests.add(read(tmp_path / name)[0]["model_sha256"])
    assert len(digests) == 1


@pytest.mark.parametrize("architecture", ["mlp", "mnist_cnn", "emnist_cnn"])
def test_an_exported_model_takes_any_number_of_images(architecture: str) -> None:
    """emnist_cnn has dropout, which must be off in what is exported."""
    inputs = torch.rand(9, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    model = build_model(architecture, (1, 28, 28), 5)
    names: dict[str, Any] = {"class_names.json": ""}
    program = torch.export.load(io.BytesIO(personal_model.export(model, inputs, "abcde")), extra_files=names)
    assert json.loads(names["class_names.json"]) == list("abcde")
    with torch.no_grad():
        for size in (1, 2, 9):
            assert torch.equal(program.module()(inputs[:size]), model.eval()(inputs[:size]))


class DependsOnBatch(nn.Module):
    """Does other things with one example than with several."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        outputs: Tensor = self.linear(images.flatten(1))
        return outputs if len(images) > 5 else 2 * outputs


class IsRandom(nn.Linear):
    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs.flatten(1)) + torch.rand(())


@pytest.mark.parametrize(
    ("model", "reason"), [(DependsOnBatch(), "cannot export"), (IsRandom(784, 10), "other outputs")]
)
def test_a_program_that_is_not_the_model_is_refused(model: nn.Module, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        personal_model.export(model, torch.rand(9, 1, 28, 28), DIGITS)


def test_bad_images_leave_nothing_behind(run: Path, images: Path, tmp_path: Path) -> None:
    def refused(reason: str, folder: Path = images, *flags: str) -> None:
        with pytest.raises(ValueError, match=reason):
            personalize.main([str(run), str(folder), "--output", str(tmp_path / "out"), *flags])
        assert not (tmp_path / "out").exists()

    (images / "ten").mkdir()
    Image.new("L", (28, 28)).save(images / "ten" / "1.png")
    refused(r"my_digits/ten is named after no class of the run; rename it to one of 0, 1, 2, 3, 4, 5, 6, 7, 8, 9")
    (images / "ten").rename(images / "9" / "more")
    refused(r"9/more is no file; the layout is class/image\.png")
    (images / "9" / "more" / "1.png").rename(tmp_path / "1.png")
    (images / "9" / "more").rmdir()
    Image.new("L", (28, 30)).save(images / "9" / "tall.png")
    refused(r"9/tall\.png is 28x30, not 28x28")
    (images / "9" / "tall.png").unlink()
    refused("is no folder; name one that holds class/image.png", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("holds no class/image.png", tmp_path / "empty")
    (tmp_path / "one" / "3").mkdir(parents=True)
    (tmp_path / "1.png").rename(tmp_path / "one" / "3" / "1.png")
    refused("holds 1 image; add another", tmp_path / "one")
    refused(r"--local_lr 1000000.0 is too high, the model diverged; lower it", images, "--local_lr", "1e6")
    refused(r"--local_lr -1\.0 must be a number above 0", images, "--local_lr", "-1")


@pytest.mark.parametrize(
    "flags",
    [("--epochs", "0"), ("--batch_size", "x"), ("--test_fraction", "1"), ("--test_fraction", "1/0"), ("--seed", "-1")],
)
def test_a_flag_out_of_range(flags: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=f"^{' '.join(flags)} must be"):
        personalize.main(["run", "images", *flags])


def test_both_parts_have_an_image_whatever_the_share(images: Path) -> None:
    for share, num_held_out in ((Fraction(1, 1000), 1), (Fraction(999, 1000), 59), (Fraction("0.25"), 15)):
        data = load_person(images, DIGITS, share, seed=0)
        assert (len(data.train_labels), len(data.test_labels)) == (60 - num_held_out, num_held_out)


def test_what_is_no_finished_run(run: Path, images: Path, tmp_path: Path) -> None:
    def refused(path: Path, reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            personalize.main([str(path), str(images)])

    refused(images, r"is not the folder of a run \(it has no config\.json\)")
    broken = tmp_path / "broken"
    broken.mkdir()
    settings = json.loads((run / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(settings))
    refused(broken, "holds a run that has not ended")
    (broken / "result.json").write_text("{}")
    refused(broken, r"model\.safetensors cannot be read")
    content = (run / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(content[:1000])
    refused(broken, r"model\.safetensors cannot be read")
    (broken / "model.safetensors").write_bytes(content)
    rewrite_metadata(broken / "model.safetensors", architecture="mnist_cnn")
    refused(broken, r"model\.safetensors holds another model \(.*\); repeat the run")
    del settings["experiment"]["dataset"]
    (broken / "config.json").write_text(json.dumps(settings))
    refused(broken, r"config\.json is damaged, or of another version of this project")
    (broken / "config.json").write_text("{")
    refused(broken, r"config\.json is damaged")
    assert not (broken / "personalized").exists()


def test_a_model_file_without_its_facts(run: Path, images: Path, tmp_path: Path) -> None:
    """As earlier versions wrote it: nothing may be guessed."""
    from safetensors.torch import save_file

    old = tmp_path / "old"
    old.mkdir()
    for name in ("config.json", "result.json"):
        (old / name).write_bytes((run / name).read_bytes())
    metadata = {"dataset": "digits", "architecture": "mlp", "format": "pt"}
    save_file(read_run_model(run), old / "model.safetensors", metadata)
    with pytest.raises(ValueError, match=r"does not say what its model is, .*; repeat the run"):
        personalize.main([str(old), str(images)])


def test_a_runs_own_folder_is_not_written_over(run: Path, images: Path) -> None:
    before = (run / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is the folder of a run, whose model would be replaced"):
        personalize.main([str(run), str(images), "--output", str(run)])
    assert (run / "model.safetensors").read_bytes() == before


def test_a_folder_that_cannot_be_written(run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"--output .*file/out cannot be written \(Not a directory\); make room there"):
        personalize.main([str(run), str(images), "--output", str(tmp_path / "file" / "out")])


def test_a_disk_that_fills_up_leaves_no_result(
    run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new model beside an earlier one's result would be taken for a pair."""
    personalize.main([str(run), str(images), "--output", str(tmp_path / "out")])
    write = personal_model.replace_file

    def fill_up(path: Path, parts: Any) -> None:
        if path.suffix == ".pt2":
            raise OSError(28, "No space left on device")
        write(path, parts)

    monkeypatch.setattr(personal_model, "replace_file", fill_up)
    with pytest.raises(OSError, match="No space left on device"):
        personalize.main([str(run), str(images), "--output", str(tmp_path / "out"), "--epochs", "2"])
    assert not (tmp_path / "out" / "result.json").exists()


class Sketches:
    """A user's own data set: real digits, with names for them and a model of its own."""

    num_classes = 10
    fingerprint = "sketches"
    train_client_ids, unseen_client_ids = range(16), range(16, 20)

    def __init__(self, data_root: Path, num_clients: int | None, seed: int) -> None:
        self._digits = digits_dataset(20)

    def num_train_examples(self, client_id: int) -> int:
        return self._digits.num_train_examples(client_id)

    def client_data(self, client_id: int) -> Any:
        return self._digits.client_data(client_id)


class NamedSketches(Sketches):
    class_names = ["nought", *"abcdefghi"]


class ModelledSketches(Sketches):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


class ValuedSketches(Sketches):
    """Whose labels are numbers to predict."""

    @staticmethod
    def loss_function(outputs: Tensor, labels: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, 0], labels)

    def client_data(self, client_id: int) -> Any:
        data = super().client_data(client_id)
        return type(data)(data.train_inputs, data.train_labels.float(), data.test_inputs, data.test_labels.float())


class SmallSketches(ModelledSketches):
    """Whose images are of another size."""

    def client_data(self, client_id: int) -> Any:
        data = super().client_data(client_id)
        return type(data)(data.train_inputs[..., ::2], data.train_labels, data.test_inputs[..., ::2], data.test_labels)

    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(392, 10))


def run_on_own(path: Path, kind: type[Sketches], name: str | None = None) -> Path:
    data = kind(path, None, 0)
    model = data.build_model() if isinstance(data, ModelledSketches) else None
    name = name or f"test_personalize:{kind.__name__}"
    changes: dict[str, Any] = {} if model is None else {"architecture": "auto"}
    return make_run(path, data, model, dataset=name, num_clients=None, partition=None, **changes)


def test_names_of_a_users_own_classes(images: Path, tmp_path: Path) -> None:
    """They come from the run, which needs neither the data set nor its module any more."""
    run = run_on_own(tmp_path / "run", NamedSketches, "no_such_module:factory")
    (images / "0").rename(images / "Nought")
    (images / "1").rename(images / "A")
    personalize.main([str(run), str(images)])
    result, _, metadata = read(run / "personalized" / "my_digits")
    assert json.loads(metadata["class_names"]) == NamedSketches.class_names
    assert set(result["classes"]) == set(NamedSketches.class_names)
    assert sum(counts["held_out"] for counts in result["classes"].values()) == 12
    (images / "2").rename(images / "two")
    with pytest.raises(ValueError, match="rename it to one of nought, a, b, c"):
        personalize.main([str(run), str(images)])


@pytest.mark.slow
def test_running_statistics_are_personalized_saved_and_exported(images: Path, tmp_path: Path) -> None:
    """All that the model consists of, so that what needs none of this project gives the same outputs."""
    run = make_run(tmp_path / "run", architecture="resnet8")
    personalize.main([str(run), str(images)])
    output = run / "personalized" / "my_digits"
    result, state, _ = read(output)
    _, before, _ = read(run)
    assert int(state["norm.num_batches_tracked"]) == 0, "a counter is no part of the model"
    assert not torch.equal(state["norm.running_mean"], before["norm.running_mean"])
    model = build_model("resnet8", (1, 28, 28), 10).eval()
    model.load_state_dict(state)
    assert parameters_sha256(flatten(model)) == result["model_sha256"]
    inputs = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.export.load(output / "model.pt2").module()(inputs), model(inputs))


def test_classes_without_names_are_numbers(images: Path, tmp_path: Path) -> None:
    run = run_on_own(tmp_path / "run", Sketches)
    personalize.main([str(run), str(images)])
    result, _, metadata = read(run / "personalized" / "my_digits")
    assert "class_names" not in metadata
    assert set(result["classes"]) == set(DIGITS)


def test_a_users_own_model_comes_from_its_data_set(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_on_own(tmp_path / "run", ModelledSketches)
    personalize.main([str(run), str(images)])
    assert "ModelledSketches brings its own build_model: its module is imported" in capsys.readouterr().err
    assert set(read(run / "personalized" / "my_digits")[1]) == {"1.weight", "1.bias"}
    gone = run_on_own(tmp_path / "gone", ModelledSketches, "no_such_module:factory")
    with pytest.raises(ValueError, match="--dataset no_such_module:factory cannot be imported"):
        personalize.main([str(gone), str(images)])
    other = run_on_own(tmp_path / "other", ModelledSketches, "test_personalize:SmallSketches")
    with pytest.raises(ValueError, match="holds another model"):
        personalize.main([str(other), str(images)])


def test_runs_that_are_not_on_classes_of_images(images: Path, tmp_path: Path) -> None:
    valued = run_on_own(tmp_path / "valued", ValuedSketches)
    with pytest.raises(ValueError, match="ValuedSketches, whose labels are numbers and not classes"):
        personalize.main([str(valued), str(images)])
    for architecture, dataset, inputs in (("lstm", "shakespeare", 80), ("sine_mlp", "sine", 1)):
        run = make_run(tmp_path / dataset)
        settings = json.loads((run / "config.json").read_text())
        settings["experiment"].update(dataset=dataset)
        (run / "config.json").write_text(json.dumps(settings))
        rewrite_metadata(
            run / "model.safetensors", architecture=architecture, dataset=dataset, input_shape=f"[{inputs}]"
        )
        reason = f"is a run on {dataset}, whose inputs of the shape \\({inputs},\\) are no images in grey or colour"
        with pytest.raises(ValueError, match=reason):
            personalize.main([str(run), str(images)])


def rewrite_metadata(path: Path, **changes: str) -> None:
    from safetensors.torch import load_file, save_file

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, **changes})


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ("abcdefghij", "must be a list of texts"),
        (list(range(10)), "a list of texts"),
        (["a"] * 10, "1 of them different"),
    ],
)
def test_names_that_are_none(names: Any, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Found out before the run, not when its model is written."""
    from datasets import DatasetRequest, load_federated_dataset

    monkeypatch.setattr(NamedSketches, "class_names", names)
    request = DatasetRequest("test_personalize:NamedSketches", None, lambda count: 1, None, seed=0)
    with pytest.raises(ValueError, match=reason):
        load_federated_dataset(request, tmp_path)


def test_dark_images_on_a_bright_ground_are_pointed_out(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The likeliest mistake with scans; the result would be poor without a word why."""
    personalize.main([str(run), str(images), "--output", str(tmp_path / "out")])
    assert "invert" not in capsys.readouterr().err
    for path in images.glob("*/*.png"):
        with Image.open(path) as image:
            inverted = 255 - np.asarray(image)
        Image.fromarray(inverted).save(path)
    personalize.main([str(run), str(images), "--output", str(tmp_path / "out")])
    assert "dark on a bright ground" in capsys.readouterr().err
    assert has_bright_ground(load_person(images, DIGITS, FIFTH, seed=0).train_inputs)


def test_the_table_says_when_it_got_worse() -> None:
    good, bad = personal_model.Score(0.1, 9, 10), personal_model.Score(0.4567, 8, 10)
    assert "fewer images right" not in personalize.score_table(bad, good, 5)
    table = personalize.score_table(good, bad, 1)
    assert "after 1 epoch " in table
    assert "80.00 %" in table
    assert "8 of 10" in table
    assert "fewer images right than before" in table
