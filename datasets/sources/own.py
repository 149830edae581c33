"""The boundary where a user's own code comes in: its data set, model and loss are checked before they are used.

Whatever breaks a rule, or fails in the user's code, is a ValueError of one line: the data set, the client, the rule and
the value. Data sets of this project do not come through here.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from perfedavg.contracts import REQUIRED, ClientData
from perfedavg.own_module import call_own_code, explained, import_own

MAX_FINGERPRINT_CHARS = 500

Result = TypeVar("Result")


def load_own(name: str, data_root: Path, num_clients: int | None, seed: int) -> OwnDataset:
    """Call the factory that `package.module:factory` stands for, and check what it returns.

    Raises ValueError where it cannot be imported, fails, or returns what breaks a rule as far as the first training
    client and the first unseen one show; of the others, each is checked when it is read.
    """
    factory = import_own("--dataset", name, "factory")
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


def _faults_of_client(reading: _Reading) -> Iterator[str]:
    """What a client breaks, and the fix, rule by rule; a rule may rest on those before it."""
    data, like = reading.data, reading.like or reading.data
    for name, tensor in vars(data).items():
        if not isinstance(tensor, Tensor):
            yield f"{name} is a {type(tensor).__name__}; make it a torch.Tensor, such as by torch.from_numpy"
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            yield f"{name} is {tensor.layout} on {tensor.device}; give a dense tensor on the CPU"
        if tensor.requires_grad:
            yield f"{name} requires a gradient; detach it"
        if tensor.ndim == 0:
            yield f"{name} is a single number; its first dimension must be the examples'"
    parts = (("train", data.train_inputs, data.train_labels), ("test", data.test_inputs, data.test_labels))
    for part, inputs, labels in parts:
        if len(inputs) != len(labels):
            yield f"{part}_inputs has {len(inputs)} examples, {part}_labels {len(labels)}; give each input one label"
    if not len(data.train_labels):
        yield "its training part is empty; leave the client out, or give it an example"
    if reading.is_unseen and not len(data.test_labels):
        yield "its test part is empty, and it is to be scored; leave the client out, or give it an example"
    if len(data.train_labels) != reading.num_train_examples:
        said = reading.num_train_examples
        yield f"train_labels has {len(data.train_labels)} entries, and num_train_examples says {said}; let them agree"
    for part, inputs, labels in parts:
        if inputs.is_complex() or inputs.dtype == torch.bool:
            yield f"{part}_inputs are {inputs.dtype}; use float32, or int64 for tokens"
        if not bool(torch.isfinite(inputs).all()):
            yield f"{part}_inputs hold NaN or infinity; replace them"
        yield from _faults_of_labels(f"{part}_labels", labels, reading)
        for kind, tensor, first in (("inputs", inputs, like.train_inputs), ("labels", labels, like.train_labels)):
            if (tensor.dtype, tensor.shape[1:]) != (first.dtype, first.shape[1:]):
                yield f"{part}_{kind} are {_shown(tensor)}, those read first {_shown(first)}; make them alike"


def _faults_of_labels(name: str, labels: Tensor, reading: _Reading) -> Iterator[str]:
    if labels.is_floating_point():
        if not reading.has_loss and labels.ndim == 1:
            yield f"{name} are {labels.dtype}; use int64 for classes, or bring a loss_function for targets"
        if not bool(torch.isfinite(labels).all()):
            yield f"{name} hold NaN or infinity; replace them"
        return
    if labels.dtype != torch.int64:
        yield f"{name} are {labels.dtype}; use int64 for classes (labels.long()), or float32 for targets"
    if labels.ndim != 1:
        yield f"{name} have the shape {tuple(labels.shape)}; give one whole number an example"
    bad = labels[(labels < 0) | (labels >= reading.num_classes)]
    if len(bad):
        highest = reading.num_classes - 1
        yield f"{name} hold {int(bad[0])}; with num_classes {reading.num_classes} a label is 0 to {highest}"


def _shown(examples: Tensor) -> str:
    return f"{examples.dtype} of shape {tuple(examples.shape[1:])} each"


class OwnDataset:
    """A user's own data set behind the rules: what `perfedavg.contracts.FederatedDataset` asks for.

    A client is checked when it is first read, also on a worker; later readings of it cost nothing more. `build_model`
    and `loss_function` are there where the user's data set has them. Safe to read from several threads where the
    user's is.
    """

    def __init__(self, name: str, own: Any) -> None:
        """Raises ValueError where a rule is broken."""
        self.name = name
        self._own = own
        missing = [part for part in REQUIRED if not (hasattr(type(own), part) or hasattr(own, part))]
        if missing:
            raise ValueError(f"what --dataset {name} returns has no {', '.join(missing)}; see docs/your-own-data.md")
        self.num_classes = self._whole_number("num_classes", lambda: own.num_classes)
        self.class_names = self._class_names()
        self.fingerprint = self._call("fingerprint", lambda: own.fingerprint)
        if not isinstance(self.fingerprint, str) or not 1 <= len(self.fingerprint) <= MAX_FINGERPRINT_CHARS:
            shown = f"{self.fingerprint!r:.100}"
            raise self._broken(f"fingerprint is {shown}; it must be a text of 1 to {MAX_FINGERPRINT_CHARS} characters")
        self.train_client_ids = self._client_ids("train_client_ids")
        self.unseen_client_ids = self._client_ids("unseen_client_ids")
        self._unseen = _members(self.unseen_client_ids)
        train = _members(self.train_client_ids)
        both = next((client_id for client_id in self.unseen_client_ids if client_id in train), None)
        if both is not None:
            raise self._broken(f"client {both} is in train_client_ids and in unseen_client_ids; leave it out of one")
        if hasattr(own, "build_model"):
            self.build_model = lambda: self._call("build_model()", own.build_model)
        if hasattr(own, "loss_function"):
            self.loss_function = lambda *of: self._call("loss_function", lambda: own.loss_function(*of))
        self._checked: set[int] = set()
        self._like: ClientData | None = None
        self._like = self.client_data(self.train_client_ids[0])
        self._check_repeatable(self.train_client_ids[0], self._like)
        for client_id in self.unseen_client_ids[:1]:
            self.client_data(client_id)

    def client_name(self, client_id: int) -> str | None:
        """What the user's data set calls a client, where it does."""
        name_of = getattr(self._own, "client_name", lambda _: None)
        name = self._call(f"client_name({client_id})", lambda: name_of(client_id))
        if name is not None and not isinstance(name, str):
            raise self._broken(f"client_name({client_id}) is {name!r:.100}; return a text, or None")
        return name

    def num_train_examples(self, client_id: int) -> int:
        what = f"num_train_examples({client_id})"
        return self._whole_number(what, lambda: self._own.num_train_examples(client_id))

    def client_data(self, client_id: int) -> ClientData:
        def read() -> ClientData:
            given = self._own.client_data(client_id)
            return ClientData(*(getattr(given, field.name) for field in fields(ClientData)))

        data = self._call(f"client_data({client_id})", read)
        if client_id not in self._checked:
            said, is_unseen = self.num_train_examples(client_id), client_id in self._unseen
            has_loss = hasattr(self, "loss_function")
            reading = _Reading(data, said, is_unseen, self.num_classes, has_loss, self._like)
            for fault in _faults_of_client(reading):
                name = self.client_name(client_id)
                called = "" if name is None else f" ({name!r:.100})"
                raise self._broken(f"client {client_id}{called}: {fault}")
            self._checked.add(client_id)
        return data

    def has_test_part(self, client_id: int) -> bool:
        """Training clients need none."""
        return len(self.client_data(client_id).test_labels) > 0

    def _check_repeatable(self, client_id: int, before: ClientData) -> None:
        again = self.client_data(client_id)
        for name, tensor in vars(before).items():
            if not torch.equal(tensor, getattr(again, name)):
                raise self._broken(
                    f"client_data({client_id}) gave other {name} when it was called again; what it returns must follow "
                    "from its arguments alone, such as by a generator seeded with the client's number",
                )

    def _client_ids(self, part: str) -> Sequence[int]:
        ids: Any = self._call(part, lambda: getattr(self._own, part))
        if not isinstance(ids, range):
            listed = self._call(part, lambda: ids.tolist() if hasattr(ids, "tolist") else list(ids))
            odd = [client_id for client_id in listed if not _is_whole(client_id)]
            if odd:
                raise self._broken(
                    f"{part} holds {odd[0]!r:.100}; number the clients, and give their names in client_name(client_id)"
                )
            ids = [operator.index(client_id) for client_id in listed]  # also numpy's integers
        numbers: Sequence[int] = ids
        if not numbers and part == "train_client_ids":
            raise self._broken(f"{part} is empty; there must be clients to train")
        for number in (*numbers[:1], *numbers[-1:]) if isinstance(numbers, range) else numbers:
            if not 0 <= number < 2**63:
                raise self._broken(f"{part} holds {number}; number the clients from 0 on")
        if len(_members(numbers)) < len(numbers):
            twice = Counter(numbers).most_common(1)[0][0]
            raise self._broken(f"{part} holds {twice} twice; name each client once")
        return numbers

    def _class_names(self) -> Sequence[str] | None:
        """They may be left out; but they are written with the model, when all the work is done."""
        names = self._call("class_names", lambda: getattr(self._own, "class_names", None))
        if names is None:
            return None
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise self._broken("class_names must be a list of texts, one a class")
        if not len(set(names)) == len(names) == self.num_classes:
            raise self._broken(
                f"class_names has {len(names)} names, {len(set(names))} of them different, for {self.num_classes} "
                "classes; name each class once"
            )
        return names

    def _whole_number(self, what: str, get: Callable[[], Any]) -> int:
        value = self._call(what, get)
        if not _is_whole(value) or operator.index(value) < 1:
            raise self._broken(f"{what} is {value!r:.100}; it must be a whole number from 1")
        return operator.index(value)

    def _call(self, what: str, function: Callable[[], Result]) -> Result:
        return call_own_code(f"--dataset {self.name}: {what}", function)

    def _broken(self, fault: str) -> ValueError:
        return ValueError(f"--dataset {self.name}: {fault}")


def _is_whole(value: object) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _members(client_ids: Sequence[int]) -> range | set[int]:
    """For a quick `in`; a range is one itself."""
    return client_ids if isinstance(client_ids, range) else set(client_ids)
