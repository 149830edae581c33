"""The boundary where a model comes in that this project does not know, or data that its own models do not know.

What breaks a rule, or fails in a user's code, is a ValueError of one line: whose model it is, the rule and the value.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from perfedavg.contracts import FederatedDataset, example_data
from perfedavg.own_module import OwnModuleError, call_own_code, explained, import_own
from perfedavg.settings import flag
from perfedavg.training.flat_model import FlatModel, flatten
from perfedavg.training.local_training import Loss, loss_of

TRIED_EXAMPLES = 2
"""By which a model and a loss are tried before the first round."""

_SINGLE_EXAMPLE = "Expected more than 1 value per channel"
"""How torch's BatchNorm begins to refuse a batch of one example."""


def build_own_model(flag: str, name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Call the factory that `package.module:factory` stands for, given with a flag such as `--model`.

    input_shape: of one example, such as (1, 28, 28).  num_classes: outputs for one example.
    Raises ValueError where it cannot be imported or fails.
    """
    factory = import_own(flag, name, "factory")
    try:
        model: nn.Module = factory(input_shape, num_classes)
    except (Exception, SystemExit) as error:
        called = f"{name.partition(':')[2]}(input_shape={input_shape}, num_classes={num_classes})"
        raise explained(f"{flag} {name}: {called}", error) from error
    return model


def check_model(whose: str, model: object, dataset: FederatedDataset, batch_size: int) -> None:
    """Raises ValueError where a model cannot be trained on the data set's clients.

    whose: how a message begins, such as `--model my_net:Net`.
    It is tried on the first examples of a client, and left as it was. What other clients make of it shows when
    they are trained.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"{whose} is a {type(model).__name__}; return a torch.nn.Module")
    for fault in _faults_of_model(model):
        raise ValueError(f"{whose}: the model {fault}")
    data = example_data(dataset)
    inputs, labels = (part[:TRIED_EXAMPLES] for part in (data.train_inputs, data.train_labels))
    with torch.random.fork_rng(devices=[]):
        _try_scoring(whose, model, inputs, labels, dataset.num_classes, loss_of(dataset))
        tried = _try_training(whose, model, inputs, labels, loss_of(dataset))
        if not _takes_one_example(whose, tried, inputs):
            _refuse_single_examples(whose, dataset, batch_size)


def explain(whose: str) -> Callable[[Exception, Sequence[int]], Exception]:
    """From an error in training or scoring clients with a user's model or loss to what to raise: one line."""

    def explaining(error: Exception, client_ids: Sequence[int]) -> Exception:
        if isinstance(error, ValueError) and _SINGLE_EXAMPLE in str(error):  # as where a method cuts examples once more
            return ValueError(
                f"{whose}: the model's BatchNorm cannot train on a batch of one example, as one of client "
                f"{', '.join(map(str, client_ids))}; use GroupNorm or LayerNorm, or another {flag('batch_size')}"
            )
        if isinstance(error, (ValueError, OSError, MemoryError, torch.OutOfMemoryError)):
            return error  # has its line, or is not the code's fault
        clients = ", ".join(map(str, client_ids[:10])) + (", ..." if len(client_ids) > 10 else "")
        return explained(f"{whose}: training or scoring client{'s' if len(client_ids) > 1 else ''} {clients}", error)

    return explaining


def _faults_of_model(model: nn.Module) -> Iterator[str]:
    """What a model breaks, whoever built it, and the fix."""
    parameters = dict(model.named_parameters())
    if not any(parameter.requires_grad for parameter in parameters.values()):
        yield "has no parameter that is trained"
    types = {parameter.dtype for parameter in parameters.values()}
    if len(types) > 1 or not types <= {torch.float32, torch.float64}:
        yield f"has parameters of {', '.join(sorted(map(str, types)))}; make all of them float32 (model.float())"
    for name, tensor in (*parameters.items(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            yield f"does not know the shape of {name} yet; give its sizes"
        if tensor.device.type != "cpu":
            yield f"has {name} on {tensor.device}; build it on the CPU, --device moves it"
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            yield f"starts with NaN or infinity in {name}; initialize it"


def _try_scoring(
    whose: str, model: nn.Module, inputs: Tensor, labels: Tensor, num_classes: int, loss_function: Loss
) -> None:
    """In evaluation the model must give one row of outputs an example, and the loss a number with a gradient."""
    what = f"{whose}: the model on inputs {tuple(inputs.shape)} of {inputs.dtype}"
    tried = call_own_code(what, lambda: copy.deepcopy(model).eval())
    outputs = call_own_code(what, lambda: tried(inputs))
    for fault in _faults_of_outputs(outputs, labels, num_classes):
        raise ValueError(f"{whose}: {fault}")
    loss = call_own_code(f"{whose}: the loss", lambda: loss_function(outputs, labels))
    for fault in _faults_of_loss(loss):
        raise ValueError(f"{whose}: {fault}")
    trained = [parameter for parameter in tried.parameters() if parameter.requires_grad]
    call_own_code(f"{whose}: the loss's gradient", lambda: torch.autograd.grad(loss, trained, allow_unused=True))


def _faults_of_outputs(outputs: object, labels: Tensor, num_classes: int) -> Iterator[str]:
    if not isinstance(outputs, Tensor):
        yield f"the model returns a {type(outputs).__name__}; let it return one tensor"
        return
    shape, expected = tuple(outputs.shape), (len(labels), num_classes, *labels.shape[1:])
    if labels.is_floating_point() and shape[:1] != expected[:1]:
        yield f"the model's outputs {shape} are not one an example, of {len(labels)} examples"
    if not labels.is_floating_point() and shape != expected:
        yield f"the model's outputs {shape} are not (examples, num_classes), which is {expected}"


def _faults_of_loss(loss: object) -> Iterator[str]:
    if not isinstance(loss, Tensor) or loss.ndim:
        shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        yield f"loss_function returns {shown}; return the mean over the batch, a tensor without axes"
        return
    if not bool(torch.isfinite(loss)):
        yield f"the loss of the untrained model is {loss.item()}; it must be finite"
    if not loss.requires_grad:
        yield "the loss does not depend on the model's parameters; compute it from outputs, undetached"


def _try_training(whose: str, model: nn.Module, inputs: Tensor, labels: Tensor, loss_function: Loss) -> FlatModel:
    """In training nothing may pass from one client to the next, by a buffer or by torch's generator."""
    start = flatten(model)
    try:
        tried = FlatModel(model, loss_function=loss_function)
        tried.load(start)
        before = torch.random.get_rng_state()
        rows = [0, -1]  # two, also of a client that has one example
        call_own_code(
            f"{whose}: training", lambda: tried.descend(loss_function(tried(inputs[rows]), labels[rows]), 0.0)
        )
        if not torch.equal(torch.random.get_rng_state(), before):
            raise ValueError(
                "the model draws from torch's global generator while it trains, which no client's seed reaches; use "
                "nn.Dropout, and no random function in forward"
            )
        tried.load(start)
    except OwnModuleError:
        raise
    except ValueError as error:
        raise ValueError(f"{whose}: {error}") from error
    return tried


def _takes_one_example(whose: str, tried: FlatModel, inputs: Tensor) -> bool:
    """Whether a batch may be one example, of which BatchNorm has no variance."""
    try:
        tried(inputs[:1])
    except Exception as error:
        if _SINGLE_EXAMPLE in str(error):
            return False
        raise explained(f"{whose}: training on one example", error) from error
    return True


def _refuse_single_examples(whose: str, dataset: FederatedDataset, batch_size: int) -> None:
    """Raises ValueError where a client's last batch of an epoch is a single example."""
    for client_id in (*dataset.train_client_ids, *dataset.unseen_client_ids):
        num_examples = dataset.num_train_examples(client_id)
        if num_examples % batch_size == 1 or batch_size == 1:
            raise ValueError(
                f"{whose}: the model's BatchNorm cannot train on a batch of one example, and client {client_id} has "
                f"one, of its {num_examples} examples with {flag('batch_size')} {batch_size}; use GroupNorm or "
                "LayerNorm, or another batch size"
            )
