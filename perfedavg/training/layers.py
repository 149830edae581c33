"""Layers that a private copy of a model uses in place of torch's: the same functions, seeded or faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from perfedavg.settings import flag

BLOCK_BYTES = 3 * 2**19
"""Of a large weight, worked on at once: what stays in a core's cache between its use for a gradient and its update."""


class DeferredGradients:
    """The gradients of dense layers' weights: kept as factors, or subtracted at once.

    pending: for each use of a layer in the backward pass its weight, (outputs, inputs), the gradient of its outputs,
        (rows, outputs), and its inputs, (rows, inputs). A weight's gradient is the sum over its uses of
        `gradient.t() @ inputs`.
    learning_rate: of the step of plain SGD that the backward pass is for, or None. With it, a weight that was used
        once is updated as soon as its gradient is known, while it is in the cache, and leaves nothing pending.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, Tensor, Tensor]] = []
        self.learning_rate: float | None = None
        self._num_uses: Counter[Tensor] = Counter()

    def begin(self, learning_rate: float | None) -> None:
        """A backward pass begins."""
        self.pending.clear()
        self.learning_rate = learning_rate

    def end(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The backward pass is over: take what is pending."""
        taken, self.pending = self.pending, []
        self.learning_rate = None
        self._num_uses.clear()
        return taken

    def note_use(self, weight: Tensor) -> None:
        self._num_uses[weight] += 1

    def linear_backward(
        self, weight: Tensor, multiplied: Tensor, gradient: Tensor, rows: Tensor, needs_input_grad: bool
    ) -> Tensor | None:
        """Keep or subtract the gradient of a weight, unless it is frozen.

        Returns that of the inputs, `gradient @ multiplied`, where it is needed.
        """
        if multiplied.dtype != weight.dtype:
            if weight.requires_grad:
                self.pending.append((weight, gradient, rows))
            return gradient.mm(multiplied) if needs_input_grad else None
        subtracts = self.learning_rate is not None and self._num_uses[weight] == 1 and weight.requires_grad
        to_rows: Tensor | None = None
        for block in blocks(weight):
            part, part_gradient = multiplied[block], gradient[:, block]
            if needs_input_grad:
                to_rows = part_gradient.mm(part) if to_rows is None else to_rows.addmm_(part_gradient, part)
            if subtracts:
                part.addmm_(part_gradient.t(), rows, alpha=-cast(float, self.learning_rate))
        if weight.requires_grad and not subtracts:
            self.pending.append((weight, gradient, rows))
        return to_rows


def blocks(weight: Tensor) -> list[slice]:
    """The rows of a weight, in blocks. The same ones in every use, so that every way of using them rounds the same."""
    num_rows = weight.shape[0]
    size = max(1, BLOCK_BYTES // (weight.shape[1] * weight.itemsize)) if weight.device.type == "cpu" else num_rows
    return [slice(first, first + size) for first in range(0, num_rows, size)]


class SeededDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) that draws its masks from a generator of its own.

    `nn.Dropout` reads torch's global generator, which clients that train side by side in one process would share.
    """

    def __init__(self, probability: float, generator: torch.Generator) -> None:
        super().__init__()
        self.probability = probability
        self.generator = generator

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return inputs
        keep = 1.0 - self.probability
        if keep == 0.0:
            return torch.zeros_like(inputs)
        return inputs * self._mask(inputs, keep) * (1.0 / keep)

    def _mask(self, inputs: Tensor, keep: float) -> Tensor:
        """Of the shape of the inputs, true with probability `keep`."""
        return torch.rand(inputs.shape, generator=self.generator, device=inputs.device) < keep


@dataclass
class GroupBatches:
    """What `GroupDropout` must know of clients that go through one model together, under `torch.vmap`.

    generators: a client's own, one a client; there may be more of them than clients.
    sizes: of each client's batch in this step; the largest is the number of rows that all of them have.
    """

    generators: list[torch.Generator]
    sizes: Sequence[int]


class GroupDropout(SeededDropout):
    """`SeededDropout` under `torch.vmap` over clients, each of which draws what it would draw alone.

    Behind its own rows a client has copies of its first row, which get that row's mask. The first dimension of the
    inputs must be the batch's. Works under any nesting of torch.func's transforms in which `vmap` maps over clients.
    """

    def __init__(self, probability: float, batches: GroupBatches) -> None:
        super().__init__(probability, batches.generators[0])
        self._batches = batches

    def _mask(self, inputs: Tensor, keep: float) -> Tensor:
        mask: Tensor = _GroupMask.apply(inputs, keep, self._batches)  # type: ignore[no-untyped-call]
        return mask


class _GroupMask(torch.autograd.Function):
    """The masks of a `GroupDropout`: a function of autograd, because a rule for vmap sees all clients at once."""

    @staticmethod
    def forward(inputs: Tensor, keep: float, batches: GroupBatches) -> Tensor:
        raise AssertionError("a GroupDropout was used outside a vmap over clients")

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        context.mark_non_differentiable(output)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[None, None, None]:
        return None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int, None, None], inputs: Tensor, keep: float, batches: GroupBatches
    ) -> tuple[Tensor, int]:
        inputs = inputs.movedim(in_dims[0], 0)
        if inputs.shape[:2] != (len(batches.sizes), max(batches.sizes)):
            raise ValueError(
                f"a dropout's inputs have {inputs.shape[1]} rows where the batch has {max(batches.sizes)}; their first "
                f"dimension must be the batch's; or use {flag('client_batching')} 1"
            )
        uniform = torch.empty(inputs.shape, device=inputs.device)
        for rows, size, generator in zip(uniform, batches.sizes, batches.generators, strict=False):
            rows[:size].uniform_(generator=generator)
            rows[size:] = rows[0]
        return uniform < keep, 0


class FactoredLinear(nn.Module):
    """A dense layer that leaves its weight's gradient in factors; autograd itself is told of none.

    Over a batch of 20 that gradient is a product of two narrow matrices. Multiplied out it is as large as the weight,
    and to write it and read it again is most of what the layer costs in a step of SGD; added to the weight as a
    product (`addmm_`), it is not.

    linear: whose parameters it shares.  deferred: takes its weight's gradient, in the backward pass.
    precision: in which it multiplies while it trains, with a copy of the weight that `refresh` brings up to date; None
        for the weight's own.
    """

    def __init__(self, linear: nn.Linear, deferred: DeferredGradients, precision: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._deferred = deferred
        self._copy = None if precision is None else linear.weight.detach().to(precision)

    def refresh(self) -> None:
        """The weight has changed."""
        if self._copy is not None:
            self._copy.copy_(self.weight.detach())

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., inputs) to (..., outputs)."""
        multiplied = self.weight.detach() if self._copy is None or not self.training else self._copy
        rows = inputs.reshape(-1, inputs.shape[-1]).to(multiplied.dtype)
        if torch.is_grad_enabled():
            self._deferred.note_use(self.weight)
        outputs: Tensor = _DenseProduct.apply(rows, self.weight, multiplied, self.bias, self._deferred)  # type: ignore[no-untyped-call]
        return outputs.view(*inputs.shape[:-1], outputs.shape[-1])


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a `FactoredLinear` can take a layer's place: a dense one whose weight is a parameter that is trained.

    A weight that is made of others (weight normalization), one that is frozen, and a layer with hooks are left alone.
    """
    return (
        type(layer) is nn.Linear
        and isinstance(layer.weight, nn.Parameter)
        and layer.weight.requires_grad
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and not layer._backward_hooks
        and not layer._backward_pre_hooks
    )


class _DenseProduct(torch.autograd.Function):
    """`rows @ multiplied.t() + bias`, in the type of the rows.

    rows: (rows, inputs).  weight: (outputs, inputs), whose gradient is deferred.  multiplied: its values, in
    the type of the rows.  bias: (outputs,) or None.
    """

    @staticmethod
    def forward(
        context: Any,
        rows: Tensor,
        weight: Tensor,
        multiplied: Tensor,
        bias: Tensor | None,
        deferred: DeferredGradients,
    ) -> Tensor:
        context.save_for_backward(rows, weight, multiplied)
        context.bias_type = None if bias is None else bias.dtype
        context.deferred = deferred
        if bias is None:
            return rows.mm(multiplied.t())
        return torch.addmm(bias.to(rows.dtype), rows, multiplied.t())

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, Tensor | None, None]:
        (gradient,) = gradients
        rows, weight, multiplied = context.saved_tensors
        to_rows = context.deferred.linear_backward(
            weight, multiplied, gradient, rows.detach(), context.needs_input_grad[0]
        )
        to_bias = None if context.bias_type is None else gradient.sum(0, dtype=context.bias_type)
        return to_rows, None, None, to_bias, None


def channels_last(images: Tensor) -> Tensor:
    """The same images, (batch, channels, height, width), with each pixel's channels side by side in memory.

    With one channel that is the same memory, and torch goes by the strides, which therefore say so.
    """
    _, channels, height, width = images.shape
    if channels == 1:
        return images.contiguous().as_strided(images.shape, (height * width, 1, width, 1))
    return images.contiguous(memory_format=torch.channels_last)


def replace_layers(module: nn.Module, replacement: Callable[[nn.Module], nn.Module | None]) -> nn.Module:
    """The module with every layer for which there is a replacement exchanged, wherever and however often it stands."""
    done: dict[nn.Module, nn.Module] = {}

    def replaced(layer: nn.Module) -> nn.Module:
        if layer not in done:
            done[layer] = layer
            done[layer] = replacement(layer) or layer
            if done[layer] is layer:
                for name, child in layer._modules.items():
                    if child is not None:
                        layer._modules[name] = replaced(child)
        return done[layer]

    return replaced(module)
