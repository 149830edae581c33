"""The boundary where a user's own code comes in: its data set, model and loss, checked by rules that read like a list.

Whatever breaks a rule, or fails in the user's code, is a ValueError of one line: the data set, the client, the rule and
the value. Data sets of this project do not come through here.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.sources.own_module import explained, import_factory
from perfedavg.contracts import REQUIRED, ClientData

MAX_TEXT_CHARS = 500
"""Of a fingerprint."""

TRIED_EXAMPLES = 2
"""By which a model and a loss are tried before the first round."""

Result = TypeVar("Result")


def load_own(name: str, data_root: Path, num_clients: int | None, seed: int) -> OwnDataset:
    """Call the factory that `package.module:factory` stands for, and check what it returns.

    Raises ValueError where it cannot be imported, fails, or returns what breaks a rule as far as the first training
    client and the first unseen one show; of the others, each is checked when it is read.
    """
    factory = import_factory(name)
    try:
        own = factory(data_root, num_clients, seed)
    except (Exception, SystemExit) as error:
        raise explained(f"--dataset {name}: {name.partition(':')[2]}(data_root, num_clients, seed)", error) from error
    return OwnDataset(name, own)


@dataclass(frozen=True)
class _Reading:
    """A client as a user's data set gives it.  like: the first client that was read, or None where this is it."""

    data: ClientData
    num_train_examples: int
    is_unseen: bool
    num_classes: int
    has_loss: bool
    like: ClientData | None

    @property
    def parts(self) -> list[tuple[str, Tensor, Tensor]]:
        """Name, inputs and labels of each part."""
        data = self.data
        return [("train", data.train_inputs, data.train_labels), ("test", data.test_inputs, data.test_labels)]


def _is_plain(reading: _Reading) -> str | None:
    for field in fields(reading.data):
        tensor = getattr(reading.data, field.name)
        if not isinstance(tensor, Tensor):
            return f"{field.name} is a {type(tensor).__name__}; make it a torch.Tensor, such as by torch.from_numpy"
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return f"{field.name} is {tensor.layout} on {tensor.device}; give a dense tensor on the CPU"
        if tensor.requires_grad:
            return f"{field.name} requires a gradient; detach it"
        if tensor.ndim == 0:
            return f"{field.name} is a single number; its first dimension must be the examples'"
    return None


def _has_a_label_for_each_input(reading: _Reading) -> str | None:
    for part, inputs, labels in reading.parts:
        if len(inputs) != len(labels):
            return f"{part}_inputs has {len(inputs)} examples, {part}_labels {len(labels)}; give each input one label"
    return None


def _has_examples(reading: _Reading) -> str | None:
    if not len(reading.data.train_labels):
        return "its training part is empty; leave the client out, or give it an example"
    if reading.is_unseen and not len(reading.data.test_labels):
        return "its test part is empty, and it is to be scored; leave the client out, or give it an example"
    return None


def _has_the_number_that_was_said(reading: _Reading) -> str | None:
    if len(reading.data.train_labels) != reading.num_train_examples:
        found, said = len(reading.data.train_labels), reading.num_train_examples
        return f"train_labels has {found} entries, and num_train_examples says {said}; let them agree"
    return None


def _inputs_are_numbers(reading: _Reading) -> str | None:
    for part, inputs, _ in reading.parts:
        if inputs.is_complex() or inputs.dtype == torch.bool:
            return f"{part}_inputs are {inputs.dtype}; use float32, or int64 for tokens"
        if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
            return f"{part}_inputs hold NaN or infinity; replace them"
    return None


def _labels_are_classes_or_targets(reading: _Reading) -> str | None:
    for part, _, labels in reading.parts:
        if labels.is_floating_point():
            if not reading.has_loss and labels.ndim == 1:
                return f"{part}_labels are {labels.dtype}; use int64 for classes, or bring a loss_function for targets"
            if not bool(torch.isfinite(labels).all()):
                return f"{part}_labels hold NaN or infinity; replace them"
            continue
        if labels.dtype != torch.int64:
            return f"{part}_labels are {labels.dtype}; use int64 for classes (labels.long()), or float32 for targets"
        if labels.ndim != 1:
            return f"{part}_labels have the shape {tuple(labels.shape)}; give one whole number an example"
        bad = labels[(labels < 0) | (labels >= reading.num_classes)]
        if len(bad):
            highest = reading.num_classes - 1
            return f"{part}_labels hold {int(bad[0])}; with num_classes {highest + 1} a label is 0 to {highest}"
    return None


def _is_like_the_first(reading: _Reading) -> str | None:
    like = reading.like or reading.data
    for part, *tensors in reading.parts:
        firsts = (like.train_inputs, like.train_labels)
        for kind, tensor, first in zip(("inputs", "labels"), tensors, firsts, strict=True):
            if (tensor.dtype, tensor.shape[1:]) != (first.dtype, first.shape[1:]):
                return f"{part}_{kind} are {_shown(tensor)}, those read first {_shown(first)}; make them alike"
    return None


def _shown(examples: Tensor) -> str:
    return f"{examples.dtype} of shape {tuple(examples.shape[1:])} each"


CLIENT_RULES: tuple[Callable[[_Reading], str | None], ...] = (
    _is_plain,
    _has_a_label_for_each_input,
    _has_examples,
    _has_the_number_that_was_said,
    _inputs_are_numbers,
    _labels_are_classes_or_targets,
    _is_like_the_first,
)
"""Each returns what a client breaks, and the fix, or None."""


class OwnDataset:
    """A user's own data set behind the rules: what `perfedavg.contracts.FederatedDataset` asks for.

    A client is checked when it is first read, also on a worker; later readings of it cost nothing more. `build_model`
    and `loss_function` are there where the user's data set has them. Safe to read from several threads where the
    user's is.
    """

    num_left_out = 0

    def __init__(self, name: str, own: Any) -> None:
        """Raises ValueError where a rule is broken."""
        self.name = name
        self._own = own
        missing = [part for part in REQUIRED if not (hasattr(type(own), part) or hasattr(own, part))]
        if missing:
            raise ValueError(f"what --dataset {name} returns has no {', '.join(missing)}; see docs/your-own-data.md")
        self.num_classes = self._whole_number("num_classes", lambda: own.num_classes, 1)
        self.class_names = self._call("class_names", lambda: getattr(own, "class_names", None))
        _check_class_names(name, self.class_names, self.num_classes)
        self.fingerprint = self._fingerprint()
        self.train_client_ids = self._client_ids("train_client_ids")
        self.unseen_client_ids = self._client_ids("unseen_client_ids")
        self._check_disjoint()
        self._unseen = _members(self.unseen_client_ids)
        self._like: ClientData | None = None
        self._checked: set[int] = set()
        if hasattr(own, "build_model"):
            self.build_model = self._build_model
        if hasattr(own, "loss_function"):
            self.loss_function = self._loss
        self._read_first_clients()

    def client_name(self, client_id: int) -> str | None:
        """What the user's data set calls a client, where it does."""
        own_name = getattr(self._own, "client_name", None)
        if own_name is None:
            return None
        name = self._call(f"client_name({client_id})", lambda: own_name(client_id))
        if name is not None and not isinstance(name, str):
            raise self._broken(f"client_name({client_id}) is {name!r:.100}; return a text, or None")
        return name

    def num_train_examples(self, client_id: int) -> int:
        what = f"num_train_examples({client_id})"
        return self._whole_number(what, lambda: self._own.num_train_examples(client_id), 1)

    def client_data(self, client_id: int) -> ClientData:
        data = self._read(client_id)
        if client_id not in self._checked:
            self._check_client(client_id, data)
            self._checked.add(client_id)
        return data

    def check_model(self, model: object) -> None:
        """Raises ValueError where a model, the user's or this project's, cannot be trained on the first client."""
        whose = "build_model()" if hasattr(self, "build_model") else "--struct"
        if not isinstance(model, nn.Module):
            raise self._broken(f"{whose} is a {type(model).__name__}; return a torch.nn.Module")
        complaint = _complaint_about(model)
        if complaint:
            raise self._broken(f"the model of {whose} {complaint}")
        first = self.client_data(self.train_client_ids[0])
        inputs, labels = first.train_inputs[:TRIED_EXAMPLES], first.train_labels[:TRIED_EXAMPLES]
        what = f"the model of {whose} on inputs {tuple(inputs.shape)} of {inputs.dtype}"
        with torch.random.fork_rng(devices=[]):
            tried = self._call(what, lambda: copy.deepcopy(model).eval())
            outputs = self._call(what, lambda: tried(inputs))
            self._check_outputs(outputs, labels)
            loss_function = getattr(self, "loss_function", F.cross_entropy)
            loss = self._call("the loss", lambda: loss_function(outputs, labels))
            self._check_loss(loss)
            trained = [parameter for parameter in tried.parameters() if parameter.requires_grad]
            self._call("the loss's gradient", lambda: torch.autograd.grad(loss, trained, allow_unused=True))

    def explain(self, error: Exception, client_ids: Sequence[int]) -> Exception:
        """What to raise for an error in training or scoring clients with the user's model and loss: one line."""
        if isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError)):
            return error  # has its line, or is not the code's fault
        clients = ", ".join(map(str, client_ids[:10])) + (", ..." if len(client_ids) > 10 else "")
        what = f"--dataset {self.name}: training or scoring client{'s' if len(client_ids) > 1 else ''} {clients}"
        return explained(what, error)

    def _read_first_clients(self) -> None:
        first = self.train_client_ids[0]
        self._like = self.client_data(first)
        again = self.client_data(first)
        for field in fields(ClientData):
            if not torch.equal(getattr(self._like, field.name), getattr(again, field.name)):
                raise self._broken(
                    f"client_data({first}) gave other {field.name} when it was called again; what it returns must "
                    "follow from its arguments alone, such as by a generator seeded with the client's number",
                )
        self.client_data(self.unseen_client_ids[0])

    def _read(self, client_id: int) -> ClientData:
        def read() -> ClientData:
            given = self._own.client_data(client_id)
            return ClientData(*(getattr(given, field.name) for field in fields(ClientData)))

        return self._call(f"client_data({client_id})", read)

    def _check_client(self, client_id: int, data: ClientData) -> None:
        reading = _Reading(
            data,
            self.num_train_examples(client_id),
            client_id in self._unseen,
            self.num_classes,
            hasattr(self, "loss_function"),
            self._like,
        )
        for rule in CLIENT_RULES:
            complaint = rule(reading)
            if complaint:
                name = self.client_name(client_id)
                called = "" if name is None else f" ({name!r:.100})"
                raise self._broken(f"client {client_id}{called}: {complaint}")

    def _build_model(self) -> Any:
        return self._call("build_model()", self._own.build_model)

    def _loss(self, outputs: Tensor, labels: Tensor) -> Any:
        return self._call("loss_function", lambda: self._own.loss_function(outputs, labels))

    def _check_outputs(self, outputs: object, labels: Tensor) -> None:
        if not isinstance(outputs, Tensor):
            raise self._broken(f"the model returns a {type(outputs).__name__}; let it return one tensor")
        shape = tuple(outputs.shape)
        if labels.is_floating_point():
            if outputs.ndim == 0 or len(outputs) != len(labels):
                raise self._broken(f"the model's outputs {shape} are not one an example, of {len(labels)} examples")
        elif shape != (len(labels), self.num_classes):
            expected = (len(labels), self.num_classes)
            raise self._broken(f"the model's outputs {shape} are not (examples, num_classes), which is {expected}")

    def _check_loss(self, loss: object) -> None:
        if not isinstance(loss, Tensor) or loss.ndim:
            shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise self._broken(f"loss_function returns {shown}; return the mean over the batch, a tensor without axes")
        if not bool(torch.isfinite(loss)):
            raise self._broken(f"the loss of the untrained model is {loss.item()}; it must be finite")
        if not loss.requires_grad:
            raise self._broken(
                "the loss does not depend on the model's parameters; compute it from outputs, undetached"
            )

    def _client_ids(self, part: str) -> Sequence[int]:
        ids: Any = self._call(part, lambda: getattr(self._own, part))
        if not isinstance(ids, range):
            listed = self._call(part, lambda: ids.tolist() if hasattr(ids, "tolist") else list(ids))
            ids = [self._client_id(part, client_id) for client_id in listed]
        numbers: Sequence[int] = ids
        if not numbers:
            raise self._broken(f"{part} is empty; there must be clients to train and clients to be scored")
        for number in (numbers[0], numbers[-1]) if isinstance(numbers, range) else numbers:
            if not 0 <= number < 2**63:
                raise self._broken(f"{part} holds {number}; number the clients from 0 on")
        if len(_members(numbers)) < len(numbers):
            twice = next(number for number, count in Counter(numbers).items() if count > 1)
            raise self._broken(f"{part} holds {twice} twice; name each client once")
        return numbers

    def _client_id(self, part: str, client_id: object) -> int:
        if isinstance(client_id, bool) or not hasattr(client_id, "__index__"):
            raise self._broken(
                f"{part} holds {client_id!r:.100}; number the clients, and give their names in client_name(client_id)"
            )
        return operator.index(client_id)  # also a numpy integer

    def _check_disjoint(self) -> None:
        train = _members(self.train_client_ids)
        both = next((client_id for client_id in self.unseen_client_ids if client_id in train), None)
        if both is not None:
            raise self._broken(f"client {both} is in train_client_ids and in unseen_client_ids; leave it out of one")

    def _fingerprint(self) -> str:
        fingerprint = self._call("fingerprint", lambda: self._own.fingerprint)
        if not isinstance(fingerprint, str) or not 1 <= len(fingerprint) <= MAX_TEXT_CHARS:
            raise self._broken(
                f"fingerprint is {fingerprint!r:.100}; it must be a text of 1 to {MAX_TEXT_CHARS} characters"
            )
        return fingerprint

    def _whole_number(self, what: str, get: Callable[[], Any], lowest: int) -> int:
        value = self._call(what, get)
        if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < lowest:
            raise self._broken(f"{what} is {value!r:.100}; it must be a whole number from {lowest}")
        return operator.index(value)

    def _call(self, what: str, function: Callable[[], Result]) -> Result:
        """What a piece of the user's code returns. Raises ValueError, with its file and line, where it fails."""
        try:
            return function()
        except (MemoryError, torch.OutOfMemoryError):
            raise  # not the code's fault
        except Exception as error:
            raise explained(f"--dataset {self.name}: {what}", error) from error

    def _broken(self, complaint: str) -> ValueError:
        return ValueError(f"--dataset {self.name}: {complaint}")


def _members(client_ids: Sequence[int]) -> range | set[int]:
    """For a quick `in`; a range is one itself."""
    return client_ids if isinstance(client_ids, range) else set(client_ids)


def _complaint_about(model: nn.Module) -> str | None:
    """What a model breaks, whoever built it, and the fix, or None."""
    parameters = dict(model.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        return "has no parameter that is trained"
    types = {parameter.dtype for parameter in parameters.values()}
    if len(types) > 1 or not types <= {torch.float32, torch.float64}:
        return f"has parameters of {', '.join(sorted(map(str, types)))}; make all of them float32 (model.float())"
    for name, parameter in parameters.items():
        if nn.parameter.is_lazy(parameter):
            return f"does not know the shape of {name} yet; give its sizes"
        if parameter.device.type != "cpu":
            return f"has {name} on {parameter.device}; build it on the CPU, --device moves it"
        if not bool(torch.isfinite(parameter).all()):
            return f"starts with NaN or infinity in {name}; initialize it"
    return None


def _check_class_names(dataset: str, names: Any, num_classes: int) -> None:
    """They may be left out; but they are written with the model, when all the work is done."""
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"--dataset {dataset}: class_names must be a list of texts, one a class")
    if len(set(names)) != num_classes or len(names) != num_classes:
        raise ValueError(
            f"--dataset {dataset}: class_names has {len(names)} names, {len(set(names))} of them different, for "
            f"{num_classes} classes; name each class once"
        )
