"""Entry point: adapts a finished run's model to one client of the run, or to one person's labelled images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import utils
from launch import paths
from launch.flags import parse
from launch.settings import Checked, Data
from perfedavg.fields import setting
from perfedavg.machine.kernels import pin_kernels
from perfedavg.own_files import is_own_code, is_path
from perfedavg.recording.runs import RecordedRun
from perfedavg.settings import AUTO_MODEL, Population, refuse_share
from perfedavg.terminal.console import say, show
from perfedavg.terminal.entry_point import run_entry_point

if TYPE_CHECKING:  # imported where they are used, so that --help stays fast
    from torch import nn

    from datasets.sources.image_files import ImageForm
    from perfedavg.contracts import ClientData
    from perfedavg.personal_model import RunModel, Score
    from perfedavg.training.local_training import LocalTraining, Loss

EARLIER_SHAPE = (1, 28, 28)
"""Of the images of runs that did not say it: earlier versions had no others."""


def _share(text: str) -> Fraction:
    problem = refuse_share(text)
    if problem is not None:
        raise ValueError(problem)
    return Fraction(text)


@dataclass(frozen=True, kw_only=True)
class Personalize(Data, Checked):
    """Adapt the model of a finished run to one of the run's clients, or to one person's labelled images, and score it.

    Before and after, on examples held out. Writes the personalized model, also as a program that needs none of this
    project.
    """

    run: Path = setting(
        MISSING,
        "folder of a finished run, which the run names when it ends",
        parse=paths.path,
        metavar="RUN",
        positional=True,
    )
    images: Path | None = setting(
        None,
        "folder with class/image.png below it, images as the run's were; the classes are the run's",
        parse=paths.folder,
        metavar="IMAGES",
        positional=True,
    )
    client: str | None = setting(
        None, "name or number of a client of the run, which adapts as it did there", metavar="NAME", absent="IMAGES"
    )
    again: bool = setting(False, "with --client: score the model that an earlier call saved, without adapting")
    epochs: int | None = setting(
        None, "passes over the images", at_least=1, absent="the run's --personalization_epochs, 5"
    )
    batch_size: int | None = setting(None, "images a step", at_least=1, absent="the run's --batch_size, 20")
    local_lr: float | None = setting(None, "learning rate of the run's client optimizer", above=0, absent="the run's")
    test_fraction: Fraction = setting(
        Fraction(1, 5), "share of the images that is held out, such as 0.2 or 1/3", parse=_share, metavar="X"
    )
    seed: int = setting(0, "which images are held out follows from it", at_least=0, at_most=2**63 - 1)
    output: Path | None = setting(
        None,
        "where to write; what an earlier call left there is replaced",
        parse=paths.folder,
        metavar="FOLDER",
        absent="RUN/personalized/<name of the folder IMAGES>, or client-<number>",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.images is None) == (self.client is None):
            raise ValueError("name either a folder of images or, with --client, a client of the run")
        of_images = ("epochs", "batch_size", "local_lr", "seed", "test_fraction")
        given = [name for name in of_images if getattr(self, name) != getattr(Personalize, name)]  # its default
        if self.client is not None and given:
            raise ValueError(
                f"--{given[0]} {getattr(self, given[0])} is for images; a client of the run adapts as it did there"
            )
        if self.again and self.client is None:
            raise ValueError("--again is for --client; adapt to the images anew")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(Personalize, argv)
    pin_kernels(portable_kernels_of(args.run))

    from perfedavg.training.compute import use_reproducible_kernels

    use_reproducible_kernels()
    if args.images is not None:
        adapt_to_images(args, args.images)
    else:
        assert args.client is not None, "either is given"
        adapt_client_of_run(args, args.client)


def adapt_client_of_run(args: Personalize, text: str) -> None:
    """Show what the client of that name or number comes to, as in the run, and write its model."""
    from perfedavg.client_of_run import adapt_client, check_data, find_client, score_again, write_client
    from perfedavg.contracts import client_label

    run = RecordedRun.read(args.run)
    run.check_ended()
    config = run.experiment()
    dataset = utils.get_datasets(config, args.data_root)
    check_data(run, dataset)
    client_id = find_client(dataset, text)
    output = output_folder(args, f"client-{client_id}")
    model = utils.get_model(config, dataset)
    if args.again:
        then, now = score_again(run, output, model, dataset, client_id)
        show(figures_table({"when it was saved": then, "now": now}))
        return
    adapted = adapt_client(run, model, dataset, client_id)
    score = adapted.score
    show(
        f"client {client_label(dataset, client_id)} of {args.run}, "
        f"{'never seen in training' if adapted.population is Population.UNSEEN else 'one of those that train'}: "
        f"{score.num_train_examples} examples to adapt to, {score.num_test_examples} held out to be scored on"
    )
    epochs = f"after {adapted.num_epochs} epoch{'s' if adapted.num_epochs > 1 else ''}"
    show(figures_table({"before": score.initial, epochs: score.personalized}))
    if adapted.recorded is None:
        show("the run did not score this client, so its clients.csv does not have it")
    elif differing := adapted.differing:
        show(f"the run's clients.csv has {differing}: it was scored on another kind of processor, or by other versions")
    else:
        show("the same figures, to the digit, as in the run's clients.csv")
    write_client(output, adapted, model, dataset, run)
    show(f"personalized model in {output}; the same command with --again scores it again")


def figures_table(rows: Mapping[str, Mapping[str, float | None]]) -> str:
    """A row each, with a column a metric. What is no number is left out."""
    metrics = [name for name, value in next(iter(rows.values())).items() if value is not None and math.isfinite(value)]
    widths = {name: max(24, len(name) + 2) for name in metrics}
    lines = ["", f"{'':18}{''.join(f'{name:>{width}}' for name, width in widths.items())}"]
    for label, values in rows.items():
        lines.append(f"{label:18}{''.join(f'{values.get(name)!r:>{width}}' for name, width in widths.items())}")
    return "\n".join([*lines, ""])


def adapt_to_images(args: Personalize, images: Path) -> None:
    """Show what a person's images come to, and write their model."""
    from datasets.clients.person import load_person
    from perfedavg.engine.experiment import parameters_sha256
    from perfedavg.personal_model import RunModel, export, personalize, write_personalized
    from perfedavg.training.flat_model import flatten

    run = RunModel.read(args.run)
    training = local_training(run, args)
    output = output_folder(args, images.resolve().name)
    form = image_form(run)
    model, loss_function = load_model(run, args.data_root)
    data = load_person(images, run.class_names, args.test_fraction, args.seed, form)
    warn_of_bright_ground(run, data)
    counts = count_images(data, run.class_names)
    num_adapted_to, num_held_out = counts["adapted_to"], counts["held_out"]
    show(
        f"{images}: {num_adapted_to + num_held_out} images of {len(counts['classes'])} of the run's "
        f"{len(run.class_names)} classes; {num_adapted_to} to adapt to, {num_held_out} held out to be scored on"
    )
    run_sha256 = parameters_sha256(flatten(model))
    method = list(run.config.phases.values())[-1].method
    before, after = personalize(model, data, method, training, run.config.precision, args.seed, loss_function)
    show(score_table(before, after, training.num_epochs))
    program = export(model, data.test_inputs, run.class_names)
    result = {
        "run": str(args.run.absolute()),
        "run_model_sha256": run_sha256,
        "dataset": run.config.dataset,
        **describe_settings(args, images, training, run.config.precision),
        **counts,
        "before": before.to_dict(),
        "after": after.to_dict(),
        "model_sha256": parameters_sha256(flatten(model)),
    }
    write_personalized(output, model, program, {**run.facts.to_metadata(), "personalized_from": run_sha256}, result)
    show(f"personalized model in {output}; docs/personalize.md says how to use it")


def portable_kernels_of(run: Path) -> str:
    """A run's --portable_kernels, which hold for its personalization too; `false` for what is no run, said later."""
    try:
        return RecordedRun.read(run).experiment().portable_kernels
    except ValueError:
        return "false"


def local_training(run: RunModel, args: Personalize) -> LocalTraining:
    """What the run's unseen clients did, where the flags do not say otherwise."""
    from perfedavg.training.local_training import LocalTraining

    optimizer = run.config.fedavg.client_optimizer
    if args.local_lr is not None:
        optimizer = dataclasses.replace(optimizer, learning_rate=args.local_lr)
        phase = dataclasses.replace(run.config.fedavg, client_optimizer=optimizer)
        dataclasses.replace(run.config, fedavg=phase)  # which checks it
    return LocalTraining(
        optimizer,
        num_epochs=args.epochs or run.config.num_personalization_epochs,
        batch_size=args.batch_size or run.config.batch_size,
    )


def output_folder(args: Personalize, name: str) -> Path:
    """Raises ValueError where it is a run's own folder, whose model and result would be replaced."""
    folder: Path = args.output or args.run / "personalized" / name
    if (folder / "config.json").exists():
        raise ValueError(f"--output {folder} is the folder of a run, whose model would be replaced; name another one")
    return folder


def image_form(run: RunModel) -> ImageForm:
    """Of the images that the run's model takes. Raises ValueError where it takes none."""
    from datasets.sources.image_files import ImageForm

    try:
        return ImageForm.of_model(run.facts.input_shape or EARLIER_SHAPE, run.config.own_files)
    except ValueError as error:
        raise ValueError(f"{run.path} is a run on {run.config.dataset}, whose {error}; name one on images") from error


def load_model(run: RunModel, data_root: Path) -> tuple[nn.Module, Loss]:
    """The run's model, and the loss that it was trained with.

    Raises ValueError where its data set brings a model or a loss and cannot be had, or has no classes.
    """
    import torch.nn.functional as F

    from perfedavg.contracts import example_data
    from perfedavg.training.local_training import loss_of

    facts = run.facts
    if not facts.own_parts:
        model = utils.build_architecture(facts.architecture, facts.input_shape or EARLIER_SHAPE, len(run.class_names))
        run.load_into(model)
        return model, F.cross_entropy
    say(f"{facts.dataset} brings its own {' and '.join(facts.own_parts)}: its module is imported, its data are opened")
    dataset = utils.get_datasets(run.config, data_root)
    if example_data(dataset).train_labels.is_floating_point():
        raise ValueError(f"{run.path} is a run on {facts.dataset}, whose labels are numbers and not classes")
    # In runs of earlier versions, a data set's model was taken whatever the setting said.
    architecture = AUTO_MODEL if "build_model" in facts.own_parts else facts.architecture
    model = utils.get_model(dataclasses.replace(run.config, architecture=architecture), dataset)
    run.load_into(model)
    return model, loss_of(dataset)


def warn_of_bright_ground(run: RunModel, data: ClientData) -> None:
    """Only a user's own data may have it too."""
    from datasets.clients.person import has_bright_ground

    dataset = run.config.dataset
    is_users_own = dataset == "folder" or is_own_code(dataset) or is_path(dataset)
    if not is_users_own and has_bright_ground(data.train_inputs):
        say(
            f"these images are dark on a bright ground, {dataset} is bright on a dark one: the model cannot "
            "know them; invert them"
        )


def count_images(data: ClientData, class_names: tuple[str, ...]) -> dict[str, Any]:
    """How many images there are in each part, and of each class of which there are any."""
    parts = {"adapted_to": data.train_labels.tolist(), "held_out": data.test_labels.tolist()}
    present = sorted({label for labels in parts.values() for label in labels})
    return {
        **{part: len(labels) for part, labels in parts.items()},
        "classes": {
            class_names[label]: {part: labels.count(label) for part, labels in parts.items()} for label in present
        },
    }


def describe_settings(args: Personalize, images: Path, training: LocalTraining, precision: str) -> dict[str, Any]:
    return {
        "images": str(images.absolute()),
        "test_fraction": float(args.test_fraction),
        "seed": args.seed,
        "epochs": training.num_epochs,
        "batch_size": training.batch_size,
        "client_optimizer": dataclasses.asdict(training.optimizer),
        "precision": precision,
    }


def score_table(before: Score, after: Score, num_epochs: int) -> str:
    """The scores on the held-out images, and what to do where they fell."""
    rows = {"as the run left it": before, f"after {num_epochs} epoch{'s' if num_epochs > 1 else ''}": after}
    lines = ["", f"{'':22}{'loss':>9}{'accuracy':>11}{'named right':>14}"]
    for label, score in rows.items():
        share = f"{score.num_right} of {score.num_examples}"
        lines.append(f"{label:22}{score.loss:>9.4f}{100 * score.accuracy:>9.2f} %{share:>14}")
    lines.append("")
    if after.num_right < before.num_right:
        lines += ["It names fewer images right than before: try fewer --epochs, a lower --local_lr or more images.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run_entry_point(main)
